"""torchdata's StatefulDataLoader under our datasets: state of workers, and what must not show."""

import json
import multiprocessing
import sys
import time
import warnings
from itertools import islice

import pytest

from tests.unit_tests.data.byte_tokenizer import OneTokenAByte
from tests.unit_tests.data.kinds import KINDS, TEXTS, lists, make_source, text_dataset
from tests.unit_tests.data.test_dataloader import Counting, build
from torchtitan.data.dataloader import build_dataloader, merge_states
from torchtitan.data.rank_slice import RankSlice
from torchtitan.data.worker_processes import (
    iterator_states,
    stateful_dataloader,
    worker_context,
)
from torchtitan.tools.errors import UserError


def loader_of(source, batch_size=3, state=None):
    rank_slice = RankSlice(0, 1, batch_size, num_workers=2)
    loader = build_dataloader(
        text_dataset(source, OneTokenAByte(), 20, rank_slice=rank_slice, num_streams=4)
    )
    if state:
        loader.load_state_dict(json.loads(json.dumps(state)))
    return loader


@pytest.mark.parametrize("kind", KINDS)
def test_two_workers_go_on_exactly_where_two_workers_stopped(tmp_path, kind):
    """After an odd number of batches, so another worker makes the first one; then with batches of
    another size, so that those prepared before are cut in their middle."""
    source = make_source(kind, tmp_path, [text if n % 3 else "" for n, text in enumerate(TEXTS)])
    loader = loader_of(source)
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    state = merge_states([loader.local_state()])
    assert state["consumed"] == 9 and state["skipped_documents"] == loader.skipped_documents > 0
    expected = lists(islice(batches, 4))
    assert lists(islice(loader_of(source, state=state), 4)) == expected
    examples = [pair for batch in expected for pair in zip(*batch, strict=True)]
    smaller = lists(islice(loader_of(source, 2, state), 6))
    assert [pair for batch in smaller for pair in zip(*batch, strict=True)] == examples


def plain_loader(workers):
    dataset = Counting(RankSlice(0, 1, 3, workers))
    context = worker_context(dataset) if workers else None
    return stateful_dataloader(
        dataset, batch_size=3, num_workers=workers, multiprocessing_context=context
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_of_torchdata_resumes_our_datasets_by_itself(workers):
    loader = plain_loader(workers)
    assert [ids.tolist() for _, ids in islice(loader, 3)][-1] == [6, 7, 8]
    state = loader.state_dict()
    assert sum(each["examples"] for each in iterator_states(state)) == 9
    again = plain_loader(workers)
    again.load_state_dict(state)
    assert [ids.tolist() for _, ids in islice(again, 2)] == [[9, 10, 11], [12, 13, 14]]


class Noting(Counting):
    """Writes a byte into a file for each example that is made."""

    def __init__(self, file, *args):
        super().__init__(*args)
        self.file = file

    def example(self, sequence):
        with self.file.open("a") as file:
            file.write(".")
        return super().example(sequence)


@pytest.mark.parametrize("batches_at_once, ready", [(1, 4), (12, 12)])
def test_workers_make_the_next_step_ready_while_this_one_runs(tmp_path, batches_at_once, ready):
    made = tmp_path / "made"
    dataset = Noting(made, RankSlice(0, 1, batch_size=3, num_workers=2))
    batches = iter(build_dataloader(dataset, batches_at_once))
    next(batches)
    expected = 3 * (1 + ready)
    end = time.monotonic() + 30
    while made.stat().st_size < expected and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.2)  # no more are made
    assert made.stat().st_size == expected


def test_what_is_ready_fits_into_the_shared_memory_of_a_container(tmp_path):
    rank_slice = RankSlice(0, 1, batch_size=8, num_workers=1)
    source = make_source(KINDS[0], tmp_path, TEXTS)
    settings = text_dataset(source, OneTokenAByte(), 4096, rank_slice=rank_slice, num_streams=1)
    assert build_dataloader(settings, 1000)._loader.prefetch_factor == 8  # 4 MiB of 0.5 MiB each


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_position_before_the_first_batch_starts_no_process(num_workers):
    before = set(multiprocessing.active_children())
    loader = build(num_workers=num_workers)
    assert loader.local_state()["consumed"] == loader.skipped_documents == 0
    assert set(multiprocessing.active_children()) == before


def test_without_workers_no_process_loads_data():
    before = set(multiprocessing.active_children())
    next(iter(build()))
    assert set(multiprocessing.active_children()) == before


def test_no_warning_of_a_package_is_shown():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build()


def test_a_missing_torchdata_is_one_sentence_with_the_way_out(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchdata"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchdata", None)
    with pytest.raises(UserError, match="needs the package torchdata.* pip install torchdata"):
        build()
