"""Files in which ranks report to scripts/launch.py, in a folder that it makes.

Error messages: each failing rank appends its own to one file, and the launcher prints the first, as
well as those that ranks leave to it. Printed by the rank alone it would be lost: the other ranks
fail too, each with the traceback of its communication, and the output of most ranks is not shown.

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
_ATTEMPT = "TORCHELASTIC_RESTART_COUNT"


class RankError(NamedTuple):
    """A rank's error message, "rank 1: ...", with the run's exit code.

    follows: whether the cause is another rank that is gone.
    """

    sentence: str
    exit_code: int
    follows: bool = False


def write_error(
    sentence: str, exit_code: int, *, follows: bool = False, is_left: bool = False
) -> bool:
    """Append this rank's error message, if a launcher reads the file. Returns whether it is there.

    is_left: whether the rank itself doesn't log it.
    """
    if ERROR_FILE not in os.environ:
        return False
    number = {name: int(os.environ.get(name, 0)) for name in ("RANK", _ATTEMPT)}
    record = {
        "rank": number["RANK"],
        "of": int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        "attempt": number[_ATTEMPT],
        "exit_code": exit_code,
        "sentence": sentence,
        "follows": follows,
        "is_left": is_left,
    }
    try:
        with open(os.environ[ERROR_FILE], "a") as file:
            file.write(json.dumps(record) + "\n")
    except OSError:  # a full disk
        return False
    return True


def leave_error(sentence: str, exit_code: int) -> bool:
    """Leave this rank's error message to the launcher, which tells equal ones once.

    Returns False where this rank has to log it: without a launcher, on a full disk, and before a
    restart, because the launcher reads the last attempt's.
    """
    attempt, last = (int(os.environ.get(n, 0)) for n in (_ATTEMPT, "TORCHELASTIC_MAX_RESTARTS"))
    return write_error(sentence, exit_code, is_left=attempt >= last) and attempt >= last


def read_errors(path: Path) -> list[RankError]:
    """Read the first failing rank's message, and then those that ranks have left to the launcher;
    equal ones once.

    The first one is the cause; the later ones may follow from it. Of several attempts (restarts by
    torchrun) the last one counts.
    """
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):  # half a line, from a full disk
            records.append(json.loads(line))
    last = max((each["attempt"] for each in records), default=0)
    records = [each for each in records if each["attempt"] == last]
    ranks_of: dict[str, list[int]] = {}
    for each in records:
        ranks_of.setdefault(each["sentence"], []).append(each["rank"])
    errors: dict[str, RankError] = {}
    for each in records:
        sentence, ranks = each["sentence"], ranks_of[each["sentence"]]
        shown = sentence if len(ranks) == each["of"] > 1 else f"{_name(ranks)}: {sentence}"
        if not errors or each["is_left"]:
            errors.setdefault(sentence, RankError(shown, each["exit_code"], each["follows"]))
    return list(errors.values())


def _name(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, sorted(ranks)))}"


def mark_steps_begun() -> None:
    """Note for the launcher that this rank has begun its steps and has something to save."""
    if ERROR_FILE in os.environ:
        _begun(Path(os.environ[ERROR_FILE]), os.getpid()).touch()


def have_steps_begun(path: Path, ranks: Iterable[int]) -> bool:
    """Tell whether any of these ranks has something to save.

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
