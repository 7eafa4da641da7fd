"""Records beside metrics.jsonl for the report of a run: its events, and each expert's load.

events.jsonl: starts, checkpoints, skipped steps, rewinds, alarms, phases, sample texts, the end; in
    the order in which they happened: steps that a rewind repeats keep theirs.
expert_load.jsonl: tokens of each expert in percent of its layer's mean, some 200 times a run.
"""

import json
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from torchtitan.components.metrics.record_file import RecordFile, move_aside
from torchtitan.components.metrics.writers import JsonlWriter

EVENTS, EXPERT_LOAD = "events.jsonl", "expert_load.jsonl"
# At most some 12 MB a run of 58 layers with 256 experts.
_LOADS_OF_A_RUN = 200


class History:
    """Writes both files. Like metrics.jsonl they are continued by a resumed run and renamed by a
    new one (start_step 0).

    total_steps: of the run; sets how often loads are recorded.
    """

    def __init__(self, folder: Path, start_step: int, total_steps: int) -> None:
        events = folder / EVENTS
        before = partial(end_torn_line, events) if start_step else partial(move_aside, events)
        self._events = RecordFile(events, before)
        self._loads = JsonlWriter(folder / EXPERT_LOAD, start_step)
        self._stride = max(1, total_steps // _LOADS_OF_A_RUN)
        self._due = start_step + 1

    def event(self, step: int, kind: str, **facts: Any) -> None:
        """kind: start, checkpoint, checkpoint_failed, skip, rewind, alarm, phase, sample or end."""
        line = json.dumps({"step": step, "time": time.time(), "event": kind, **facts}, default=str)
        self._events.append(step, f"{line}\n".encode())

    def loads(self, step: int, relative: Mapping[int, torch.Tensor]) -> None:
        """Record the loads of a logged step, if enough steps have passed since the last record.

        relative: by layer, (E,): tokens over the layer's mean.
        """
        if step < self._due:
            return
        percent = {
            layer: (100 * each).round().to(torch.int64).tolist() for layer, each in relative.items()
        }
        self._loads.write({"step": step, "percent_of_mean": percent})
        self._due = step + self._stride

    def rewind(self, step: int) -> None:
        self._loads.rewind(step)
        self._due = step + 1

    def close(self) -> None:
        self._events.close()
        self._loads.close()


def end_torn_line(path: Path) -> None:
    """End a line that a kill has cut off, so that the next record has its own."""
    if path.is_file() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")
