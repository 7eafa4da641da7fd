"""Sum of each token's rows, and counting sort by expert, in Triton; reference: ops/permute.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _reduce(rows, row_of_slot, out, D, K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < D
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        slot = token * K + k
        row = tl.load(row_of_slot + slot).to(tl.int64)
        here = inside & (row >= 0)
        total += tl.load(rows + row * D + cols, mask=here, other=0.0).to(tl.float32)
    tl.store(out + token * D + cols, total.to(out.dtype.element_ty), mask=inside)


def reduce_rows(rows_RD: Tensor, row_of_slot_TK: Tensor) -> Tensor:
    """Sum each token's rows in fp32: (T, D). Arguments as in `RowOrder`."""
    (T, K), D = row_of_slot_TK.shape, rows_RD.size(1)
    out_TD = rows_RD.new_empty(T, D)
    if T:
        block = min(2048, triton.next_power_of_2(D))
        _reduce[(T, triton.cdiv(D, block))](
            rows_RD,
            row_of_slot_TK,
            out_TD,
            D,
            K=K,
            BLOCK=block,
        )
    return out_TD


@triton.jit
def _expand(x, slot_of_row, num_rows, rows, D, K, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    if row >= tl.load(num_rows):
        return
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < D
    token = (tl.load(slot_of_row + row) // K).to(tl.int64)
    tl.store(rows + row * D + cols, tl.load(x + token * D + cols, mask=inside), mask=inside)


def expand_rows(x_TD: Tensor, slot_of_row_R: Tensor, num_rows: Tensor, top_k: int) -> Tensor:
    """(R, D): the token of each of the first `num_rows` rows; the others are left as they are.

    num_rows: one int32 on the device.
    """
    R, D = slot_of_row_R.numel(), x_TD.size(1)
    rows_RD = x_TD.new_empty(R, D)
    if R:
        block = min(2048, triton.next_power_of_2(D))
        grid = (R, triton.cdiv(D, block))
        _expand[grid](x_TD, slot_of_row_R, num_rows, rows_RD, D, top_k, BLOCK=block)
    return rows_RD


# Counting sort. A program has SLOTS consecutive slots: it counts them by expert; a prefix sum over
# (expert, program) gives the end of each program's copies for each expert; then every program
# writes its slots there, in order. Stable, no atomics. Empty slots (-1) get no row, nor do copies
# behind the R-th.

_SLOTS = 128


@triton.jit
def _count(ids, mask, counts, N, P, K, E: tl.constexpr, SLOTS: tl.constexpr, MASKED: tl.constexpr):
    program = tl.program_id(0)
    slots = program * SLOTS + tl.arange(0, SLOTS)
    counted = slots < N
    if MASKED:
        counted = tl.load(mask + slots // K, mask=counted, other=0).to(tl.int1)
    expert = tl.load(ids + slots, mask=counted, other=E).to(tl.int32)
    experts = tl.arange(0, E)
    hits = (expert[:, None] == experts[None, :]).to(tl.int32)
    tl.store(counts + experts * P + program, tl.sum(hits, axis=0))


@triton.jit
def _place(
    ids,
    counts,
    ends,
    slot_of_row,
    row_of_slot,
    ends_out,
    N,
    P,
    R,
    num_experts,
    E: tl.constexpr,
    SLOTS: tl.constexpr,
):
    program = tl.program_id(0)
    slots = program * SLOTS + tl.arange(0, SLOTS)
    inside = slots < N
    expert = tl.load(ids + slots, mask=inside, other=E).to(tl.int32)
    experts = tl.arange(0, E)
    hits = (expert[:, None] == experts[None, :]).to(tl.int32)
    earlier = tl.cumsum(hits, axis=0) - hits
    begin = tl.load(ends + experts * P + program) - tl.load(counts + experts * P + program)
    row = tl.sum(hits * (earlier + begin[None, :]), axis=1)
    kept = inside & (expert >= 0) & (row < R)
    tl.store(row_of_slot + slots, tl.where(kept, row, -1), mask=inside)
    tl.store(slot_of_row + row, slots, mask=kept)
    if program == 0:
        end = tl.minimum(tl.load(ends + experts * P + P - 1), R)
        tl.store(ends_out + experts, end, mask=experts < num_experts)


def sort_slots(ids_TK: Tensor, num_experts: int, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return slot_of_row_R, row_of_slot_TK and ends_E, all int32.

    The kernels round the number of experts up to a power of two.
    """
    N, counts_EP = ids_TK.numel(), _counts_by_program(ids_TK, num_experts, None)
    E, P = counts_EP.shape
    slot_of_row = torch.empty(num_rows, dtype=torch.int32, device=ids_TK.device)
    row_of_slot_TK = torch.empty(ids_TK.shape, dtype=torch.int32, device=ids_TK.device)
    ends_E = torch.empty(num_experts, dtype=torch.int32, device=ids_TK.device)
    ends_EP = counts_EP.flatten().cumsum(0, dtype=torch.int32)
    _place[(P,)](
        ids_TK,
        counts_EP,
        ends_EP,
        slot_of_row,
        row_of_slot_TK,
        ends_E,
        N,
        P,
        num_rows,
        num_experts,
        E=E,
        SLOTS=_SLOTS,
    )
    return slot_of_row, row_of_slot_TK, ends_E


def count_tokens(ids_TK: Tensor, num_experts: int, mask_T: Tensor | None) -> Tensor:
    """Count the tokens of each expert, (E,) int64; see `torchtitan.ops.permute.count_tokens`."""
    return _counts_by_program(ids_TK, num_experts, mask_T)[:num_experts].sum(dim=1)


def _counts_by_program(ids_TK: Tensor, num_experts: int, mask_T: Tensor | None) -> Tensor:
    K, N = ids_TK.size(1), ids_TK.numel()
    E, P = triton.next_power_of_2(num_experts), max(1, triton.cdiv(N, _SLOTS))
    counts_EP = torch.empty(E, P, dtype=torch.int32, device=ids_TK.device)
    _count[(P,)](ids_TK, mask_T, counts_EP, N, P, K, E=E, SLOTS=_SLOTS, MASKED=mask_T is not None)
    return counts_EP
