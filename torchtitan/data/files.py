"""Local files of documents: JSON lines, parquet and plain text, read by the index of a document."""

import gzip
import io
import itertools
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from torchtitan.data.documents import (
    Record,
    Rows,
    keys_there,
    record_of_bytes,
    record_of_json_line,
)
from torchtitan.data.fingerprint import fingerprint
from torchtitan.tools.errors import RunError


class DocumentFile(ABC):
    """One file of documents.

    length: number of documents, usable or not; None where only reading to the end tells
    path: where the file is
    rows: how its rows become records
    """

    length: int | None

    def __init__(self, path: Path, rows: Rows) -> None:
        self.path = path
        self.rows = rows
        self.size = path.stat().st_size
        self.name = path.name  # in checkpoints; from its folder on where a folder is read
        self.digest = fingerprint(path)

    def lost(self, error: object) -> RunError:
        """Error for a file that was whole when the run began, and isn't now."""
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        return RunError(
            f"{self.path} can't be read any more ({' '.join(str(reason).split())}); put the file "
            "back as it was and start the run again: it resumes from its newest checkpoint."
        )

    def open(self) -> io.BufferedReader:
        """Raises `RunError` where the file is gone or has another size than at the start."""
        try:
            file = self.path.open("rb")
        except OSError as error:
            raise self.lost(error) from None
        size = os.fstat(file.fileno()).st_size
        if size != self.size:
            file.close()
            raise self.lost(f"it had {self.size:,} bytes when the run began and has {size:,}")
        return file

    @abstractmethod
    def records(self, start: int, keep: Callable[[int], bool]) -> Iterator[tuple[int, Record]]:
        """(index, record) of the documents from index `start` on that `keep` accepts."""


class GroupedFile(DocumentFile):
    """A file that is read in groups of documents: how many each has, and its bytes in memory."""

    length: int
    group_rows: np.ndarray
    group_bytes: np.ndarray

    @abstractmethod
    def open_group(self, group: int) -> Callable[[int], Record]:
        """Read a group. The returned function gives its documents by row (0 is the group's first)
        and holds the group's memory for as long as it is kept."""


class IndexedFile(GroupedFile):
    """A file of which any document can be read alone: one group that takes no memory."""

    def __init__(self, path: Path, rows: Rows, length: int) -> None:
        super().__init__(path, rows)
        self.length = length
        self.group_rows, self.group_bytes = np.array([length]), np.array([0])

    @abstractmethod
    def read(self, index: int) -> Record: ...

    def open_group(self, group: int) -> Callable[[int], Record]:
        return self.read

    def records(self, start: int, keep: Callable[[int], bool]) -> Iterator[tuple[int, Record]]:
        return ((n, self.read(n)) for n in range(start, self.length) if keep(n))


class JsonLinesFile(IndexedFile):
    """One JSON object a line. In memory: where each line starts, eight bytes a line."""

    def __init__(self, path: Path, rows: Rows) -> None:
        self._bounds = _line_bounds(path)
        super().__init__(path, rows, len(self._bounds) - 1)

    def read(self, index: int) -> Record:
        start, end = int(self._bounds[index]), int(self._bounds[index + 1])
        try:
            with self.open() as file:
                file.seek(start)
                line = file.read(end - start)
        except OSError as error:
            raise self.lost(error) from None
        return record_of_json_line(f"{self.path} line {index + 1}", line, self.rows)


