"""A run on two nodes, each a network namespace of its own: it trains like one process, and where a
node is missing, late, dead or started differently the launchers end and name it."""

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts import launch
from scripts.emulated_nodes import EmulatedNodes, check_can_emulate
from scripts.soak import ranks_of
from tests.fault_tests.test_kills import SAVES, losses_by_step
from tests.fault_tests.test_launcher import until
from tests.forks import enter_network, fork_ranks, forking_python
from tests.helpers import processes
from tests.tiny_run import losses, tiny
from torchtitan.distributed import nodes
from torchtitan.tools.errors import UserError
from torchtitan.train import main

# Ranks import for seconds; machines that run the tests may be busy.
pytestmark = pytest.mark.timeout(300)

REPO = Path(__file__).parents[2]
_NEW_HOST_NAME = 0x04000000  # CLONE_NEWUTS
HOSTS = ("host-a", "host-b")
A, B = "node 0 (host-a, 10.99.0.1)", "node 1 (host-b, 10.99.0.2)"


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[EmulatedNodes]:
    try:
        check_can_emulate()
        emulated = EmulatedNodes(2, rate_mbit=0).__enter__()
    except UserError as error:
        pytest.skip(str(error))
    yield emulated
    emulated.__exit__()


class Launchers:
    """scripts/launch.py on each node, and its ranks, as forks of a process that has imported torch.

    log: `log.0` and `log.1` have what the nodes say.
    """

    def __init__(self, emulated: EmulatedNodes, folder: Path) -> None:
        self._nodes = emulated
        self._folder = folder
        self.port = 29500
        self.processes: dict[int, Any] = {}

    def start(self, node: int, *train: str, seconds: int = 30, **options: Any) -> None:
        """options: of torchrun, beside those that give the node its place."""
        place = {"nnodes": 2, "node_rank": node, "nproc_per_node": 1, "max_restarts": 0}
        place |= {"master_addr": self._nodes.address(0), "master_port": self.port}
        place |= {"rdzv_conf": f"timeout={seconds}"} | options
        arguments = [f"--{name}={value}" for name, value in place.items()]
        arguments += ["-m", "torchtitan.train", *train]
        where = (self._nodes.names[node], HOSTS[node], self.log(node))
        self.processes[node] = processes.Process(target=_launch, args=(*where, arguments))
        self.processes[node].start()

    def log(self, node: int) -> Path:
        return self._folder / f"log.{node}"

    def end(self, node: int, seconds: float = 120) -> tuple[int, str]:
        """Exit code and last line of a node's launcher."""
        self.processes[node].join(seconds)
        said = self.log(node).read_text()
        assert self.processes[node].exitcode is not None, said
        assert "Traceback" not in said, said
        return self.processes[node].exitcode, said.splitlines()[-1]


def _launch(namespace: str, host: str, log: Path, arguments: list[str]) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    with open(f"/var/run/netns/{namespace}") as network:
        enter_network(network.fileno())
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(_NEW_HOST_NAME) == 0, os.strerror(ctypes.get_errno())
    socket.sethostname(host)
    os.environ.pop("GLOO_SOCKET_IFNAME", None)  # the launcher finds it
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    fork_ranks()
    nodes.REPORT_SECONDS = 2.0  # to wait for the word of a node that is dead
    sys.exit(launch.main(arguments))


@pytest.fixture
def launchers(two_nodes, tmp_path) -> Iterator[Launchers]:
    started = Launchers(two_nodes, tmp_path)
    yield started
    for process in started.processes.values():
        process.kill()  # ranks end with their launcher
        process.join()


@pytest.fixture(scope="module")
def forks() -> Iterator[str]:
    with forking_python() as command:
        yield command


def test_two_nodes_of_which_one_comes_late_train_like_one_process(two_nodes, tmp_path, forks):
    """The whole way, from ./run_train.sh on."""
    python = tmp_path / "bin/python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {forks} "$@"\n')
    python.chmod(0o755)
    out = tiny(tmp_path / "out", training__global_batch_size=16)
    (tmp_path / "empty.toml").touch()
    env = {name: value for name, value in os.environ.items() if name != "GLOO_SOCKET_IFNAME"}
    env |= {"NNODES": "2", "NGPU": "2", "MASTER_ADDR": two_nodes.address(0), "OMP_NUM_THREADS": "1"}
    env["PATH"] = f"{python.parent}:{env['PATH']}"
    env |= {"VIRTUAL_ENV": sys.prefix, "CONFIG_FILE": str(tmp_path / "empty.toml")}
    logs, runs = [tmp_path / "log.0", tmp_path / "log.1"], []
    for node, log in enumerate(logs):
        with log.open("w") as file:
            options: dict[str, Any] = {"stdout": file, "stderr": file, "cwd": tmp_path}
            options["env"] = env | {"NODE_RANK": str(node)}
            runs.append(two_nodes.start(node, [str(REPO / "run_train.sh"), *out], **options))
        if node == 0:
            until(lambda: "meeting the others at 10.99.0.1:29500" in logs[0].read_text(), log)
    said = "".join(f"{log.read_text()}\n" for log in logs)
    assert [run.wait(200) for run in runs] == [0, 0], said
    assert main(tiny(tmp_path / "alone", training__local_batch_size=16)) == 0
    assert len(losses(tmp_path / "out")) == 4
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)


