"""Two interleaved passes: while one waits for an exchange, the other computes.

Each pass runs in a thread of its own, but never both at a time: a pass yields its turn where it has
just started an exchange (`yield_turn`), and resumes when the other yields or ends. Both use one
stream, so a GPU sees one sequence of kernels, in which the other's work stands between the start of
an exchange and the first use of its result. The turns depend on the order of the program alone, so
all ranks start their collectives in the same order.

Like DeepSeek's DualPipe (arXiv 2412.19437, section 3.2.1), where the passes are the forward pass of
one micro-batch and the backward pass of another.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

_turns: "_Turns | None" = None
# One thread for all pairs: cuDNN's plans belong to a thread, and a new one would make them again.
_first_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="first of two passes")


def yield_turn() -> None:
    """Let the other pass run, if there is one; call it after the start of an exchange."""
    if _turns is not None:
        _turns.yield_turn()


def interleave(first: Callable[[], Any], second: Callable[[], Any]) -> None:
    """Run both to their end, taking turns where they call `yield_turn`; `second` in this thread.

    An error of either is raised here; one of `second` at once.
    """
    global _turns
    assert _turns is None, "interleave inside of interleave"
    _turns = _Turns()
    try:
        _turns.run(first, second)
    finally:
        _turns = None


class _Turns:
    def __init__(self) -> None:
        # The pass that has acquired its semaphore runs; index 0 is the first pass.
        self._may_run = (threading.Semaphore(0), threading.Semaphore(0))
        self._ended = [False, False]
        self._thread_of_first = 0

    def run(self, first: Callable[[], Any], second: Callable[[], Any]) -> None:
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        future = _first_thread.submit(self._run_first, first, device)
        self._may_run[1].acquire()
        try:
            second()
        finally:  # an error is raised at once: the first pass may wait for ranks that wait for us
            self._end(1)
        future.result()

    def _run_first(self, first: Callable[[], Any], device: int | None) -> None:
        if device is not None:  # the current device is set per thread
            torch.cuda.set_device(device)
        self._thread_of_first = threading.get_ident()
        try:
            first()
        finally:
            self._end(0)

    def yield_turn(self) -> None:
        # The second pass may run in one of autograd's threads.
        me = 0 if threading.get_ident() == self._thread_of_first else 1
        if not self._ended[1 - me]:
            self._may_run[1 - me].release()
            self._may_run[me].acquire()

    def _end(self, me: int) -> None:
        self._ended[me] = True
        self._may_run[1 - me].release()
