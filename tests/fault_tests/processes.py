"""Real processes that train and may be killed, started cheaply (see tests/helpers.py).

What a launcher does for a rank is done here by hand (its variables and the address to meet at), so
that a restart costs milliseconds instead of the seconds that importing torch takes.
"""

import contextlib
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from tests.helpers import processes


class Run:
    """`world_size` processes in `torchtitan.train.main(argv)`; what they say is added to `log`.

    prepare: a module's function that each process calls first, with its rank and options; it may
    change both the options and the process.
    """

    def __init__(
        self,
        argv: list[str],
        world_size: int,
        log: Path,
        prepare: Callable[[int, list[str]], None] | None = None,
    ) -> None:
        self.log = log
        port = _free_port()
        self.ranks = [
            processes.Process(target=_train, args=(argv, rank, world_size, port, log, prepare))
            for rank in range(world_size)
        ]
        for process in self.ranks:
            process.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.ranks:
            process.kill()
            process.join()

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        os.kill(self.ranks[rank].pid, number)

    def exit_codes(self, seconds: float = 120) -> list[int | None]:
        """Exit codes of all ranks, when they have ended; None for one that has not."""
        deadline = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in self.ranks]

    def wait_for(self, path: Path, seconds: float = 120) -> None:
        """Until a file is there."""
        self.wait_until(path.exists, f"{path} did not come", seconds)

    def wait_until(self, happens: Callable[[], bool], else_: str, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not happens():
            assert time.monotonic() < deadline, f"{else_}:\n{self.log.read_text()}"
            assert all(process.is_alive() for process in self.ranks), self.log.read_text()
            time.sleep(0.005)

    def wait_for_words(self, words: str) -> None:
        """Until a rank has said them."""
        self.wait_until(
            lambda: self.log.exists() and words in self.log.read_text(), f"none said '{words}'"
        )


def _free_port() -> int:
    """A port below those that the kernel deals out, so that nothing takes it before rank 0 does."""
    first, last = 20_000, 30_000
    with contextlib.suppress(OSError):
        dealt_out = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
        if dealt_out > 10_000:
            first, last = max(1024, dealt_out - 10_000), dealt_out
    ports = list(range(first, last))
    # Not by the tests' seed: suites that run side by side would try the same ones.
    random.SystemRandom().shuffle(ports)
    return next(port for port in ports if _is_free(port))


def _is_free(port: int) -> bool:
    with socket.socket() as probe, contextlib.suppress(OSError):
        probe.bind(("", port))
        return True
    return False


def _train(
    argv: list[str],
    rank: int,
    world_size: int,
    port: int,
    log: Path,
    prepare: Callable[[int, list[str]], None] | None,
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "LOG_RANK": ",".join(map(str, range(world_size))),
    }
    os.environ.pop("TITAN_NOHUP", None)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    from torchtitan.train import main

    if prepare is not None:
        prepare(rank, argv)
    sys.exit(main(argv))
