"""The loader: who takes which example, one position of all ranks, and workers that never hang."""

import json
import os
import random
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.forks import Forked
from torchtitan.data import DataSettings
from torchtitan.data.dataloader import build_dataloader, merge_states
from torchtitan.data.rank_slice import RankSlice
from torchtitan.data.stream_dataset import StreamDataset
from torchtitan.tools.errors import UserError

STREAMS = 6


class CountingStream:
    """Sequence k of stream s is the number of its example; raises at `bad`."""

    dataset = None

    def __init__(self, index, bad, position):
        self.index, self.bad = index, bad
        self.taken = position["taken"] if position else 0

    def sequence(self, number):
        self.last, self.taken = number * STREAMS + self.index, number + 1
        if self.last == self.bad:
            raise UserError(f"document {self.bad} is bad.")
        self.skipped = int(self.last % 5 == 0)
        return [self.last]

    def position(self):
        return {"taken": self.taken, "last": self.last}


class Counting(StreamDataset):
    """Example n is n, of a stream that counts its examples; raises at `bad`."""

    def __init__(self, rank_slice=None, bad=None, seed=0):
        super().__init__(DataSettings((), False, 1, rank_slice.batch_size), STREAMS, rank_slice)
        self.bad, self.seed = bad, seed

    def identity(self):
        return {"debug.seed": self.seed}

    def check_position(self, index, position):
        assert position.keys() == {"taken", "last"}

    def open_stream(self, index, skips, position):
        return CountingStream(index, self.bad, position)

    def example(self, sequence):
        return {"n": sequence[0]}, sequence[0]


def build(batch_size=3, num_workers=0, dp_rank=0, dp_degree=1, **dataset):
    return build_dataloader(
        Counting(RankSlice(dp_rank, dp_degree, batch_size, num_workers), **dataset)
    )


def run(batches, dp_degree, state=None, **layout):
    """The examples of `batches` of each rank, and the position of all of them afterwards."""
    loaders = [build(dp_rank=rank, dp_degree=dp_degree, **layout) for rank in range(dp_degree)]
    if state:
        for loader in loaders:
            loader.load_state_dict(json.loads(json.dumps(state)))
    taken = [n for loader in loaders for _, ids in islice(loader, batches) for n in ids.tolist()]
    return taken, merge_states([loader.local_state() for loader in reversed(loaders)])


# ---------------------------------------------------------------------------------------------
# The order and the position
# ---------------------------------------------------------------------------------------------

SHARES = dict(
    dp_degree=st.integers(1, 7),
    batch_size=st.integers(1, 5),
    num_workers=st.integers(0, 3),
    first=st.integers(0, 100),
)


@given(**SHARES)
@settings(deadline=None)
def test_each_round_of_batches_of_all_ranks_is_the_next_stretch(
    dp_degree, batch_size, num_workers, first
):
    """Batch i comes from worker i modulo their number, as torch hands them out."""
    workers = max(1, num_workers)
    slices = [RankSlice(rank, dp_degree, batch_size, num_workers) for rank in range(dp_degree)]
    makers = [
        [rank_slice.examples(first, worker) for worker in range(workers)] for rank_slice in slices
    ]
    for i in range(4):
        batches = [list(islice(rank[i % workers], batch_size)) for rank in makers]
        begin = first + i * dp_degree * batch_size
        found = sorted(n for batch in batches for n in batch)
        assert found == list(range(begin, begin + dp_degree * batch_size))


@given(num_streams=st.integers(1, 12), **SHARES)
@settings(deadline=None)
def test_the_streams_of_a_process_are_all_that_it_ever_meets(
    num_streams, dp_degree, batch_size, num_workers, first
):
    rank_slice = RankSlice(0, dp_degree, batch_size, num_workers)
    streams = rank_slice.streams(num_streams, rank_slice.examples(first))
    assert {n % num_streams for n in islice(rank_slice.examples(first), 400)} == streams


@pytest.mark.parametrize(
    ("rank_slice", "num_streams", "times"),
    [
        (RankSlice(0, 8, batch_size=5), 64, 1),  # alone, a rank's batch size is its own affair
        (RankSlice(0, 8, batch_size=2, num_workers=4), 64, 1),
        (RankSlice(0, 3), 64, 3),  # no common divisor: all read all
        (RankSlice(0, 6), 64, 3),
        (RankSlice(0, 128), 64, 2),
        (RankSlice(0, 4), 1, 4),
        (RankSlice(0, 2, batch_size=3, num_workers=2), 12, 1),
    ],
)
def test_how_often_an_example_is_made(rank_slice, num_streams, times):
    assert rank_slice.times_made(num_streams) == times


@pytest.mark.parametrize("num_workers", [0, 2])
def test_another_layout_goes_on_with_nothing_lost_and_nothing_twice(num_workers):
    """4 ranks -> 3 -> 1 -> 2 with other batches; the last one has no multiple of the streams."""
    seen, state = run(2, dp_degree=4, batch_size=1)
    for batches, layout in [
        (1, dict(dp_degree=3, batch_size=5)),
        (3, dict(dp_degree=1, batch_size=2, num_workers=num_workers)),
        (2, dict(dp_degree=2, batch_size=3)),
    ]:
        taken, state = run(batches, state=state, **layout)
        assert sorted(taken) == list(range(len(seen), len(seen) + len(taken)))
        seen += taken
    assert sorted(seen) == list(range(41)) and state["consumed"] == 41
    assert {stream: position["last"] for stream, position in state["lanes"].items()} == {
        str(stream): max(range(stream, 41, STREAMS)) for stream in range(STREAMS)
    }
    assert state["skipped_documents"] == 9, "0, 5, ..., 40: each told once over four layouts"


