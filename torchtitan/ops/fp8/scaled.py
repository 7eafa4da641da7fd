"""Products of a linear layer in FP8 with one scale a tensor or a row: torchao's recipes.

    tensorwise          one scale a tensor, largest / 448; gradients in e5m2
    rowwise             a scale for each row of both factors of a product, a power of two
    rowwise_with_gw_hp  the same forward; the gradient of inputs reads the weight with one scale,
                        that of weights is a product in the dtype of the input

Written in operations that torch.compile fuses. Products are torch's own (`torch._scaled_mm`); on
other devices, and where asked for, they are those of the dequantised numbers, added up in fp32.
Coarser than blocks of 128 (linear.py): one outlier takes the digits of its whole row or tensor.

Letters: R rows, K inputs, N outputs.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtitan.ops.fp8.linear import Fp8Recipe
from torchtitan.ops.fp8.quantize import E4M3, power_of_two_scale

_MULTIPLE = 16  # of the size over which a product adds up


class _Scaled(NamedTuple):
    """A factor of a product, in FP8.

    values: (rows, size that the product adds up over).
    scales: fp32 (rows, 1), or (1, 1) where one serves all.
    """

    values: Tensor
    scales: Tensor


def scaled_linear(x: Tensor, weight_NK: Tensor, recipe: Fp8Recipe) -> Tensor:
    """Compute x · weightᵀ: (..., K) to (..., N), in the dtype of x."""
    out_RN = _ScaledLinear.apply(
        x.flatten(0, -2), weight_NK, recipe.scales, recipe.gradient_kind, recipe.emulate
    )
    return out_RN.unflatten(0, x.shape[:-1])


def quantise(x: Tensor, *, by_row: bool, kind: torch.dtype = E4M3) -> _Scaled:
    """Quantise the rows of a matrix with a scale each, or all with one.

    Zeros have scale 1. NaN and infinity make what shares their scale NaN.
    """
    x, limit = x.float(), torch.finfo(kind).max
    largest = x.abs().amax(1, keepdim=True)
    if by_row:
        scales = power_of_two_scale(largest, kind)
    else:
        largest = largest.amax().view(1, 1)
        # By a tensor: on a GPU torch multiplies by the reciprocal of a Python number.
        scales = largest / torch.full_like(largest, limit)
        scales = torch.where(largest == 0, 1.0, torch.where(largest.isfinite(), scales, torch.nan))
    return _Scaled((x / scales).clamp(-limit, limit).to(kind), scales)


def _transposed(x: _Scaled) -> _Scaled:
    """Return the transposed of a matrix with one scale."""
    return _Scaled(x.values.t(), x.scales)


def _product(
    a: _Scaled, b: _Scaled, dtype: torch.dtype, *, emulate: bool, fast: bool = False
) -> Tensor:
    """Compute a · bᵀ.

    fast: the tensor cores' own sums, of fewer digits than fp32, on a GPU.
    """
    if emulate or a.values.device.type == "cpu":
        whole_a, whole_b = (values.float() * scales for values, scales in (a, b))
        out = torch.mm(whole_a, whole_b.t())
        return out if dtype == torch.float32 else out.to(dtype)
    values = [F.pad(x.values, (0, -x.values.size(1) % _MULTIPLE)).contiguous() for x in (a, b)]
    scales = [a.scales, b.scales]
    if any(each.numel() > 1 for each in scales):  # the kernel takes rows' scales of both or neither
        rows = zip(scales, values, strict=True)
        scales = [each.expand(len(of_row), 1).contiguous() for each, of_row in rows]
    out = torch._scaled_mm(
        values[0],
        values[1].t(),
        scale_a=scales[0],
        scale_b=scales[1].t(),
        out_dtype=torch.bfloat16,
        use_fast_accum=fast,
    )
    # torch 2.11 loses the gradients of a compiled function that ends with a cast to the same dtype.
    return out if dtype == torch.bfloat16 else out.to(dtype)


class _ScaledLinear(torch.autograd.Function):
    """Keeps the weight, and the input as the weights' gradient reads it."""

    @staticmethod
    def forward(
        ctx: Any, x_RK: Tensor, w_NK: Tensor, scales: str, kind: torch.dtype, emulate: bool
    ) -> Tensor:
        by_row = scales != "tensorwise"
        x = quantise(x_RK, by_row=by_row)
        kept: tuple[Tensor, ...] = ()
        if ctx.needs_input_grad[1]:
            if scales == "rowwise_with_gw_hp":
                kept = (x_RK,)
            else:
                kept = quantise(x_RK.t(), by_row=True) if by_row else _transposed(x)
        ctx.save_for_backward(w_NK, *kept)
        ctx.scales, ctx.kind, ctx.emulate = scales, kind, emulate
        w = quantise(w_NK, by_row=by_row)
        return _product(x, w, x_RK.dtype, emulate=emulate, fast=True)

    @staticmethod
    def backward(ctx: Any, grad_RN: Tensor) -> tuple[Tensor | None, ...]:
        w_NK, *kept = ctx.saved_tensors
        by_row, dtype = ctx.scales != "tensorwise", grad_RN.dtype
        grad = quantise(grad_RN, by_row=by_row, kind=ctx.kind)
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            of_inputs = quantise(w_NK.t(), by_row=ctx.scales == "rowwise")
            grad_x = _product(grad, of_inputs, dtype, emulate=ctx.emulate)
        if ctx.needs_input_grad[1] and ctx.scales == "rowwise_with_gw_hp":
            grad_w = grad_RN.t() @ kept[0]
        elif ctx.needs_input_grad[1]:
            columns = _transposed(grad)
            if by_row:
                columns = quantise(grad_RN.t(), by_row=True, kind=ctx.kind)
            grad_w = _product(columns, _Scaled(*kept), dtype, emulate=ctx.emulate)
        return grad_x, grad_w, None, None, None
