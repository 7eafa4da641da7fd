"""Products of activations with weights in FP8, forward and backward (DeepSeek-V3's recipe).

    output              activations 1 × 128 by weights 128 × 128
    gradient of inputs  gradients 1 × 128 by the transposed weights
    of weights          gradients by activations, both 1 × 128 along tokens

Kept for the backward pass are activations in FP8. Weights in bf16 or fp32 are quantised in each
pass, so nothing of them is kept; an `Fp8Weight` (weight.py) comes quantised.

Letters: R rows sorted by group, K inputs, N outputs, E groups, T tokens, D model dim, F hidden dim.
"""

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchtitan.ops.fp8.choice import functions
from torchtitan.ops.fp8.quantize import BLOCK, E4M3, E5M2, Fp8
from torchtitan.ops.fp8.weight import Fp8Weight, takes_fp8_weights
from torchtitan.ops.permute import RowOrder, sum_copies

_MULTIPLE = 16  # bytes: what the tensor memory accelerator fetches begins and ends there


class Fp8Recipe(NamedTuple):
    """How a layer computes in FP8.

    wide_gradients: gradients in e5m2 instead of e4m3.
    emulate: in plain torch, on any device.
    dispatch: experts' tokens, and the gradients of their outputs, travel in FP8 (wire.py).
    gather: FSDP gathers the weights in FP8 (distributed/float8_gather.py).
    """

    wide_gradients: bool = False
    emulate: bool = False
    dispatch: bool = False
    gather: bool = False

    @property
    def gradient_kind(self) -> torch.dtype:
        return E5M2 if self.wide_gradients else E4M3


def why_not_linear(inputs: int, outputs: int) -> str | None:
    """Reason for which a product of these sizes can't be in FP8, None where it can."""
    for size in (inputs, outputs):
        if size % _MULTIPLE:
            return f"{size} is no multiple of {_MULTIPLE}"
    return None


def why_not_experts(dim: int, hidden: int) -> str | None:
    """Reason for which experts of these sizes can't be in FP8, None where they can."""
    if hidden % BLOCK:
        return f"their hidden size {hidden} is no multiple of {BLOCK}"
    return why_not_linear(dim, hidden)


def fp8_linear(x: Tensor, weight_NK: Tensor, recipe: Fp8Recipe) -> Tensor:
    """Compute x · weightᵀ: (..., K) to (..., N), in the dtype of x."""
    x_RK = x.flatten(0, -2)
    ends = torch.full((1,), x_RK.size(0), dtype=torch.int32, device=x.device)
    return fp8_grouped_linear(x_RK, weight_NK.unsqueeze(0), ends, recipe).unflatten(0, x.shape[:-1])


def fp8_grouped_linear(
    x_RK: Tensor, weight_ENK: Tensor, ends_E: Tensor, recipe: Fp8Recipe
) -> Tensor:
    """Compute x[rows of group e] · weight[e]ᵀ for every e: (R, N), in the dtype of x.

    ends_E: int32, rows up to the end of each group; the last is R.
    """
    return _linear(x_RK.contiguous(), weight_ENK.contiguous(), ends_E, *recipe[:2])[0]


def fp8_expert_ffn(
    x_TD: Tensor,
    w13_E2FD: Tensor,
    w2_EDF: Tensor,
    weights_TK: Tensor,
    order: RowOrder,
    recipe: Fp8Recipe,
) -> Tensor:
    """Compute `ops.expert_ffn.expert_ffn` in FP8; arguments as there.

    Kept for the backward pass are tokens, and gate and up in FP8, of which the activation is
    computed again.
    """
    return _experts(x_TD, w13_E2FD.contiguous(), w2_EDF, weights_TK, *order, *recipe[:2])[0]


