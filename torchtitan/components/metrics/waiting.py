"""The rank that the others wait for, from one profiled step at intervals.

Ranks meet in every collective, so all of them take as long as the latest. The latest rank spends
the least time in communication kernels: when it comes, the others are there already. What makes it
late is what it has more of than the others: time in which its device had no kernel to run (its host
is behind), or time in which it computed (its device is slower, or has more to do).
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from torchtitan.tools.kernel_times import DeviceTime, device_time
from torchtitan.tools.logging import logger


class Straggler(NamedTuple):
    """rank: the one that came last.
    waited: ms that the others (their median) waited for it.
    host: ms that it was idle beyond the others; device: ms that it computed beyond the others.
    """

    rank: int
    waited: float
    host: float
    device: float


def find_straggler(times: Sequence[DeviceTime]) -> Straggler:
    """times: by rank, of two or more."""
    rank = min(range(len(times)), key=lambda r: times[r].communication)
    late, others = times[rank], [t for r, t in enumerate(times) if r != rank]
    return Straggler(
        rank=rank,
        waited=median(t.communication for t in others) - late.communication,
        host=max(0.0, late.idle - median(t.idle for t in others)),
        device=max(0.0, late.computing - median(t.computing for t in others)),
    )


class WaitProfile:
    """Profiles every `freq`-th step on all ranks; 0 = none. Only CUDA devices can be profiled at a
    cost that a run does not feel: some 0.2 s.
    """

    def __init__(self, freq: int, device: torch.device):
        several = dist.is_initialized() and dist.get_world_size() > 1
        self.freq = freq if several and device.type == "cuda" else 0
        self._numbers: dict[str, float] = {}

    @contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Profile what runs inside, where it is this step's turn; logs a line on rank 0."""
        if not self.freq or step % self.freq:
            yield
            return
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            start = time.perf_counter()
            yield
            torch.cuda.synchronize()
            step_ms = (time.perf_counter() - start) * 1e3
        kernels = [
            (event.name, event.time_range.start, event.time_range.end)
            for event in profiler.events() or []
            if event.device_type == DeviceType.CUDA
        ]
        self._share(step, device_time(kernels, step_ms), step_ms)

    def take_numbers(self) -> dict[str, float]:
        """Return the last profile's numbers for the log, once."""
        numbers, self._numbers = self._numbers, {}
        return numbers

    def _share(self, step: int, own: DeviceTime, step_ms: float) -> None:
        times: list[DeviceTime] = [own] * dist.get_world_size()
        dist.all_gather_object(times, own)
        found = find_straggler(times)
        self._numbers = {
            "waited_ms": found.waited,
            "waited_for_rank": float(found.rank),
            "waited_for_host_ms": found.host,
            "waited_for_device_ms": found.device,
            "exposed_communication_ms": own.exposed,
        }
        if dist.get_rank() == 0:
            logger.info("%s", line(step, found, step_ms))


def line(step: int, found: Straggler, step_ms: float) -> str:
    """One sentence for the console."""
    why = "its host" if found.host >= found.device else "its device"
    more = f"{found.host:.1f} ms more idle, {found.device:.1f} ms more computing than the others"
    return (
        f"Step {step}: the ranks waited {found.waited:.1f} of {step_ms:.1f} ms for rank "
        f"{found.rank}, {why} ({more})"
    )
