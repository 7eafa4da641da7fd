"""`python FILE ...` and `python -m MODULE ...` as forks of a process that has imported everything.

A start costs a tenth of a second instead of the 4 (torch) to 9 (torchtitan.train) of a core that
the imports take. Parents, sessions, signals, environment, folder and output are those of a real
start. The imports themselves, and what happens during them, need a real one: test_launcher.py and
test_run_train.py keep one each. With GPUs all starts are real, for CUDA bears no fork.
"""

import atexit
import ctypes
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, process, resource_tracker, util
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

from tests.helpers import processes

_NEW_NETWORK = 0x40000000  # CLONE_NEWNET of linux/sched.h
_CLIENT = Path(__file__).with_name("forks_client.py")


def be_python(
    arguments: list[str], env: dict[str, str], folder: str, stdout: int, stderr: int
) -> NoReturn:
    """Become the process of a Python command. Call it in a fork.

    arguments: of `python`: options, -m and a module or a script, and what they are given.
    stdout, stderr: file descriptors.
    """
    code: Any = 1
    try:
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):  # as exec does; those ignored stay ignored
                signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _forget_parent()
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))
        os.environ.clear()
        os.environ.update(env)
        os.chdir(folder)
        _run([each for each in arguments if each != "-u"])
        code = 0
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:  # as the interpreter ends, without the parent's objects
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(code or 0)


def _forget_parent() -> None:
    """multiprocessing would go on with its parent's helpers, whose files are closed here."""
    resource_tracker._resource_tracker.__init__()  # type: ignore[misc]
    forkserver._forkserver.__init__()  # type: ignore[misc]
    process.current_process()._config["daemon"] = False  # daemons may not have children
    process._children.clear()  # type: ignore[attr-defined]
    util._finalizer_registry.clear()  # type: ignore[attr-defined]
    atexit._clear()
    atexit.register(util._exit_function)


def _run(arguments: list[str]) -> None:
    if arguments[0] == "-m":
        _, module, *rest = arguments
        sys.argv = [module, *rest]
        sys.modules.pop(module, None)  # runpy would warn that it runs twice
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        return
    sys.argv = list(arguments)
    sys.path.insert(0, str(Path(arguments[0]).parent))
    runpy.run_path(arguments[0], run_name="__main__")


class Fork:
    """A rank, forked from its launcher, with those methods of `subprocess.Popen` that torchrun
    calls."""

    def __init__(
        self, arguments: list[str], env: dict[str, str], stdout: int = 1, stderr: int = 2
    ) -> None:
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            be_python(arguments, env, os.getcwd(), stdout, stderr)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("rank", timeout or 0)
            time.sleep(0.01)
        return code


def fork_ranks() -> None:
    """From now on the ranks of a launcher that runs in this process are forks of it."""
    if torch.cuda.is_available():
        return

    def forked(self: SubprocessHandler, args: tuple[str, ...], env: dict[str, str]) -> Fork:
        outputs = [
            number if file is None else file.fileno()
            for number, file in ((1, self._stdout), (2, self._stderr))
        ]
        return Fork(list(args[1:]), env, *outputs)

    SubprocessHandler._popen = forked  # type: ignore[method-assign]


class Forked:
    """`python ARGUMENTS` in a session of its own; what it says is added to `log`."""

    def __init__(self, log: Path, arguments: list[str], env: dict[str, str]) -> None:
        log.touch()
        self._process = processes.Process(target=_start, args=(log, arguments, env))
        self._process.start()
        # One that a failed test has left would keep pytest from ending, which waits for it.
        atexit.register(self.kill)

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, seconds: float) -> int | None:
        self._process.join(seconds)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


def _start(log: Path, arguments: list[str], env: dict[str, str]) -> NoReturn:
    os.setsid()
    fork_ranks()
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    if torch.cuda.is_available():
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.execve(sys.executable, [sys.executable, *arguments], env)
    be_python(arguments, env, os.getcwd(), handle, handle)


# ---------------------------------------------------------------------------------------------
# For shell scripts
# ---------------------------------------------------------------------------------------------


@contextmanager
def forking_python() -> Iterator[str]:
    """Give the command, for a shell, of a `python` whose processes are forks."""
    if torch.cuda.is_available():
        yield sys.executable
        return
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        path = f"{folder}/socket"  # pytest's folders may be too long for one
        listener.bind(path)
        listener.listen()
        server = processes.Process(target=_serve, args=(listener,), daemon=True)
        server.start()
        yield f"{sys.executable} -I -S {_CLIENT} {path}"
        server.kill()
        server.join()


def _serve(listener: socket.socket) -> None:
    fork_ranks()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who answer
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _answer(connection)
            os._exit(0)
        connection.close()


def _answer(connection: socket.socket) -> None:
    """Run a client's command, and tell it the exit code."""
    size = int.from_bytes(connection.recv(8), "big")
    _, handles, _, _ = socket.recv_fds(connection, 1, 3)
    text = b""
    while len(text) < size:
        text += connection.recv(size - len(text))
    told = json.loads(text)
    pid = os.fork()
    if pid == 0:
        stdout, stderr, network = handles
        enter_network(network)
        be_python(told["arguments"], told["env"], told["folder"], stdout, stderr)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    connection.sendall(str(code).encode())


def enter_network(namespace: int) -> None:
    """Enter the network namespace of a file descriptor, where this process is in another."""
    if os.path.sameopenfile(namespace, os.open("/proc/self/ns/net", os.O_RDONLY)):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.setns(namespace, _NEW_NETWORK) == 0, os.strerror(ctypes.get_errno())
