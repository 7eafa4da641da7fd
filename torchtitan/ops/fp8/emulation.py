"""The functions of kernels.py in plain torch, on any device: the same values, scales and rounding.

Products are those of the dequantised numbers, added up in fp32. Sizes of groups are read on the
host. Slow: for tests, and for runs that ask for it (`quantize.linear.float8.emulate`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtitan.ops.fp8 import quantize
from torchtitan.ops.fp8.quantize import BLOCK, E4M3, Fp8, by_rows, transposed_blocks

__all__ = [
    "by_blocks",
    "by_both",
    "by_columns",
    "by_rows",
    "gather",
    "rows_by_blocks",
    "rows_by_rows",
    "swiglu",
    "swiglu_backward",
    "transposed_blocks",
]


def _counts(ends: Tensor) -> list[int]:
    return ends.diff(prepend=ends.new_zeros(1)).tolist()


def by_blocks(w_ENK: Tensor, *, transposed: bool = False) -> Fp8:
    weight = quantize.by_blocks(w_ENK)
    return transposed_blocks(weight) if transposed else weight


def by_both(
    x_RK: Tensor, ends: Tensor, padded_ends: Tensor, kind: torch.dtype = E4M3
) -> tuple[Fp8, Fp8]:
    rows = by_rows(x_RK, kind)
    return rows, by_columns(rows, ends, padded_ends, x_RK.size(0))


def by_columns(
    x: Fp8,
    ends: Tensor,
    padded_ends: Tensor,
    rows: int,
    slot_of_row: Tensor | None = None,
    top_k: int = 1,
) -> Fp8:
    counts = _counts(ends)
    x_RK = quantize.rows_to_float(x)
    if slot_of_row is not None:
        x_RK = x_RK[slot_of_row[: sum(counts)] // top_k]
    made = quantize.by_columns(x_RK, counts, x.values.dtype)
    # As wide as the kernels make it, who don't know the sizes of groups.
    missing = quantize.padded_tiles(rows, len(counts)) - len(made.scales)
    values = F.pad(made.values.view(torch.uint8), (0, missing * BLOCK)).view(made.values.dtype)
    return Fp8(values, F.pad(made.scales, (0, 0, 0, missing)))


def gather(x: Fp8, slot_of_row_R: Tensor, ends: Tensor, top_k: int) -> Fp8:
    tokens = slot_of_row_R[: int(ends[-1])] // top_k
    return Fp8(x.values.view(torch.uint8)[tokens].view(x.values.dtype), x.scales[:, tokens])


def _of_rows(weights_N: Tensor | None, slot_of_row_R: Tensor | None, rows: int) -> Tensor | None:
    if weights_N is None or slot_of_row_R is None:
        return None
    return weights_N[slot_of_row_R[:rows]]


def swiglu(
    gate_up_R2F: Tensor, weights_N: Tensor | None, slot_of_row_R: Tensor | None, ends: Tensor
) -> tuple[Fp8, Fp8]:
    return quantize.swiglu(gate_up_R2F, _of_rows(weights_N, slot_of_row_R, int(ends[-1])))


def swiglu_backward(
    grad_RF: Tensor,
    kept: Fp8,
    weights_N: Tensor | None,
    slot_of_row_R: Tensor | None,
    ends: Tensor,
    padded_ends: Tensor,
    kind: torch.dtype,
) -> tuple[Fp8, Fp8, Fp8, Tensor]:
    counts = _counts(ends)
    weights_R = _of_rows(weights_N, slot_of_row_R, sum(counts))
    return quantize.swiglu_backward(grad_RF, kept, weights_R, counts, kind)


def rows_by_blocks(
    x: Fp8, weight: Fp8, ends: Tensor, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    counts = _counts(ends)
    rows = quantize.rows_to_float(x)
    weights = quantize.blocks_to_float(weight)
    pairs = zip(rows[: sum(counts)].split(counts), weights, strict=True)
    product = torch.cat([x_e @ w_e.t() for x_e, w_e in pairs])
    return product.to(dtype) if out is None else out.copy_(product)


def rows_by_rows(
    a: Fp8, b: Fp8, padded_ends: Tensor, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    counts = _counts(padded_ends)
    wholes = [quantize.columns_to_float(each)[: sum(counts)] for each in (a, b)]
    parts = [whole.split(counts) for whole in wholes]
    products = torch.stack([a_e.t() @ b_e for a_e, b_e in zip(*parts, strict=True)])
    return products.to(dtype) if out is None else out.copy_(products)
