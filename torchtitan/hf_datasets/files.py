"""Local files of documents: JSON lines, parquet and plain text, found by path and read by place."""

import functools
import glob
import gzip
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from torchtitan.hf_datasets.records import (
    Record,
    record_of_bytes,
    record_of_json_line,
    record_of_text,
)
from torchtitan.tools.errors import UserError

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet", ".txt")


class DocumentFile(ABC):
    """One file. `length` is its number of places, or None where only reading to the end tells."""

    length: int | None

    def __init__(self, path: Path, text_key: str) -> None:
        self.path = path
        self.text_key = text_key
        self.size = path.stat().st_size

    @abstractmethod
    def records(self, start: int, keep: Callable[[int], bool]) -> Iterator[tuple[int, Record]]:
        """(place, record) from place `start` on, for the places that `keep` wants."""


class IndexedFile(DocumentFile):
    """A file any of whose documents can be read at once."""

    length: int

    @abstractmethod
    def read(self, place: int) -> Record: ...

    def records(self, start: int, keep: Callable[[int], bool]) -> Iterator[tuple[int, Record]]:
        return ((place, self.read(place)) for place in range(start, self.length) if keep(place))


class JsonLinesFile(IndexedFile):
    """One JSON object a line. In memory: where each line starts, eight bytes a line."""

    def __init__(self, path: Path, text_key: str) -> None:
        super().__init__(path, text_key)
        self._bounds = _line_bounds(path)
        self.length = len(self._bounds) - 1

    def read(self, place: int) -> Record:
        start, end = int(self._bounds[place]), int(self._bounds[place + 1])
        with self.path.open("rb") as file:
            file.seek(start)
            line = file.read(end - start)
        return record_of_json_line(f"{self.path} line {place + 1}", line, self.text_key)


class ParquetFile(IndexedFile):
    """A column of strings. A document costs the reading of its row group, the last few are kept."""

    def __init__(self, path: Path, text_key: str) -> None:
        super().__init__(path, text_key)
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                meta = file.metadata
                self._has_text = text_key in file.schema_arrow.names
        except pyarrow.ArrowException as error:
            raise OSError(f"it is no parquet file ({str(error)[:80]})") from error
        rows = [meta.row_group(group).num_rows for group in range(meta.num_row_groups)]
        self._bounds = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])
        self.length = meta.num_rows

    def read(self, place: int) -> Record:
        where = f"{self.path} row {place + 1}"
        if not self._has_text:
            return Record(where, problem=f"no '{self.text_key}' key")
        group = int(np.searchsorted(self._bounds, place, side="right")) - 1
        try:
            column = _read_row_group(str(self.path), group, self.text_key)
            text = column[place - int(self._bounds[group])].as_py()
        except UnicodeDecodeError:
            return Record(where, problem="wrong encoding")
        except (pyarrow.ArrowException, OSError):
            return Record(where, problem="unreadable row group")
        return record_of_text(where, text, self.text_key)


class TextFile(IndexedFile):
    """A whole file of plain text is one document."""

    length = 1

    def read(self, place: int) -> Record:
        return record_of_bytes(str(self.path), self.path.read_bytes(), "the file")


class GzipLinesFile(DocumentFile):
    """Compressed JSON lines, read from the front; what comes after damage is lost."""

    length = None

    def records(self, start: int, keep: Callable[[int], bool]) -> Iterator[tuple[int, Record]]:
        place = -1
        try:
            with gzip.open(self.path, "rb") as lines:
                for place, line in enumerate(lines):
                    if place >= start and keep(place):
                        where = f"{self.path} line {place + 1}"
                        yield place, record_of_json_line(where, line, self.text_key)
        except (EOFError, OSError, zlib.error):
            damaged = place + 1
            if damaged >= start and keep(damaged):
                where = f"{self.path} after line {damaged}"
                yield damaged, Record(where, problem="unreadable gzip")


def find_files(path: str, pattern: str | None = None) -> list[Path]:
    """The files that training.dataset_path means: a file, all below a folder, or a glob; sorted.

    `pattern` is a glob to prefer inside a folder, where it matches anything.
    """
    given = Path(path).expanduser()
    if given.is_dir():
        found = list(given.glob(pattern)) if pattern else []
        found = found or [file for file in given.rglob("*") if not _hidden(file, given)]
    elif given.exists():
        found = [given]
    else:
        found = [Path(name) for name in glob.glob(str(given), recursive=True)]
        if not found:
            raise UserError(
                f"training.dataset_path = '{path}' names no file, folder or glob that matches "
                "anything here; correct the path."
            )
    files = sorted(file for file in found if file.is_file() and file.name.endswith(SUFFIXES))
    if not files:
        raise UserError(
            f"training.dataset_path = '{path}' holds no file that ends in {', '.join(SUFFIXES)}; "
            "convert the documents to one of these (JSON lines are the simplest)."
        )
    return files


def open_file(path: Path, text_key: str) -> DocumentFile:
    """Raises OSError where the file cannot be read."""
    if path.name.endswith(".gz"):
        return GzipLinesFile(path, text_key)
    if path.name.endswith(".parquet"):
        return ParquetFile(path, text_key)
    if path.name.endswith(".txt"):
        return TextFile(path, text_key)
    return JsonLinesFile(path, text_key)


def _hidden(file: Path, root: Path) -> bool:
    """Caches and version control keep their files below names that start with a dot."""
    return any(part.startswith(".") for part in file.relative_to(root).parts)


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


# Content of files, not state: the same arguments always give the same column.
@functools.lru_cache(maxsize=4)
def _read_row_group(path: str, group: int, column: str) -> pyarrow.ChunkedArray:
    with pyarrow.parquet.ParquetFile(path) as file:
        return file.read_row_group(group, columns=[column]).column(column)
