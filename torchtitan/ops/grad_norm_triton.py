"""Sum of the squares of many tensors, each read once, in Triton; reference: ops/grad_norm.py.

One launch for each tensor; each program adds up a chunk in fp32 and writes one number of its own,
so the order of the sum is fixed (no atomics).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK, _BLOCKS = 2048, 16  # elements of a block, and blocks of a program


@triton.jit
def _squares(tensor, sums, inner, stride, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    tensor += tl.program_id(1).to(tl.int64) * stride
    start = tl.program_id(0).to(tl.int64) * BLOCK * BLOCKS
    total = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(BLOCKS):
        at = start + i * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(tensor + at, mask=at < inner, other=0.0).to(tl.float32)
        total += x * x
    tl.store(sums + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), tl.sum(total))


def sum_of_squares(tensors: list[Tensor]) -> Tensor:
    """Sum of the squares of all elements: scalar fp32."""
    grids = []
    for t in tensors:
        outer = 1 if t.is_contiguous() else t.size(0)  # parts of a fused tensor: dense rows
        inner = t.numel() // outer
        grids.append((triton.cdiv(inner, _BLOCK * _BLOCKS), outer, inner))
    sums = torch.empty(sum(a * b for a, b, _ in grids), device=tensors[0].device)
    start = 0
    for t, (chunks, outer, inner) in zip(tensors, grids, strict=True):
        stride = 0 if outer == 1 else t.stride(0)
        _squares[(chunks, outer)](
            t, sums[start:], inner, stride, BLOCK=_BLOCK, BLOCKS=_BLOCKS, num_warps=8
        )
        start += chunks * outer
    return sums.sum()
