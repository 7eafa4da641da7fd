"""Activation checkpointing: keep a layer's input, recompute the rest in the backward pass.

Three modes: every layer (`full`), every n-th layer (`selective`, option n), or by operation
(`selective`, option "op"): attention, expert GEMMs and communication results are kept, and every
second matrix product; the rest, cheap, is recomputed. Option "elementwise" keeps every matrix
product, so that only norms, activations, rotary positions and the like are computed twice.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from torchtitan.config import ActivationCheckpoint
from torchtitan.ops import document_attention, expert_ffn, mla_attention  # noqa: F401 (makes their operators)
from torchtitan.tools.logging import logger

_KEPT_OPS = {
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._grouped_mm.default,
    torch.ops.torchtitan.document_attention.default,
    torch.ops.torchtitan.expert_ffn.default,
    torch.ops.torchtitan.mla_attention.default,
    torch.ops._c10d_functional.all_to_all_single.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
}
# What the options that go by operation recompute.
_BY_OP = {
    "op": "all but attention, expert GEMMs and every second matmul",
    "elementwise": "all but attention and GEMMs",
}
_MATMUL = torch.ops.aten.mm.default


def apply_activation_checkpoint(layers: nn.ModuleDict, config: ActivationCheckpoint) -> None:
    """Wrap the forward of the chosen layers in place; parameter names stay."""
    if config.mode == "none":
        return
    options = {
        "use_reentrant": False,
        "preserve_rng_state": config.preserve_rng_state,
        "determinism_check": config.determinism_check,
        "early_stop": config.early_stop,
        "debug": config.debug,
    }
    option = config.selective_ac_option if config.mode == "selective" else "1"
    by_op = option in _BY_OP
    every = 1 if by_op else int(option)
    chosen = [layer for i, layer in enumerate(layers.values(), 1) if i % every == 0]
    for layer in chosen:
        if by_op:
            shapes = _matmul_shapes(layer, config.per_op_sac_force_recompute_mm_shapes_by_fqns)
            options["context_fn"] = partial(_keep_by_op, shapes, option == "elementwise")
        layer.forward = partial(checkpoint, layer.forward, **options)
    logger.info(
        "Activation checkpointing: %d of %d layers recompute %s",
        len(chosen),
        len(layers),
        _BY_OP.get(option, "everything"),
    )


def _matmul_shapes(layer: nn.Module, names: list[str]) -> set[torch.Size]:
    """Shapes (in, out) of the linear layers whose name contains one of `names`."""
    return {
        torch.Size((module.in_features, module.out_features))
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) and any(part in name for part in names)
    }


def _keep_by_op(recomputed_shapes: set[torch.Size], keep_matmuls: bool):
    return create_selective_checkpoint_contexts(_op_policy(recomputed_shapes, keep_matmuls))


def _op_policy(
    recomputed_shapes: set[torch.Size], keep_matmuls: bool
) -> Callable[..., CheckpointPolicy]:
    # One policy per pass through a layer, so the count of matmuls starts anew each time. Forward
    # and recomputation meet the same operations in the same order, so they agree on every second
    # one.
    matmuls = {"forward": 0, "recompute": 0}

    def policy(ctx, op, *args, **kwargs) -> CheckpointPolicy:
        if op in _KEPT_OPS:
            return CheckpointPolicy.MUST_SAVE
        if op is _MATMUL:
            if args[1].shape in recomputed_shapes:
                return CheckpointPolicy.PREFER_RECOMPUTE
            matmuls["recompute" if ctx.is_recompute else "forward"] += 1
            if keep_matmuls or matmuls["recompute" if ctx.is_recompute else "forward"] % 2:
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return policy
