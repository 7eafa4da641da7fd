"""One document as it was found: its text, or why it is skipped; and the count of the skipped."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torchtitan.tools.logging import logger

# How many skipped documents a loader process names one by one; from then on it reports how many
# they have become at 10, 100, 1,000, ... (some data never ends, so no epoch's summary may come).
NAMED_SKIPS = 3


@dataclass(frozen=True)
class Record:
    """`where` is for people ("data.jsonl line 7"); exactly one of text and problem is set."""

    where: str
    text: str = ""
    problem: str = ""


def record_of_text(where: str, text: object, text_key: str) -> Record:
    """Check what stood under the text key."""
    if not isinstance(text, str):
        return Record(where, problem=f"'{text_key}' is not a string")
    if not text.strip():
        return Record(where, problem="empty text")
    try:
        text.encode()  # JSON can spell half a surrogate pair, which is not a character
    except UnicodeEncodeError:
        return Record(where, problem="wrong encoding")
    return Record(where, text=text)


def record_of_fields(where: str, fields: Mapping, text_key: str) -> Record:
    if text_key not in fields:
        return Record(where, problem=f"no '{text_key}' key")
    return record_of_text(where, fields[text_key], text_key)


def record_of_bytes(where: str, data: bytes, text_key: str) -> Record:
    try:
        return record_of_text(where, data.decode("utf-8-sig"), text_key)
    except UnicodeDecodeError:
        return Record(where, problem="wrong encoding")


def record_of_json_line(where: str, line: bytes, text_key: str) -> Record:
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
    return record_of_fields(where, fields, text_key)


class Skips:
    """What a loader process has skipped since it started: the first few are named in the log, then
    their number as it grows."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: Record | None = None
        self._next_report = 10

    def add(self, record: Record) -> None:
        self.counts[record.problem] += 1
        self.first = self.first or record
        total = self.counts.total()
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
