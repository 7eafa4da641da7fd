"""Signals that ask a run to end: it finishes its step, saves, and says so in one sentence.

SLURM sends SIGUSR1 ahead of the time limit where the job asks for it (`--signal=USR1@120`) and
SIGTERM before it kills; Kubernetes sends SIGTERM and waits for the pod's grace period; Ctrl-C is
SIGINT, Ctrl-\\ SIGQUIT, and a terminal that closes sends SIGHUP. docs/checkpoint.md has the table.
"""

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any, Literal, Self

from torchtitan.tools.last_words import leave_stop_code, mark_steps_begun
from torchtitan.tools.logging import logger

POLITE = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
# Set by a launcher that was started with nohup. Its ranks can't see it: torchrun's own handlers
# take the place of "ignored".
_NOHUP = "TITAN_NOHUP"
# `timeout` sends its signal to the process and to its group: twice, one right after the other.
_SAME_SIGNAL_SECONDS = 0.25
# A launcher that shares its group's signal with its ranks hands on the one they had already.
_SAME_REQUEST_SECONDS = 2.0


def stop_code(number: int) -> int:
    """Exit code of a run that this signal has ended well: 0 for those that schedulers send (the
    job is to go on later, not to count as failed), else 128 + number, as a shell has it."""
    return 0 if number in (signal.SIGTERM, signal.SIGUSR1) else 128 + number


class SignalListener:
    """Give this process's POLITE signals to `receive(signal, sender's pid)`, in a thread.

    A handler would wait for the main thread, which may be inside of a collective that waits for a
    rank that is gone, and would not know the sender. Threads and processes that are started
    meanwhile inherit that these signals are blocked: no loader process or compiler dies of a
    signal that the run answers, and ranks can't meet one before they listen themselves.
    """

    def __init__(self, receive: Callable[[signal.Signals, int | None], None]) -> None:
        self._receive = receive
        self._closed = False
        self._last: tuple[int, float] = (0, 0.0)

    def start(self) -> None:
        nohup = _NOHUP in os.environ or signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        if nohup:
            os.environ[_NOHUP] = "1"
        self._ignored = {signal.SIGHUP} if nohup else set()
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, POLITE)
        self._handlers: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            # For signals that the kernel gives to a thread from before, which doesn't block them.
            for number in POLITE:
                self._handlers[number] = signal.signal(number, lambda n, _: self._take(n, None))
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Leave signals as they were before `start`."""
        self._closed = True
        if (thread := self._thread.ident) is not None:
            signal.pthread_kill(thread, signal.SIGUSR1)  # ends its waiting
        self._thread.join()
        for number, handler in self._handlers.items():
            if handler is not None:  # not one of C's
                signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def _listen(self) -> None:
        while True:
            info = signal.sigwaitinfo(POLITE)
            if self._closed:
                return
            self._take(info.si_signo, info.si_pid)

    def _take(self, number: int, sender: int | None) -> None:
        last, then = self._last
        again = number == last and time.monotonic() - then < _SAME_SIGNAL_SECONDS
        if number not in self._ignored and not again:
            self._receive(signal.Signals(number), sender)
        self._last = (number, time.monotonic())  # the second may have waited for that


class StopRequest:
    """Whether the run was asked to end, and by which signal: `number`, 0 for none.

    Before the first step there is nothing to save: a process alone ends at once, ranks end when
    they are all there. From then on the run ends after its step. The second signal ends the process
    at once (exit code 128 + signal); one that the launcher hands on is no second one.

    Signals count while this is entered (several times is as good as once).
    """

    def __init__(self) -> None:
        self.number = 0
        self._phase: Literal["start", "steps", "end"] = "start"
        self._way = "ends after this step"
        self._heard = False  # by this rank itself
        self._handed_on_at = -math.inf  # when the launcher did, if it was the first
        self._entered = 0
        # torchrun and scripts/launch.py say by this variable that they are the parent process.
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def __enter__(self) -> Self:
        if not self._entered:
            self._listener = SignalListener(self._receive)
            self._listener.start()
        self._entered += 1
        return self

    def __exit__(self, *exception: object) -> None:
        self._entered -= 1
        if not self._entered:
            self._listener.close()

    def begin_steps(self, *, saves: bool) -> None:
        """From here on a request waits for the end of a step. saves: and for a checkpoint."""
        self._way = "ends after this step" + (", with a checkpoint" if saves else "")
        self._phase = "steps"
        mark_steps_begun()

    def end_steps(self) -> None:
        """From here on the run ends anyway, well or not."""
        self._way = "is about to end"
        self._phase = "end"

    def agree(self, number: int) -> None:
        """Take over what some rank was asked by (0: none was)."""
        self.number = self.number or number

    def exit_code(self) -> int:
        """What a run that went well returns. Under torchrun that is 0, or it would begin anew;
        scripts/launch.py learns the code and returns it."""
        code = stop_code(self.number) if self.number else 0
        if self._launcher is None:
            return code
        leave_stop_code(code)
        return 0

    def _receive(self, number: signal.Signals, sender: int | None) -> None:
        handed_on = self._launcher is not None and sender == self._launcher
        if self._phase == "start" and handed_on:  # it ends all ranks, as one of them has failed
            os._exit(128 + number)
        now = time.monotonic()
        if not self._heard:
            self._heard = True
            self._handed_on_at = now if handed_on else -math.inf
            self._receive_first(number, handed_on)
        elif not handed_on and now - self._handed_on_at > _SAME_REQUEST_SECONDS:
            self._end(number, 128 + number, "the second signal, so the process ends at once")
        else:
            self._handed_on_at = -math.inf

    def _receive_first(self, number: signal.Signals, handed_on: bool) -> None:
        self.number = self.number or number
        if self._phase == "steps" or (self._phase == "end" and not handed_on):
            logger.warning("%s: the run %s", number.name, self._way)
        elif self._phase == "start" and not _has_peers():
            self._end(number, stop_code(number), "the run ends before its first step")

    def _end(self, number: signal.Signals, code: int, sentence: str) -> None:
        logger.warning("%s: %s", number.name, sentence)
        logging.shutdown()
        os._exit(code)


def _has_peers() -> bool:
    """Whether other ranks would wait for this one."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"