def _padded(ends_E: Tensor) -> Tensor:
    """Ends of the groups, each padded to a multiple of 128."""
    counts = ends_E.diff(prepend=ends_E.new_zeros(1))
    return ((counts + BLOCK - 1) // BLOCK * BLOCK).cumsum(0, dtype=torch.int32)


def _by_blocks(
    do: ModuleType, w_ENK: Tensor, scales: Tensor | None, *, transposed: bool = False
) -> Fp8:
    """Quantise weights, unless they come with their scales (and are transposed, then)."""
    return do.by_blocks(w_ENK, transposed=transposed) if scales is None else Fp8(w_ENK, scales)


# ---------------------------------------------------------------------------------------------
# One product, of one weight or of one for each group
# ---------------------------------------------------------------------------------------------


@torch.library.custom_op("torchtitan::fp8_linear", mutates_args=())
def _linear(
    x_RK: Tensor,
    w_ENK: Tensor,
    ends_E: Tensor,
    wide_gradients: bool,
    emulate: bool,
    w_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the product, and x in FP8, which the backward pass needs.

    w_scales: of weights that are in FP8.
    """
    do = functions(x_RK, emulate)
    x, weight = do.by_rows(x_RK), _by_blocks(do, w_ENK, w_scales)
    return do.rows_by_blocks(x, weight, ends_E, x_RK.dtype), *x


@_linear.register_fake
def _(x_RK, w_ENK, ends_E, wide_gradients, emulate, w_scales=None):
    return x_RK.new_empty(x_RK.size(0), w_ENK.size(1)), *_fake_rows(x_RK)


def _fake_rows(x_RK: Tensor) -> tuple[Tensor, Tensor]:
    R, K = x_RK.shape
    scales = x_RK.new_empty(-(-K // BLOCK), R, dtype=torch.float32)
    return x_RK.new_empty(R, K, dtype=E4M3), scales


@torch.library.custom_op("torchtitan::fp8_linear_backward", mutates_args=())
def _linear_backward(
    grad_RN: Tensor,
    x_values: Tensor,
    x_scales: Tensor,
    w_ENK: Tensor,
    ends_E: Tensor,
    wide_gradients: bool,
    emulate: bool,
    needs_x: bool,
    needs_w: bool,
    w_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of the weights; of what needs none, of no size.

    w_scales: of weights that are in FP8; these are transposed, (E, K, N).
    """
    do, kind = functions(grad_RN, emulate), Fp8Recipe(wide_gradients).gradient_kind
    R, dtype = grad_RN.size(0), grad_RN.dtype
    grad = do.by_rows(grad_RN, kind)
    grad_x, grad_w = grad_RN.new_empty(0, 0), grad_RN.new_empty(0, 0, 0)
    if needs_x:
        turned = _by_blocks(do, w_ENK, w_scales, transposed=True)
        grad_x = do.rows_by_blocks(grad, turned, ends_E, dtype)
    if needs_w:
        padded = _padded(ends_E)
        t_grad = do.by_columns(grad, ends_E, padded, R)
        t_x = do.by_columns(Fp8(x_values, x_scales), ends_E, padded, R)
        grad_w = do.rows_by_rows(t_grad, t_x, padded, dtype)
    return grad_x, grad_w


@_linear_backward.register_fake
def _(grad_RN, x_values, x_scales, w_ENK, ends_E, wide, emulate, needs_x, needs_w, w_scales=None):
    grad_x = grad_RN.new_empty(x_values.shape if needs_x else (0, 0))
    shape = ends_E.size(0), grad_RN.size(1), x_values.size(1)
    return grad_x, grad_RN.new_empty(shape if needs_w else (0, 0, 0))


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, w_ENK, ends_E, *ctx.recipe, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], w_ENK, ends_E)


