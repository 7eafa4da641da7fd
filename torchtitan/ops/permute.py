"""Bring the routed copies of tokens into expert order, and back.

Of T tokens each has K copies; copy n = t · K + k. Sorted by expert, copy n stands in row
`row_of_copy[n]`, and row r holds copy `copy_of_row[r]`. Stable: copies of one expert stay in token
order.

`expand_rows` and `reduce_rows` are each other's transpose, so each is the other's backward: gathers
in both directions, no atomics (deterministic), and nothing saved but the indices.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class ExpertOrder(NamedTuple):
    """copy_of_row_N, row_of_copy_TK: int64 indices as above. counts_E: int64 rows of an expert."""

    copy_of_row_N: Tensor
    row_of_copy_TK: Tensor
    counts_E: Tensor


def sort_by_expert(ids_TK: Tensor, num_experts: int) -> ExpertOrder:
    """Expert order of the copies routed to `ids_TK`. No host sync."""
    sorted_ids_N, copy_of_row_N = ids_TK.flatten().sort(stable=True)
    rows_N = torch.arange(sorted_ids_N.numel(), device=ids_TK.device)
    row_of_copy_N = torch.empty_like(copy_of_row_N).scatter_(0, copy_of_row_N, rows_N)
    experts_E = torch.arange(num_experts, device=ids_TK.device)
    ends_E = torch.searchsorted(sorted_ids_N, experts_E, right=True)
    counts_E = ends_E.diff(prepend=ends_E.new_zeros(1))
    return ExpertOrder(copy_of_row_N, row_of_copy_N.view_as(ids_TK), counts_E)


def expand_rows(x_TD: Tensor, order: ExpertOrder) -> Tensor:
    """Every token's K copies, in expert order: (N, D)."""
    return _ExpandRows.apply(x_TD, order.copy_of_row_N, order.row_of_copy_TK)


def reduce_rows(rows_ND: Tensor, order: ExpertOrder) -> Tensor:
    """Sum of every token's K rows, in fp32, returned in the rows' dtype: (T, D)."""
    return _ReduceRows.apply(rows_ND, order.copy_of_row_N, order.row_of_copy_TK)


def _expand(x_TD: Tensor, copy_of_row_N: Tensor, row_of_copy_TK: Tensor) -> Tensor:
    return x_TD[copy_of_row_N // row_of_copy_TK.size(1)]


def _reduce(rows_ND: Tensor, row_of_copy_TK: Tensor) -> Tensor:
    # fp64 stays fp64 (tests); everything below accumulates in fp32.
    sum_dtype = torch.promote_types(rows_ND.dtype, torch.float32)
    return rows_ND[row_of_copy_TK].sum(dim=1, dtype=sum_dtype).to(rows_ND.dtype)


class _ExpandRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, copy_of_row_N, row_of_copy_TK):
        ctx.save_for_backward(row_of_copy_TK)
        return _expand(x_TD, copy_of_row_N, row_of_copy_TK)

    @staticmethod
    def backward(ctx, grad_ND):
        (row_of_copy_TK,) = ctx.saved_tensors
        return _reduce(grad_ND, row_of_copy_TK), None, None


class _ReduceRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_ND, copy_of_row_N, row_of_copy_TK):
        ctx.save_for_backward(copy_of_row_N, row_of_copy_TK)
        return _reduce(rows_ND, row_of_copy_TK)

    @staticmethod
    def backward(ctx, grad_TD):
        return _expand(grad_TD, *ctx.saved_tensors), None, None
