"""Products of activations with weights in FP8, forward and backward (DeepSeek-V3's recipe).

    output              activations 1 × 128 by weights 128 × 128
    gradient of inputs  gradients 1 × 128 by the transposed weights
    of weights          gradients by activations, both 1 × 128 along tokens

Kept for the backward pass are activations in FP8, transposed where the gradient of weights reads
them. Weights in bf16 or fp32 are quantised in each pass, so nothing of them is kept; an `Fp8Weight`
(weight.py) comes quantised.

Letters: R rows sorted by group, K inputs, N outputs, E groups.
"""

from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from torchtitan.ops.fp8.choice import functions
from torchtitan.ops.fp8.quantize import BLOCK, E4M3, E5M2, Fp8, padded_tiles
from torchtitan.ops.fp8.weight import Fp8Weight, takes_fp8_weights

_MULTIPLE = 16  # bytes: what the tensor memory accelerator fetches begins and ends there


Scales = Literal["blockwise", "tensorwise", "rowwise", "rowwise_with_gw_hp"]


class Fp8Recipe(NamedTuple):
    """How a layer computes in FP8.

    wide_gradients: gradients in e5m2 instead of e4m3.
    emulate: in plain torch, on any device.
    dispatch: experts' tokens, and the gradients of their outputs, travel in FP8 (wire.py).
    gather: FSDP gathers the weights in FP8 (distributed/float8_gather.py).
    scales: blockwise is this file's recipe, and the only one for experts; others: scaled.py.
    """

    wide_gradients: bool = False
    emulate: bool = False
    dispatch: bool = False
    gather: bool = False
    scales: Scales = "blockwise"

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
    out = fp8_grouped_linear(x.flatten(0, -2), weight_NK.unsqueeze(0), None, recipe)
    return out.unflatten(0, x.shape[:-1])


def fp8_grouped_linear(
    x_RK: Tensor, weight_ENK: Tensor, ends_E: Tensor | None, recipe: Fp8Recipe
) -> Tensor:
    """Compute x[rows of group e] · weight[e]ᵀ for every e: (R, N), in the dtype of x.

    ends_E: int32, rows up to the end of each group; None = a single one has all rows.
    """
    trains = torch.is_grad_enabled() and weight_ENK.requires_grad
    return _linear(x_RK.contiguous(), weight_ENK.contiguous(), ends_E, *recipe[:2], trains)[0]


def linear_forward(
    x_RK: Tensor, weight_NK: Fp8Weight, recipe: Fp8Recipe, *, trains: bool
) -> tuple[Tensor, Fp8]:
    """Compute x · weightᵀ (R, N) without autograd; return it with x by columns.

    trains: whether `linear_gradients_` will be asked for that of the weight; otherwise nothing is
        kept.
    """
    values, scales = (part.unsqueeze(0) for part in weight_NK.by_blocks())
    out, *kept = _linear(x_RK, values, None, *recipe[:2], trains, scales)
    return out, Fp8(*kept)


def linear_gradients_(
    grad: Fp8,
    columns: Fp8,
    kept: Fp8,
    turned: Fp8 | None,
    grad_x_RK: Tensor | None,
    grad_w_NK: Tensor | None,
    *,
    add: bool,
    emulate: bool,
) -> None:
    """Write the gradients of `linear_forward` into their places; None = one isn't needed.

    grad, columns: gradient of the output by rows, and by columns.
    kept: x by columns.
    turned: the transposed weight, needed for the gradient of x.
    add: to what `grad_w_NK` holds.
    """
    weight = turned or (None, None)
    _gradients_(*grad, *columns, *kept, *weight, grad_x_RK, grad_w_NK, add, emulate)


