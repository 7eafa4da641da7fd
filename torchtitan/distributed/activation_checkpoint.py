"""Activation checkpointing: keep a layer's input, recompute the rest in the backward pass.

It applies to every layer (`full`), to every n-th layer (`selective`, option n), or by operation
(`selective`, option "op"): attention, expert GEMMs and communication results are kept, and every
second matrix product; the rest, which is cheap, is recomputed ("elementwise" keeps every matrix
product). In all modes the choice of experts is kept, so that recomputation sends every token to the
same experts as before, whatever has happened to the routing bias meanwhile.

`memory_budget` leaves the choice to the compiler, which solves for the cheapest recomputation.
"""

import copy
import types
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
import torch._functorch.config
import torch.utils.checkpoint
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    _CachedTorchDispatchMode,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from torchtitan.config import ActivationCheckpoint
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger

# Operations by their registered names. In every mode the choice of experts is kept.
_ROUTING = {"aten::topk", "torchtitan::route"}
# Kept by the options that go by operation. New operators of ours (namespace torchtitan) are added
# here, and nowhere else.
_KEPT = _ROUTING | {
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "flex_attention",
    "aten::_grouped_mm",
    "aten::_scaled_mm",
    "torchtitan::causal_blocks",
    "torchtitan::causal_runs",
    "torchtitan::document_attention",
    "torchtitan::expert_ffn",
    "torchtitan::fp8_expert_ffn",
    "torchtitan::fp8_feed_forward",
    "torchtitan::fp8_linear",
    "torchtitan::mla_attention",
    # The operators inside the differentiable collectives: policies see those below autograd.
    "_c10d_functional::all_to_all_single",
    "_c10d_functional::reduce_scatter_tensor",
}
_MATMUL = "aten::mm"
# What is recomputed with the options that go by operation.
_BY_OP = {
    "op": "all but attention, expert GEMMs and every second matmul",
    "elementwise": "all but attention and GEMMs",
}


def check_memory_budget(config: ActivationCheckpoint) -> None:
    """Raise `UserError` where the picture of the memory budget can't be drawn here."""
    if config.visualize_memory_budget_pareto and find_spec("matplotlib") is None:
        raise UserError(
            "activation_checkpoint.visualize_memory_budget_pareto = true needs matplotlib, which "
            "is not installed; install it, or set it to false."
        )


def apply_activation_checkpoint(
    layers: Mapping[str, nn.Module], config: ActivationCheckpoint, dump_folder: str = "."
) -> None:
    """Wrap the forward of the chosen layers in place; parameter names stay."""
    _set_memory_budget(config, dump_folder)
    if config.mode in ("none", "memory_budget"):
        return
    option = config.selective_ac_option if config.mode == "selective" else "1"
    by_op, keep_matmuls = option in _BY_OP, option == "elementwise"
    every = 1 if by_op else int(option)
    # Counted by global number: the chosen layers must not depend on a pipeline's stages.
    numbers = _numbers(layers)
    chosen = [layer for name, layer in layers.items() if (numbers[name] + 1) % every == 0]
    _ignore_records_of_profiler()
    recomputed: dict[tuple[Callable, frozenset[torch.Size]], Callable] = {}
    for layer in chosen:
        shapes: set[torch.Size] = set()
        if by_op:
            shapes = _matmul_shapes(layer, config.per_op_sac_force_recompute_mm_shapes_by_fqns)
        policy = partial(_op_policy, frozenset(shapes), keep_matmuls) if by_op else _keep_routing
        forward = getattr(layer.forward, "__func__", layer.forward)
        kind = forward, frozenset(shapes)  # only layers with experts have a gate to recompute
        if kind not in recomputed:
            recomputed[kind] = _recomputed(forward, policy, config)
        layer.forward = types.MethodType(recomputed[kind], layer)
    logger.info(
        "Activation checkpointing: %d of %d layers recompute %s",
        len(chosen),
        len(layers),
        _BY_OP.get(option, "everything"),
    )


class _ReplayMode(_CachedTorchDispatchMode):
    """Replays kept results any number of times.

    Schedules that split the backward pass of a stage (zero bubble) recompute twice; torch's own
    mode returns each kept result only once.
    """

    kept: dict[Any, Any]

    def __enter__(self):
        self.storage = {op: copy.copy(results) for op, results in self.kept.items()}
        return super().__enter__()


