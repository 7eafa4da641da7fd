"""Traces and memory snapshots of a running job, every `profile_freq` steps or on request.

They are context managers around the training loop that yield an object with `step()`, to be called
at the end of each training step. Disabled, they yield one that does nothing, so the loop has no
branches. Open a trace in https://ui.perfetto.dev and a snapshot in https://pytorch.org/memory_viz.
"""

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity

from torchtitan.tools.disk import SideOutput, free_bytes, whole_or_none
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger

# Number of allocations and frees that a snapshot holds, each with its Python stack: tens of MB, of
# deep stacks hundreds. C++ frames are left out: looking up their names takes long, and meanwhile
# the other ranks wait.
_HISTORY: dict[str, Any] = {"max_entries": 100_000, "stacks": "python"}


class Stepper(Protocol):
    def step(self) -> None: ...


class _Off:
    def step(self) -> None:
        pass


@contextmanager
def maybe_profile(
    *,
    enable_profiling: bool,
    dump_folder: str | os.PathLike,
    save_traces_folder: str,
    profile_freq: int,
    profiler_active: int,
    profiler_warmup: int,
    start_step: int = 0,
    rank: int = 0,
) -> Iterator[Stepper]:
    """Write `dump_folder/save_traces_folder/iteration_N/rankR_trace.json` at each multiple N of
    `profile_freq`, with the `profiler_active` steps that end at N.

    Raises UserError where the recorded steps do not fit between two traces.

    start_step: number of steps done before (0, or the resumed checkpoint's).
    """
    if not enable_profiling:
        yield _Off()
        return
    wait = profile_freq - profiler_active - profiler_warmup
    if wait < 0:
        raise UserError(
            f"profiling.profile_freq = {profile_freq} is less than profiling.profiler_warmup + "
            f"profiling.profiler_active = {profiler_warmup + profiler_active}; raise it to that sum"
        )

    folder = Path(dump_folder, save_traces_folder)
    output = SideOutput(f"The trace for {folder}", folder, "later ones are tried")

    def save(profiler: torch.profiler.profile) -> None:
        _save_trace(profiler, folder, start_step + profiler.step_num, rank, output)

    logger.info(f"profiler: a trace every {profile_freq} steps in {folder}")
    schedule = torch.profiler.schedule(wait=wait, warmup=profiler_warmup, active=profiler_active)
    with torch.profiler.profile(
        activities=_activities(),
        # torch counts its own steps from 0; ours continue from the checkpoint's.
        schedule=lambda step: schedule(step + start_step),
        on_trace_ready=save,
        record_shapes=True,
    ) as profiler:
        try:
            yield profiler
        finally:
            # The trace that is being recorded when the loop ends is incomplete.
            profiler.on_trace_ready = None


@contextmanager
def maybe_memory_snapshot(
    *,
    enable_memory_snapshot: bool,
    dump_folder: str | os.PathLike,
    save_memory_snapshot_folder: str,
    profile_freq: int,
    start_step: int = 0,
    rank: int = 0,
) -> Iterator[Stepper]:
    """Write the CUDA allocator's history to `dump_folder/save_memory_snapshot_folder/iteration_N/
    rankR_memory_snapshot.pickle` at each multiple N of `profile_freq`.

    When the loop runs out of memory, one more is written, to `iteration_N_out_of_memory` with N the
    step that failed, and the error is raised again. Raises UserError without a CUDA device.

    start_step: number of steps done before (0, or the resumed checkpoint's).
    """
    if not enable_memory_snapshot:
        yield _Off()
        return
    if not torch.cuda.is_available():
        raise UserError(
            "profiling.enable_memory_snapshot = true needs a CUDA device, which this process does "
            "not have; set it to false"
        )

    snapshots = _MemorySnapshots(
        Path(dump_folder, save_memory_snapshot_folder), profile_freq, start_step, rank
    )
    snapshots.begin()
    try:
        yield snapshots
    except torch.OutOfMemoryError:
        snapshots.save(f"iteration_{snapshots.steps_done + 1}_out_of_memory")
        raise
    finally:
        snapshots.end()


class _MemorySnapshots:
    def __init__(self, folder: Path, freq: int, start_step: int, rank: int) -> None:
        self.folder = folder
        self.freq = freq
        self.steps_done = start_step
        self.rank = rank
        self._output = SideOutput(
            f"The memory snapshot for {folder}", folder, "later ones are tried"
        )

    def begin(self) -> None:
        """Let the allocator keep its history, which cudaMallocAsync can't."""
        with self._output.attempt(Exception):
            torch.cuda.memory._record_memory_history(**_HISTORY)

    def end(self) -> None:
        with self._output.attempt(Exception):
            torch.cuda.memory._record_memory_history(enabled=None)

    def step(self) -> None:
        self.steps_done += 1
        if self.steps_done % self.freq == 0:
            self.save(f"iteration_{self.steps_done}")

    def save(self, subfolder: str) -> None:
        with self._output.attempt(Exception):
            path = _file_of(self.folder, subfolder, f"rank{self.rank}_memory_snapshot.pickle")
            with whole_or_none(path):
                torch.cuda.memory._dump_snapshot(str(path))
            logger.info(f"memory snapshot: wrote {path}")


