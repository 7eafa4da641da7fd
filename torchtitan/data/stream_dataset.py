"""The examples of one process, drawn from streams; its iterator knows the position it has reached.

Both kinds of dataset (text_datasets.py, blend.py) differ in how a stream is opened and checked.
The iterator has `state_dict` and `load_state_dict`, so `torchdata`'s StatefulDataLoader brings its
state from a worker process together with each batch.
"""

import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch.utils.data import IterableDataset

from torchtitan.data.documents import Skips
from torchtitan.data.packing import Packed
from torchtitan.data.rank_slice import RankSlice
from torchtitan.data.settings import DataSettings
from torchtitan.data.tokenizer import Tokenizer
from torchtitan.ops.attention import number_documents
from torchtitan.ops.cross_entropy import IGNORE_INDEX

Example = tuple[dict[str, torch.Tensor], torch.Tensor]


class Stream(Protocol):
    """Sequences of one stream, in order.

    skipped: unusable documents that were passed over for the last sequence
    dataset: name of the dataset of a blend that gave the last sequence; None without a blend
    """

    skipped: int
    dataset: str | None

    def sequence(self, number: int) -> Packed | None:
        """seq_len labels at most; None at the end of finite data."""
        ...

    def position(self) -> dict:
        """Position behind the last sequence, of what JSON can hold."""
        ...


class StreamDataset(IterableDataset, ABC):
    """The examples of a rank slice: ({"input": int64 [seq_len]}, labels int64 [seq_len]).

    With conversations the first part also has "documents", int64 [seq_len]: the number of each
    token's conversation (or text) in the example; −1 = padding.

    Example n is sequence n // num_streams of stream n % num_streams. A process opens the streams
    that its examples come from. Where others take from one too, it makes their sequences of it and
    drops them.

    With `settings.infinite` each stream goes on with its next epoch, in a new order, without a gap.
    Without, it is a single pass: each rank ends when its own streams have, so ranks may get
    different numbers of batches, and whoever steps them together has to agree on the end. The last
    sequence of a stream is padded; padding has the label IGNORE_INDEX.

    settings: which data, and how it is cut
    num_streams: number of streams
    rank_slice: which examples
    names: names of the datasets of a blend; empty without a blend
    pad_id: token id of padding
    eos_id: token id that ends a document of text
    """

    names: tuple[str, ...] = ()
    pad_id: int
    eos_id: int | None

    def __init__(self, settings: DataSettings, num_streams: int, rank_slice: RankSlice) -> None:
        self.settings = settings
        self.num_streams = num_streams
        self.rank_slice = rank_slice
        self.start(0, {})

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Facts that the meaning of a position depends on; the loader compares them on resume."""

    @abstractmethod
    def open_stream(self, index: int, skips: Skips, position: dict | None) -> Stream:
        """Stream `index`, from a position on; None: from its start."""

    @abstractmethod
    def check_position(self, index: int, position: dict) -> None:
        """Raise ValueError (or KeyError, TypeError) where it is no position of stream `index`."""

    def resize(self, rank_slice: RankSlice, seq_len: int) -> None:
        """Cut the next iteration into these batches of `seq_len` tokens."""
        batch_size = rank_slice.batch_size
        self.settings = replace(self.settings, seq_len=seq_len, batch_size=batch_size)
        self.rank_slice = rank_slice

    def start(self, consumed: int, positions: dict[int, dict]) -> None:
        """Let each `iter()` from now on begin there.

        consumed: N, the examples of the run before it
        positions: position by stream; a stream that is not named begins at its start
        """
        for index, position in positions.items():
            self.check_position(index, position)
        self.consumed, self.positions = consumed, positions

    def __iter__(self) -> "ExampleIterator":
        return ExampleIterator(self)

    def use_tokens_of(self, tokenizer: Tokenizer) -> None:
        """Set `pad_id` and `eos_id`."""
        ids = (tokenizer.pad_id, tokenizer.eos_id)
        self.pad_id = next((i for i in ids if i is not None), 0)
        self.eos_id = tokenizer.eos_id

    def example(self, packed: Packed) -> Example:
        """Pad a sequence to seq_len."""
        missing = self.settings.seq_len - len(packed.labels)
        inputs = {"input": torch.tensor(packed.inputs + [self.pad_id] * missing)}
        if self.settings.with_chat:
            documents = packed.documents
            if documents is None:
                texts = torch.tensor([packed.inputs])
                documents = number_documents(texts, self.eos_id)[0].tolist()
            inputs["documents"] = torch.tensor(documents + [-1] * missing)
        return inputs, torch.tensor(packed.labels + [IGNORE_INDEX] * missing)


class ExampleIterator:
    """Iterates over the examples of this process. The state is the position behind the last one."""

    def __init__(self, dataset: StreamDataset) -> None:
        self._dataset = dataset
        positions = {index: json.dumps(p) for index, p in dataset.positions.items()}
        self._begin(dataset.consumed, 0, positions, 0, dict.fromkeys(dataset.names, 0))

    def _begin(
        self,
        consumed: int,
        examples: int,
        streams: dict[int, str],
        skipped: int,
        tokens_of: dict[str, int],
    ) -> None:
        self._consumed, self._examples = consumed, examples
        self._positions = streams
        self._skipped, self._tokens_of = skipped, tokens_of
        self._skips = Skips()
        self._open: dict[int, Stream] = {}
        rank_slice = self._dataset.rank_slice
        numbers = rank_slice.examples_here(consumed)
        self._running = rank_slice.streams(self._dataset.num_streams, numbers)
        numbers = rank_slice.examples_here(consumed)
        self._numbers: Iterator[int] = itertools.islice(numbers, examples, None)

    def __iter__(self) -> "ExampleIterator":
        return self

    def __next__(self) -> Example:
        while self._running:
            number, index = divmod(next(self._numbers), self._dataset.num_streams)
            self._examples += 1
            stream = self._stream(index)
            sequence = stream.sequence(number)
            if sequence is None:
                self._running.discard(index)
                continue
            self._positions[index] = json.dumps(stream.position())
            self._skipped += stream.skipped
            if stream.dataset is not None:
                self._tokens_of[stream.dataset] += len(sequence.labels)
            return self._dataset.example(sequence)
        raise StopIteration

    def _stream(self, index: int) -> Stream:
        if index not in self._open:
            text = self._positions.get(index)
            position = None if text is None else json.loads(text)
            self._open[index] = self._dataset.open_stream(index, self._skips, position)
        return self._open[index]

    def state_dict(self) -> dict[str, Any]:
        """Position of this process.

        consumed: examples of the run before this iteration
        examples: examples that this process has made since
        streams: position by stream as JSON, so that only the changed ones travel between processes
        skipped_documents: unusable documents passed over since
        tokens_of: tokens that each dataset of a blend has given since
        """
        return {
            "consumed": self._consumed,
            "examples": self._examples,
            "streams": dict(self._positions),
            "skipped_documents": self._skipped,
            "tokens_of": dict(self._tokens_of),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the state of a process with the same rank slice and worker index."""
        self._begin(
            state["consumed"],
            state["examples"],
            dict(state["streams"]),
            state["skipped_documents"],
            dict(state["tokens_of"]),
        )
