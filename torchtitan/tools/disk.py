"""Checks of folders before a run, and writes during a run that survive a failing disk.

A folder that a key names is checked before a run (`check_writable`, `check_readable`). Output
beside the training itself (metrics, traces) is written through a `SideOutput`, so that a disk that
fails later never ends the run.
"""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger

# A full disk, or a user's full quota.
FULL = (errno.ENOSPC, errno.EDQUOT)

# ------------------------------------------------------------------ before a run


def check_writable(key: str, folder: str | os.PathLike) -> None:
    """Raise `UserError` where `folder` can't be created, read or written to; leave nothing behind.

    A full disk passes: space may be freed later, and failing writes report themselves.

    key: names the folder in the message.
    """
    problem = _problem_of(Path(folder).absolute())
    if problem is not None:
        raise UserError(
            f"{key} {_shortened(folder)} can't be written to ({problem}): name a writable folder."
        )


def _problem_of(folder: Path) -> str | None:
    nearest = folder
    try:
        nearest = _nearest(folder)
        if nearest.is_symlink() and not nearest.exists():
            return f"{nearest} is a link to {os.readlink(nearest)}, which doesn't exist"
        if not nearest.is_dir():
            return f"{nearest} is not a folder"
        if nearest == folder:
            os.listdir(folder)
        with tempfile.TemporaryFile(dir=nearest):  # permissions alone don't prove it
            return None
    except OSError as error:
        if error.errno in FULL:
            return None
        return f"{error.strerror}: {_shortened(nearest)}"


def _nearest(folder: Path) -> Path:
    """Find the folder itself or its nearest existing parent; a dangling link counts as existing."""
    for path in (folder, *folder.parents):
        with suppress(FileNotFoundError, NotADirectoryError):
            path.lstat()
            return path
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))


def _shortened(path: str | os.PathLike) -> str:
    text = str(path)
    return text if len(text) <= 200 else f"{text[:60]}... ({len(text)} characters)"


def check_readable(key: str, path: str | os.PathLike) -> None:
    """Raise `UserError` where an existing file or folder can't be read.

    A missing one passes: its reader can say what it should contain.
    """
    try:
        if Path(path).is_dir():
            os.listdir(path)
            os.stat(os.path.join(path, "."))  # fails for a folder that may be listed, not entered
        elif Path(path).exists():
            with open(path, "rb"):
                pass
    except OSError as error:
        raise UserError(
            f"{key} {_shortened(path)} can't be read ({error.strerror}): name another one, or let "
            "this user read it."
        ) from None


# ------------------------------------------------------------------ during a run


def reason(error: OSError, folder: Path, *, free: int | None = None, needed: int = 0) -> str:
    """Reason of a failed write; for a full disk with the free and the needed bytes.

    folder: any path on the disk in question; it need not exist.
    free: bytes that were free, where that is known; None = ask the disk now.
    needed: bytes that were to be written; 0 = unknown.
    """
    text = error.strerror or str(error)
    numbers = []
    if error.errno == errno.ENOSPC:
        free = free_bytes(folder) if free is None else free
        numbers += [] if free is None else [f"{free:,} bytes free"]
    if error.errno in FULL and needed:
        numbers.append(f"{needed:,} bytes needed")
    return f"{text}: {', '.join(numbers)}" if numbers else text


def free_bytes(folder: Path) -> int | None:
    """Bytes free for this user on the disk that holds `folder`; None where that is unknown."""
    with suppress(OSError):
        disk = os.statvfs(_nearest(folder.absolute()))
        return disk.f_bavail * disk.f_frsize
    return None


class SideOutput:
    """Output that a run writes beside the training. Failures are logged, never raised.

    A failure is logged once, and again only after a write has succeeded in between.

    what: subject of the message, such as "metrics.jsonl".
    path: any path on the disk in question.
    lost: end of the message, the consequence for unwritten output, such as "it is written later".
    """

    def __init__(self, what: str, path: Path, lost: str) -> None:
        self.what, self.path, self.lost = what, path, lost
        self.failing = False

    @contextmanager
    def attempt(self, kinds: type[Exception] = OSError) -> Iterator[None]:
        """Catch and log errors of `kinds` that the block raises."""
        try:
            yield
        except kinds as error:
            if not self.failing:
                why = str(error) if isinstance(error, UserError) else repr(error)
                why = reason(error, self.path) if isinstance(error, OSError) else why
                logger.warning(
                    "%s can't be written (%s); training continues, and %s",
                    self.what,
                    why,
                    self.lost,
                )
            self.failing = True
        else:
            if self.failing:
                logger.warning("%s can be written again", self.what)
            self.failing = False


@contextmanager
def whole_or_none(path: Path) -> Iterator[None]:
    """Remove `path`, which the block writes, where the block fails: half a file wastes space."""
    try:
        yield
    except Exception:
        with suppress(OSError):
            path.unlink()
        raise


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically: it is complete, or as it was before. Raises `OSError`."""
    beside = path.with_name(path.name + ".tmp")
    with whole_or_none(beside):
        beside.write_bytes(content)
        beside.replace(path)
