"""Parts of every row: a clock for steps and kernels, quartiles, peak memory, the machine's name.

Imports torch and nothing else of ours or of peers: the peers' processes use it, too.
"""

import datetime
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch

GIB = 2**30
Result = TypeVar("Result")


def quartiles(values: list[float]) -> dict[str, float]:
    """median, q1, q3, min and count of at least one value."""
    if len(values) == 1:
        values = values * 2
        count = 1
    else:
        count = len(values)
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3, "min": min(values), "count": count}


def machine() -> dict[str, Any]:
    """Describe machine, versions and time, for every row: rows of different machines don't
    compare."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else _cpu_name(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load": None if cuda else os.getloadavg()[0],
        "date": datetime.datetime.now().isoformat(timespec="minutes"),
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            ]
    except OSError:
        names = []
    return names[0] if names else platform.machine()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float:
    """Allocated since `reset_peak` on a GPU; on a CPU the process's largest resident size."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def time_steps(step: Callable[[], object], warmup: int, steps: int) -> list[float]:
    """Seconds of each of `steps` steps, end to end, after `warmup` that don't count.

    On a GPU between CUDA events at the steps' ends, so that the clock adds no wait of its own.
    """
    for _ in range(warmup):
        step()
    synchronize()
    reset_peak()
    if not torch.cuda.is_available():
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        return seconds
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    ends[0].record()
    for end in ends[1:]:
        step()
        end.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in zip(ends, ends[1:], strict=False)]


def measure(
    forward: Callable[[], torch.Tensor], inputs: list[torch.Tensor], reps: int
) -> dict[str, Any]:
    """Time and memory of one operation, forward and (where `inputs` need gradients) backward.

    forward_ms, backward_ms: quartiles, of passes alone, their launches included.
    together_ms: mean of passes one after the other, which launches don't delay unless the host is
        the slower one; None on a CPU.
    kept_gib: what the forward pass leaves allocated, its output included; None on a CPU.
    peak_gib: the largest allocation above the start; None on a CPU.
    """
    backward = any(tensor.requires_grad for tensor in inputs)
    grad = None
    times: dict[str, list[float]] = {"forward_ms": [], "backward_ms": []}
    kept = peak = None
    for rep in range(reps + 3):
        for tensor in inputs:
            tensor.grad = None
        before = _allocated()
        reset_peak()
        out, forward_ms = _timed(forward)
        kept = _allocated() - before
        if backward:
            grad = torch.randn_like(out) if grad is None else grad
            _, backward_ms = _timed(partial(out.backward, grad))
        peak = peak_gib() - before
        del out
        if rep >= 3:  # the first ones compile, tune and warm the allocator
            times["forward_ms"].append(forward_ms)
            if backward:
                times["backward_ms"].append(backward_ms)
    row: dict[str, Any] = {name: quartiles(ms) for name, ms in times.items() if ms}
    if not torch.cuda.is_available():
        return row | {"together_ms": None, "kept_gib": None, "peak_gib": None}

    def passes() -> None:
        for tensor in inputs:
            tensor.grad = None
        out = forward()
        if backward:
            out.backward(grad)

    return row | {"together_ms": _ms_a_run(passes, reps), "kept_gib": kept, "peak_gib": peak}


def _ms_a_run(run: Callable[[], object], reps: int) -> float:
    """Milliseconds of a GPU for each of `reps` runs, the host not waiting between them."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for rep in range(reps + 3):
        if rep == 3:  # the host is ahead by then
            start.record()
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / reps


def _allocated() -> float:
    return torch.cuda.memory_allocated() / GIB if torch.cuda.is_available() else 0.0


def _timed(fn: Callable[[], Result]) -> tuple[Result, float]:
    """Result and milliseconds."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        return fn(), (time.perf_counter() - start) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    out = fn()
    end.record()
    torch.cuda.synchronize()
    return out, start.elapsed_time(end)