def _recomputed(
    forward: Callable, make_policy: Callable[[], Callable], config: ActivationCheckpoint
) -> Callable:
    """Make the method that replaces `forward`, one for all layers.

    torch.compile shares compiled code between layers with the same code; a closure for each layer
    would be compiled anew, up to the limit of recompilations.
    """

    def contexts():
        record, replay = create_selective_checkpoint_contexts(make_policy())
        replay.__class__ = _ReplayMode
        replay = cast(_ReplayMode, replay)
        replay.kept = replay.storage
        return record, replay

    options = {
        "use_reentrant": False,
        "preserve_rng_state": config.preserve_rng_state,
        "determinism_check": config.determinism_check,
        "early_stop": config.early_stop,
        "debug": config.debug,
        "context_fn": contexts,
    }

    def forward_recomputed(layer: nn.Module, *args):
        return checkpoint(lambda *inputs: forward(layer, *inputs), *args, **options)

    return forward_recomputed


def _ignore_records_of_profiler() -> None:
    # FSDP inside of a layer (its experts) marks its all-gathers for the profiler, and not equally
    # often in both passes; torch 2.13 checks that, 2.11 has neither the check nor the set.
    ignored = getattr(torch.utils.checkpoint, "SAC_IGNORED_OPS", None)
    if ignored is not None:
        ignored |= {
            torch.ops.profiler._record_function_enter_new.default,
            torch.ops.profiler._record_function_exit._RecordFunction,
        }


def _numbers(names: Iterable[str]) -> dict[str, int]:
    """Number layers by their names "0", "1", …; others (multi-token prediction) follow them."""
    numbers = {name: int(name) for name in names if name.isdecimal()}
    others = [name for name in names if name not in numbers]
    first = max(numbers.values(), default=-1) + 1
    return numbers | {name: first + k for k, name in enumerate(others)}


def _matmul_shapes(layer: nn.Module, names: list[str]) -> set[torch.Size]:
    """List the shapes (in, out) of the linear layers whose name contains one of `names`."""
    return {
        torch.Size((module.in_features, module.out_features))
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) and any(part in name for part in names)
    }


def _keep_routing() -> Callable[..., CheckpointPolicy]:
    def policy(ctx, op, *args, **kwargs) -> CheckpointPolicy:
        if op.name() in _ROUTING:
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return policy


def _op_policy(
    recomputed_shapes: frozenset[torch.Size], keep_matmuls: bool
) -> Callable[..., CheckpointPolicy]:
    # One policy per pass through a layer, so the count of matmuls starts at zero each time. Forward
    # and recomputation run the same operations in the same order, so both pick the same half.
    matmuls = {"forward": 0, "recompute": 0}

    def policy(ctx, op, *args, **kwargs) -> CheckpointPolicy:
        if op.name() in _KEPT:
            return CheckpointPolicy.MUST_SAVE
        if op.name() == _MATMUL:
            if args[1].shape in recomputed_shapes:
                return CheckpointPolicy.PREFER_RECOMPUTE
            matmuls["recompute" if ctx.is_recompute else "forward"] += 1
            if keep_matmuls or matmuls["recompute" if ctx.is_recompute else "forward"] % 2:
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return policy


def _set_memory_budget(config: ActivationCheckpoint, dump_folder: str) -> None:
    """Set the compiler's options for the whole process; config/rules has checked compile.enable."""
    budgeted = config.mode == "memory_budget"
    settings = torch._functorch.config
    settings.activation_memory_budget = config.memory_budget if budgeted else 1.0
    settings.visualize_memory_budget_pareto = budgeted and config.visualize_memory_budget_pareto
    if not budgeted:
        return
    # torch 2.13 doesn't size the process groups that collectives take; they hold no activations.
    if hasattr(settings, "unsafe_treat_script_objects_as_zero_size"):
        settings.unsafe_treat_script_objects_as_zero_size = True
    if config.visualize_memory_budget_pareto:
        folder = Path(dump_folder) / "memory_budget_pareto"
        folder.mkdir(parents=True, exist_ok=True)
        settings.memory_budget_pareto_dir = str(folder)
    logger.info(
        "Activation checkpointing: the compiler keeps %g of the activations", config.memory_budget
    )
