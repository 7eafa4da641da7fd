"""Time of a device's kernels, from a profile: computing, communication that nothing hides, idle."""

import re
from collections.abc import Iterable
from typing import NamedTuple

COMMUNICATION = re.compile(r"nccl|c10d::|gloo:", re.I)

# Name, start and end in µs.
Kernel = tuple[str, float, float]


class DeviceTime(NamedTuple):
    """Milliseconds of a step on one device.

    computing: at least one kernel that is no communication ran.
    communication: of all communication kernels, whether something hides them or not.
    exposed: only communication ran.
    idle: no kernel ran.
    """

    computing: float
    communication: float
    exposed: float
    idle: float


def device_time(kernels: Iterable[Kernel], step_ms: float) -> DeviceTime:
    """step_ms: from the start of the step to its end, with the time before the first kernel."""
    kernels = list(kernels)
    communication = [(a, b) for name, a, b in kernels if COMMUNICATION.search(name)]
    computing = [(a, b) for name, a, b in kernels if not COMMUNICATION.search(name)]
    busy, computed = covered(communication + computing), covered(computing)
    return DeviceTime(
        computing=computed / 1e3,
        communication=covered(communication) / 1e3,
        exposed=(busy - computed) / 1e3,
        idle=max(0.0, step_ms - busy / 1e3),
    )


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of spans."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
