"""One AdamW step of one tensor in one pass, in Triton; reference: ops/adamw.py.

Reads and writes 28 bytes a parameter with fp32 weights and states and bf16 gradient and compute
copy; 14 with bf16 weights and states. With a copy in FP8: ops/fp8/adamw.cu.
"""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _adamw(p, g, m, v, numbers, factor, beta1, beta2, eps, l2, SCALE: tl.constexpr):
    """Return the new weight and states, fp32."""
    lr, decay = tl.load(numbers), tl.load(numbers + 1)
    correction1, correction2 = tl.load(numbers + 2), tl.load(numbers + 3)
    if SCALE:
        g *= tl.load(factor)
    g += l2 * p
    p *= 1.0 - decay
    m += (g - m) * (1.0 - beta1)
    v += (g * g - v) * (1.0 - beta2)
    p -= lr * (m / correction1) / (tl.sqrt(v / correction2) + eps)
    return p, m, v


@triton.jit
def _update(
    param,
    grad,
    mean,
    square,
    numbers,
    copy,
    factor,
    inner,
    param_stride,
    grad_stride,
    copy_stride,
    beta1,
    beta2,
    eps,
    l2,
    COPY: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    within = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    outer = tl.program_id(1).to(tl.int64)
    inside = within < inner
    param += outer * param_stride
    grad += outer * grad_stride
    mean += outer * inner
    square += outer * inner
    p = tl.load(param + within, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + within, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(mean + within, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(square + within, mask=inside, other=0.0).to(tl.float32)
    p, m, v = _adamw(p, g, m, v, numbers, factor, beta1, beta2, eps, l2, SCALE)
    tl.store(mean + within, m.to(mean.dtype.element_ty), mask=inside)
    tl.store(square + within, v.to(square.dtype.element_ty), mask=inside)
    tl.store(param + within, p.to(param.dtype.element_ty), mask=inside)
    if COPY:
        copy += outer * copy_stride
        tl.store(copy + within, p.to(copy.dtype.element_ty), mask=inside)


def update(
    param: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    numbers_4: Tensor,
    copy: Tensor | None,
    factor: Tensor | None,
    *,
    betas: tuple[float, float],
    eps: float,
    l2: float,
) -> None:
    """Update in place; arguments as in `adamw_update`."""
    tensors = [param, grad] + ([] if copy is None else [copy])
    # A part of a fused tensor has gaps between its rows; each row is dense.
    dense = all(tensor.is_contiguous() for tensor in tensors)
    outer = 1 if dense else param.size(0)
    inner, block = param.numel() // outer, 1024
    _update[(triton.cdiv(inner, block), outer)](
        param,
        grad,
        mean,
        square,
        numbers_4,
        copy,
        factor,
        inner,
        *(0 if t is None or dense else t.stride(0) for t in (param, grad, copy)),
        *betas,
        eps,
        l2,
        COPY=copy is not None,
        SCALE=factor is not None,
        BLOCK=block,
        num_warps=4,
    )
