"""Sorting copies by expert and summing them again, against loops over indices."""

import pytest
import torch

from torchtitan.ops.permute import counts_of, expand_rows, reduce_rows, sort_slots

T, K, E, D = 7, 3, 6, 4


@pytest.fixture
def ids() -> torch.Tensor:
    torch.manual_seed(0)
    chosen = torch.stack([torch.randperm(E - 1)[:K] for _ in range(T)])
    return chosen + (chosen >= 2)  # nobody wants expert 2


def copies_in_order(ids: torch.Tensor) -> list[tuple[int, int]]:
    """(token, slot) of every row: experts ascending, tokens in order within one."""
    order = []
    for expert in range(E):
        order += [(t, k) for t in range(T) for k in range(K) if ids[t, k] == expert]
    return order


def test_order_is_by_expert_then_by_token(ids):
    order = sort_slots(ids, E)
    rows = copies_in_order(ids)
    assert order.slot_of_row_R.tolist() == [t * K + k for t, k in rows]
    for row, (t, k) in enumerate(rows):
        assert order.row_of_slot_PK[t, k] == row
    counts = counts_of(order)
    assert torch.equal(counts.long(), torch.bincount(ids.flatten(), minlength=E))
    assert counts[2] == 0 and order.ends.dtype == torch.int32


def test_expand_places_every_tokens_copies(ids):
    x = torch.randn(T, D)
    expected = torch.stack([x[t] for t, _ in copies_in_order(ids)])
    assert torch.equal(expand_rows(x, sort_slots(ids, E)), expected)


def test_reduce_sums_every_tokens_rows(ids):
    rows = torch.randn(T * K, D, dtype=torch.float64)
    expected = torch.zeros(T, D, dtype=torch.float64)
    for row, (t, _) in zip(rows, copies_in_order(ids), strict=True):
        expected[t] += row
    torch.testing.assert_close(reduce_rows(rows, sort_slots(ids, E)), expected)


def test_expand_and_reduce_are_each_others_transpose(ids):
    order = sort_slots(ids, E)
    x, y = torch.randn(T, D).double(), torch.randn(T * K, D).double()
    torch.testing.assert_close((expand_rows(x, order) * y).sum(), (x * reduce_rows(y, order)).sum())


def test_gradients_are_right(ids):
    order = sort_slots(ids, E)
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(T * K, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: expand_rows(t, order), x)
    assert torch.autograd.gradcheck(lambda t: reduce_rows(t, order), rows)


def test_bf16_rows_are_summed_in_fp32():
    # 256 + 1 + 1: in bf16 each 1 alone is lost (257 rounds to 256), their sum is not.
    ids = torch.tensor([[0, 1, 2]])
    rows = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16, requires_grad=True)
    out = reduce_rows(rows, sort_slots(ids, 3))
    assert out.dtype == torch.bfloat16 and out.item() == 258.0
    out.sum().backward()
    assert rows.grad.dtype == torch.bfloat16

    # The same on the way back: a token's gradient is the sum over its copies.
    x = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    expand_rows(x, sort_slots(ids, 3)).backward(rows.detach())
    assert x.grad.item() == 258.0


def test_no_tokens():
    order = sort_slots(torch.empty(0, K, dtype=torch.int64), E)
    assert counts_of(order).tolist() == [0] * E
    assert expand_rows(torch.empty(0, D), order).shape == (0, D)
    assert reduce_rows(torch.empty(0, D), order).shape == (0, D)


# ---------------------------------------------------------------------------------------------
# Slots without a copy
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def places() -> torch.Tensor:
    """Row 0 goes everywhere, row 3 nowhere, the others to some; nobody wants destination 2."""
    return torch.tensor(
        [[5, 0, 4], [-1, 3, -1], [1, -1, 0], [-1, -1, -1], [-1, 0, 5], [4, 5, -1], [-1, -1, 1]]
    )


def taken(places: torch.Tensor) -> int:
    return int((places >= 0).sum())


def test_empty_slots_have_no_row(places):
    order = sort_slots(places, E, num_rows=taken(places))
    rows = copies_in_order(places)
    assert order.slot_of_row_R.tolist() == [t * K + k for t, k in rows]
    for row, (t, k) in enumerate(rows):
        assert order.row_of_slot_PK[t, k] == row
    assert torch.equal(order.row_of_slot_PK >= 0, places >= 0) and order.some_empty
    assert counts_of(order).tolist() == [3, 2, 0, 1, 2, 3]
    x = torch.randn(T, D)
    assert torch.equal(expand_rows(x, order), torch.stack([x[t] for t, _ in rows]))


def test_empty_slots_add_nothing_not_even_nan(places):
    order = sort_slots(places, E, num_rows=taken(places))
    rows = torch.randn(taken(places), D, dtype=torch.float64)
    rows[-1] = float("nan")  # the row that an empty slot's index is clamped to
    expected = torch.zeros(T, D, dtype=torch.float64)
    for row, (t, _) in zip(rows, copies_in_order(places), strict=True):
        expected[t] += row
    out = reduce_rows(rows, order)
    torch.testing.assert_close(out, expected, equal_nan=True)
    assert out[3].tolist() == [0.0] * D and out.isnan().any(dim=1).sum() == 1


def test_gradients_are_right_with_empty_slots(places):
    order = sort_slots(places, E, num_rows=taken(places))
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(taken(places), D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: expand_rows(t, order), x)
    assert torch.autograd.gradcheck(lambda t: reduce_rows(t, order), rows)


def test_no_empty_slot_after_all(ids):
    full, told = sort_slots(ids, E), sort_slots(ids, E, num_rows=T * K)
    assert torch.equal(full.slot_of_row_R, told.slot_of_row_R)
    assert torch.equal(full.row_of_slot_PK, told.row_of_slot_PK)
    assert torch.equal(full.ends, told.ends)
    rows = torch.randn(T * K, D)
    assert torch.equal(reduce_rows(rows, full), reduce_rows(rows, told))


@pytest.mark.parametrize("num_rows_in", [0, 4])
def test_only_empty_slots(num_rows_in):
    """No row at all, of tokens that are there (R = 0) or not (P = 0): zeros, and gradients too."""
    order = sort_slots(torch.full((num_rows_in, K), -1), E, num_rows=0)
    assert counts_of(order).tolist() == [0] * E
    x = torch.randn(num_rows_in, D, requires_grad=True)
    rows = expand_rows(x, order)
    assert rows.shape == (0, D)
    out = reduce_rows(rows, order)
    assert torch.equal(out, torch.zeros(num_rows_in, D))
    out.sum().backward()
    assert torch.equal(x.grad, torch.zeros(num_rows_in, D))