def test_the_position_is_that_of_the_batches_handed_out_not_of_those_prepared():
    """Two workers prepare two batches each in advance."""
    loader = build(num_workers=2)
    batches = iter(loader)
    for number in range(1, 4):
        next(batches)
        state = merge_states([loader.local_state()])
        assert state["consumed"] == 3 * number
        assert max(p["last"] for p in state["lanes"].values()) == 3 * number - 1


def test_ranks_that_share_their_data_count_once():
    loaders = [build(dp_rank=rank, dp_degree=2) for rank in (0, 0, 1, 1)]
    for loader in loaders:
        next(iter(loader))
    state = merge_states([loader.local_state() for loader in loaders])
    assert (state["consumed"], state["skipped_documents"]) == (6, 2)


def test_a_position_that_was_loaded_and_not_used_is_kept():
    _, state = run(5, dp_degree=2)
    taken, again = run(0, dp_degree=3, state=state)
    assert (taken, again) == ([], state)


def test_the_next_pass_begins_at_the_beginning():
    loader = build()
    loader.load_state_dict(run(3, dp_degree=1)[1])
    assert [next(iter(loader))[1].tolist() for _ in range(2)] == [[9, 10, 11], [0, 1, 2]]


def test_ranks_out_of_step_are_a_mistake_of_ours():
    states = [build(dp_rank=rank, dp_degree=2).local_state() for rank in range(2)]
    states[1]["consumed"] = 6
    with pytest.raises(AssertionError, match="different numbers of batches"):
        merge_states(states)


def test_a_state_of_other_data_is_refused_with_the_way_out():
    _, state = run(2, dp_degree=1)
    sentence = "with debug.seed = 0, and this run has 5; resume with 0"
    with pytest.raises(UserError, match=sentence) as error:
        build(seed=5).load_state_dict(state)
    assert 'checkpoint.exclude_from_loading = ["dataloader"]' in str(error.value)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda state: state.pop("consumed"), "KeyError: 'consumed'"),
        (lambda state: state.pop("identity"), "KeyError: 'identity'"),
        (lambda state: state["lanes"].pop("2"), "stream 2 has given 0 of 2 examples"),
        (lambda state: state["lanes"]["1"].update(taken=3), "stream 1 has given 3 of 2 examples"),
        (lambda state: state["lanes"].update({"6": {"taken": 1}}), "streams .*6"),
        (lambda state: state.update(consumed=-1), "-1 examples"),
        (lambda state: state.update(consumed="many"), "TypeError"),
        (lambda state: state.update(lanes=[1, 2]), "AttributeError"),
        (lambda state: state.update(dp_rank_0="text", lanes={"a": {}}), "ValueError"),
    ],
)
def test_a_damaged_state_is_one_sentence_with_the_way_out(damage, sentence):
    _, state = run(3, dp_degree=1)
    damage(state)
    loader = build()
    with pytest.raises(UserError, match=rf"position is damaged \(.*{sentence}") as error:
        loader.load_state_dict(state)
    assert "take another checkpoint" in str(error.value)
    assert next(iter(loader))[1].tolist() == [0, 1, 2], "nothing of it was taken over"


def test_an_empty_state_begins_at_the_beginning():
    loader = build()
    loader.load_state_dict({})
    assert next(iter(loader))[1].tolist() == [0, 1, 2]


# ---------------------------------------------------------------------------------------------
# The process and its workers
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("num_workers", -1)])
def test_impossible_sizes_are_refused(name, value):
    with pytest.raises(UserError, match=f"{name} = {value} must be at least"):
        build(**{name: value})


def test_loading_data_takes_nothing_from_the_random_numbers_of_the_run():
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    expected = torch.rand(1).item(), random.random(), np.random.rand()
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    loader = build()
    loader.local_state()
    next(iter(loader))
    next(iter(loader))
    assert (torch.rand(1).item(), random.random(), np.random.rand()) == expected


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_user_error_comes_as_its_sentence_from_a_worker_too(num_workers):
    loader = build(bad=4, num_workers=num_workers)
    with pytest.raises(UserError) as error:
        list(loader)
    assert str(error.value) == "document 4 is bad."


SCRIPT = """
import multiprocessing, sys
sys.path.insert(0, {root!r})
from tests.unit_tests.data.test_dataloader import Counting, build

if __name__ == "__main__":
    batches = iter(build(num_workers=2))
    next(batches)
    pids = [child.pid for child in multiprocessing.active_children()]
    print(*pids, flush=True)
    if sys.argv[1] == "stay":
        while True:
            next(batches)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "loads_data.py"
    path.write_text(SCRIPT.format(root=str(Path(__file__).parents[3])))
    return str(path)


def gone(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):  # before it is opened, and while it is read
        return True


def test_a_program_that_stops_in_the_middle_of_the_data_ends_at_once(script, tmp_path):
    log = tmp_path / "log"
    program = Forked(log, [script, "end"], dict(os.environ))
    assert program.wait(60) == 0, log.read_text()
    # Behind this line Python's resource tracker may warn: it races with the exit.
    pids = log.read_text().partition("\n")[0].split()
    assert len(pids) == 2 and all(gone(int(pid)) for pid in pids), log.read_text()


def test_workers_of_a_killed_program_end_themselves(script, tmp_path):
    log = tmp_path / "log"
    program = Forked(log, [script, "stay"], dict(os.environ))
    until(lambda: log.read_text().endswith("\n"), "no word of the program", seconds=60)
    pids = [int(pid) for pid in log.read_text().split()]
    assert len(pids) == 2 and not any(gone(pid) for pid in pids)
    program.kill()
    until(lambda: all(gone(pid) for pid in pids), "the workers outlived their program")


def until(condition, complaint, seconds=15):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, complaint
        time.sleep(0.05)
