"""What several tests share: processes that stay alive between tests."""

import atexit
import contextlib
import ctypes
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any, cast

import pytest
import torch
import torch._dynamo.guards
import torch.distributed as dist

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_SPLITS = "splits backward passes, which torch"  # of trainer/preflight.py's refusal

# Processes are forks of one that has imported everything, which takes 4 seconds of a core. (With
# GPUs they start anew: among the imports is one that touches CUDA, which then bears no fork.)
processes = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
if not torch.cuda.is_available():
    processes.set_forkserver_preload(["tests.warm"])


class Ranks:
    """`world_size` processes, started once and used by many tests.

    On a machine with GPUs each uses one and NCCL, else the CPU and gloo. A failure in one of them
    ends them all, so that nothing waits for a rank that is gone; the next `run` starts new ones.

    On the CPU they are stopped (SIGSTOP) between two runs: each gloo group has a thread that wakes
    a hundred times a second, and after some hundred tests these threads were a third of all load.
    """

    def __init__(self, world_size: int):
        self.world_size = world_size
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._pipes: list[Connection] = []
        self._stops = not torch.cuda.is_available()
        # At exit multiprocessing would wait for daemons to take SIGTERM, which stopped ones can't.
        atexit.register(self.close)

    def run(self, fn: Callable[..., Any], *args: Any, seconds: float = 220) -> list[Any]:
        """Return the results of `fn(*args)` by rank. `fn` is a module's function."""
        if not self._processes:
            self._start()
        try:
            self._signal(signal.SIGCONT)
            for pipe in self._pipes:
                pipe.send_bytes(pickle.dumps((fn, args)))
            results = self._collect(time.monotonic() + seconds)
            self._signal(signal.SIGSTOP)
            return results
        except BaseException:
            self.close()
            raise

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes if self._stops else []:
            os.kill(cast(int, process.pid), number)

    def _collect(self, deadline: float) -> list[Any]:
        results: dict[int, Any] = {}
        while len(results) < self.world_size:
            waiting = [pipe for r, pipe in enumerate(self._pipes) if r not in results]
            for pipe in wait(waiting, timeout=0.1):
                rank = self._pipes.index(pipe)
                ok, results[rank] = pickle.loads(pipe.recv_bytes())
                if not ok and torch.__version__ < "2.13" and _SPLITS in results[rank]:
                    pytest.skip(f"the schedule {_SPLITS} {torch.__version__} refuses")
                assert ok, f"rank {rank} failed:\n{results[rank]}"
            for rank, process in enumerate(self._processes):
                assert process.is_alive(), f"rank {rank} died (exit code {process.exitcode})"
            assert time.monotonic() < deadline, f"only ranks {sorted(results)} answered in time"
        return [results[rank] for rank in range(self.world_size)]

    def _start(self) -> None:
        store = tempfile.NamedTemporaryFile(delete=False).name
        for rank in range(self.world_size):
            ours, theirs = processes.Pipe()
            process = processes.Process(
                target=_serve, args=(theirs, store, rank, self.world_size), daemon=True
            )
            process.start()
            self._processes.append(process)
            self._pipes.append(ours)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []


def compile_cheaply() -> None:
    """Leave out a fifth of the time of each compilation: a full garbage collection, and a flush of
    the processor's caches to measure a guard's latency, which is only logged."""
    torch._dynamo.config.run_gc_after_compile = False
    torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0


def _die_with_parent() -> None:
    """Also where the tests are killed while this process is stopped (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _serve(pipe: Connection, store: str, rank: int, world_size: int) -> None:
    _die_with_parent()
    compile_cheaply()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
        backend = "cuda:nccl,cpu:gloo"
        # One process runs many shapes: at the usual limit flex attention would run uncompiled,
        # which fails for short sequences.
        torch._dynamo.config.recompile_limit = 256
    torch.set_num_threads(1)
    dist.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=world_size
    )
    with contextlib.suppress(EOFError):  # the tests are over
        while True:
            # What is here stays: looking through it at every collection (the one below, and the
            # trainer's) would cost more than the runs do.
            gc.freeze()
            fn, args = pickle.loads(pipe.recv_bytes())
            if torch.__version__ < "2.13":  # takes sizes of another run's model for variables
                torch._dynamo.reset()
            try:
                answer = (True, fn(*args))
            except BaseException:
                answer = (False, traceback.format_exc())
            gc.collect()  # the process groups of a run are in cycles, and keep threads
            pipe.send_bytes(pickle.dumps(answer))
