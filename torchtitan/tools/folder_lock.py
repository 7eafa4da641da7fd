"""One writer at a time for a folder, by a lock file that names it: host, process and start time.

The lock is the kernel's (flock): it ends with the process, however that ends, so on one machine a
dead process never leaves a lock behind. Network file systems may not show it to other machines. So
the owner also writes a rising count to the file, the beat, and a machine that finds the file of
another one first watches whether the count still rises. Readers of the folder ignore the lock.
"""

import errno
import fcntl
import json
import os
import socket
import threading
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger

NAME = ".lock"
# Time between beats; and time without a beat after which another machine takes the owner for dead
# (caches of a network file system may delay a beat, by default for up to 30 s, or a minute).
BEAT_SECONDS, SILENCE_SECONDS = 10.0, 60.0
# Time to wait for a process that has just been killed and still holds the lock.
PATIENCE_SECONDS = 4.0
_NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class FolderLock:
    """Lock of a folder, held from `__enter__` to `__exit__`, or to the end of the process.

    path: the lock file; its folder is made.
    what: subject of the error message, such as "job.dump_folder outputs".
    way_out: what the user can do instead of waiting, such as "name another folder".
    """

    def __init__(self, path: Path, what: str, way_out: str) -> None:
        self.path, self.what, self.way_out = path.absolute(), what, way_out
        self._made: list[Path] = []  # folders that this lock creates, innermost first
        self._file = -1
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        """Take the lock. Raises `UserError` where another process holds it, `OSError` for a folder
        that can't be written to."""
        folders = (self.path.parent, *self.path.parent.parents)
        self._made = [folder for folder in folders if not folder.exists()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._file = self._take()
        except BaseException:
            self._leave()
            raise
        self._since = datetime.now().isoformat(sep=" ", timespec="seconds")
        self._beat(0)
        self._beating = threading.Thread(target=self._keep_beating, daemon=True)
        self._beating.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._beating.join()  # else it could write into another file with the same descriptor
        with suppress(OSError):
            self.path.unlink()
        self._leave()

    def _leave(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        for folder in self._made:
            with suppress(OSError):  # it is no longer empty
                folder.rmdir()

    def _take(self) -> int:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                if self._is_free(file, deadline):
                    return file
            except BaseException:
                os.close(file)
                raise
            os.close(file)

    def _is_free(self, file: int, deadline: float) -> bool:
        """Try to lock the file; False = try again. Raises `UserError` where another keeps it."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            flocked = True
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                if time.monotonic() > deadline:
                    raise self._refusal(_owner(file)) from None
                time.sleep(0.1)
                return False
            if error.errno not in _NO_FLOCK:
                raise
            flocked = False
        if not os.path.exists(self.path) or not os.path.samestat(
            os.fstat(file), os.stat(self.path)
        ):
            return False  # the last owner has just removed the file
        owner = _owner(file)
        if owner and self._lives(owner, flocked=flocked):
            raise self._refusal(owner)
        return True

    def _lives(self, owner: dict[str, Any], *, flocked: bool) -> bool:
        """Tell whether the process that wrote the file may still run.

        flocked: the kernel has given this process the lock; False = it supports no locks.
        """
        if _boot_id() and owner.get("boot") == _boot_id():
            return not flocked and owner.get("started") == _start_of(owner.get("pid"))
        if owner.get("host") == socket.gethostname():
            return False  # this machine has been restarted since
        before = self.path.read_bytes()
        logger.warning(
            "%s was written by process %s on %s; waiting %d s to see whether it still runs",
            self.path,
            owner.get("pid"),
            owner.get("host"),
            SILENCE_SECONDS,
        )
        deadline = time.monotonic() + SILENCE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(min(1.0, SILENCE_SECONDS / 10))
            with suppress(OSError):
                if self.path.read_bytes() != before:
                    return True
        return False

    def _refusal(self, owner: dict[str, Any]) -> UserError:
        who = "another process"
        if owner:
            who = f"process {owner.get('pid')} on {owner.get('host')} since {owner.get('since')}"
        return UserError(
            f"{self.what} is being written to by another run ({who}): wait for its end, or "
            f"{self.way_out}; if that process no longer runs, remove {self.path}."
        )

    def _keep_beating(self) -> None:
        beat = 0
        while not self._ended.wait(BEAT_SECONDS):
            beat += 1
            self._beat(beat)

    def _beat(self, number: int) -> None:
        owner = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": self._since,
            "boot": _boot_id(),
            "started": _start_of(os.getpid()),
            "beat": number,
        }
        text = (json.dumps(owner) + "\n").encode()
        with suppress(OSError):  # such as a full disk: the kernel's lock is held all the same
            os.pwrite(self._file, text, 0)
            os.ftruncate(self._file, len(text))


def _owner(file: int) -> dict[str, Any]:
    """Read the last owner's record; empty where it wrote none or is writing it now."""
    try:
        owner = json.loads(os.pread(file, 4096, 0))
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _boot_id() -> str:
    return _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""


def _start_of(pid: Any) -> str | None:
    """Start time of a process, in ticks since the machine's start; None where it doesn't exist."""
    try:
        # "pid (name) state parent ...", where the name may contain any character
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None
