"""A dense SwiGLU feed-forward layer in FP8, as one operator: experts' arithmetic, without routing.

Kept for the backward pass are the input by columns, and gate and up in FP8, of which the activation
is computed again.

Letters: T tokens, D model dim, F hidden dim.
"""

from typing import Any, cast

import torch
from torch import Tensor

from torchtitan.ops.fp8.choice import functions
from torchtitan.ops.fp8.linear import (
    Fp8Recipe,
    fake_columns,
    groups_of,
    in_blocks,
    in_blocks_transposed,
    input_in_fp8,
    no_columns,
)
from torchtitan.ops.fp8.quantize import BLOCK, E4M3, Fp8
from torchtitan.ops.fp8.weight import Fp8Weight, takes_fp8_weights


def fp8_feed_forward(
    x: Tensor, gate_up: tuple[Tensor, ...], w2_DF: Tensor, recipe: Fp8Recipe
) -> Tensor:
    """Compute w2(silu(w1 x) · w3 x), (..., D) to (..., D).

    gate_up: w1 and w3 (F, D), or one tensor of both (2F, D). F is a multiple of 128.
    """
    x_TD = x.flatten(0, -2).contiguous()
    sides = gate_up, (w2_DF,)
    trains = [torch.is_grad_enabled() and any(w.requires_grad for w in side) for side in sides]
    w1, w3 = (*gate_up, None)[:2]
    return _feed_forward(x_TD, w1, w3, w2_DF, *recipe[:2], *trains)[0].view_as(x)


def _joined(w1: Tensor, w3: Tensor | None) -> Tensor:
    """Return gate over up as a stack of one, (1, 2F, D)."""
    return (w1 if w3 is None else torch.cat((w1, w3))).unsqueeze(0)


