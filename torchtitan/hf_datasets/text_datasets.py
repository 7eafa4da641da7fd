"""Packed text: documents become one stream of tokens, cut into training examples.

The stream of a loader process is `bos document eos bos document eos ...`, epoch after epoch. A
window of seq_len + 1 tokens gives input = window[:-1] and labels = window[1:]; the next window
starts on the last token of this one, so every token but the very first is a label exactly once.
"""

import json
from collections.abc import Iterator

import torch
from torch.distributed.checkpoint.stateful import Stateful
from torch.utils.data import IterableDataset, get_worker_info

from torchtitan.components.dataloader import SKIPPED, ParallelAwareDataLoader, build_dataloader
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.tokenizer import Tokenizer
from torchtitan.hf_datasets.catalog import open_source
from torchtitan.hf_datasets.records import Skips
from torchtitan.hf_datasets.sources import Reader, Shard, Source
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger

# Where a run starts. `reader` is the position of the current document (None: of the first one of
# the epoch), `token` how many of its tokens are read, `carry` the last token of the last window.
START = {"epoch": 0, "reader": None, "token": 0, "documents": 0, "skipped": {}, "carry": []}

Example = tuple[dict[str, torch.Tensor], torch.Tensor]


class TextDataset(IterableDataset, Stateful):
    """The examples of one data-parallel rank: ({"input": int64 [seq_len]}, int64 labels [seq_len]).

    Beside "input" stands SKIPPED, how many documents were skipped since this process's last
    example: a sum that the loader takes out again, over however many processes.
    infinite=True goes on with the next epoch, in a new order, without a gap. infinite=False ends
    after one epoch; its last example is filled up, and the filling has the label IGNORE_INDEX.
    Each `iter()` begins at the loaded state, once, and otherwise at the start.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        seq_len: int,
        *,
        dp_rank: int = 0,
        dp_degree: int = 1,
        seed: int = 0,
        infinite: bool = True,
    ) -> None:
        self.source = source
        self.tokenizer = tokenizer
        self.seq_len = seq_len
        self.dp_rank = dp_rank
        self.dp_degree = dp_degree
        self.seed = seed
        self.infinite = infinite
        self._position: dict = START
        self._loaded: dict | None = None

    def identity(self) -> dict:
        """What the meaning of a state depends on, for the loader to compare on resume."""
        return {
            "training.seed": self.seed,
            **self.tokenizer.identity(),
            **self.source.identity(),
        }

    def state_dict(self) -> dict:
        # One string: torchdata ships changes of nested dictionaries between processes, and a key
        # that disappears (a new epoch's `skipped`) would stay behind.
        return {"position": json.dumps(self._position)}

    def load_state_dict(self, state: dict) -> None:
        self._position = self._loaded = json.loads(state["position"])

    def __iter__(self) -> Iterator[Example]:
        # Not a generator itself: the loaded state is used up now, not at the first example.
        self._position, self._loaded = self._loaded or START, None
        return self._examples(self._position)

    def _examples(self, state: dict) -> Iterator[Example]:
        stream = _TokenStream(self, self._shard(), state)
        carry: list[int] = state["carry"]
        while True:
            window = carry + stream.take(self.seq_len + 1 - len(carry))
            if len(window) < 2:  # nothing left that could be a label
                return
            carry = window[-1:]
            self._position = {**stream.position(), "carry": carry}
            yield self._example(window, stream.take_skipped())
            if len(window) <= self.seq_len:  # filled up: the end of finite data
                return

    def _shard(self) -> Shard:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        return Shard(self.dp_rank, self.dp_degree, worker, num_workers)

    def _example(self, window: list[int], skipped: int) -> Example:
        missing = self.seq_len + 1 - len(window)
        fill = next((i for i in (self.tokenizer.pad_id, self.tokenizer.eos_id) if i is not None), 0)
        inputs = window[:-1] + [fill] * missing
        labels = window[1:] + [IGNORE_INDEX] * missing
        return (
            {"input": torch.tensor(inputs), SKIPPED: torch.tensor(skipped)},
            torch.tensor(labels),
        )


class _TokenStream:
    """The tokens of a loader process, document after document, epoch after epoch."""

    def __init__(self, dataset: TextDataset, shard: Shard, state: dict) -> None:
        self._dataset = dataset
        self._shard = shard
        self._skips = Skips()
        self._open_epoch(state["epoch"])
        self._skips.start_epoch(state["skipped"])
        self._documents: int = state["documents"]
        self._tokens: list[int] = []
        self._token = 0
        if state["reader"] is not None:  # in the middle of a document: read it again
            self._reader.load_state_dict(state["reader"])
            self._documents -= 1
            self._next_document()
            self._token = state["token"]

    def take(self, count: int) -> list[int]:
        """The next `count` tokens; fewer only where the data ends."""
        taken: list[int] = []
        while len(taken) < count:
            if self._token >= len(self._tokens) and not self._next_document():
                break
            piece = self._tokens[self._token : self._token + count - len(taken)]
            self._token += len(piece)
            taken += piece
        return taken

    def take_skipped(self) -> int:
        """How many documents were skipped since the last call."""
        return self._skips.take_new()

    def position(self) -> dict:
        return {
            "epoch": self._epoch,
            "reader": self._document_start,
            "token": self._token,
            "documents": self._documents,
            "skipped": dict(self._skips.counts),
        }

    def _open_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._documents = 0
        self._document_start: dict | None = None
        self._skips.start_epoch({})
        self._reader: Reader = self._dataset.source.open(self._dataset.seed, epoch, self._shard)

    def _next_document(self) -> bool:
        """Tokenise the next usable document; False at the end of finite data."""
        while True:
            start = self._reader.state_dict()
            record = next(self._reader, None)
            if record is None:
                self._finish_epoch()
                if not self._dataset.infinite:
                    return False
                self._open_epoch(self._epoch + 1)
            elif record.problem:
                self._skips.add(record)
            else:
                break
        tokenizer = self._dataset.tokenizer
        self._tokens = tokenizer.encode(
            record.text,
            add_bos=tokenizer.bos_id is not None,
            add_eos=tokenizer.eos_id is not None,
        )
        self._token, self._document_start = 0, start
        self._documents += 1
        return True

    def _finish_epoch(self) -> None:
        name, shard = self._dataset.source.name, self._shard
        place = f"loader process {shard.index + 1} of {shard.count}"
        if not self._documents:
            raise UserError(
                f"training.dataset '{name}' had no usable document for {place} in epoch "
                f"{self._epoch} (skipped: {self._skips or 'none'}); give it more documents, or "
                "lower the data-parallel degree or training.dataset_num_workers."
            )
        if self._skips.counts:
            logger.warning(
                f"Data {name}, epoch {self._epoch}, {place}: {self._documents:,} documents read, "
                f"{self._skips.counts.total():,} skipped ({self._skips})"
            )


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
    infinite: bool = True,
) -> ParallelAwareDataLoader:
    """Batches ({"input": [batch_size, seq_len]}, labels [batch_size, seq_len]) of this rank."""
    source = open_source(dataset_name, dataset_path, text_key)
    source.check_shards(dp_degree, max(1, num_workers))
    dataset = TextDataset(
        source,
        tokenizer,
        seq_len,
        dp_rank=dp_rank,
        dp_degree=dp_degree,
        seed=seed,
        infinite=infinite,
    )
    return build_dataloader(
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        dp_rank=dp_rank,
        dp_degree=dp_degree,
    )
