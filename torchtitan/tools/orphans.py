"""A rank that outlives its launcher would go on training, beside the run that is started next."""

import os
import threading
import time

from torchtitan.tools.last_words import ERROR_FILE

_LOOK_EVERY_SECONDS = 1.0


def end_with_the_launcher() -> None:
    """Under scripts/launch.py: end this process when that one is gone (a `kill -9`, say)."""
    if ERROR_FILE in os.environ:
        threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(_LOOK_EVERY_SECONDS)
    os._exit(1)
