"""The loader: one state entry a rank, states of another layout refused, workers that never hang."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset

from torchtitan.components.dataloader import build_dataloader
from torchtitan.tools.errors import UserError


class Counting(IterableDataset):
    """0, 1, 2, ... up to `end`; raises at `bad`."""

    def __init__(self, end=100, bad=None, seed=0):
        self.end, self.bad, self.seed, self.next = end, bad, seed, 0

    def identity(self):
        return {"training.seed": self.seed}

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]

    def __iter__(self):
        while self.next < self.end:
            if self.next == self.bad:
                raise UserError(f"document {self.bad} is bad.")
            self.next += 1
            yield self.next - 1


def build(dataset=None, batch_size=3, num_workers=0, dp_rank=0, dp_degree=1):
    return build_dataloader(
        dataset or Counting(),
        batch_size=batch_size,
        num_workers=num_workers,
        dp_rank=dp_rank,
        dp_degree=dp_degree,
    )


def state_after(batches, **settings):
    loader = build(**settings)
    for _ in zip(range(batches), loader, strict=False):
        pass
    return loader.state_dict()


def test_the_states_of_all_ranks_merge_into_one():
    states = [state_after(rank + 1, dp_rank=rank, dp_degree=3) for rank in range(3)]
    merged = {key: value for state in states for key, value in state.items()}
    assert sorted(merged) == ["dp_degree", "dp_rank_0", "dp_rank_1", "dp_rank_2"]
    assert all(isinstance(json.loads(merged[f"dp_rank_{rank}"]), dict) for rank in range(3))
    for rank in range(3):
        loader = build(dp_rank=rank, dp_degree=3)
        loader.load_state_dict(merged)
        first = 3 * (rank + 1)
        assert next(iter(loader)).tolist() == [first, first + 1, first + 2]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"dp_degree": 2}, "data-parallel degree = 1, and this run has 2; resume with 1"),
        ({"num_workers": 1}, "training.dataset_num_workers = 0, and this run has 1"),
        ({"dataset": Counting(seed=5)}, "with training.seed = 0, and this run has 5"),
    ],
)
def test_a_state_of_another_run_is_refused_with_the_way_out(settings, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        build(**settings).load_state_dict(state_after(2))
    assert 'checkpoint.exclude_from_loading = ["dataloader"]' in str(error.value)


def test_a_state_without_this_rank_is_damaged():
    state = state_after(1, dp_rank=0, dp_degree=2)
    with pytest.raises(UserError, match="no entry 'dp_rank_1'"):
        build(dp_rank=1, dp_degree=2).load_state_dict(state)


def test_an_empty_state_begins_at_the_beginning():
    loader = build()
    loader.load_state_dict({})
    assert next(iter(loader)).tolist() == [0, 1, 2]


@pytest.mark.parametrize("settings", [{"batch_size": 0}, {"num_workers": -1}])
def test_impossible_sizes_are_refused(settings):
    (name, value) = next(iter(settings.items()))
    with pytest.raises(UserError, match=f"{name} = {value} must be at least"):
        build(**settings)


def test_loading_data_takes_nothing_from_the_random_numbers_of_the_run():
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    expected = torch.rand(1).item(), random.random(), np.random.rand()
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    loader = build()
    loader.state_dict()
    next(iter(loader))
    next(iter(loader))
    assert (torch.rand(1).item(), random.random(), np.random.rand()) == expected


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_user_error_comes_as_its_sentence_from_a_worker_too(num_workers):
    loader = build(Counting(bad=4), num_workers=num_workers)
    with pytest.raises(UserError) as error:
        list(loader)
    assert str(error.value) == "document 4 is bad."


SCRIPT = """
import multiprocessing, sys
sys.path.insert(0, {root!r})
from tests.unit_tests.components.test_dataloader import Counting, build

if __name__ == "__main__":
    batches = iter(build(Counting(end=10**9), num_workers=2))
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
    except FileNotFoundError:
        return True


def test_a_program_that_stops_in_the_middle_of_the_data_ends_at_once(script):
    run = subprocess.run([sys.executable, script, "end"], capture_output=True, timeout=60)
    pids = run.stdout.split()
    assert (run.returncode, len(pids)) == (0, 2), run.stderr.decode()
    assert all(gone(int(pid)) for pid in pids)


def test_workers_of_a_killed_program_end_themselves(script):
    with subprocess.Popen([sys.executable, script, "stay"], stdout=subprocess.PIPE) as program:
        pids = [int(pid) for pid in program.stdout.readline().split()]
        assert len(pids) == 2 and not any(gone(pid) for pid in pids)
        os.kill(program.pid, signal.SIGKILL)
    limit = time.monotonic() + 15
    while not all(gone(pid) for pid in pids):
        assert time.monotonic() < limit, "the workers outlived their program"
        time.sleep(0.1)
