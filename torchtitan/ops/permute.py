"""Permutation of tokens' copies into the order of their destinations, and back.

Each of P rows has K slots. A slot holds one copy of its row, bound for a destination (an expert, a
rank, a node), or is empty; slot n = p · K + k. Sorted by destination, the copy of slot n is in row
`row_of_slot[n]`, and row r holds the copy of slot `slot_of_row[r]`. The sort is stable: copies for
one destination keep their order.

`expand_rows` and `reduce_rows` are each other's transpose, so each is the other's backward: gathers
in both directions, no atomics (deterministic), and nothing saved but the indices.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class RowOrder(NamedTuple):
    """Order of rows by destination. Integers are int64, or int32 where the Triton kernel sorted.

    slot_of_row_R: slot of each row; undefined behind the last copy.
    row_of_slot_PK: row of each slot; −1 = the slot is empty, or its row would be behind the R-th.
    ends: int32, rows up to the end of each destination, of those among the R.
    some_empty: False = every slot has a row.
    """

    slot_of_row_R: Tensor
    row_of_slot_PK: Tensor
    ends: Tensor
    some_empty: bool


def counts_of(order: RowOrder) -> Tensor:
    """Return the rows of each destination, int32."""
    return order.ends.diff(prepend=order.ends.new_zeros(1))


def sort_slots(
    destination_PK: Tensor, num_destinations: int, num_rows: int | None = None
) -> RowOrder:
    """Sort the copies by destination. No host sync.

    destination_PK: int64; −1 = empty slot.
    num_rows: R, length of the list of rows. It may be larger than the number of copies, or smaller:
        the last copies then have no row. None = no slot is empty.
    """
    some_empty = num_rows is not None
    rows = destination_PK.numel() if num_rows is None else num_rows
    if destination_PK.is_cuda:
        slot_of_row_R, row_of_slot_PK, ends = _sort_slots(destination_PK, num_destinations, rows)
        return RowOrder(slot_of_row_R, row_of_slot_PK, ends, some_empty)
    keys_PK = destination_PK
    if some_empty:  # empty slots go last
        keys_PK = destination_PK.where(destination_PK >= 0, num_destinations)
    sorted_keys_N, slot_of_row_N = keys_PK.flatten().sort(stable=True)
    rows_N = torch.arange(sorted_keys_N.numel(), device=keys_PK.device)
    row_of_slot_N = torch.empty_like(slot_of_row_N).scatter_(0, slot_of_row_N, rows_N)
    destinations = torch.arange(num_destinations, device=keys_PK.device)
    ends = torch.searchsorted(sorted_keys_N, destinations, right=True)
    if some_empty:
        ends = ends.clamp(max=rows)
        row_of_slot_N = row_of_slot_N.where(row_of_slot_N < ends[-1], -1)
    row_of_slot_PK = row_of_slot_N.view_as(keys_PK)
    return RowOrder(slot_of_row_N[:rows], row_of_slot_PK, ends.int(), some_empty)


def expand_rows(x_PD: Tensor, order: RowOrder) -> Tensor:
    """Copy every row to its destinations, in their order: (R, D). R = the number of copies."""
    return _ExpandRows.apply(x_PD, order.slot_of_row_R, order.row_of_slot_PK, order.some_empty)


def reduce_rows(rows_RD: Tensor, order: RowOrder) -> Tensor:
    """Sum every row's copies in fp32: (P, D) in the dtype of `rows_RD`."""
    return _ReduceRows.apply(rows_RD, order.slot_of_row_R, order.row_of_slot_PK, order.some_empty)


def sum_copies(rows_RD: Tensor, row_of_slot_PK: Tensor, *, some_empty: bool = False) -> Tensor:
    """Sum the rows of every line of `row_of_slot_PK` in fp32: (P, D) in the dtype of `rows_RD`. Not
    differentiable.

    some_empty: whether some numbers are −1, no row.
    """
    return _reduce(rows_RD, row_of_slot_PK, some_empty)


