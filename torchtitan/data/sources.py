"""Sources of documents: which shard gets which ones, in which order, and how to resume.

Three kinds. Indexed files can be read at any index, so an epoch is one permutation of everything.
Row groups (parquet, parquet.py) are put in a new order and shuffled in those open together.
The hub and gzip files can only be read from the front, so they are shuffled window by window. A
reader yields the records of one epoch of one shard, and its state is the position of the next
record: read again from there, the same records follow. Each shard forms a stream of
data/dataloader.py: how many there are never depends on who reads them.
"""

import bisect
import copy
import itertools
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from torchtitan.data.documents import Record
from torchtitan.data.files import DocumentFile, IndexedFile
from torchtitan.data.identity import CONTENTS, REVISION
from torchtitan.data.permutation import order
from torchtitan.data.settings import DatasetSettings
from torchtitan.tools.errors import RunError, UserError
from torchtitan.tools.logging import logger

# Documents of the hub or of gzip files that are shuffled among each other, in all streams together
# (a process that reads every stream holds so many); read again when a run resumes.
WINDOW = 4096
# Seconds to wait before each new attempt at a hub dataset that has failed; `datasets` has made its
# own attempts before it lets a failure through.
RECONNECT_AFTER = (1, 2, 4, 8)
# A stream costs an open file and a line in the checkpoint. More are good for more ranks only, and
# 64 divide well among the usual powers of two.
MOST_STREAMS = 64
# Streams that differ by one document (or file) more or less are as good as equal from here on, and
# one bad document leaves others in its stream.
EVEN_PARTS = 16


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count` of a source; the documents of one stream."""

    index: int = 0
    count: int = 1


def choose_streams(possible: Iterable[int]) -> int:
    """The number with the largest power of two in it, and of those the largest: d ranks read none
    of S streams twice where d divides S, and d is mostly a power of two."""
    return max(possible, key=lambda streams: (streams & -streams, streams))


def streams_of_documents(documents: int, most: int = MOST_STREAMS) -> int:
    """Number of streams for documents that can be read one by one."""
    return choose_streams(range(1, max(1, min(most, MOST_STREAMS, documents // EVEN_PARTS)) + 1))


def streams_of_files(files: int) -> int:
    """Number of streams for files that are read whole: as many for each stream, or almost."""
    numbers = range(1, min(files, MOST_STREAMS) + 1)
    return choose_streams(n for n in numbers if files % n == 0 or files // n >= EVEN_PARTS)


class Reader(ABC):
    """Iterates over the records of one epoch of one shard."""

    def __iter__(self) -> "Reader":
        return self

    @abstractmethod
    def __next__(self) -> Record: ...

    @abstractmethod
    def state_dict(self) -> dict:
        """JSON-able position of the next record."""

    @abstractmethod
    def load_state_dict(self, state: dict) -> None: ...


class Source(ABC):
    """Documents of one dataset. Picklable: each loader process opens its own readers.

    settings: dataset, with the TOML table that errors name
    files: local files; none of the hub
    """

    def __init__(self, settings: DatasetSettings, files: Sequence[DocumentFile] = ()) -> None:
        self.settings = settings
        self.name = settings.label or settings.name  # for log lines and errors
        self.files = files

    @abstractmethod
    def identity(self) -> dict:
        """Facts that a position depends on: a checkpoint's must equal ours to resume from it."""

    @abstractmethod
    def open(self, seed: int, epoch: int, shard: Shard) -> Reader: ...

    def probe(self) -> Iterator[Record]:
        """Some documents, as cheaply as they come: is there anything usable at all?"""
        return self.open(0, 0, Shard())

    @abstractmethod
    def num_streams(self) -> int:
        """Number of shards that suits this source, by its data alone."""

    def check_streams(self, num_streams: int) -> None:  # noqa: B027 - the hub tells no length
        """Raise `UserError` where some stream would have nothing to read."""

    def check_enough(self, documents: int, num_streams: int) -> None:
        """Raise `UserError` where there are fewer documents than streams."""
        if documents < num_streams:
            raise UserError(
                f"training.dataset_lanes = {num_streams} must be at most {documents}, the number "
                f"of documents of {self.settings.toml_key('dataset')} '{self.name}'; lower it, or "
                "leave it unset."
            )


class IndexedFiles(Source):
    """All documents of files that can be read at any index, permuted as a whole."""

    def __init__(self, settings: DatasetSettings, files: Sequence[IndexedFile]) -> None:
        super().__init__(settings, files)
        self.files: Sequence[IndexedFile] = files
        self._ends = np.cumsum([file.length for file in files]).tolist()

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, document: int) -> Record:
        file = bisect.bisect_right(self._ends, document)
        before = self._ends[file - 1] if file else 0
        return self.files[file].read(document - before)

    def identity(self) -> dict:
        return {**identity_of_files(self.settings, self.files), "data documents": len(self)}

    def open(self, seed: int, epoch: int, shard: Shard) -> Reader:
        return _PermutedReader(self, seed, epoch, shard)

    def num_streams(self) -> int:
        return streams_of_documents(len(self))

    def check_streams(self, num_streams: int) -> None:
        self.check_enough(len(self), num_streams)


class _PermutedReader(Reader):
    """Document i of the epoch's order belongs to shard i modulo the number of shards."""

    def __init__(self, source: IndexedFiles, seed: int, epoch: int, shard: Shard) -> None:
        self._source = source
        self._order = order(len(source), seed, epoch)
        self._shard = shard
        self._taken = 0

    def __next__(self) -> Record:
        index = self._taken * self._shard.count + self._shard.index
        if index >= len(self._order):
            raise StopIteration
        self._taken += 1
        return self._source.read(self._order[index])

    def state_dict(self) -> dict:
        return {"taken": self._taken}

    def load_state_dict(self, state: dict) -> None:
        self._taken = state["taken"]


class StreamedFiles(Source):
    """Files of which some can only be read from the front (gzip), the files permuted.

    With no more shards than files each shard reads files of its own; otherwise all shards read all
    files and each keeps its lines.
    """

    def identity(self) -> dict:
        return identity_of_files(self.settings, self.files)

    def open(self, seed: int, epoch: int, shard: Shard) -> Reader:
        stream = self._stream(seed, epoch, shard)
        return WindowShuffledReader(stream, seed, epoch, window_of(shard))

    def num_streams(self) -> int:
        return streams_of_files(len(self.files))

    def probe(self) -> Iterator[Record]:
        return self._stream(0, 0, Shard())

    def _stream(self, seed: int, epoch: int, shard: Shard) -> Reader:
        numbers = list(order(len(self.files), seed, epoch))
        if shard.count <= len(numbers):
            return _FilesReader(self.files, numbers[shard.index :: shard.count], Shard())
        return _FilesReader(self.files, numbers, shard)


class _FilesReader(Reader):
    """Reads files in order; line j of file n belongs to shard n + j modulo the shards."""

    def __init__(self, files: Sequence[DocumentFile], numbers: list[int], shard: Shard) -> None:
        self._files = files
        self._numbers = numbers
        self._shard = shard
        self.load_state_dict({"file": 0, "line": 0})

    def __next__(self) -> Record:
        while self._file < len(self._numbers):
            if self._records is None:
                number = self._numbers[self._file]
                self._records = self._files[number].records(self._line, self._keep(number))
            for line, record in self._records:
                self._line = line + 1
                return record
            self._file, self._line, self._records = self._file + 1, 0, None
        raise StopIteration

    def _keep(self, number: int):
        count, index = self._shard.count, self._shard.index
        return lambda line: (number + line) % count == index

    def state_dict(self) -> dict:
        return {"file": self._file, "line": self._line}

    def load_state_dict(self, state: dict) -> None:
        self._file, self._line, self._records = state["file"], state["line"], None


class HubStream(Source):
    """A streaming `datasets.IterableDataset`.

    `datasets` splits it by files, or by documents where there are fewer files than shards. Its own
    shuffle forgets its buffer when a run resumes, so the windows are shuffled here.

    settings: name on the hub or alias, and the text key
    dataset: the opened dataset
    """

    def __init__(self, settings: DatasetSettings, dataset) -> None:
        super().__init__(settings)
        self.name = settings.name.partition("@")[0]
        self._dataset = dataset
        self._revision = revision_of(dataset)

    def identity(self) -> dict:
        """Facts that `datasets` tells without reading. Off the hub, a change of the documents alone
        stays unseen; on it, the revision shows it."""
        info, split = self._dataset.info, str(self._dataset.split)
        known = (info.splits or {}).get(split)
        return {
            "training.dataset": self.name,
            **self.settings.identity(),
            "data config": info.config_name,
            "data split": split,
            "data files": self._dataset.num_shards,
            "data documents": known and known.num_examples,
        } | ({REVISION: self._revision} if self._revision else {})

    def open(self, seed: int, epoch: int, shard: Shard) -> Reader:
        return WindowShuffledReader(self._stream(shard), seed, epoch, window_of(shard))

    def num_streams(self) -> int:
        return streams_of_files(self._dataset.num_shards)

    def probe(self) -> Iterator[Record]:
        return self._stream(Shard())

    def _stream(self, shard: Shard) -> Reader:
        from datasets.distributed import split_dataset_by_node

        own = copy.deepcopy(self._dataset)  # an iteration leaves its position in the object
        if shard.count <= own.num_shards:
            own = own.shard(shard.count, shard.index, contiguous=False)
        else:
            own = split_dataset_by_node(own, rank=shard.index, world_size=shard.count)
        return _HubReader(self, own)


class _HubReader(Reader):
    def __init__(self, source: HubStream, dataset) -> None:
        self._name = source.name
        self._settings = source.settings
        self._dataset = dataset
        self.load_state_dict({"number": 0, "dataset": None})

    def __next__(self) -> Record:
        fields = {key: column[0] for key, column in self._next_example().items()}
        self._number += 1
        where = f"{self._name}, document {self._number} of this stream"
        return self._settings.rows.record(where, fields)

    def _next_example(self) -> dict:
        """Read an example; after a failure open the dataset again behind the last one, several
        times."""
        for seconds in (*RECONNECT_AFTER, None):
            try:
                if self._examples is None:
                    # Plain `iter` would split the files over the loader's workers once more.
                    self._examples = self._dataset.iter(batch_size=1)
                example = next(self._examples)
                self._has_begun = True
                return example
            except StopIteration:
                raise
            except Exception as error:  # clients of networks have no common class for theirs
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            key = self._settings.toml_key("dataset")
            where = f"{key} '{self._name}' behind document {self._number} of a stream"
            if seconds is None:
                raise RunError(
                    f"{where} can't be read any more ({reason}), after {len(RECONNECT_AFTER)} new "
                    "attempts; check the network and the data set and start the run again: it goes "
                    "on from its newest checkpoint."
                )
            logger.warning(f"{where} can't be read ({reason}); the next attempt in {seconds} s")
            time.sleep(seconds)
            self.load_state_dict(self.state_dict())
        raise AssertionError("the last attempt returns or raises")

    def state_dict(self) -> dict:
        if not self._has_begun:  # `datasets` tells a loaded position only once it iterates
            return self._loaded
        return {"number": self._number, "dataset": self._dataset.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self._loaded = state
        self._number, self._examples, self._has_begun = state["number"], None, False
        if state["dataset"] is not None:
            self._dataset.load_state_dict(state["dataset"])


class WindowShuffledReader(Reader):
    """Shuffles a stream window by window. The state is where the window began and how many of it
    were taken, so resuming reads the window again and loses or repeats nothing."""

    def __init__(self, stream: Reader, seed: int, epoch: int, window: int) -> None:
        self._stream = stream
        self._key = (seed, epoch)
        self._size = window
        self._number = -1  # of the current window; -1 is an empty one before the first
        self._start = stream.state_dict()
        self._window: list[Record] = []
        self._taken = 0

    def __next__(self) -> Record:
        if self._taken == len(self._window):
            self._fill(self._number + 1)
            if not self._window:
                raise StopIteration
        self._taken += 1
        return self._window[self._order[self._taken - 1]]

    def _fill(self, number: int) -> None:
        self._number = number
        self._start = self._stream.state_dict()
        self._window = list(itertools.islice(self._stream, self._size))
        self._order = order(len(self._window), *self._key, number)
        self._taken = 0

    def state_dict(self) -> dict:
        return {"stream": self._start, "window": self._number, "taken": self._taken}

    def load_state_dict(self, state: dict) -> None:
        self._stream.load_state_dict(state["stream"])
        self._number, self._window, self._taken = state["window"], [], 0
        if self._number >= 0:
            self._fill(self._number)
            self._taken = state["taken"]


def identity_of_files(settings: DatasetSettings, files: Sequence[DocumentFile]) -> dict:
    return {
        **settings.identity(),
        "data files": len(files),
        "data bytes": sum(file.size for file in files),
        CONTENTS: [[file.name, file.size, file.digest] for file in files],
    }


def revision_of(dataset) -> str | None:
    """Commit of a streamed dataset of the hub, by the addresses of its files."""
    addresses = str(getattr(getattr(dataset, "_ex_iterable", None), "kwargs", ""))
    found = re.search(r"hf://datasets/[^@'\"]+@([^/'\"]+)/", addresses)
    return found[1] if found else None


def window_of(shard: Shard) -> int:
    return max(1, WINDOW // shard.count)
