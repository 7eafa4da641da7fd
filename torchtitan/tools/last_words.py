"""What ranks leave for scripts/launch.py, in files of a folder that it makes.

Sentences of failing ranks: each appends its own to one file, and the launcher tells the first.
A rank's own would drown: the other ranks fail from then on too, each with the traceback of its
communication, and the output of most ranks is not shown.

Further: which ranks have begun their steps, and the exit code of a run that a signal has ended.
"""

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

# Names the file; unset where nobody is there to read it.
ERROR_FILE = "TITAN_ERROR_FILE"


def leave_last_words(sentence: str, exit_code: int) -> None:
    """Append this rank's sentence, if a launcher listens."""
    if ERROR_FILE in os.environ:
        rank = int(os.environ.get("RANK", 0))
        attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        words = {"rank": rank, "attempt": attempt, "exit_code": exit_code, "sentence": sentence}
        # On a full disk the log has to do.
        with contextlib.suppress(OSError), open(os.environ[ERROR_FILE], "a") as file:
            file.write(json.dumps(words) + "\n")


def read_last_words(path: Path) -> tuple[str, int] | None:
    """The first rank's "rank 1: ..." and exit code, None where no rank has left any: the first is
    the cause, whatever comes after it may follow from it. Of several attempts the last one's."""
    if not path.exists():
        return None
    words = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):  # half a line of a full disk
            words.append(json.loads(line))
    if not words:
        return None
    last = max(each["attempt"] for each in words)
    first = next(each for each in words if each["attempt"] == last)
    return f"rank {first['rank']}: {first['sentence']}", first["exit_code"]


def mark_steps_begun() -> None:
    """From here on this rank has something to save."""
    if ERROR_FILE in os.environ:
        _begun(Path(os.environ[ERROR_FILE]), os.getpid()).touch()


def have_steps_begun(path: Path, ranks: Iterable[int]) -> bool:
    """Whether any of these ranks (process ids) has something to save; of none, whether one had."""
    begun = [_begun(path, rank) for rank in ranks] or path.parent.glob("begun-*")
    return any(file.exists() for file in begun)


def leave_stop_code(code: int) -> None:
    """The exit code that the launcher is to return for a run that a signal has ended well."""
    if ERROR_FILE in os.environ and code:
        _stop_code(Path(os.environ[ERROR_FILE])).write_text(str(code))


def read_stop_code(path: Path) -> int:
    """0 where no rank has left one."""
    return int(_stop_code(path).read_text()) if _stop_code(path).exists() else 0


def _begun(path: Path, rank: int) -> Path:
    return path.with_name(f"begun-{rank}")


def _stop_code(path: Path) -> Path:
    return path.with_name("stop_code")