def _expand(x_PD: Tensor, slot_of_row_R: Tensor, row_of_slot_PK: Tensor) -> Tensor:
    return x_PD[slot_of_row_R // row_of_slot_PK.size(1)]


def _reduce(rows_RD: Tensor, row_of_slot_PK: Tensor, some_empty: bool) -> Tensor:
    if rows_RD.is_cuda and rows_RD.dtype != torch.float64:
        return _reduce_rows(rows_RD.contiguous(), row_of_slot_PK)
    # fp64 stays fp64 (tests); everything below accumulates in fp32.
    sum_dtype = torch.promote_types(rows_RD.dtype, torch.float32)
    if not some_empty:
        copies_PKD = rows_RD[row_of_slot_PK]
    elif rows_RD.size(0) == 0:
        return rows_RD.new_zeros(row_of_slot_PK.size(0), rows_RD.size(1))
    else:
        copies_PKD = rows_RD[row_of_slot_PK.clamp(min=0)]
        copies_PKD = copies_PKD.masked_fill((row_of_slot_PK < 0).unsqueeze(-1), 0)
    sum_PD = copies_PKD.sum(dim=1, dtype=sum_dtype)
    # No `to` where it would do nothing: as the last operation of a compiled autograd.Function it
    # makes torch 2.11 lose the gradient (2.13 does not).
    return sum_PD if sum_dtype == rows_RD.dtype else sum_PD.to(rows_RD.dtype)


@torch.library.custom_op("torchtitan::sort_slots", mutates_args=(), device_types="cuda")
def _sort_slots(
    destination_PK: Tensor, num_destinations: int, num_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    from torchtitan.ops import permute_triton

    return permute_triton.sort_slots(destination_PK, num_destinations, num_rows)


@_sort_slots.register_fake
def _(destination_PK, num_destinations, num_rows):
    def int32(*shape):
        return destination_PK.new_empty(shape, dtype=torch.int32)

    return int32(num_rows), int32(*destination_PK.shape), int32(num_destinations)


@torch.library.custom_op("torchtitan::count_tokens", mutates_args=(), device_types="cuda")
def count_tokens(ids_TK: Tensor, num_experts: int, mask_T: Tensor | None) -> Tensor:
    """Count the tokens of each expert, on a GPU: (E,) int64.

    ids_TK: int64, experts of each token.
    mask_T: bool, True = the token counts; None = all count.
    """
    from torchtitan.ops import permute_triton

    return permute_triton.count_tokens(ids_TK, num_experts, mask_T)


@count_tokens.register_fake
def _(ids_TK, num_experts, mask_T):
    return ids_TK.new_empty(num_experts, dtype=torch.int64)


@torch.library.custom_op("torchtitan::reduce_rows", mutates_args=(), device_types="cuda")
def _reduce_rows(rows_RD: Tensor, row_of_slot_PK: Tensor) -> Tensor:
    from torchtitan.ops import permute_triton

    return permute_triton.reduce_rows(rows_RD, row_of_slot_PK)


@_reduce_rows.register_fake
def _(rows_RD, row_of_slot_PK):
    return rows_RD.new_empty(row_of_slot_PK.size(0), rows_RD.size(1))


class _ExpandRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_PD, slot_of_row_R, row_of_slot_PK, some_empty):
        ctx.save_for_backward(row_of_slot_PK)
        ctx.some_empty = some_empty
        return _expand(x_PD, slot_of_row_R, row_of_slot_PK)

    @staticmethod
    def backward(ctx, grad_RD):
        (row_of_slot_PK,) = ctx.saved_tensors
        return _reduce(grad_RD, row_of_slot_PK, ctx.some_empty), None, None, None


class _ReduceRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RD, slot_of_row_R, row_of_slot_PK, some_empty):
        ctx.save_for_backward(slot_of_row_R, row_of_slot_PK)
        return _reduce(rows_RD, row_of_slot_PK, some_empty)

    @staticmethod
    def backward(ctx, grad_PD):
        return _expand(grad_PD, *ctx.saved_tensors), None, None, None
