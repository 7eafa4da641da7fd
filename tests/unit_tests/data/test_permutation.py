"""An epoch's order: each document once, another order each epoch, the same for the same seed."""

from hypothesis import given, settings
from hypothesis import strategies as st

from torchtitan.data.permutation import order


@settings(max_examples=60, deadline=None)
@given(length=st.integers(0, 700), seed=st.integers(0, 2**63), epoch=st.integers(0, 1000))
def test_every_document_comes_exactly_once(length, seed, epoch):
    assert sorted(order(length, seed, epoch)) == list(range(length))


def test_order_depends_on_seed_and_epoch_and_window_only():
    first = list(order(500, seed=1, epoch=0))
    assert first == list(order(500, seed=1, epoch=0))
    others = [order(500, 2, 0), order(500, 1, 1), order(500, 1, 0, window=1)]
    assert len({tuple(first), *(tuple(other) for other in others)}) == 4


def test_places_of_a_huge_epoch_are_computed_alone():
    huge = order(10**12, seed=3, epoch=4)
    places = [huge[i] for i in range(2000)]
    assert len(set(places)) == 2000 and max(places) < 10**12
    # Uniform draws have mean 0.5 and a standard error of 0.29 / sqrt(2000) = 0.0065.
    assert abs(sum(places) / 2000 / 10**12 - 0.5) < 0.03


def test_every_document_reaches_every_place():
    """600 epochs of 10: a cell of the 10 x 10 table expects 60 +- 7.3."""
    table = [[0] * 10 for _ in range(10)]
    for epoch in range(600):
        for place, document in enumerate(order(10, seed=5, epoch=epoch)):
            table[place][document] += 1
    cells = [cell for row in table for cell in row]
    assert min(cells) > 60 - 5 * 7.3 and max(cells) < 60 + 5 * 7.3


def test_order_never_changes_under_a_running_experiment():
    """A golden value: whoever changes it changes the data of everybody's resumed runs."""
    assert list(order(12, seed=42, epoch=1)) == GOLDEN


GOLDEN = [9, 8, 5, 2, 1, 4, 7, 6, 3, 10, 11, 0]
