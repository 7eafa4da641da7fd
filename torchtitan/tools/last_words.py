"""Sentences of failing ranks: each appends its own to one file, scripts/launch.py tells the first.

Under a launcher, a rank's sentence would drown: the other ranks fail from then on too, each with
the traceback of its communication, and the output of most ranks is not shown.
"""

import contextlib
import json
import os
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