@torch.library.custom_op(
    "torchtitan::fp8_linear_gradients_", mutates_args=("grad_x_RK", "grad_w_NK")
)
def _gradients_(
    grad_values: Tensor,
    grad_scales: Tensor,
    t_values: Tensor,
    t_scales: Tensor,
    x_values: Tensor,
    x_scales: Tensor,
    w_values: Tensor | None,
    w_scales: Tensor | None,
    grad_x_RK: Tensor | None,
    grad_w_NK: Tensor | None,
    add: bool,
    emulate: bool,
) -> None:
    do, groups = functions(grad_values, emulate), groups_of(None, grad_values)
    if grad_w_NK is not None:
        columns, x, out = Fp8(t_values, t_scales), Fp8(x_values, x_scales), grad_w_NK.unsqueeze(0)
        # Not added in the product's kernel: that was no faster (docs/LOG.md).
        product = do.rows_by_rows(
            columns, x, groups.padded_ends, out.dtype, out=None if add else out
        )
        if add:
            out += product
    if grad_x_RK is not None:
        assert w_values is not None and w_scales is not None
        grad, turned = Fp8(grad_values, grad_scales), Fp8(w_values, w_scales)
        do.rows_by_blocks(grad, turned, groups.ends, grad_x_RK.dtype, grad_x_RK)


@_gradients_.register_fake
def _(*_):
    return None


class Groups(NamedTuple):
    """Groups of rows, int32 on the device.

    ends: rows up to the end of each.
    padded_ends: the same with each group padded to a multiple of 128.
    """

    ends: Tensor
    padded_ends: Tensor


