"""One AdamW step of one tensor in one pass, in Triton; reference: ops/adamw.py.

Reads and writes 28 bytes a parameter with fp32 weights and states and bf16 gradient and compute
copy, 27 with one in FP8; 14 with bf16 weights and states.
"""

import triton
import triton.language as tl
from torch import Tensor

from torchtitan.ops.fp8.quantize import BLOCK
from torchtitan.ops.fp8.weight import Fp8Weight


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


@triton.jit
def _update_by_blocks(
    param,
    grad,
    mean,
    square,
    numbers,
    values,
    scales,
    factor,
    N,
    K,
    param_stride,
    grad_stride,
    values_stride,
    scales_stride,
    beta1,
    beta2,
    eps,
    l2,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A program has a block of 128 x 128, whose scale is its largest magnitude / 448.

    It goes through the block a few rows at a time, twice: new weights are read again, from the
    cache, once the largest is known. All of a block at once fills the registers, and then loads
    wait for nothing but themselves (docs/LOG.md, 2026-11-27).
    """
    of_k, of_n = tl.program_id(0), tl.program_id(1)
    e = tl.program_id(2).to(tl.int64)
    k = of_k * BLOCK + tl.arange(0, BLOCK)
    param += e * param_stride
    grad += e * grad_stride
    mean += e * N * K
    square += e * N * K
    values += e * values_stride
    largest = tl.zeros((ROWS, BLOCK), tl.int32)  # as integers, so that NaN is above every number
    for begin in range(0, BLOCK, ROWS):
        n = of_n * BLOCK + begin + tl.arange(0, ROWS)
        inside = (n[:, None] < N) & (k[None, :] < K)
        within = n[:, None] * K + k[None, :]
        p = tl.load(param + within, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad + within, mask=inside, other=0.0).to(tl.float32)
        m = tl.load(mean + within, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(square + within, mask=inside, other=0.0).to(tl.float32)
        p, m, v = _adamw(p, g, m, v, numbers, factor, beta1, beta2, eps, l2, SCALE)
        tl.store(mean + within, m.to(mean.dtype.element_ty), mask=inside)
        tl.store(square + within, v.to(square.dtype.element_ty), mask=inside)
        tl.store(param + within, p.to(param.dtype.element_ty), mask=inside)
        magnitudes = tl.where(inside, p, 0.0).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        largest = tl.maximum(largest, magnitudes)
    top = tl.max(tl.max(largest, axis=1), axis=0).to(tl.float32, bitcast=True)
    scale = tl.where(top == 0.0, 1.0, tl.div_rn(top, 448.0))
    tl.store(scales + e * scales_stride + of_n * tl.cdiv(K, BLOCK) + of_k, scale)
    tl.debug_barrier()
    for begin in range(0, BLOCK, ROWS):
        n = of_n * BLOCK + begin + tl.arange(0, ROWS)
        inside = (n[:, None] < N) & (k[None, :] < K)
        within = n[:, None] * K + k[None, :]
        p = tl.load(param + within, mask=inside, other=0.0).to(tl.float32)
        quotients = tl.div_rn(p, tl.zeros_like(p) + scale)
        tl.store(values + within, quotients.to(tl.float8e4nv), mask=inside)


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
    if isinstance(copy, Fp8Weight):
        how = {"betas": betas, "eps": eps, "l2": l2}
        _by_blocks(param, grad, mean, square, numbers_4, copy, factor, **how)
        return
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


def _by_blocks(
    param: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    numbers_4: Tensor,
    copy: Fp8Weight,
    factor: Tensor | None,
    *,
    betas: tuple[float, float],
    eps: float,
    l2: float,
) -> None:
    tensors = [t if t.ndim == 3 else t.unsqueeze(0) for t in (param, grad, *copy.parts())]
    E, N, K = tensors[0].shape
    assert all(t.stride(1) == t.size(2) for t in tensors), "each matrix is dense"
    _update_by_blocks[(triton.cdiv(K, BLOCK), triton.cdiv(N, BLOCK), E)](
        *tensors[:2],
        mean,
        square,
        numbers_4,
        *tensors[2:],
        factor,
        N,
        K,
        *(t.stride(0) for t in tensors),
        *betas,
        eps,
        l2,
        SCALE=factor is not None,
        BLOCK=BLOCK,
        ROWS=16,
        num_warps=16,
    )
