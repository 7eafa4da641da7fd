"""A blend of datasets: which one gives example n, and the lanes from which it comes.

Whole examples are drawn, each packed from one dataset, so shares hold in tokens however long the
documents are. Which dataset gives example n is a pure function of n and the weights. Lane l of
the blend has lane l of every dataset below it; those take turns. So the examples of a lane stay
with one loader process, whatever the weights, and nothing is tokenised twice.
"""

import bisect
import json
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import IterableDataset

from torchtitan.config.blend import Stretch
from torchtitan.data.dataloader import DATASET, POSITION, SKIPPED, Share
from torchtitan.data.documents import Skips
from torchtitan.data.packing import START, Lane
from torchtitan.data.text_datasets import Example, TextDataset

# Where a lane of a blend starts: its windows, and the positions of its datasets' lanes.
BLEND_START = {"taken": 0, "datasets": {}}

MASK64 = (1 << 64) - 1
GOLDEN_RATIO = 0x9E3779B97F4A7C15  # its fraction, times 2**64


class Turns:
    """turns[n] is the dataset that gives example n.

    A stretch repeats its period, in which each dataset has exactly its parts of turns, and begins
    it at another place each time. Else lane n modulo L would get the same few turns for ever where
    period and L have a common divisor, and much of some datasets would never be read. Steps of the
    golden ratio visit all places most evenly (Weyl's sequence), so all lanes advance alike.

    After m examples of a stretch a dataset with share w has given w * m, give or take less than two
    (less than one, of two datasets), and exactly w * m after whole periods.
    """

    def __init__(self, stretches: Sequence[Stretch]) -> None:
        self._firsts = [stretch.first for stretch in stretches]
        self._periods = [period_of(stretch.parts) for stretch in stretches]

    def __getitem__(self, n: int) -> int:
        stretch = bisect.bisect_right(self._firsts, n) - 1
        period = self._periods[stretch]
        repetition, place = divmod(n - self._firsts[stretch], len(period))
        begin = (repetition * GOLDEN_RATIO & MASK64) * len(period) >> 64
        return period[(begin + place) % len(period)]


def period_of(parts: Sequence[int]) -> list[int]:
    """sum(parts) turns, parts[k] of them k's, each spread so that after m turns k has had its
    share of m, give or take less than one.

    The j-th turn of k may come once its share of the turns is above j, and must come before it is
    above j + 1; of those that may, the one that must come first is next. This always succeeds
    (Baruah, Cohen, Plaxton, Varvel, "Proportionate progress", 1996, for one processor).
    """
    length, had, period = sum(parts), [0] * len(parts), []
    for m in range(1, length + 1):
        may = (k for k, part in enumerate(parts) if had[k] * length < part * m)
        turn = min(may, key=lambda k: (had[k] + 1) / parts[k])
        had[turn] += 1
        period.append(turn)
    return period


class BlendedLane:
    """The windows of one lane of a blend, from a position on; see `Lane`.

    open_lane(k, position) opens this lane of dataset k; turn(i) is the dataset of window i.
    """

    def __init__(
        self,
        names: Sequence[str],
        turn: Callable[[int], int],
        open_lane: Callable[[int, dict], Lane],
        position: dict,
    ) -> None:
        self._names = names
        self._turn = turn
        self._open_lane = open_lane
        self._taken: int = position["taken"]
        self._positions: dict[str, dict] = dict(position["datasets"])
        self._lanes: dict[int, Lane] = {}  # opened at their first turn
        self.dataset = ""  # of the last window
        self.skipped = 0

    def window(self, number: int) -> list[int]:
        while self._taken <= number:
            turn = self._turn(self._taken)
            self.dataset = name = self._names[turn]
            start = self._positions.get(name, START)
            if turn not in self._lanes:
                self._lanes[turn] = self._open_lane(turn, start)
            lane = self._lanes[turn]
            window = lane.window(start["taken"])
            assert window is not None, "each dataset of a blend begins anew when it ends"
            self._positions[name] = lane.position()
            self.skipped = lane.skipped
            self._taken += 1
        return window

    def position(self) -> dict:
        """Behind the last window."""
        return {"taken": self._taken, "datasets": dict(self._positions)}


class BlendedDataset(IterableDataset):
    """The examples of a share, drawn from several datasets by turns. They must be without end and
    have the same share, lanes and seed."""

    infinite = True

    def __init__(self, datasets: dict[str, TextDataset], turns: Turns) -> None:
        self.names = tuple(datasets)
        self._datasets = list(datasets.values())
        self._turns = turns
        self.share, self.num_lanes = self._datasets[0].share, self._datasets[0].num_lanes
        self.start(0, {})

    def identity(self) -> dict:
        """The weights are not in it: another blend may go on from here with the same datasets."""
        shared = ("debug.seed", "training.dataset_lanes", *self._datasets[0].tokenizer.identity())
        identity: dict = {"training.blend": list(self.names)}
        for name, dataset in zip(self.names, self._datasets, strict=True):
            for key, value in dataset.identity().items():
                identity[key if key in shared else f"training.blend.{name}: {key}"] = value
        return identity

    def resize(self, share: Share, seq_len: int) -> None:
        self.share = share
        for dataset in self._datasets:
            dataset.resize(share, seq_len)

    def start(self, consumed: int, lanes: dict[int, dict]) -> None:
        """Each `iter()` from now on begins behind `consumed` examples, at these positions."""
        for lane, position in lanes.items():
            below = position["datasets"]
            whole = all(below[name].keys() == START.keys() for name in below)
            if position["taken"] != sum(below[name]["taken"] for name in below) or not whole:
                raise ValueError(f"lane {lane} has {position}")
        self._consumed, self._positions = consumed, lanes

    def __iter__(self) -> Iterator[Example]:
        # Not a generator itself: the position is taken now, not at the first example.
        return self._examples(self._consumed, self._positions)

    def _examples(self, consumed: int, positions: dict[int, dict]) -> Iterator[Example]:
        skips = Skips()
        lanes: dict[int, BlendedLane] = {}
        for n in self.share.examples_here(consumed):
            number, index = divmod(n, self.num_lanes)
            if index not in lanes:
                lanes[index] = self._open_lane(index, skips, positions.get(index, BLEND_START))
            lane = lanes[index]
            window = torch.tensor(lane.window(number))
            example = {
                "input": window[:-1],
                SKIPPED: torch.tensor(lane.skipped),
                DATASET: lane.dataset,
                POSITION: json.dumps(lane.position()),
            }
            yield example, window[1:]

    def _open_lane(self, index: int, skips: Skips, position: dict) -> BlendedLane:
        def turn(number: int) -> int:
            return self._turns[number * self.num_lanes + index]

        def open_lane(dataset: int, position: dict) -> Lane:
            return self._datasets[dataset].open_lane(index, skips, position)

        return BlendedLane(self.names, turn, open_lane, position)
