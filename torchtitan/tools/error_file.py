"""Files in which ranks report to scripts/launch.py, in a folder that it makes.

Error messages: each failing rank appends its own to one file, and the launcher prints the first.
Printed by the rank alone it would be lost: the other ranks fail too, each with the traceback of its
communication, and the output of most ranks is not shown.

Also: which ranks have begun their steps, and the exit code of a run that a signal has ended.
"""

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

# Environment variable with the path of the error file; unset without scripts/launch.py.
ERROR_FILE = "TITAN_ERROR_FILE"


class RankError(NamedTuple):
    """A rank's error message, "rank 1: ...", with the run's exit code.

    follows: whether the cause is another rank that is gone.
    """

    sentence: str
    exit_code: int
    follows: bool = False


def write_error(sentence: str, exit_code: int, *, follows: bool = False) -> None:
    """Append this rank's error message, if a launcher reads the file."""
    if ERROR_FILE in os.environ:
        rank = int(os.environ.get("RANK", 0))
        attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        record = {"rank": rank, "attempt": attempt, "exit_code": exit_code, "sentence": sentence}
        record["follows"] = follows
        # On a full disk the message is only in the log.
        with contextlib.suppress(OSError), open(os.environ[ERROR_FILE], "a") as file:
            file.write(json.dumps(record) + "\n")


def read_first_error(path: Path) -> RankError | None:
    """Read the first failing rank's message; None where there is none.

    The first one is the cause; the later ones may follow from it. Of several attempts (restarts by
    torchrun) the last one counts.
    """
    if not path.exists():
        return None
    records = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):  # half a line, from a full disk
            records.append(json.loads(line))
    if not records:
        return None
    last = max(each["attempt"] for each in records)
    first = next(each for each in records if each["attempt"] == last)
    sentence = f"rank {first['rank']}: {first['sentence']}"
    return RankError(sentence, first["exit_code"], first["follows"])


def mark_steps_begun() -> None:
    """Note for the launcher that this rank has begun its steps and has something to save."""
    if ERROR_FILE in os.environ:
        _begun(Path(os.environ[ERROR_FILE]), os.getpid()).touch()


def have_steps_begun(path: Path, ranks: Iterable[int]) -> bool:
    """Whether any of these ranks has something to save.

    ranks: process ids; empty = all ranks that ever ran.
    """
    begun = [_begun(path, rank) for rank in ranks] or path.parent.glob("begun-*")
    return any(file.exists() for file in begun)


def leave_stop_code(code: int) -> None:
    """Set the exit code that the launcher returns for a run that a signal has ended well."""
    if ERROR_FILE in os.environ and code:
        _stop_code(Path(os.environ[ERROR_FILE])).write_text(str(code))


def read_stop_code(path: Path) -> int:
    """Read the code of `leave_stop_code`; 0 where no rank has written one."""
    return int(_stop_code(path).read_text()) if _stop_code(path).exists() else 0


def name_dumps(prefix: Path) -> None:
    """Tell the launcher where ranks write what they did last; see tools/flight_recorder.py."""
    if ERROR_FILE in os.environ:
        _dumps(Path(os.environ[ERROR_FILE])).write_text(str(prefix.absolute()))


def read_dumps_prefix(path: Path) -> Path | None:
    """Read the path of `name_dumps`; None where no rank has written it."""
    return Path(_dumps(path).read_text()) if _dumps(path).exists() else None


def _begun(path: Path, rank: int) -> Path:
    return path.with_name(f"begun-{rank}")


def _dumps(path: Path) -> Path:
    return path.with_name("dumps")


def _stop_code(path: Path) -> Path:
    return path.with_name("stop_code")