def _differentiate_linear(ctx: Any, grad_RN: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    needs_x, needs_w, *_rest = ctx.needs_input_grad
    grad_x, grad_w = _linear_backward(
        grad_RN.contiguous(), *ctx.saved_tensors, *ctx.recipe, needs_x, needs_w
    )
    return grad_x if needs_x else None, grad_w if needs_w else None, *[None] * 4


_linear.register_autograd(_differentiate_linear, setup_context=_save_linear)


@takes_fp8_weights(torch.ops.torchtitan.fp8_linear.default)
def _linear_in_fp8(x_RK: Tensor, weight: Fp8Weight, *others: Any) -> tuple[Tensor, ...]:
    values, scales = weight.by_blocks()
    return _linear(x_RK, values, *others[:3], scales)


@takes_fp8_weights(torch.ops.torchtitan.fp8_linear_backward.default)
def _linear_backward_in_fp8(*args: Any) -> tuple[Tensor, Tensor]:
    grad_RN, x_values, x_scales, weight, *others = args
    values, scales = weight.turned()
    return _linear_backward(grad_RN, x_values, x_scales, values, *others[:5], scales)


# ---------------------------------------------------------------------------------------------
# All of a layer's experts
# ---------------------------------------------------------------------------------------------


@torch.library.custom_op("torchtitan::fp8_expert_ffn", mutates_args=())
def _experts(
    x_TD: Tensor,
    w13_E2FD: Tensor,
    w2_EDF: Tensor,
    weights_TK: Tensor,
    slot_of_row_R: Tensor,
    row_of_slot_TK: Tensor,
    counts_E: Tensor,
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
    ends_E = counts_E.cumsum(0, dtype=torch.int32)
    rows = do.gather(do.by_rows(x_TD), slot_of_row_R, ends_E, K)
    w13 = _by_blocks(do, w13_E2FD, w13_scales)
    gate_up_R2F = do.rows_by_blocks(rows, w13, ends_E, dtype)
    del rows, w13
    hidden, kept = do.swiglu(gate_up_R2F, weights_TK.flatten(), slot_of_row_R, ends_E)
    del gate_up_R2F
    out_RD = do.rows_by_blocks(hidden, _by_blocks(do, w2_EDF, w2_scales), ends_E, dtype)
    return sum_copies(out_RD, row_of_slot_TK, some_empty=some_empty), *kept


@_experts.register_fake
def _(
    x_TD, w13_E2FD, w2_EDF, weights_TK, slot, row, counts_E, some_empty, wide, emulate,
    w13_scales=None, w2_scales=None,
):  # fmt: skip
    R = slot.size(0)
    gate_up_R2F = x_TD.new_empty(R, w13_E2FD.size(1))
    return torch.empty_like(x_TD), *_fake_rows(gate_up_R2F)


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
    counts_E: Tensor,
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

    w13_scales, w2_scales: of weights that are in FP8; these are transposed, (E, D, 2F), (E, F, D).
    """
    do, kind = functions(x_TD, emulate), Fp8Recipe(wide_gradients).gradient_kind
    dtype, K, R = x_TD.dtype, weights_TK.size(1), slot_of_row_R.size(0)
    ends_E = counts_E.cumsum(0, dtype=torch.int32)
    padded = _padded(ends_E)
    groups = ends_E, padded
    grad = do.by_rows(grad_TD, kind)
    rows = do.gather(grad, slot_of_row_R, ends_E, K)
    w2 = _by_blocks(do, w2_EDF, w2_scales, transposed=True)
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
    grad_w13, grad_w2 = x_TD.new_empty(0), x_TD.new_empty(0)
    if trains_w2:
        t_grad = do.by_columns(grad, *groups, R, slot_of_row_R, K)
        grad_w2 = do.rows_by_rows(t_grad, t_hidden, padded, dtype)
        del t_grad
    del t_hidden
    if trains_w13:
        t_x = do.by_columns(do.by_rows(x_TD), *groups, R, slot_of_row_R, K)
        grad_w13 = do.rows_by_rows(t_both, t_x, padded, dtype)
        del t_x
    del t_both
    w13 = _by_blocks(do, w13_E2FD, w13_scales, transposed=True)
    grad_rows_RD = do.rows_by_blocks(of_rows, w13, ends_E, dtype)
    grad_x_TD = sum_copies(grad_rows_RD, row_of_slot_TK, some_empty=some_empty)
    return grad_x_TD, grad_w13, grad_w2, _of_slots(grad_weights_R, row_of_slot_TK)


def _of_slots(x_R: Tensor, row_of_slot_TK: Tensor) -> Tensor:
    """The element of every slot's row (T, K); 0 where it has none."""
    if x_R.numel() == 0:
        return x_R.new_zeros(row_of_slot_TK.shape)
    return torch.where(row_of_slot_TK < 0, 0.0, x_R[row_of_slot_TK.clamp(min=0)])


@_experts_backward.register_fake
def _(
    grad, x_TD, kept_values, kept_scales, w13, w2, weights_TK, slot, row, counts, some_empty, wide,
    emulate, trains_w13, trains_w2, w13_scales=None, w2_scales=None,
):  # fmt: skip
    E, D, F2 = counts.size(0), x_TD.size(1), kept_values.size(1)
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
    first, second = w13.turned(), w2.turned()
    scales = first.scales, second.scales
    return _experts_backward(*before, first.values, second.values, *args[6:15], *scales)
