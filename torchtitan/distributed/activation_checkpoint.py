"""Activation checkpointing: keep a layer's input, recompute the rest in the backward pass.

Every layer (`full`), every n-th layer (`selective`, option n), or by operation (`selective`, option
"op"): attention, expert GEMMs and communication results are kept, and every second matrix product;
the rest, cheap, is recomputed ("elementwise" keeps every matrix product). In all of them the choice
of experts is kept, so that recomputation sends every token where it went before, whatever has
happened to the routing bias meanwhile.

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

# Operations by their registered names. Kept in every mode: results that choose experts.
_ROUTING = {"aten::topk", "torchtitan::route"}
# Kept by operation. Our own operators (namespace torchtitan) are added here, and nowhere else.
_KEPT = _ROUTING | {
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "flex_attention",
    "aten::_grouped_mm",
    "torchtitan::document_attention",
    "torchtitan::expert_ffn",
    "torchtitan::mla_attention",
    # What the differentiable collectives are made of: policies look below autograd.
    "_c10d_functional::all_to_all_single",
    "_c10d_functional::reduce_scatter_tensor",
}
_MATMUL = "aten::mm"
# What the options that go by operation recompute.
_BY_OP = {
    "op": "all but attention, expert GEMMs and every second matmul",
    "elementwise": "all but attention and GEMMs",
}


def check_memory_budget(config: ActivationCheckpoint) -> None:
    """Raise `UserError` where its picture can't be drawn here."""
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
    # By global number: which layers recompute must not depend on a pipeline's cut.
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


class _Again(_CachedTorchDispatchMode):
    """Recomputes any number of times: schedules that split the backward pass of a stage (zero
    bubble) do it twice, where torch's own gives each kept result out once."""

    kept: dict[Any, Any]

    def __enter__(self):
        self.storage = {op: copy.copy(results) for op, results in self.kept.items()}
        return super().__enter__()


def _recomputed(
    forward: Callable, make_policy: Callable[[], Callable], config: ActivationCheckpoint
) -> Callable:
    """A method in the place of `forward`. One for all layers: torch.compile shares what it has
    compiled between layers with the same code, and a closure for each layer would be code of its
    own, up to the limit of recompilations."""

    def contexts():
        first, again = create_selective_checkpoint_contexts(make_policy())
        again.__class__ = _Again
        again = cast(_Again, again)
        again.kept = again.storage
        return first, again

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
    # FSDP inside of a layer (its experts) marks its all-gathers for the profiler, not equally often
    # in both passes; torch 2.13 is strict about that, 2.11 has neither the check nor the set.
    ignored = getattr(torch.utils.checkpoint, "SAC_IGNORED_OPS", None)
    if ignored is not None:
        ignored |= {
            torch.ops.profiler._record_function_enter_new.default,
            torch.ops.profiler._record_function_exit._RecordFunction,
        }


def _numbers(names: Iterable[str]) -> dict[str, int]:
    """Of layers by their names "0", "1", …; others (multi-token prediction) come behind them."""
    numbers = {name: int(name) for name in names if name.isdecimal()}
    others = [name for name in names if name not in numbers]
    first = max(numbers.values(), default=-1) + 1
    return numbers | {name: first + k for k, name in enumerate(others)}


def _matmul_shapes(layer: nn.Module, names: list[str]) -> set[torch.Size]:
    """Shapes (in, out) of the linear layers whose name contains one of `names`."""
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
    # One policy per pass through a layer, so the count of matmuls starts anew each time. Forward
    # and recomputation meet the same operations in the same order, so they agree on every second
    # one.
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
    """Settings of the compiler for the whole process; the validator has seen that it compiles."""
    budgeted = config.mode == "memory_budget"
    settings = torch._functorch.config
    settings.activation_memory_budget = config.memory_budget if budgeted else 1.0
    settings.visualize_memory_budget_pareto = budgeted and config.visualize_memory_budget_pareto
    if not budgeted:
        return
    if config.visualize_memory_budget_pareto:
        folder = Path(dump_folder) / "memory_budget_pareto"
        folder.mkdir(parents=True, exist_ok=True)
        settings.memory_budget_pareto_dir = str(folder)
    logger.info(
        "Activation checkpointing: the compiler keeps %g of what it could", config.memory_budget
    )