def test_a_node_that_never_comes_is_named_on_the_others(launchers):
    launchers.start(0, seconds=1)
    code, last = launchers.end(0)
    assert code == 1
    assert "E node 1 of 2 did not come to 10.99.0.1:29500 within NODES_TIMEOUT (1): check" in last


def test_without_node_0_the_others_end(launchers):
    launchers.start(1, seconds=1)
    code, last = launchers.end(1)
    assert code == 1
    assert "E node 0 was not found at MASTER_ADDR:MASTER_PORT (10.99.0.1:29500) within" in last
    assert "NODES_TIMEOUT (1; " in last


def test_a_port_that_is_taken_on_node_0(launchers, two_nodes):
    serve = "import socket, time; s = socket.create_server(('', 29500)); print(flush=True)"
    serve += "; time.sleep(99)"
    server = two_nodes.start(0, [sys.executable, "-c", serve], stdout=subprocess.PIPE)
    server.stdout.readline()
    launchers.start(0, seconds=20)
    launchers.start(1, seconds=2)
    code, last = launchers.end(0)
    assert code == 2 and "MASTER_PORT is 29500, on which another process listens: set it" in last
    code, last = launchers.end(1)
    assert code == 1 and "node 0 was not found at MASTER_ADDR:MASTER_PORT" in last
    server.kill()
    server.wait()


def test_variables_that_differ_between_nodes(launchers):
    launchers.start(0, nproc_per_node=4)
    launchers.start(1, nproc_per_node=2)
    for node in range(2):
        code, last = launchers.end(node)
        assert code == 2
        assert f"E NGPU is 2 on {B}, but 4 on {A}: set it to the same value on all nodes." in last


def test_settings_that_differ_between_nodes(launchers, tmp_path):
    """The ranks find it, and name their nodes."""
    launchers.start(0, *tiny(tmp_path / "out"))
    launchers.start(1, *tiny(tmp_path / "out", optimizer__lr=0.05))
    for node in range(2):
        code, last = launchers.end(node)
        assert code == 2
        assert "the ranks of this run differ in optimizer.lr: " in last
        assert "0.05 on rank 1 (node 1: host-b, 10.99.0.2), " in last
        assert "0.01 on rank 0 (node 0: host-a, 10.99.0.1); start all" in last


def test_sigterm_to_one_launcher_ends_all_nodes_with_a_checkpoint(launchers, tmp_path):
    _start_long_run(launchers, tmp_path)
    os.kill(launchers.processes[1].pid, signal.SIGTERM)
    for node in range(2):
        code, last = launchers.end(node)
        assert code == 0, last
    newest = max(losses_by_step(tmp_path))
    assert (tmp_path / "checkpoint" / f"step-{newest}").exists()


def test_when_node_0_dies_the_others_end_and_name_it(launchers, tmp_path):
    """Its launcher too, at which the nodes met."""
    _start_long_run(launchers, tmp_path)
    (rank,) = ranks_of(launchers.processes[0].pid)
    launchers.processes[0].kill()
    os.kill(rank, signal.SIGKILL)
    code, last = launchers.end(1)
    assert code == 1
    assert re.search(rf"E {re.escape(B)}: rank 1: step \d+: .* has gone \(", last), last
    assert last.endswith(f"; {A}, at which the nodes met, has ended.")


def _start_long_run(launchers: Launchers, folder: Path) -> None:
    """Start both nodes, and return when steps have been done."""
    options = tiny(folder, **SAVES | {"training__steps": 100_000})
    for node in range(2):
        launchers.start(node, *options)
    until(lambda: (folder / "checkpoint" / "step-3").exists(), launchers.log(0))


def test_a_rank_that_dies_is_replaced_and_a_node_that_dies_is_named(launchers, tmp_path):
    options = tiny(tmp_path, **SAVES | {"training__steps": 100_000})
    for node in range(2):
        launchers.start(node, *options, max_restarts=1)
    log, checkpoints = launchers.log(0), tmp_path / "checkpoint"
    until(lambda: (checkpoints / "step-3").exists(), log)
    (rank,) = ranks_of(launchers.processes[1].pid)
    os.kill(rank, signal.SIGKILL)
    until(lambda: log.read_text().count(" I Training: ") == 2, log)
    reached = max(losses_by_step(tmp_path))
    until(lambda: max(losses_by_step(tmp_path)) > reached + 2, log)
    (rank,) = ranks_of(launchers.processes[1].pid)
    launchers.processes[1].kill()
    os.kill(rank, signal.SIGKILL)
    code, last = launchers.end(0)
    assert code == 1
    assert re.search(rf"E {re.escape(A)}: rank 0: step \d+: rank 1 \(node 1: host-b, 10", last), (
        last
    )
    assert {len(values) for values in losses_by_step(tmp_path).values()} == {1}, "done twice alike"
