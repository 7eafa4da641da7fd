"""Parquet can only be read by whole row groups: what is open together is shuffled together.

Each epoch puts the row groups of all files in a new order, which lines up all documents. Each
shard owns an equal range of that line, so it reads few groups besides its own. It walks its
range pool by pool: as many groups as fit into its part of POOL_BYTES are open, and their
documents come in a permuted order. A group is read once an epoch (once by each shard where a
border of ranges falls into it), and the position of a document is computed, so resuming reads
nothing twice.
"""

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from torchtitan.data.documents import Record
from torchtitan.data.files import GroupedFile
from torchtitan.data.permutation import order
from torchtitan.data.settings import DatasetSettings
from torchtitan.data.sources import (
    Reader,
    Shard,
    Source,
    identity_of_files,
    streams_of_documents,
)

# Text held open by all streams together: some 120,000 web pages. A stream holds a row group at
# least.
# Changing it changes the order of everybody's resumed runs.
POOL_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Piece:
    """Rows of one row group that one shard reads."""

    file: GroupedFile
    group: int
    first: int
    rows: int
    size: int  # bytes in memory: the whole group's, however few the rows


class GroupedFiles(Source):
    """Files that are read in groups, parquet first of all; others beside it are one group each."""

    def __init__(self, settings: DatasetSettings, files: Sequence[GroupedFile]) -> None:
        super().__init__(settings, files)
        self.files: Sequence[GroupedFile] = files
        self._groups = [(file, n) for file in files for n in range(len(file.group_rows))]
        self._rows = np.concatenate([file.group_rows for file in files])
        self._lines: dict[tuple[int, int], np.ndarray] = {}

    def __len__(self) -> int:
        return int(self._rows.sum())

    def identity(self) -> dict:
        return {**identity_of_files(self.settings, self.files), "data documents": len(self)}

    def open(self, seed: int, epoch: int, shard: Shard) -> Reader:
        pools = _pools(self._pieces(seed, epoch, shard), POOL_BYTES // shard.count)
        return _PoolReader(pools, seed, epoch)

    def num_streams(self) -> int:
        """Number of streams that leaves each a row group of its own, and holds those in memory."""
        group_bytes = sum(int(file.group_bytes.sum()) for file in self.files) / len(self._groups)
        most = min(len(self._groups), int(POOL_BYTES / max(1, group_bytes)))
        return streams_of_documents(len(self), most)

    def check_streams(self, num_streams: int) -> None:
        self.check_enough(len(self), num_streams)

    def _line(self, seed: int, epoch: int) -> np.ndarray:
        """All row groups in the epoch's order, kept for the streams that come to it next."""
        if (seed, epoch) not in self._lines:
            while len(self._lines) > 1:
                del self._lines[min(self._lines)]
            line = order(len(self._groups), seed, epoch)
            self._lines[seed, epoch] = np.fromiter(line, np.int64)
        return self._lines[seed, epoch]

    def _pieces(self, seed: int, epoch: int, shard: Shard) -> list[Piece]:
        """The shard's range of the epoch's line; no two shards differ by more than a document."""
        groups = self._line(seed, epoch)
        ends = np.cumsum(self._rows[groups])
        begins = ends - self._rows[groups]
        low, high = (len(self) * index // shard.count for index in (shard.index, shard.index + 1))
        firsts = np.maximum(begins, low) - begins
        rows = np.minimum(ends, high) - begins - firsts
        pieces = []
        for n in np.flatnonzero(rows > 0):
            file, group = self._groups[groups[n]]
            size = int(file.group_bytes[group])
            pieces.append(Piece(file, group, int(firsts[n]), int(rows[n]), size))
        return pieces


def _pools(pieces: list[Piece], pool_bytes: int) -> list[list[Piece]]:
    pools: list[list[Piece]] = []
    room = 0
    for piece in pieces:
        if not pools or piece.size > room:
            pools.append([])
            room = pool_bytes
        pools[-1].append(piece)
        room -= piece.size
    return pools


class _PoolReader(Reader):
    """Document i of a shard lies in the pool that i falls into, at a permuted index there."""

    def __init__(self, pools: list[list[Piece]], seed: int, epoch: int) -> None:
        self._pools = pools
        self._ends = np.cumsum([sum(piece.rows for piece in pool) for pool in pools]).tolist()
        self._key = (seed, epoch)
        self._taken = 0
        self._number = -1  # of the open pool

    def __next__(self) -> Record:
        number = bisect.bisect_right(self._ends, self._taken)
        if number == len(self._pools):
            raise StopIteration
        if number != self._number:
            self._open(number)
        row = self._order[self._taken - self._begin]
        self._taken += 1
        index = bisect.bisect_right(self._piece_ends, row)
        piece = self._pools[number][index]
        if index not in self._read:
            self._read[index] = piece.file.open_group(piece.group)
        return self._read[index](row - self._piece_ends[index] + piece.rows + piece.first)

    def _open(self, number: int) -> None:
        self._number = number
        self._begin = self._ends[number - 1] if number else 0
        self._piece_ends = np.cumsum([piece.rows for piece in self._pools[number]]).tolist()
        # The groups themselves were permuted under window 0.
        self._order = order(self._piece_ends[-1], *self._key, window=number + 1)
        # Filled as the documents ask; the last pool's groups are let go here.
        self._read: dict[int, Callable[[int], Record]] = {}

    def state_dict(self) -> dict:
        return {"taken": self._taken}

    def load_state_dict(self, state: dict) -> None:
        self._taken = state["taken"]
