"""Cross entropy of a block of logits with its gradient in FP8, in Triton.

Reference: the gradient of ops/cross_entropy_triton.py, then `by_both` of kernels.py. A program has
a tile of 128 x 128 logits, whose gradient is rounded to their dtype, quantised by rows, and then by
columns as quantize.cu does it; it is never written before.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchtitan.ops.cross_entropy_triton import losses_and_log_sums
from torchtitan.ops.fp8.quantize import BLOCK, E4M3, E5M2, Fp8


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _quantise(x, AXIS: tl.constexpr, WIDE: tl.constexpr):
    """Return values and scales, one for all of an axis."""
    # Largest / (448 or 57344), both 1.75 times a power of two, rounded up to a power of two.
    largest = tl.reduce(tl.abs(x), AXIS, _larger, keep_dims=True).to(tl.int32, bitcast=True)
    exponent = ((largest + 0x1FFFFF) >> 23) - (15 if WIDE else 8)
    bits = tl.where(largest == 0, 127, tl.maximum(exponent, 1)) << 23
    finite = largest < 0x7F800000
    scale = tl.where(finite, bits.to(tl.float32, bitcast=True), float("nan"))
    inverse = tl.where(finite, (0x7F000000 - bits).to(tl.float32, bitcast=True), float("nan"))
    return (x * inverse).to(tl.float8e5 if WIDE else tl.float8e4nv), scale


@triton.jit
def _gradient(
    logits,
    log_sums,
    labels,
    values,
    scales,
    t_values,
    t_scales,
    N,
    V,
    ignore,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tiles, blocks = tl.num_programs(0), tl.num_programs(1)
    first_row, first_column = tl.program_id(0) * BLOCK, tl.program_id(1) * BLOCK
    i = tl.arange(0, BLOCK)
    row, column = first_row + i, first_column + i
    inside = (row[:, None] < N) & (column[None, :] < V)
    tile = first_row.to(tl.int64) * V + first_column + i[:, None] * V + i[None, :]
    label = tl.load(labels + row, mask=row < N, other=ignore).to(tl.int32)
    counts = label != ignore
    log_sum = tl.load(log_sums + row, mask=counts, other=0.0)
    x = tl.load(logits + tile, mask=inside & counts[:, None], other=float("-inf")).to(tl.float32)
    grad = tl.exp(x - log_sum[:, None])
    # Most tiles have no label.
    if tl.max(((label >= first_column) & (label < first_column + BLOCK)).to(tl.int32), axis=0) > 0:
        grad -= tl.where(column[None, :] == label[:, None], 1.0, 0.0)
    grad = grad.to(logits.dtype.element_ty).to(tl.float32)

    quantised, scale = _quantise(grad, 1, WIDE)
    tl.store(values + tile, quantised, mask=inside)
    place = scales + tl.program_id(1).to(tl.int64) * N + row
    tl.store(place[:, None], scale, mask=row[:, None] < N)

    quantised, t_scale = _quantise(quantised.to(tl.float32) * scale, 0, WIDE)
    turned = first_column.to(tl.int64) * tiles * BLOCK + first_row
    turned += i[:, None] * (tiles * BLOCK) + i[None, :]
    tl.store(t_values + turned, tl.trans(quantised), mask=column[:, None] < V)
    place = t_scales + tl.program_id(0).to(tl.int64) * blocks * BLOCK + column
    tl.store(place[None, :], t_scale)


def cross_entropy(
    logits_NV: Tensor, labels_N: Tensor, ignore: int, kind: torch.dtype = E4M3
) -> tuple[Tensor, Fp8, Fp8]:
    """Losses (N,) fp32, 0 where the label is `ignore`, and the gradient of their sum by rows and by
    columns, as `by_both` returns it for one group of all rows. The logits stay.

    kind: e4m3 or e5m2.
    """
    N, V = logits_NV.shape
    tiles, blocks = triton.cdiv(N, BLOCK), triton.cdiv(V, BLOCK)
    losses_N, log_sums_N = losses_and_log_sums(logits_NV, labels_N, ignore)
    rows = Fp8(logits_NV.new_empty(N, V, dtype=kind), losses_N.new_empty(blocks, N))
    t_values = logits_NV.new_empty(V, tiles * BLOCK, dtype=kind)
    columns = Fp8(t_values, losses_N.new_empty(tiles, blocks * BLOCK))
    if N:
        _gradient[(tiles, blocks)](
            logits_NV,
            log_sums_N,
            labels_N,
            *rows,
            *columns,
            N,
            V,
            ignore,
            WIDE=kind == E5M2,
            BLOCK=BLOCK,
            num_warps=8,
        )
    return losses_N, rows, columns
