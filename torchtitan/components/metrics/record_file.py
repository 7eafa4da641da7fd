"""Files that grow by a record per logged step: metrics.jsonl, and TensorBoard's event files.

A failing disk never ends a run: records wait in memory until they can be written. The file is
opened for each of them, so a file that was removed is created again, and a record is never written
in part.
"""

import json
import os
import re
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from torchtitan.tools.disk import SideOutput, whole_or_none
from torchtitan.tools.logging import logger

MAX_WAITING = 1000  # records in memory; with 60 layers and TensorBoard's image some 50 kB each


class RecordFile:
    """Appends records to `path`, which is created with its folder.

    Nothing here raises `OSError`: a failure is logged once, and everything that failed is tried
    again at the next record.

    before: called before the first record.
    """

    def __init__(self, path: Path, before: Callable[[], None] | None = None) -> None:
        self.path = path
        self._todo = [before] if before else []
        self._waiting: deque[tuple[int, bytes]] = deque()
        self._lost = 0
        self._size = 0
        self._output = SideOutput(str(path), path.parent, "its records follow when it can be")
        self._write_waiting()

    def append(self, step: int, record: bytes) -> None:
        self._waiting.append((step, record))
        if len(self._waiting) > MAX_WAITING:
            self._waiting.popleft()
            self._lost += 1
        self._write_waiting()

    def rewind(self, step: int, take_back: Callable[[], None]) -> None:
        """Remove the records of steps after `step`, which are done again.

        take_back: removes them from the file.
        """
        self._waiting = deque(each for each in self._waiting if each[0] <= step)
        self._todo.append(take_back)
        self._write_waiting()

    def close(self) -> None:
        if self._waiting or self._todo:
            self._write_waiting()
        missing = self._lost + len(self._waiting)
        if missing:
            logger.warning("%s lacks %d records that could not be written", self.path, missing)

    def _write_waiting(self) -> None:
        with self._output.attempt():
            while self._todo:
                self._todo[0]()
                del self._todo[0]
                self._size = self.path.stat().st_size if self.path.exists() else 0
            self._append(b"".join(record for _, record in self._waiting))
            self._waiting.clear()

    def _append(self, data: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size < self._size:
                logger.warning("%s was removed or shortened; a new one is begun", self.path)
            elif size > self._size and self._output.failing:  # the rest of a failed attempt
                file.truncate(self._size)
                size = self._size
            view = memoryview(data)
            try:
                while view:
                    view = view[file.write(view) :]
            except OSError:
                with suppress(OSError):
                    file.truncate(size)
                raise
            self._size = size + len(data)


# -----------------------------------------------------------------------------
# JSON lines of an earlier run, or of repeated steps


def move_aside(path: Path) -> None:
    """Rename an earlier run's file to the next free number; one without a record is left alone."""
    if not path.is_file() or path.stat().st_size == 0:
        return
    pattern = re.compile(rf"{re.escape(path.stem)}\.(\d+){re.escape(path.suffix)}")
    found = [pattern.fullmatch(other.name) for other in path.parent.iterdir()]
    number = 1 + max((int(match[1]) for match in found if match), default=0)
    kept = path.rename(path.with_name(f"{path.stem}.{number}{path.suffix}"))
    logger.info(f"metrics: {path} of an earlier run is now {kept.name}")


def take_back(path: Path, step: int) -> None:
    """Keep each step up to `step` once, and remove later ones, which the run does again.

    Removed records are added to `<stem>.replaced.jsonl`: they may be the only trace of a run that
    failed. A line cut off by a kill is removed, too.
    """
    if not path.exists():
        return
    kept, replaced, torn = _sort_out(path.read_bytes(), step)
    if torn:
        logger.warning(f"{path}: dropped {torn} bytes that are not a whole record")
    if not replaced and not torn:
        return
    beside = path.with_name(path.name + ".tmp")
    with whole_or_none(beside):
        beside.write_bytes(b"".join(kept))
        if replaced:
            others = path.with_name(f"{path.stem}.replaced{path.suffix}")
            with others.open("ab") as file:
                file.writelines(replaced)
            logger.info(
                f"metrics: {len(replaced)} records of {path} are now in {others.name}; the run "
                f"repeats the steps after step {step}"
            )
        beside.replace(path)


def _sort_out(content: bytes, step: int) -> tuple[list[bytes], list[bytes], int]:
    """Return the lines that stay, the lines of repeated steps, and the number of other bytes."""
    kept: list[tuple[int, bytes]] = []
    replaced: list[bytes] = []
    torn = 0
    for line in content.splitlines(keepends=True):
        number = _step_of(line)
        if number is None:
            torn += len(line)
            continue
        while kept and kept[-1][0] >= number:
            replaced.append(kept.pop()[1])
        if number <= step:
            kept.append((number, line))
        else:
            replaced.append(line)
    return [line for _, line in kept], replaced, torn


def _step_of(line: bytes) -> int | None:
    if not line.endswith(b"\n"):
        return None
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None
