"""Progress bar of long work, in an interactive terminal; elsewhere nothing.

The bar leaves the cursor at the beginning of its line, and each log line clears what it begins on.
So lines of other processes, which share the terminal, don't mix with it.
"""

import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, TypeVar

# Environment variable, set by a launcher that runs in a terminal: ranks write to a pipe, from which
# it copies lines to the terminal. The bar is written to the terminal itself.
TERMINAL = "TITAN_TERMINAL"
CLEAR_LINE = "\033[K"

T = TypeVar("T")


def share_terminal() -> None:
    """Let the ranks that this process starts show a bar in its terminal, if it runs in one."""
    if sys.stderr.isatty():
        os.environ[TERMINAL] = os.ttyname(sys.stderr.fileno())


def beside_a_bar() -> bool:
    """Tell whether lines of this process may come to a line of the terminal that holds a bar."""
    return _understands_codes() and (TERMINAL in os.environ or sys.stderr.isatty())


def progress_bar(total: int, what: str, unit: str, done: int = 0) -> Any:
    """Open a bar (tqdm's). Rank 0 shows it, where it is the only rank that logs.

    what: text in front of it.
    unit: "B" is shown with prefixes, as 1.5 GB.
    done: units that are done already.
    """
    from tqdm import tqdm

    class Bar(tqdm):
        monitor_interval = 0  # no thread: scripts/prove.py forks its ranks meanwhile

    stream = _terminal()
    return Bar(
        total=total,
        desc=what,
        unit=unit,
        initial=done,
        disable=stream is None,
        file=_AtLineStart(stream) if stream is not None else None,
        dynamic_ncols=True,
        leave=False,
        miniters=1,  # each unit may take minutes, so none waits for others to be shown
        smoothing=0.1,
        unit_scale=unit == "B",
        unit_divisor=1024,
    )


def track(work: Iterable[T], total: int, what: str, unit: str) -> Iterator[T]:
    """Yield what is in `work`, with a bar that counts it."""
    with progress_bar(total, what, unit) as bar:
        for each in work:
            yield each
            bar.update()


def _terminal() -> TextIO | None:
    others_log = (os.environ.get("LOG_RANK") or "0") != "0"
    if (os.environ.get("RANK") or "0") != "0" or others_log or not _understands_codes():
        return None
    if sys.stderr.isatty():
        return sys.stderr
    try:
        return open(os.environ[TERMINAL], "w")
    except (KeyError, OSError):
        return None


def _understands_codes() -> bool:
    return os.environ.get("TERM", "dumb") != "dumb"


class _AtLineStart:
    """A terminal that returns the cursor to the beginning of the line after each write."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        self._stream.write(f"{text}\r")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