@torch.library.custom_op("torchtitan::fp8_feed_forward", mutates_args=())
def _feed_forward(
    x_TD: Tensor,
    w1: Tensor,
    w3: Tensor | None,
    w2_DF: Tensor,
    wide_gradients: bool,
    emulate: bool,
    trains_w13: bool,
    trains_w2: bool,
    w13_scales: Tensor | None = None,
    w2_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the output (T, D), x by columns, and gate and up by rows.

    w3: None = `w1` is gate over up.
    w13_scales, w2_scales: of weights that are in FP8.
    """
    do, groups = functions(x_TD, emulate), groups_of(None, x_TD)
    x, columns = input_in_fp8(do, x_TD, groups, trains_w13)
    w13 = in_blocks(do, _joined(w1, w3), w13_scales)
    gate_up_T2F = do.rows_by_blocks(x, w13, groups.ends, x_TD.dtype)
    del x, w13
    hidden, kept = do.swiglu(gate_up_T2F, None, None, groups.ends)
    del gate_up_T2F
    w2 = in_blocks(do, w2_DF.unsqueeze(0), w2_scales)
    out_TD = do.rows_by_blocks(hidden, w2, groups.ends, x_TD.dtype)
    return out_TD, columns.values, columns.scales, kept.values, kept.scales


@_feed_forward.register_fake
def _(x_TD, w1, w3, w2_DF, wide, emulate, trains_w13, trains_w2, w13_scales=None, w2_scales=None):
    T, F2 = x_TD.size(0), 2 * w2_DF.size(1)
    columns = fake_columns(x_TD, 1) if trains_w13 else no_columns(x_TD)
    scales = x_TD.new_empty(F2 // BLOCK, T, dtype=torch.float32)
    return torch.empty_like(x_TD), *columns, x_TD.new_empty(T, F2, dtype=E4M3), scales


@torch.library.custom_op("torchtitan::fp8_feed_forward_backward", mutates_args=())
def _backward(
    grad_TD: Tensor,
    x_values: Tensor,
    x_scales: Tensor,
    kept_values: Tensor,
    kept_scales: Tensor,
    w1: Tensor,
    w3: Tensor | None,
    w2_DF: Tensor,
    wide_gradients: bool,
    emulate: bool,
    trains_w13: bool,
    trains_w2: bool,
    w13_scales: Tensor | None = None,
    w2_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, of gate over up (2F, D), and of w2; that of a frozen weight has no
    size. Arguments as in `_feed_forward`."""
    do, kind = functions(grad_TD, emulate), Fp8Recipe(wide_gradients).gradient_kind
    dtype, groups = grad_TD.dtype, groups_of(None, grad_TD)
    grad_w13, grad_w2 = grad_TD.new_empty(1, 0, 0), grad_TD.new_empty(1, 0, 0)
    if trains_w2:
        grad, t_grad = do.by_both(grad_TD, *groups, kind)
    else:
        grad, t_grad = do.by_rows(grad_TD, kind), None
    w2 = in_blocks_transposed(do, w2_DF.unsqueeze(0), w2_scales)
    grad_TF = do.rows_by_blocks(grad, w2, groups.ends, dtype)
    del grad, w2
    of_rows, t_both, t_hidden, _ = do.swiglu_backward(
        grad_TF, Fp8(kept_values, kept_scales), None, None, *groups, kind
    )
    del grad_TF
    if t_grad is not None:
        grad_w2 = do.rows_by_rows(t_grad, t_hidden, groups.padded_ends, dtype)
    del t_grad, t_hidden
    if trains_w13:
        grad_w13 = do.rows_by_rows(t_both, Fp8(x_values, x_scales), groups.padded_ends, dtype)
    del t_both
    w13 = in_blocks_transposed(do, _joined(w1, w3), w13_scales)
    return do.rows_by_blocks(of_rows, w13, groups.ends, dtype), grad_w13[0], grad_w2[0]


@_backward.register_fake
def _(
    grad_TD, x_values, x_scales, kept_values, kept_scales, w1, w3, w2_DF, wide, emulate, trains_w13,
    trains_w2, w13_scales=None, w2_scales=None,
):  # fmt: skip
    D, F = w2_DF.shape
    grad_w13 = grad_TD.new_empty((2 * F, D) if trains_w13 else (0, 0))
    return torch.empty_like(grad_TD), grad_w13, grad_TD.new_empty((D, F) if trains_w2 else (0, 0))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, w1, w3, w2, *ctx.settings, _, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.in_one = w3 is None
    ctx.save_for_backward(*output[1:], w1, w3, w2)


def _differentiate(ctx: Any, grad_TD: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    *_recipe, trains_w13, trains_w2 = ctx.settings
    grad_x, grad_w13, grad_w2 = _backward(grad_TD.contiguous(), *ctx.saved_tensors, *ctx.settings)
    of_w1 = of_w3 = None
    if trains_w13:
        of_w1, of_w3 = (grad_w13, None) if ctx.in_one else grad_w13.chunk(2)
    return grad_x, of_w1, of_w3, grad_w2 if trains_w2 else None, *[None] * 6


_feed_forward.register_autograd(_differentiate, setup_context=_save)


def _in_parts(w1: Tensor, w3: Tensor | None, w2: Tensor) -> tuple[Any, ...]:
    """Return values in the places of weights in FP8, and their scales (FSDP may gather only one of
    the two sizes in FP8)."""
    w13_scales = w2_scales = None
    if isinstance(w1, Fp8Weight):
        w13 = cast(Fp8Weight, w1 if w3 is None else torch.cat((w1, w3)))
        w1, w3, w13_scales = w13.values, None, w13.scales.unsqueeze(0)
    if isinstance(w2, Fp8Weight):
        w2, w2_scales = w2.values, w2.scales.unsqueeze(0)
    return (w1, w3, w2), (w13_scales, w2_scales)


@takes_fp8_weights(torch.ops.torchtitan.fp8_feed_forward.default)
def _in_fp8(x_TD: Tensor, *others: Any) -> tuple[Tensor, ...]:
    values, scales = _in_parts(*others[:3])
    return _feed_forward(x_TD, *values, *others[3:7], *scales)


@takes_fp8_weights(torch.ops.torchtitan.fp8_feed_forward_backward.default)
def _backward_in_fp8(*args: Any) -> tuple[Tensor, ...]:
    values, scales = _in_parts(*args[5:8])
    return _backward(*args[:5], *values, *args[8:12], *scales)
