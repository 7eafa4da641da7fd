"""Two passes by turns: while one waits for what travels, the other computes.

Each pass runs in a thread of its own, but never both at a time: a pass gives way where it has
just started an exchange (`give_way`), and goes on when the other gives way or ends. Both use one
stream, so what a GPU sees is one sequence of kernels, in which the other's work stands between the
start of an exchange and the first use of its result. The turns depend on the order of the program
alone, so all ranks start their collectives in the same order.

Like DeepSeek's DualPipe (arXiv 2412.19437, section 3.2.1), where the passes are the forward pass of
one micro-batch and the backward pass of another.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

_turns: "_Turns | None" = None
# One for all pairs: cuDNN's plans belong to a thread, and a new one would make them again.
_first_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="first of two passes")


def give_way() -> None:
    """An exchange is under way: let the other pass work, if there is one."""
    if _turns is not None:
        _turns.give_way()


def by_turns(first: Callable[[], Any], second: Callable[[], Any]) -> None:
    """Run both to their end; `second` in this thread. Raises what either has raised, of `second`
    at once.
    """
    global _turns
    assert _turns is None, "passes by turns inside of passes by turns"
    _turns = _Turns()
    try:
        _turns.run(first, second)
    finally:
        _turns = None


class _Turns:
    def __init__(self) -> None:
        # Whoever holds its own may run; index 0 is the first pass.
        self._may_run = (threading.Semaphore(0), threading.Semaphore(0))
        self._ended = [False, False]
        self._thread_of_first = 0

    def run(self, first: Callable[[], Any], second: Callable[[], Any]) -> None:
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        future = _first_thread.submit(self._run_first, first, device)
        self._may_run[1].acquire()
        try:
            second()
        finally:  # with an error at once: the first pass may wait for ranks that wait for us
            self._end(1)
        future.result()

    def _run_first(self, first: Callable[[], Any], device: int | None) -> None:
        if device is not None:  # each thread has a current device of its own
            torch.cuda.set_device(device)
        self._thread_of_first = threading.get_ident()
        try:
            first()
        finally:
            self._end(0)

    def give_way(self) -> None:
        # The second pass may be in a thread of autograd's.
        me = 0 if threading.get_ident() == self._thread_of_first else 1
        if not self._ended[1 - me]:
            self._may_run[1 - me].release()
            self._may_run[me].acquire()

    def _end(self, me: int) -> None:
        self._ended[me] = True
        self._may_run[1 - me].release()
