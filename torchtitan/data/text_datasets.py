"""Text as training examples: the windows of the lanes, and who takes which."""

import json
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import IterableDataset

from torchtitan.data.catalog import open_source
from torchtitan.data.dataloader import (
    POSITION,
    SKIPPED,
    ParallelAwareDataLoader,
    Share,
    build_dataloader,
)
from torchtitan.data.documents import Skips
from torchtitan.data.packing import START, Lane
from torchtitan.data.sources import Shard, Source
from torchtitan.data.tokenizer import Tokenizer
from torchtitan.ops.cross_entropy import IGNORE_INDEX
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger

Example = tuple[dict, torch.Tensor]


class TextDataset(IterableDataset):
    """The examples of a share: ({"input": int64 [seq_len]}, labels int64 [seq_len]).

    Beside "input" stand SKIPPED, an int64 scalar, and POSITION, which the loader takes out again.

    num_lanes None lets the source decide. A process opens the lanes that its share meets. Where
    others meet one too, it reads the others' windows of it and drops them.

    infinite=True goes on with the next epoch of each lane, in a new order, without a gap.
    infinite=False is a single pass: each rank ends when its own lanes have, so the ranks may get
    different numbers of batches, and whoever steps them together has to agree on the end. The last
    window of a lane is filled up, and the filling has the label IGNORE_INDEX.
    """

    names = ()  # of the datasets of a blend

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        seq_len: int,
        *,
        share: Share = Share(),  # noqa: B008 - it is frozen
        num_lanes: int | None = None,
        seed: int = 0,
        infinite: bool = True,
    ) -> None:
        self.source = source
        self.tokenizer = tokenizer
        self.seq_len = seq_len
        self.share = share
        self.num_lanes = source.num_lanes() if num_lanes is None else num_lanes
        self.seed = seed
        self.infinite = infinite
        self.start(0, {})
        source.check_lanes(self.num_lanes)

    def identity(self) -> dict:
        """What the meaning of a position depends on, for the loader to compare on resume."""
        return {
            "debug.seed": self.seed,
            "training.dataset_lanes": self.num_lanes,
            **self.tokenizer.identity(),
            **self.source.identity(),
        }

    def resize(self, share: Share, seq_len: int) -> None:
        self.share, self.seq_len = share, seq_len

    def start(self, consumed: int, lanes: dict[int, dict]) -> None:
        """Each `iter()` from now on begins behind `consumed` examples, at these positions."""
        for lane, position in lanes.items():
            if position.keys() != START.keys():
                raise ValueError(f"lane {lane} has {sorted(position)}")
        self._consumed, self._positions = consumed, lanes

    def __iter__(self) -> Iterator[Example]:
        # Not a generator itself: the position is taken now, not at the first example.
        return self._examples(self._consumed, self._positions)

    def _examples(self, consumed: int, positions: dict[int, dict]) -> Iterator[Example]:
        skips = Skips()
        lanes: dict[int, Lane] = {}
        running = self.share.lanes(self.num_lanes, self.share.examples_here(consumed))
        for n in self.share.examples_here(consumed):
            number, index = divmod(n, self.num_lanes)
            if index not in lanes:
                lanes[index] = self.open_lane(index, skips, positions.get(index, START))
            window = lanes[index].window(number)
            if window:
                yield self._example(window, lanes[index])
                continue
            running.discard(index)
            if not running:
                return

    def open_lane(self, index: int, skips: Skips, position: dict) -> Lane:
        return Lane(
            self.source,
            self.tokenizer,
            Shard(index, self.num_lanes),
            skips,
            seq_len=self.seq_len,
            seed=self.seed,
            infinite=self.infinite,
            position=position,
        )

    def _example(self, window: list[int], lane: Lane) -> Example:
        missing = self.seq_len + 1 - len(window)
        fill = next((i for i in (self.tokenizer.pad_id, self.tokenizer.eos_id) if i is not None), 0)
        inputs = window[:-1] + [fill] * missing
        labels = window[1:] + [IGNORE_INDEX] * missing
        example = {
            "input": torch.tensor(inputs),
            SKIPPED: torch.tensor(lane.skipped),
            POSITION: json.dumps(lane.position()),
        }
        return example, torch.tensor(labels)


def build_text_dataloader(
    *,
    dataset_name: str,
    dataset_path: str | None,
    text_key: str,
    tokenizer: Tokenizer,
    seq_len: int,
    batch_size: int,
    dp_rank: int,
    dp_degree: int,
    seed: int,
    num_workers: int,
    num_lanes: int | None = None,
    infinite: bool = True,
) -> ParallelAwareDataLoader:
    """Batches ({"input": [batch_size, seq_len]}, labels [batch_size, seq_len]) of this rank."""
    source = open_source(dataset_name, dataset_path, text_key)
    share = Share(dp_rank, dp_degree, batch_size, num_workers)
    dataset = TextDataset(
        source,
        tokenizer,
        seq_len,
        share=share,
        num_lanes=num_lanes,
        seed=seed,
        infinite=infinite,
    )
    loader = build_dataloader(dataset)
    report_lanes(source.name, dataset.num_lanes, share, [source])
    return loader


def report_lanes(name: str, lanes: int, share: Share, sources: Sequence[Source] = ()) -> None:
    """Say how many streams there are and, where this layout makes them several times, which number
    a new run could have instead: one that the `sources` accept."""
    logger.info(f"Data {name}: its documents form {lanes} streams (training.dataset_lanes)")
    times = share.times_made(lanes)
    if times < 2:
        return
    # Without workers only the ranks share; with them each batch is another process's.
    good = share.dp_degree if share.num_workers < 2 else share.processes * share.batch_size
    instead = good * max(1, round(lanes / good))
    advice = f"; a new run avoids it with training.dataset_lanes = {instead}"
    try:
        for source in sources:
            source.check_lanes(instead)
    except UserError:  # there are too few documents for it
        advice = ""
    logger.warning(
        f"Data {name}: {share.processes} processes read {lanes} streams, so each document is "
        f"tokenized {times:.1f} times, which costs time and changes no number{advice}; a run that "
        f"goes on from a checkpoint keeps its streams"
    )
