"""Folders and disks as a run meets them: what can't be used, and why something can't be written.

A folder that a key names is checked before a run (`check_writable`, `check_readable`). What a run
writes beside the training itself (metrics, traces) goes through a `SideOutput`, so that a disk that
fails later never ends it.
"""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger

# A disk without room, or a user's share of it.
FULL = (errno.ENOSPC, errno.EDQUOT)

# ------------------------------------------------------------------ before a run


def check_writable(key: str, folder: str | os.PathLike) -> None:
    """Raise `UserError` where `folder` can't be made, read or written to; leaves nothing behind.

    A full disk passes: room may come, and what can't be written is told then. key: names the folder
    in the sentence.
    """
    problem = _problem_of(Path(folder).absolute())
    if problem is not None:
        raise UserError(
            f"{key} {_shortened(folder)} can't be written to ({problem}): name a folder that can."
        )


def _problem_of(folder: Path) -> str | None:
    nearest = folder
    try:
        nearest = _nearest(folder)
        if nearest.is_symlink() and not nearest.exists():
            return f"{nearest} is a link to {os.readlink(nearest)}, which isn't there"
        if not nearest.is_dir():
            return f"{nearest} is not a folder"
        if nearest == folder:
            os.listdir(folder)
        with tempfile.TemporaryFile(dir=nearest):  # permissions alone don't tell all
            return None
    except OSError as error:
        if error.errno in FULL:
            return None
        return f"{error.strerror}: {_shortened(nearest)}"


def _nearest(folder: Path) -> Path:
    """The folder itself or the first above it that is there, if only as a link to nothing."""
    for path in (folder, *folder.parents):
        with suppress(FileNotFoundError, NotADirectoryError):
            path.lstat()
            return path
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))


def _shortened(path: str | os.PathLike) -> str:
    text = str(path)
    return text if len(text) <= 200 else f"{text[:60]}... ({len(text)} characters)"


def check_readable(key: str, path: str | os.PathLike) -> None:
    """Raise `UserError` where a file or folder is there that can't be read; one that is missing
    passes: who reads it says what it should be."""
    try:
        if Path(path).is_dir():
            os.listdir(path)
            os.stat(os.path.join(path, "."))  # a folder that may be listed, but not entered
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
    """Why something could not be written: of a full disk also its free and the needed bytes.

    folder: on the disk in question; it need not exist. free: instead of what the disk has free now.
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
    """Of the disk that holds `folder`, for this user; None where the system doesn't say."""
    with suppress(OSError):
        disk = os.statvfs(_nearest(folder.absolute()))
        return disk.f_bavail * disk.f_frsize
    return None


class SideOutput:
    """Something that a run writes beside the training: what keeps it from being written is said
    once, and again after it has been written in between; it is never raised.

    what: begins the sentence, such as "metrics.jsonl". path: on the disk in question. lost: what
    becomes of what is not written, such as "it is written later".
    """

    def __init__(self, what: str, path: Path, lost: str) -> None:
        self.what, self.path, self.lost = what, path, lost
        self.failing = False

    @contextmanager
    def attempt(self, kinds: type[Exception] = OSError) -> Iterator[None]:
        """Around the writing; errors of `kinds` end it."""
        try:
            yield
        except kinds as error:
            if not self.failing:
                why = reason(error, self.path) if isinstance(error, OSError) else repr(error)
                logger.warning(
                    "%s can't be written (%s); training goes on, and %s", self.what, why, self.lost
                )
            self.failing = True
        else:
            if self.failing:
                logger.warning("%s can be written again", self.what)
            self.failing = False


@contextmanager
def whole_or_none(path: Path) -> Iterator[None]:
    """Around the writing of a file: a failure leaves nothing of it, which would take up room."""
    try:
        yield
    except Exception:
        with suppress(OSError):
            path.unlink()
        raise


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is there whole or as it was before. Raises `OSError`."""
    beside = path.with_name(path.name + ".tmp")
    with whole_or_none(beside):
        beside.write_bytes(content)
        beside.replace(path)