def groups_of(ends_E: Tensor | None, x_RK: Tensor) -> Groups:
    """Return the groups that end there; None = one that has all rows of x."""
    if ends_E is None:
        R = x_RK.size(0)
        sizes = (R, -(-R // BLOCK) * BLOCK)
        return Groups(*(x_RK.new_full((1,), size, dtype=torch.int32) for size in sizes))
    counts = ends_E.diff(prepend=ends_E.new_zeros(1))
    padded = (counts + BLOCK - 1) // BLOCK * BLOCK
    return Groups(ends_E, padded.cumsum(0, dtype=torch.int32))


def input_in_fp8(
    do: ModuleType, x_RK: Tensor, groups: Groups, trains: bool, kind: torch.dtype = E4M3
) -> tuple[Fp8, Fp8]:
    """Return an input by rows, and by columns; these are empty where no weight reads them."""
    if trains:
        return do.by_both(x_RK, *groups, kind)
    return do.by_rows(x_RK, kind), no_columns(x_RK)


def in_blocks(do: ModuleType, w_ENK: Tensor, scales: Tensor | None) -> Fp8:
    """Quantise weights, unless they come with their scales."""
    return do.by_blocks(w_ENK) if scales is None else Fp8(w_ENK, scales)


def in_blocks_transposed(do: ModuleType, w_ENK: Tensor, scales: Tensor | None) -> Fp8:
    """Return the same weights as (E, K, N), for the gradient of inputs."""
    if scales is None:
        return do.by_blocks(w_ENK, transposed=True)
    return do.transposed_blocks(Fp8(w_ENK, scales))


@torch.library.custom_op("torchtitan::fp8_linear", mutates_args=())
def _linear(
    x_RK: Tensor,
    w_ENK: Tensor,
    ends_E: Tensor | None,
    wide_gradients: bool,
    emulate: bool,
    trains: bool,
    w_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the product, and x by columns, for the gradient of the weights.

    trains: whether there will be one; otherwise nothing is kept.
    w_scales: of weights that are in FP8.
    """
    do, groups = functions(x_RK, emulate), groups_of(ends_E, x_RK)
    weight = in_blocks(do, w_ENK, w_scales)
    x, columns = input_in_fp8(do, x_RK, groups, trains)
    return do.rows_by_blocks(x, weight, groups.ends, x_RK.dtype), columns.values, columns.scales


@_linear.register_fake
def _(x_RK, w_ENK, ends_E, wide_gradients, emulate, trains, w_scales=None):
    kept = fake_columns(x_RK, w_ENK.size(0)) if trains else no_columns(x_RK)
    return x_RK.new_empty(x_RK.size(0), w_ENK.size(1)), *kept


def fake_rows(x_RK: Tensor, kind: torch.dtype = E4M3) -> Fp8:
    """Return tensors of the shapes that a matrix has by rows."""
    R, K = x_RK.shape
    scales = x_RK.new_empty(-(-K // BLOCK), R, dtype=torch.float32)
    return Fp8(x_RK.new_empty(R, K, dtype=kind), scales)


def fake_columns(x_RK: Tensor, groups: int, kind: torch.dtype = E4M3) -> Fp8:
    """Return tensors of the shapes that a matrix has by columns."""
    R, K = x_RK.shape
    tiles = padded_tiles(R, groups)
    scales = x_RK.new_empty(tiles, -(-K // BLOCK) * BLOCK, dtype=torch.float32)
    return Fp8(x_RK.new_empty(K, tiles * BLOCK, dtype=kind), scales)


def no_columns(x_RK: Tensor) -> Fp8:
    return Fp8(x_RK.new_empty(0, 0, dtype=E4M3), x_RK.new_empty(0, 0, dtype=torch.float32))


@torch.library.custom_op("torchtitan::fp8_linear_backward", mutates_args=())
def _linear_backward(
    grad_RN: Tensor,
    x_values: Tensor,
    x_scales: Tensor,
    w_ENK: Tensor,
    ends_E: Tensor | None,
    wide_gradients: bool,
    emulate: bool,
    needs_x: bool,
    needs_w: bool,
    w_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of the weights; of what needs none, of no size.

    x_values, x_scales: x by columns.
    w_scales: of weights that are in FP8.
    """
    do, kind = functions(grad_RN, emulate), Fp8Recipe(wide_gradients).gradient_kind
    dtype, groups = grad_RN.dtype, groups_of(ends_E, grad_RN)
    grad_x, grad_w = grad_RN.new_empty(0, 0), grad_RN.new_empty(0, 0, 0)
    if needs_w:
        grad, columns = do.by_both(grad_RN, *groups, kind)
        grad_w = do.rows_by_rows(columns, Fp8(x_values, x_scales), groups.padded_ends, dtype)
        del columns
    else:
        grad = do.by_rows(grad_RN, kind)
    if needs_x:
        turned = in_blocks_transposed(do, w_ENK, w_scales)
        grad_x = do.rows_by_blocks(grad, turned, groups.ends, dtype)
    return grad_x, grad_w


@_linear_backward.register_fake
def _(grad_RN, x_values, x_scales, w_ENK, ends_E, wide, emulate, needs_x, needs_w, w_scales=None):
    grad_x = grad_RN.new_empty((grad_RN.size(0), w_ENK.size(2)) if needs_x else (0, 0))
    return grad_x, grad_RN.new_empty(w_ENK.shape if needs_w else (0, 0, 0))


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, w_ENK, ends_E, *ctx.recipe, _, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], w_ENK, ends_E)


def _differentiate_linear(ctx: Any, grad_RN: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    needs_x, needs_w, *_rest = ctx.needs_input_grad
    grad_x, grad_w = _linear_backward(
        grad_RN.contiguous(), *ctx.saved_tensors, *ctx.recipe, needs_x, needs_w
    )
    return grad_x if needs_x else None, grad_w if needs_w else None, *[None] * 5


_linear.register_autograd(_differentiate_linear, setup_context=_save_linear)


@takes_fp8_weights(torch.ops.torchtitan.fp8_linear.default)
def _linear_in_fp8(x_RK: Tensor, weight: Fp8Weight, *others: Any) -> tuple[Tensor, ...]:
    values, scales = weight.by_blocks()
    return _linear(x_RK, values, *others[:4], scales)


@takes_fp8_weights(torch.ops.torchtitan.fp8_linear_backward.default)
def _linear_backward_in_fp8(*args: Any) -> tuple[Tensor, Tensor]:
    *before, weight = args[:4]
    values, scales = weight.by_blocks()
    return _linear_backward(*before, values, *args[4:9], scales)