class ParquetFile(GroupedFile):
    """A column of strings, or all columns. One document costs the reading of its row group."""

    def __init__(self, path: Path, rows: Rows) -> None:
        super().__init__(path, rows)
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                meta = file.metadata
                self.schema = file.schema_arrow
        except pyarrow.ArrowException as error:
            raise OSError(f"it is no parquet file ({str(error)[:80]})") from error
        groups = [meta.row_group(number) for number in range(meta.num_row_groups)]
        paths = [meta.schema.column(number).path for number in range(meta.num_columns)]
        twice = [n for n in dict.fromkeys(self.schema.names) if self.schema.names.count(n) > 1]
        if twice:
            raise OSError(f"it has several columns named '{twice[0]}'")
        # A nested column has several, which start with its name; read and refused as no string.
        columns = self.schema.names if rows.columns is None else rows.columns
        self._columns = [name for name in columns if name in self.schema.names]
        ours = [
            n
            for n, path in enumerate(paths)
            if any(f"{path}.".startswith(f"{name}.") for name in self._columns)
        ]
        self.length = meta.num_rows
        self.group_rows = np.array([group.num_rows for group in groups], np.int64)
        self.group_bytes = np.array(
            [sum(group.column(n).total_uncompressed_size for n in ours) for group in groups],
            np.int64,
        )

    def open_group(self, group: int) -> Callable[[int], Record]:
        before = int(self.group_rows[:group].sum())
        table, problem = self._read_group(group)

        def read(row: int) -> Record:
            where = f"{self.path} row {before + row + 1}"
            if table is None:
                found = "" if self._columns else keys_there(self.schema.names)
                return Record(where, problem=problem, found=found)
            try:
                fields = {name: table.column(name)[row].as_py() for name in self._columns}
                return self.rows.record(where, fields)
            except UnicodeDecodeError:
                return Record(where, problem="wrong encoding")

        return read

    def _read_group(self, group: int) -> tuple[pyarrow.Table | None, str]:
        """The columns, or None and the reason."""
        if not self._columns:
            return None, f"no '{self.rows.key}' key"
        self.open().close()  # a file that is gone or changed is no damaged row group
        try:
            with pyarrow.parquet.ParquetFile(self.path) as file:
                table = file.read_row_group(group, columns=self._columns)
        except (pyarrow.ArrowException, OSError) as error:
            if getattr(error, "errno", None) is not None:  # of the disk or network, not of Arrow
                raise self.lost(error) from None
            return None, "unreadable row group"
        return table, ""

    def records(self, start: int, keep: Callable[[int], bool]) -> Iterator[tuple[int, Record]]:
        bounds = itertools.pairwise([0, *np.cumsum(self.group_rows).tolist()])
        for group, (first, end) in enumerate(bounds):
            rows = [row for row in range(max(first, start), end) if keep(row)]
            if rows:
                read = self.open_group(group)
                yield from ((row, read(row - first)) for row in rows)


class TextFile(IndexedFile):
    """A whole file of plain text is one document."""

    def __init__(self, path: Path, rows: Rows) -> None:
        super().__init__(path, rows, length=1)

    def read(self, index: int) -> Record:
        try:
            with self.open() as file:
                content = file.read()
        except OSError as error:
            raise self.lost(error) from None
        return record_of_bytes(str(self.path), content, "the file")


class GzipLinesFile(DocumentFile):
    """Compressed JSON lines, read from the front; what comes after damage is lost."""

    length = None

    def records(self, start: int, keep: Callable[[int], bool]) -> Iterator[tuple[int, Record]]:
        index = -1
        try:
            with self.open() as file, gzip.open(file, "rb") as lines:
                for index, line in enumerate(lines):
                    if index >= start and keep(index):
                        where = f"{self.path} line {index + 1}"
                        yield index, record_of_json_line(where, line, self.rows)
        except (EOFError, gzip.BadGzipFile, zlib.error):
            self.open().close()  # a file that has changed is no damaged one
            damaged = index + 1
            if damaged >= start and keep(damaged):
                where = f"{self.path} after line {damaged}"
                yield damaged, Record(where, problem="unreadable gzip")
        except OSError as error:
            raise self.lost(error) from None


def open_file(path: Path, rows: Rows) -> DocumentFile:
    """Raises OSError where the file cannot be read."""
    if path.name.endswith(".gz"):
        return GzipLinesFile(path, rows)
    if path.name.endswith(".parquet"):
        return ParquetFile(path, rows)
    if path.name.endswith(".txt"):
        return TextFile(path, rows)
    return JsonLinesFile(path, rows)


def _line_bounds(path: Path) -> np.ndarray:
    """Byte offsets of the starts of all lines and of the end of the last."""
    bounds, position = [np.zeros(1, np.int64)], 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n"))
            bounds.append(ends + (position + 1))
            position += len(chunk)
    if bounds[-1].size == 0 or bounds[-1][-1] != position:
        bounds.append(np.array([position], np.int64))  # the last line has no newline
    return np.concatenate(bounds)
