"""Writers of log records: JSON lines for programs, TensorBoard for people.

A record is a flat dict of one logged step: numbers, and under a few names a number per MoE layer
({layer id: number}, or a list with one per expert) or per dataset ({name: number}). TensorBoard's
names are those of names.py.
"""

import io
import json
import math
import os
import re
import socket
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from torchtitan.components.metrics.names import FIRST_CHARTS, curves
from torchtitan.components.metrics.record_file import RecordFile, move_aside, take_back

_RUN_NAME = re.compile(r"(\d{8}-\d{4})(?:-(\d\d+))?")

Record = Mapping[str, Any]  # its numbers: see above


class JsonlWriter:
    """Writes one JSON object a line, each step once.

    A resumed run continues the file of the newest run; a new one (start_step 0) renames that to
    metrics.1.jsonl, metrics.2.jsonl and so on. Records of steps that are done again move to
    metrics.replaced.jsonl.

    Floats have full precision. A number that is not finite becomes the string "NaN", "Infinity" or
    "-Infinity": JSON has no such numbers; `float()` and JavaScript's `Number()` read these words.
    """

    def __init__(self, path: Path, start_step: int) -> None:
        self.path = path
        before = partial(take_back, path, start_step) if start_step else partial(move_aside, path)
        self._file = RecordFile(path, before)

    def write(self, record: Record) -> None:
        line = json.dumps(_finite(record), allow_nan=False) + "\n"
        self._file.append(record["step"], line.encode())

    def rewind(self, step: int) -> None:
        """Remove the records of steps after `step`, which are done again."""
        self._file.rewind(step, partial(take_back, self.path, step))

    def close(self) -> None:
        self._file.close()


def _finite(value):
    if isinstance(value, Mapping):
        return {str(name): _finite(item) for name, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


class TensorBoardWriter:
    """Writes scalars under the names of `names.curves`, one image, and the layout of the charts
    that come first.

    Each new run has its own dated folder below `parent`, whose curves TensorBoard shows together. A
    resumed run continues the newest; records of the interrupted one after `start_step` are
    replaced.

    The file is not written by torch's SummaryWriter, whose thread dies with the first error of the
    disk.
    """

    def __init__(self, parent: Path, start_step: int) -> None:
        # Imported only by runs with TensorBoard: it takes a second and needs a package.
        from tensorboard.compat.proto import event_pb2
        from torch.utils.tensorboard import summary

        self._events: Any = event_pb2  # untyped: its names are created at run time
        self._summary = summary
        newest = _newest_run(parent)
        self.folder = newest if newest and start_step else parent / _next_run_name(newest)
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)
        name = f"{seconds:010d}.{nanoseconds:09d}.{socket.gethostname()}.{os.getpid()}"
        # TensorBoard reads the files of a folder in the order of their names.
        self._file = RecordFile(self.folder / f"events.out.tfevents.{name}")
        version = self._events.Event(wall_time=time.time(), file_version="brain.Event:2")
        layout = summary.custom_scalars(
            {
                page: {title: ["Multiline", curves] for title, curves in charts.items()}
                for page, charts in FIRST_CHARTS.items()
            }
        )
        first = self._events.Event(wall_time=time.time(), step=start_step, summary=layout)
        self._append(start_step, [version, first])
        self.rewind(start_step)

    def write(self, record: Record, heatmap: np.ndarray | None) -> None:
        found = [self._summary.scalar(name, value) for name, value in curves(record).items()]
        if heatmap is not None:
            found.append(self._summary.image("expert_load", heatmap, dataformats="HWC"))
        self._append_summaries(record["step"], found)

    def write_texts(self, texts: Mapping[str, str], step: int) -> None:
        """Write texts by prompt; the prompt is in bold (TensorBoard renders Markdown)."""
        found = [
            self._summary.text(f"samples/{number}", f"**{beginning}**{text}")
            for number, (beginning, text) in enumerate(texts.items(), start=1)
        ]
        self._append_summaries(step, found)

    def rewind(self, step: int) -> None:
        """Let TensorBoard drop its records of steps after `step`, which are done again."""
        events = self._events
        start = events.SessionLog(status=events.SessionLog.START)
        event = events.Event(wall_time=time.time(), step=step + 1, session_log=start)
        self._append(step, [event])

    def _append_summaries(self, step: int, summaries: list[Any]) -> None:
        now, make = time.time(), self._events.Event
        self._append(step, [make(wall_time=now, step=step, summary=each) for each in summaries])

    def _append(self, step: int, events: list[Any]) -> None:
        """Append all events with one write."""
        from tensorboard.summary.writer.record_writer import RecordWriter

        buffer = io.BytesIO()
        writer = RecordWriter(buffer)
        for event in events:
            writer.write(event.SerializeToString())
        self._file.append(step, buffer.getvalue())

    def close(self) -> None:
        self._file.close()


def _newest_run(parent: Path) -> Path | None:
    try:
        runs = [run for run in parent.iterdir() if _RUN_NAME.fullmatch(run.name)]
    except OSError:  # no folder yet, or a failure that the first record will report
        return None
    return max(runs, default=None)


def _next_run_name(newest: Path | None) -> str:
    """Name a new run YYYYMMDD-HHMM, in local time.

    Names must only rise, so a second run within a minute (or within the repeated hour in autumn) is
    numbered: YYYYMMDD-HHMM-02.
    """
    now = time.strftime("%Y%m%d-%H%M")
    before = _RUN_NAME.fullmatch(newest.name) if newest else None
    if before is None or before[0] < now:
        return now
    minute, number = before.groups()
    return f"{minute}-{int(number or 1) + 1:02d}"
