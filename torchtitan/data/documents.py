"""Records of documents: the text or row, or why it is skipped; and the count of the skipped."""

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torchtitan.tools.logging import logger

# How many skipped documents a loader process names one by one; from then on it reports how many
# they have become at 10, 100, 1,000, ... (some data never ends, so no epoch's summary may come).
NAMED_SKIPS = 3

KINDS = {
    list: "a list",
    dict: "an object",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


@dataclass(frozen=True)
class Record:
    """One document. Exactly one of text, row and problem is set.

    where: place for log lines and errors ("data.jsonl line 7")
    text: usable text
    row: all fields, of a conversation
    problem: why the document is skipped
    found: content in place of the text, where a problem with the text key leaves that open
    """

    where: str
    text: str = ""
    problem: str = ""
    found: str = ""
    row: Mapping | None = None

    @property
    def details(self) -> str:
        return self.problem + (f" ({self.found})" if self.found else "")


def record_of_text(where: str, text: object, text_key: str) -> Record:
    """Record of the value under the text key, checked."""
    if not isinstance(text, str):
        found = f"it is {KINDS.get(type(text), 'a ' + type(text).__name__)}"
        return Record(where, problem=f"'{text_key}' is not a string", found=found)
    if not text.strip():
        return Record(where, problem="empty text")
    try:
        text.encode()  # JSON can spell half a surrogate pair, which is not a character
    except UnicodeEncodeError:
        return Record(where, problem="wrong encoding")
    return Record(where, text=text)


def keys_there(keys: Iterable[str]) -> str:
    """Part of an error sentence that lists the keys, the first few of many."""
    names = [str(key)[:40] for key in itertools.islice(keys, 9)]
    listed = ", ".join(names[:8]) + (", ..." if names[8:] else "")
    return f"they have: {listed}" if names else "they have no keys"


class Rows(Protocol):
    """How rows of files become records.

    columns: those of a parquet file that are read; None = all
    key: names what a row must have, in errors
    """

    @property
    def columns(self) -> list[str] | None: ...

    @property
    def key(self) -> str: ...

    def record(self, where: str, fields: Mapping) -> Record: ...


@dataclass(frozen=True)
class TextRows:
    """Rows with a text under `key`."""

    key: str

    @property
    def columns(self) -> list[str]:
        return [self.key]

    def record(self, where: str, fields: Mapping) -> Record:
        if self.key not in fields:
            return Record(where, problem=f"no '{self.key}' key", found=keys_there(fields))
        return record_of_text(where, fields[self.key], self.key)


def record_of_bytes(where: str, data: bytes, text_key: str) -> Record:
    try:
        return record_of_text(where, data.decode("utf-8-sig"), text_key)
    except UnicodeDecodeError:
        return Record(where, problem="wrong encoding")


def record_of_json_line(where: str, line: bytes, rows: Rows) -> Record:
    try:
        content = line.decode("utf-8-sig")  # some tools start a file with a byte order mark
    except UnicodeDecodeError:
        return Record(where, problem="wrong encoding")
    if not content.strip():
        return Record(where, problem="empty line")
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError):
        return Record(where, problem="broken JSON")
    if not isinstance(fields, dict):
        return Record(where, problem="not a JSON object")
    return rows.record(where, fields)


class Skips:
    """Count of the documents that a loader process has skipped since it started. The log names the
    first few, then their number as it grows.

    quiet: no log lines
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self.counts: Counter[str] = Counter()
        self.first: Record | None = None
        self._next_report = 10

    def add(self, record: Record) -> None:
        self.counts[record.problem] += 1
        self.first = self.first or record
        total = self.counts.total()
        if self._quiet:
            return
        if total <= NAMED_SKIPS:
            rest = "; further ones are counted" if total == NAMED_SKIPS else ""
            logger.warning(f"Skipped {record.where}: {record.problem}{rest}")
        elif total == self._next_report:
            self._next_report *= 10
            logger.warning(
                f"Skipped {total:,} documents so far ({self}), the last: "
                f"{record.where}: {record.problem}"
            )

    def __str__(self) -> str:
        return ", ".join(f"{number:,} {problem}" for problem, number in self.counts.most_common())
