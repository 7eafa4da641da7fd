"""A blend of datasets: which one gives example n, and the streams from which it comes.

Whole examples are drawn, each packed from one dataset, so shares hold in tokens however long the
documents are. Which dataset gives example n is a pure function of n and the weights. Stream s of
the blend draws from stream s of every dataset. So the examples of a stream stay with one loader
process, whatever the weights, and nothing is tokenised twice.
"""

import bisect
from collections.abc import Callable, Sequence

from torchtitan.config.blend import BlendSegment
from torchtitan.data.documents import Skips
from torchtitan.data.packing import Packed
from torchtitan.data.rank_slice import RankSlice
from torchtitan.data.stream_dataset import Stream, StreamDataset
from torchtitan.data.text_datasets import TextDataset

# Position at which a stream of a blend starts: its sequences, and positions in the datasets.
BLEND_START = {"taken": 0, "datasets": {}}

MASK64 = (1 << 64) - 1
GOLDEN_RATIO = 0x9E3779B97F4A7C15  # its fraction, times 2**64


class BlendOrder:
    """order[n] is the index of the dataset that gives example n.

    A segment repeats its period, in which each dataset gives exactly its parts, and begins it at
    another index each time. Else stream n modulo S would draw the same few datasets for ever where
    period and S have a common divisor, and much of some datasets would never be read. Steps of the
    golden ratio visit all indices most evenly (Weyl's sequence), so all streams advance alike.

    After m examples of a segment a dataset with share w has given w * m, give or take less than two
    (less than one, of two datasets), and exactly w * m after whole periods.
    """

    def __init__(self, segments: Sequence[BlendSegment]) -> None:
        self._firsts = [segment.first for segment in segments]
        self._periods = [period_of(segment.parts) for segment in segments]

    def __getitem__(self, n: int) -> int:
        segment = bisect.bisect_right(self._firsts, n) - 1
        period = self._periods[segment]
        repetition, index = divmod(n - self._firsts[segment], len(period))
        begin = (repetition * GOLDEN_RATIO & MASK64) * len(period) >> 64
        return period[(begin + index) % len(period)]


def period_of(parts: Sequence[int]) -> list[int]:
    """sum(parts) dataset indices, k for parts[k] times, each spread so that among the first m
    k comes its share of m times, give or take less than one.

    The j-th k may come once k's share of the period so far is above j, and must come before it is
    above j + 1; of those that may, the one that must come first is next. This always succeeds
    (Baruah, Cohen, Plaxton, Varvel, "Proportionate progress", 1996, for one processor).
    """
    length, had, period = sum(parts), [0] * len(parts), []
    for m in range(1, length + 1):
        may = (k for k, part in enumerate(parts) if had[k] * length < part * m)
        chosen = min(may, key=lambda k: (had[k] + 1) / parts[k])
        had[chosen] += 1
        period.append(chosen)
    return period


class BlendedStream:
    """Sequences of one stream of a blend, from a position on; see `PackedStream`.

    names: names of the datasets
    dataset_of: sequence number to the index of its dataset
    open_stream: (index of a dataset, position or None) to this stream of that dataset
    position: where to begin; `BLEND_START`, or what `position()` gave
    """

    def __init__(
        self,
        names: Sequence[str],
        dataset_of: Callable[[int], int],
        open_stream: Callable[[int, dict | None], Stream],
        position: dict,
    ) -> None:
        self._names = names
        self._dataset_of = dataset_of
        self._open_stream = open_stream
        self._taken: int = position["taken"]
        self._positions: dict[str, dict] = dict(position["datasets"])
        self._streams: dict[int, Stream] = {}  # opened when first drawn from
        self.dataset: str | None = None
        self.skipped = 0

    def sequence(self, number: int) -> Packed:
        assert number >= self._taken, (number, self._taken)
        while self._taken <= number:
            chosen = self._dataset_of(self._taken)
            self.dataset = name = self._names[chosen]
            start = self._positions.get(name)
            if chosen not in self._streams:
                self._streams[chosen] = self._open_stream(chosen, start)
            stream = self._streams[chosen]
            sequence = stream.sequence(start["taken"] if start else 0)
            assert sequence is not None, "each dataset of a blend begins anew when it ends"
            self._positions[name] = stream.position()
            self.skipped = stream.skipped
            self._taken += 1
        return sequence

    def position(self) -> dict:
        """Position behind the last sequence."""
        return {"taken": self._taken, "datasets": dict(self._positions)}


class BlendedDataset(StreamDataset):
    """Examples drawn from several datasets.

    datasets: by name; without end, and of the same rank slice, streams and seed
    order: which dataset gives which example
    """

    def __init__(self, datasets: dict[str, TextDataset], order: BlendOrder) -> None:
        self.names = tuple(datasets)
        self._datasets = list(datasets.values())
        self._order = order
        first = self._datasets[0]
        super().__init__(first.settings, first.num_streams, first.rank_slice)
        self.use_tokens_of(first.tokenizer)

    def identity(self) -> dict:
        """Identity without the weights: another blend of the same datasets may resume from here."""
        shared = ("debug.seed", "training.dataset_lanes", *self._datasets[0].tokenizer.identity())
        identity: dict = {"training.blend": list(self.names)}
        for name, dataset in zip(self.names, self._datasets, strict=True):
            for key, value in dataset.identity().items():
                identity[key if key in shared else f"training.blend.{name}: {key}"] = value
        return identity

    def resize(self, rank_slice: RankSlice, seq_len: int) -> None:
        super().resize(rank_slice, seq_len)
        for dataset in self._datasets:
            dataset.resize(rank_slice, seq_len)

    def check_position(self, index: int, position: dict) -> None:
        below = position["datasets"]
        by_name = dict(zip(self.names, self._datasets, strict=True))
        for name in below:
            by_name[name].check_position(index, below[name])
        if position["taken"] != sum(below[name]["taken"] for name in below):
            raise ValueError(f"stream {index} has {position}")

    def open_stream(self, index: int, skips: Skips, position: dict | None) -> BlendedStream:
        def dataset_of(number: int) -> int:
            return self._order[number * self.num_streams + index]

        def open_stream(dataset: int, position: dict | None) -> Stream:
            return self._datasets[dataset].open_stream(index, skips, position)

        return BlendedStream(self.names, dataset_of, open_stream, position or BLEND_START)
