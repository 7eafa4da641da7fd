"""Garbage collection at the same steps on every rank.

Python collects when its allocation counters reach a limit: on each rank at another moment, while
all the others wait in the next collective. So the automatic collector is off during training, and
every rank collects at the same steps.
"""

import gc
from collections import Counter

import torch

from torchtitan.tools.logging import logger


class GarbageCollection:
    """Turns automatic collection off; `run(step)` collects, `close()` turns it on again.

    gc_freq: steps between collections of the young generations, which take milliseconds.
    debug: collect everything at every step (slow), and warn about reference cycles that held
        tensors: their memory is freed only here, however early its last use was.
    """

    def __init__(self, gc_freq: int, debug: bool) -> None:
        assert gc_freq > 0, f"gc_freq must be positive, not {gc_freq}"
        self.gc_freq = gc_freq
        self.debug = debug
        self._was_enabled = gc.isenabled()
        gc.disable()
        gc.collect()  # Garbage of the set-up.

    def run(self, step: int) -> None:
        if self.debug:
            _collect_and_report(step)
        elif step > 1 and step % self.gc_freq == 0:
            gc.collect(1)

    def close(self) -> None:
        if self._was_enabled:
            gc.enable()


def _collect_and_report(step: int) -> None:
    flags = gc.get_debug()
    gc.set_debug(gc.DEBUG_SAVEALL)  # Unreachable objects are kept in gc.garbage, not freed.
    gc.collect()
    gc.set_debug(flags)
    # type() and not isinstance(): a dead weakref proxy in here would raise.
    tensors = [item for item in gc.garbage if issubclass(type(item), torch.Tensor)]
    if tensors:
        mib = sum(t.numel() * t.element_size() for t in tensors) / 2**20
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors[:3])
        holders = Counter(
            type(item).__qualname__
            for item in gc.garbage
            if not issubclass(type(item), torch.Tensor)
        )
        logger.warning(
            f"step {step}: reference cycles held {len(tensors)} tensors ({mib:.1f} MiB; shapes "
            f"{shapes}) until this collection; the cycles consist of "
            + ", ".join(f"{count} {kind}" for kind, count in holders.most_common(5))
        )
    tensors.clear()
    gc.garbage.clear()
    gc.collect()  # Without DEBUG_SAVEALL: now they are really freed.
