"""A polite end: SIGTERM and SIGUSR1 ask the run to finish its step and save.

SLURM sends SIGUSR1 ahead of the time limit where the job asks for it (`--signal=USR1@120`) and
SIGTERM before it kills; Kubernetes sends SIGTERM and waits for the pod's grace period.
"""

import os
import signal
import socket
import threading
from typing import Any, Self

from torchtitan.tools.logging import logger

POLITE = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """`requested` becomes true with the first signal while this is entered; the second one ends the
    process at once (exit code 128 + signal, as a shell would have it).

    A thread listens, because Python calls handlers between two lines of the main thread, and that
    one may be inside of a collective that waits for a rank that is gone.
    """

    def __init__(self) -> None:
        self.requested = False
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._listener, self._bell = socket.socketpair()
        self._bell.setblocking(False)
        self._former_bell = signal.set_wakeup_fd(self._bell.fileno(), warn_on_full_buffer=False)
        for number in POLITE:
            self._former[number] = signal.signal(number, _leave_it_to_the_thread)
        threading.Thread(target=self._listen, args=(self._listener,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._former_bell)
        self._bell.close()  # the thread ends with it

    def _listen(self, listener: socket.socket) -> None:
        with listener:
            while received := listener.recv(1):
                if received[0] in POLITE:
                    self._receive(signal.Signals(received[0]))

    def _receive(self, number: signal.Signals) -> None:
        if self.requested:
            logger.warning("%s: the second request, so the process ends at once", number.name)
            os._exit(128 + number)
        self.requested = True
        logger.warning("%s: the run ends after this step, with a checkpoint", number.name)


def _leave_it_to_the_thread(number: int, frame: object) -> None:
    """A handler must be there, or the signal would end the process."""
