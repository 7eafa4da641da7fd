"""Processes that act as ranks on this machine's CPU: forks of this one, with all its imports.

They meet in a file, not at a port, and end with this process, however it ends.
"""

import contextlib
import ctypes
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from torchtitan.tools.errors import RunError
from torchtitan.tools.logging import logger

# Not "spawn": 6 seconds of imports a process. This one must not have computed anything before.
_fork = multiprocessing.get_context("fork")
# A rank that waits for ever fails before, by its collectives' own limit.
SECONDS = 600.0
_PDEATHSIG = 1  # of <sys/prctl.h>: the signal at the parent's death


class Processes:
    """A number of ranks that run one function after another, for as long as a `with` block lasts.

    folder: for their logs and the file in which they meet.
    """

    def __init__(self, count: int, folder: Path) -> None:
        self.count, self.folder = count, folder
        self._processes: list[BaseProcess] = []
        self._pipes: list[Any] = []  # of Connection; the stub names another class

    def __enter__(self) -> "Processes":
        self.folder.mkdir(parents=True)
        try:
            for rank in range(self.count):
                self._start(rank)
        except BaseException:  # Ctrl-C among them: nobody else would end those that have started
            self.__exit__()
            raise
        return self

    def _start(self, rank: int) -> None:
        ours, theirs = _fork.Pipe()
        process = _fork.Process(target=_serve, args=(theirs, self.folder, rank, self.count))
        self._processes.append(process)
        # Python runs hooks around a fork, and drops a KeyboardInterrupt that falls into one.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        theirs.close()
        self._pipes.append(ours)

    def __exit__(self, *_: object) -> None:
        started = [process for process in self._processes if process.pid is not None]
        for process in started:
            process.kill()
        for process in started:
            process.join()

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call `function(*arguments)` on each rank; return the results, by rank.

        Raises `RunError` where a rank fails, or takes longer than SECONDS.
        """
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((function, arguments)))
        results: dict[int, Any] = {}
        deadline = time.monotonic() + SECONDS
        while len(results) < self.count:
            waiting: dict[Any, int] = {
                pipe: r for r, pipe in enumerate(self._pipes) if r not in results
            }
            for pipe in wait(list(waiting), timeout=1.0):
                results[waiting[pipe]] = self._answer(waiting[pipe])
            if time.monotonic() > deadline:
                late = [r for r in range(self.count) if r not in results]
                raise RunError(f"ranks {late} had not finished after {SECONDS:.0f} seconds")
        return [results[rank] for rank in range(self.count)]

    def _answer(self, rank: int) -> Any:
        try:
            fine, answer = pickle.loads(self._pipes[rank].recv_bytes())
        except (EOFError, OSError):
            self._processes[rank].join(5)
            code = self._processes[rank].exitcode
            raise RunError(f"rank {rank} has died (exit code {code})") from None
        if not fine:
            raise RunError(f"rank {rank} has failed: {answer}")
        return answer


def _serve(pipe: Connection, folder: Path, rank: int, count: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its ranks
    ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL)  # also where it is killed itself
    log = os.open(folder / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    logger.setLevel("WARNING")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=count
    )
    gc.freeze()  # what has been imported stays: each run's collections need not look through it
    with contextlib.suppress(EOFError, BrokenPipeError):  # the parent is gone
        while True:
            function, arguments = pickle.loads(pipe.recv_bytes())
            try:
                answer = (True, function(*arguments))
            except BaseException as error:
                traceback.print_exc()
                sys.stderr.flush()
                answer = (False, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
            gc.collect()  # process groups of a run are in cycles, and keep threads
            pipe.send_bytes(pickle.dumps(answer))
    os._exit(0)
