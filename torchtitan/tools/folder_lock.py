"""One writer at a time for a folder, by a lock file that names it: host, process and start time.

The lock is the kernel's (flock): it ends with the process, however that ends, so on one machine a
lock of a process that is gone is never in the way. Network file systems may not show it to other
machines. So the owner also counts up in the file, and a machine that finds the file of another one
first watches whether it still does. Readers of the folder don't look at the lock.
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
# The owner counts every so often; seen from another machine it is gone after so long a silence
# (caches of a network file system may hold a beat back, by default for up to 30 s, a minute).
BEAT_SECONDS, SILENCE_SECONDS = 10.0, 60.0
# A process that has just been ended may take a moment to go.
PATIENCE_SECONDS = 4.0
_NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class FolderLock:
    """Held from `__enter__` to `__exit__`, or to the end of the process.

    path: of the lock file; its folder is made. what: for the sentence, such as
    "job.dump_folder outputs". way_out: what else the user can do than wait, such as "name another
    folder".
    """

    def __init__(self, path: Path, what: str, way_out: str) -> None:
        self.path, self.what, self.way_out = path.absolute(), what, way_out
        self._made: list[Path] = []  # folders that were not there, innermost first
        self._file = -1
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        """Raises `UserError` where another process has it, `OSError` for a folder that can't be
        written to."""
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
        self._beating.join()  # or it would write into a file that takes the number of this one
        with suppress(OSError):
            self.path.unlink()
        self._leave()

    def _leave(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        for folder in self._made:
            with suppress(OSError):  # it holds something now
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
        """Lock it; False to try again. Raises `UserError` where it will stay another's."""
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
            return False  # its last owner has just removed it
        owner = _owner(file)
        if owner and self._lives(owner, flocked=flocked):
            raise self._refusal(owner)
        return True

    def _lives(self, owner: dict[str, Any], *, flocked: bool) -> bool:
        """Whether the process that wrote the file may still be there though the kernel has given
        us its lock, or has no locks (not flocked)."""
        if _boot_id() and owner.get("boot") == _boot_id():
            return not flocked and owner.get("started") == _start_of(owner.get("pid"))
        if owner.get("host") == socket.gethostname():
            return False  # it has been started anew since
        before = self.path.read_bytes()
        logger.warning(
            "%s was written by process %s on %s; waiting for %d s to see whether that is gone",
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
            f"{self.way_out}; if that process is gone, remove {self.path}."
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
        with suppress(OSError):  # a full disk, say: the kernel's lock is there all the same
            os.pwrite(self._file, text, 0)
            os.ftruncate(self._file, len(text))


def _owner(file: int) -> dict[str, Any]:
    """What the last owner wrote; empty where it wrote nothing or is just writing."""
    try:
        owner = json.loads(os.pread(file, 4096, 0))
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _boot_id() -> str:
    return _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""


def _start_of(pid: Any) -> str | None:
    """When a process began, in ticks since the machine's start; None where there is none."""
    try:
        # "pid (name) state parent ...", and the name may hold anything
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None
