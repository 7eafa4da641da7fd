"""A layer's experts in FP8, as one operator.

Kept for the backward pass are tokens, and gate and up in FP8, of which the activation is computed
again.

Letters: T tokens, D model dim, F hidden dim, E experts, K experts of a token, R rows sorted by
expert.
"""

from typing import Any

import torch
from torch import Tensor

from torchtitan.ops.expert_ffn import ExpertOperator, tokens_are_ready
from torchtitan.ops.fp8.choice import functions
from torchtitan.ops.fp8.linear import (
    Fp8Recipe,
    fake_rows,
    groups_of,
    in_blocks,
    in_blocks_transposed,
)
from torchtitan.ops.fp8.quantize import Fp8
from torchtitan.ops.fp8.weight import Fp8Weight, takes_fp8_weights
from torchtitan.ops.permute import RowOrder, sum_copies


def fp8_expert_ffn(
    x_TD: Tensor,
    w13_E2FD: Tensor,
    w2_EDF: Tensor,
    weights_TK: Tensor,
    order: RowOrder,
    recipe: Fp8Recipe,
) -> Tensor:
    """Compute `ops.expert_ffn.expert_ffn` in FP8; arguments as there."""
    return _experts(x_TD, w13_E2FD.contiguous(), w2_EDF, weights_TK, *order, *recipe[:2])[0]


def fp8_expert_operator(recipe: Fp8Recipe) -> ExpertOperator:
    """Return the operator that computes `fp8_expert_ffn`; it takes w13 contiguous."""
    return ExpertOperator(_experts, _experts_backward, recipe[:2])


