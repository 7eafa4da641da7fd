"""Signals that ask a run to end: it finishes its step, saves, and logs it in one sentence. And one,
SIGUSR2, that asks for a trace of the next steps.

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

from torchtitan.tools.error_file import leave_stop_code, mark_steps_begun
from torchtitan.tools.logging import logger

POLITE = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
TRACE = signal.SIGUSR2
_LISTENED = (*POLITE, TRACE)
# Environment variable, set by a launcher that was started with nohup. Its ranks can't see that
# SIGHUP is ignored: torchrun installs handlers of its own.
_NOHUP = "TITAN_NOHUP"
# Environment variable with a scheduler's exit code for runs that are to be started again.
_STOP_CODE = "STOP_CODE"
# `timeout` sends its signal to the process and to its group: twice, one right after the other.
_SAME_SIGNAL_SECONDS = 0.25
# A signal to the process group reaches the ranks twice: directly, and forwarded by the launcher.
_SAME_REQUEST_SECONDS = 2.0


def stop_code(number: int) -> int:
    """Exit code of a run that this signal has ended well.

    For signals that schedulers send (the job is to resume later, not to count as failed) it is 0,
    or run_train.sh's STOP_CODE; else 128 + number, as in a shell.
    """
    if number in (signal.SIGTERM, signal.SIGUSR1):
        wanted = os.environ.get(_STOP_CODE, "")
        return int(wanted) if wanted.isdecimal() else 0
    return 128 + number


class SignalListener:
    """Passes this process's POLITE signals and TRACE to `receive(signal, sender's pid)`, in a
    thread.

    A handler would wait for the main thread, which may be inside of a collective that waits for a
    dead rank, and would not know the sender. Threads and processes that are started meanwhile
    inherit that these signals are blocked: no loader process or compiler dies of a signal that the
    run handles, and no rank dies of one before it listens itself.
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
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, _LISTENED)
        self._handlers: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            # For signals that the kernel delivers to an older thread, which doesn't block them.
            for number in _LISTENED:
                self._handlers[number] = signal.signal(number, lambda n, _: self._take(n, None))
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Restore the handling of signals to that before `start`."""
        self._closed = True
        if (thread := self._thread.ident) is not None:
            signal.pthread_kill(thread, signal.SIGUSR1)  # ends its wait
        self._thread.join()
        for number, handler in self._handlers.items():
            if handler is not None:  # None: installed from C, can't be restored
                signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def _listen(self) -> None:
        while True:
            info = signal.sigwaitinfo(_LISTENED)
            if self._closed:
                return
            self._take(info.si_signo, info.si_pid)

    def _take(self, number: int, sender: int | None) -> None:
        last, then = self._last
        again = number == last and time.monotonic() - then < _SAME_SIGNAL_SECONDS
        if number not in self._ignored and not again:
            self._receive(signal.Signals(number), sender)
        self._last = (number, time.monotonic())  # after `_receive`, for which a second may wait


class StopRequest:
    """Request to end the run, by a signal: `number`, 0 for none. And requests for traces.

    Before the first step there is nothing to save: a single process ends at once, ranks end when
    all of them have joined. From then on the run ends after its step. The second signal ends the
    process at once (exit code 128 + signal); one that the launcher forwards doesn't count as a
    second.

    Signals are handled while this context is entered (entering it several times is allowed).
    """

    def __init__(self) -> None:
        self.number = 0
        self._trace = False  # asked for, not yet taken
        self._phase: Literal["start", "steps", "end"] = "start"
        self._plan = "ends after this step"
        self._received = False  # by this rank itself
        self._forwarded_at = -math.inf  # when the launcher forwarded the first signal, if it did
        self._entered = 0
        # torchrun and scripts/launch.py set this variable for their child processes.
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
        """Let requests end the run after its step from now on.

        saves: whether a checkpoint is saved then; for the log line.
        """
        self._plan = "ends after this step" + (", with a checkpoint" if saves else "")
        self._phase = "steps"
        mark_steps_begun()

    def end_steps(self) -> None:
        """Note that the run is ending, well or not, so that requests change nothing."""
        self._plan = "is about to end"
        self._phase = "end"

    def agree(self, number: int) -> None:
        """Take over the signal that some rank has received (0: none)."""
        self.number = self.number or number

    def take_trace_request(self) -> bool:
        """Tell whether a trace was asked for since the last call."""
        asked, self._trace = self._trace, False
        return asked

    def exit_code(self) -> int:
        """Exit code of a run that ended well.

        Under torchrun it is 0, because torchrun would restart the run otherwise; scripts/launch.py
        reads the code from a file and returns it.
        """
        code = stop_code(self.number) if self.number else 0
        if self._launcher is None:
            return code
        leave_stop_code(code)
        return 0

    def _receive(self, number: signal.Signals, sender: int | None) -> None:
        if number == TRACE:
            self._trace = True
            return
        forwarded = self._launcher is not None and sender == self._launcher
        if self._phase == "start" and forwarded:  # the launcher ends all ranks: one has failed
            os._exit(128 + number)
        now = time.monotonic()
        if not self._received:
            self._received = True
            self._forwarded_at = now if forwarded else -math.inf
            self._receive_first(number, forwarded)
        elif not forwarded and now - self._forwarded_at > _SAME_REQUEST_SECONDS:
            self._end(number, 128 + number, "the second signal, so the process ends at once")
        else:
            self._forwarded_at = -math.inf

    def _receive_first(self, number: signal.Signals, forwarded: bool) -> None:
        self.number = self.number or number
        if self._phase == "steps" or (self._phase == "end" and not forwarded):
            logger.warning("%s: the run %s", number.name, self._plan)
        elif self._phase == "start" and not _has_peers():
            self._end(number, stop_code(number), "the run ends before its first step")

    def _end(self, number: signal.Signals, code: int, sentence: str) -> None:
        logger.warning("%s: %s", number.name, sentence)
        logging.shutdown()
        os._exit(code)


def _has_peers() -> bool:
    """Tell whether other ranks would wait for this one."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"