def _activities() -> list[ProfilerActivity]:
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    elif torch.xpu.is_available():
        activities.append(ProfilerActivity.XPU)
    return activities


def _save_trace(
    profiler: torch.profiler.profile, folder: Path, step: int, rank: int, output: SideOutput
) -> None:
    # After an exception in here torch's profiler would crash later (2.13).
    with output.attempt(Exception):
        path = _file_of(folder, f"iteration_{step}", f"rank{rank}_trace.json")
        began = time.monotonic()
        _export(profiler, path)
        logger.info(f"profiler: wrote {path} in {time.monotonic() - began:.1f} s")


def _export(profiler: torch.profiler.profile, path: Path) -> None:
    """Write the trace; raise `OSError` where that fails, which torch's own code in C++ does not."""
    with whole_or_none(path.with_name(path.name + ".tmp")), whole_or_none(path):  # torch 2.13's
        path.touch()
        profiler.export_chrome_trace(str(path))
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 16))
            if not file.read().rstrip().endswith(b"}"):
                error = errno.EIO if free_bytes(path) else errno.ENOSPC
                raise OSError(error, os.strerror(error), str(path))


def _file_of(folder: Path, subfolder: str, name: str) -> Path:
    (folder / subfolder).mkdir(parents=True, exist_ok=True)
    return folder / subfolder / name


# -----------------------------------------------------------------------------
# On request


class RequestedTraces:
    """Records the next steps of this rank when asked to, and with CUDA the allocator's history.

    The files are named like those of `maybe_profile` and `maybe_memory_snapshot`, after the last
    recorded step.

    asked: whether a trace was asked for since its last call.
    folder, snapshot_folder: for traces and memory snapshots.
    active, warmup: steps that are recorded, and steps before them.
    busy_freq: at its multiples another profiler runs, so a trace waits until they are past; 0 =
        none.
    scheduled, snapshots_scheduled: what runs on its own schedule, which a request can't change.
    """

    def __init__(
        self,
        asked: Callable[[], bool],
        folder: Path,
        snapshot_folder: Path,
        *,
        active: int,
        warmup: int,
        start_step: int,
        rank: int,
        busy_freq: int = 0,
        scheduled: bool = False,
        snapshots_scheduled: bool = False,
    ) -> None:
        self.asked, self.folder = asked, folder
        self.active, self.warmup = active, warmup
        self.steps_done, self.rank = start_step, rank
        self.busy_freq, self.scheduled = busy_freq, scheduled
        self._snapshots = None
        if torch.cuda.is_available():
            self._snapshots = _MemorySnapshots(snapshot_folder, 1, start_step, rank)
        self._keeps_history = snapshots_scheduled
        self._profiler: torch.profiler.profile | None = None
        self._until = 0
        self._waits = False
        self._output = SideOutput(f"The trace for {folder}", folder, "later ones are tried")

    def step(self) -> None:
        """Call after each step."""
        self.steps_done += 1
        if self._profiler is not None:
            self._profiler.step()
            if self.steps_done == self._until:
                self._finish()
        if self.asked():
            self._waits = self._profiler is None and self._can_record()
        if self._waits and not self._meets_another():
            self._waits = False
            self._start()

    def close(self) -> None:
        """End a trace that is being recorded without writing it."""
        if self._profiler is not None:
            self._profiler.on_trace_ready = None
            self._profiler.stop()
            self._profiler = None
            self._end_history()

    def _can_record(self) -> bool:
        steps = self.warmup + self.active
        if self.scheduled:
            logger.warning(
                "SIGUSR2: traces are written on schedule already (profiling.enable_profiling)"
            )
            return False
        if 0 < self.busy_freq <= steps:
            logger.warning(
                f"SIGUSR2: no trace of {steps} steps (profiling.profiler_warmup + profiler_active) "
                f"fits between those of metrics.waiting_freq = {self.busy_freq}"
            )
            return False
        return True

    def _meets_another(self) -> bool:
        """Tell whether another profiler runs in the steps that a trace would take."""
        last = self.steps_done + self.warmup + self.active
        return self.busy_freq > 0 and last // self.busy_freq > self.steps_done // self.busy_freq

    def _start(self) -> None:
        self._until = self.steps_done + self.warmup + self.active
        logger.warning(
            f"SIGUSR2: recording until step {self._until}, for {self.folder}/iteration_"
            f"{self._until}/rank{self.rank}_trace.json"
        )
        if self._snapshots is not None and not self._keeps_history:
            self._snapshots.begin()
        self._profiler = torch.profiler.profile(
            activities=_activities(),
            schedule=torch.profiler.schedule(
                wait=0, warmup=self.warmup, active=self.active, repeat=1
            ),
            on_trace_ready=lambda profiler: _save_trace(
                profiler, self.folder, self.steps_done, self.rank, self._output
            ),
            record_shapes=True,
        )
        self._profiler.start()

    def _finish(self) -> None:
        assert self._profiler is not None
        self._profiler.stop()
        self._profiler = None
        if self._snapshots is not None:
            self._snapshots.save(f"iteration_{self.steps_done}")
        self._end_history()

    def _end_history(self) -> None:
        if self._snapshots is not None and not self._keeps_history:
            self._snapshots.end()