@torch.library.custom_op("torchtitan::fp8_expert_ffn", mutates_args=())
def _experts(
    x_TD: Tensor,
    w13_E2FD: Tensor,
    w2_EDF: Tensor,
    weights_TK: Tensor,
    slot_of_row_R: Tensor,
    row_of_slot_TK: Tensor,
    ends_E: Tensor,
    some_empty: bool,
    wide_gradients: bool,
    emulate: bool,
    w13_scales: Tensor | None = None,
    w2_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output (T, D), and gate and up in FP8, which the backward pass needs.

    w13_scales, w2_scales: of weights that are in FP8.
    """
    do, dtype, K = functions(x_TD, emulate), x_TD.dtype, weights_TK.size(1)
    rows = do.gather(do.by_rows(x_TD), slot_of_row_R, ends_E, K)
    w13 = in_blocks(do, w13_E2FD, w13_scales)
    gate_up_R2F = do.rows_by_blocks(rows, w13, ends_E, dtype)
    del rows, w13
    hidden, kept = do.swiglu(gate_up_R2F, weights_TK.flatten(), slot_of_row_R, ends_E)
    del gate_up_R2F
    out_RD = do.rows_by_blocks(hidden, in_blocks(do, w2_EDF, w2_scales), ends_E, dtype)
    return sum_copies(out_RD, row_of_slot_TK, some_empty=some_empty), *kept


@_experts.register_fake
def _(
    x_TD, w13_E2FD, w2_EDF, weights_TK, slot, row, ends_E, some_empty, wide, emulate,
    w13_scales=None, w2_scales=None,
):  # fmt: skip
    R = slot.size(0)
    gate_up_R2F = x_TD.new_empty(R, w13_E2FD.size(1))
    return torch.empty_like(x_TD), *fake_rows(gate_up_R2F)


@torch.library.custom_op("torchtitan::fp8_expert_ffn_backward", mutates_args=())
def _experts_backward(
    grad_TD: Tensor,
    x_TD: Tensor,
    kept_values: Tensor,
    kept_scales: Tensor,
    w13_E2FD: Tensor,
    w2_EDF: Tensor,
    weights_TK: Tensor,
    slot_of_row_R: Tensor,
    row_of_slot_TK: Tensor,
    ends_E: Tensor,
    some_empty: bool,
    wide_gradients: bool,
    emulate: bool,
    trains_w13: bool,
    trains_w2: bool,
    w13_scales: Tensor | None = None,
    w2_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of the tokens, w13, w2 and the routing weights; that of a frozen weight
    has no size.

    w13_scales, w2_scales: of weights that are in FP8.
    """
    do, kind = functions(x_TD, emulate), Fp8Recipe(wide_gradients).gradient_kind
    dtype, K, R = x_TD.dtype, weights_TK.size(1), slot_of_row_R.size(0)
    groups = _, padded = groups_of(ends_E, x_TD)
    grad = do.by_rows(grad_TD, kind)
    rows = do.gather(grad, slot_of_row_R, ends_E, K)
    w2 = in_blocks_transposed(do, w2_EDF, w2_scales)
    grad_RF = do.rows_by_blocks(rows, w2, ends_E, dtype)
    del rows, w2
    of_rows, t_both, t_hidden, grad_weights_R = do.swiglu_backward(
        grad_RF,
        Fp8(kept_values, kept_scales),
        weights_TK.flatten(),
        slot_of_row_R,
        *groups,
        kind,
    )
    del grad_RF
    w13 = in_blocks_transposed(do, w13_E2FD, w13_scales)
    grad_rows_RD = do.rows_by_blocks(of_rows, w13, ends_E, dtype)
    del of_rows, w13
    grad_x_TD = sum_copies(grad_rows_RD, row_of_slot_TK, some_empty=some_empty)
    del grad_rows_RD
    tokens_are_ready(grad_x_TD)
    grad_w13, grad_w2 = x_TD.new_empty(0), x_TD.new_empty(0)
    if trains_w2:
        t_grad = do.by_columns(grad, *groups, R, slot_of_row_R, K)
        grad_w2 = do.rows_by_rows(t_grad, t_hidden, padded, dtype)
        del t_grad
    del t_hidden
    if trains_w13:
        t_x = do.by_columns(do.by_rows(x_TD), *groups, R, slot_of_row_R, K)
        grad_w13 = do.rows_by_rows(t_both, t_x, padded, dtype)
    return grad_x_TD, grad_w13, grad_w2, _of_slots(grad_weights_R, row_of_slot_TK)


def _of_slots(x_R: Tensor, row_of_slot_TK: Tensor) -> Tensor:
    """The element of every slot's row (T, K); 0 where it has none."""
    if x_R.numel() == 0:
        return x_R.new_zeros(row_of_slot_TK.shape)
    return torch.where(row_of_slot_TK < 0, 0.0, x_R[row_of_slot_TK.clamp(min=0)])


@_experts_backward.register_fake
def _(
    grad, x_TD, kept_values, kept_scales, w13, w2, weights_TK, slot, row, ends, some_empty, wide,
    emulate, trains_w13, trains_w2, w13_scales=None, w2_scales=None,
):  # fmt: skip
    E, D, F2 = ends.size(0), x_TD.size(1), kept_values.size(1)
    grad_w13 = x_TD.new_empty((E, F2, D) if trains_w13 else 0)
    grad_w2 = x_TD.new_empty((E, D, F2 // 2) if trains_w2 else 0)
    return torch.empty_like(x_TD), grad_w13, grad_w2, torch.empty_like(weights_TK)


def _save_experts(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_TD, *others, some_empty, wide, emulate, _, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.settings = some_empty, wide, emulate
    ctx.save_for_backward(x_TD, *output[1:], *others)


def _differentiate_experts(ctx: Any, grad_TD: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    trains = ctx.needs_input_grad[1:3]
    grad_x, grad_w13, grad_w2, grad_weights = _experts_backward(
        grad_TD.contiguous(), *ctx.saved_tensors, *ctx.settings, *trains
    )
    of_weights = [g if t else None for g, t in zip((grad_w13, grad_w2), trains, strict=True)]
    return grad_x, *of_weights, grad_weights, *[None] * 8


_experts.register_autograd(_differentiate_experts, setup_context=_save_experts)


@takes_fp8_weights(torch.ops.torchtitan.fp8_expert_ffn.default)
def _experts_in_fp8(
    x_TD: Tensor, w13: Fp8Weight, w2: Fp8Weight, *others: Any
) -> tuple[Tensor, ...]:
    first, second = w13.by_blocks(), w2.by_blocks()
    return _experts(x_TD, first.values, second.values, *others[:7], first.scales, second.scales)


@takes_fp8_weights(torch.ops.torchtitan.fp8_expert_ffn_backward.default)
def _experts_backward_in_fp8(*args: Any) -> tuple[Tensor, ...]:
    *before, w13, w2 = args[:6]
    first, second = w13.by_blocks(), w2.by_blocks()
    scales = first.scales, second.scales
    return _experts_backward(*before, first.values, second.values, *args[6:15], *scales)
