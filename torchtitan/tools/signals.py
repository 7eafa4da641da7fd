"""A polite end: SIGTERM and SIGUSR1 ask the run to finish its step and save.

SLURM sends SIGUSR1 ahead of the time limit where the job asks for it (`--signal=USR1@120`) and
SIGTERM before it kills; Kubernetes sends SIGTERM and waits for the pod's grace period.
"""

import os
import signal
from types import FrameType
from typing import Any, Self

from torchtitan.tools.logging import logger

POLITE = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """`requested` becomes true with the first signal while this is entered; the second one ends the
    process at once, as if nobody listened."""

    def __init__(self) -> None:
        self.requested = False
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in POLITE:
            self._former[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.requested:
            logger.warning("%s again: ending at once", name)
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.requested = True
        logger.warning("%s: the run ends after this step, with a checkpoint", name)
