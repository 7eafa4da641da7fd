"""The end of a rank whose launcher is gone: it would keep training beside the next run."""

import os
import threading
import time

from torchtitan.tools.error_file import ERROR_FILE

_LOOK_EVERY_SECONDS = 1.0


def exit_with_launcher() -> None:
    """End this process when scripts/launch.py, its parent, is gone (for example by `kill -9`)."""
    if ERROR_FILE in os.environ:
        threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(_LOOK_EVERY_SECONDS)
    os._exit(1)
