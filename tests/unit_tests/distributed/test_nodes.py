"""How nodes meet, and find out how a run failed: threads take the part of launchers here."""

import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed import run

from torchtitan.distributed import nodes
from torchtitan.distributed.agreement import ranks_text
from torchtitan.distributed.nodes import Nodes, Place, meet_nodes, read_place
from torchtitan.tools.errors import RunError, UserError
from torchtitan.tools.network import interface_towards, own_address
from torchtitan.tools.node_names import leave_names

STATIC = ["--nnodes=4", "--node-rank=1", "--master-addr=node-0", "--master-port=7"]


def place_of(*options: str) -> Place | None:
    return read_place(run.parse_args([*options, "script.py"]))


def test_the_place_is_read_from_torchruns_options():
    place = place_of(*STATIC, "--nproc-per-node=8", "--rdzv-conf=timeout=5")
    settings: dict[str, int | str] = {"NNODES": 4, "NGPU": "8", "MAX_RESTARTS": 0}
    assert place == Place(1, 4, "node-0", 7, 5.0, settings)


@pytest.mark.parametrize(
    "options",
    [["--standalone"], ["--nnodes=1"], ["--nnodes=1:4"], ["--nnodes=2", "--rdzv-backend=c10d"]],
)
def test_one_node_and_an_elastic_rendezvous_have_no_place(options):
    assert place_of(*options) is None


def test_a_node_rank_that_is_too_large():
    with pytest.raises(UserError, match=r"NODE_RANK is 4, but must be from 0 to 3, below NNODES"):
        place_of(*STATIC, "--node-rank=4")


@pytest.mark.parametrize("port", [0, 65536, 10**9])
def test_a_port_that_is_none(port):
    with pytest.raises(UserError, match=f"MASTER_PORT is {port}, but must be a free port"):
        place_of(*STATIC, f"--master-port={port}")


def in_threads(calls: list[Callable[[], Any]]) -> list[Any]:
    results: list[Any] = [None] * len(calls)

    def call(n: int) -> None:
        try:
            results[n] = calls[n]()
        except (UserError, RunError) as error:
            results[n] = error

    threads = [threading.Thread(target=call, args=(n,)) for n in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.fixture
def port(monkeypatch) -> int:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("TITAN_NODES", "[]")  # both are restored after the test
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "of_the_user")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def joining(port: int, rank: int, count: int = 2, seconds: float = 20) -> Callable[[], Nodes]:
    return lambda: meet_nodes(Place(rank, count, "127.0.0.1", port, seconds, {"NNODES": count}))


def test_all_learn_the_names_of_all(port):
    met = in_threads([joining(port, rank, 3) for rank in range(3)])
    host = socket.gethostname()
    for each in met:
        assert each.describe(2) == f"node 2 ({host}, 127.0.0.1)"


def test_missing_nodes_are_named_to_those_that_came(port, monkeypatch):
    monkeypatch.setenv("NODE_NAMES", "gpu-0 gpu-1 gpu-2")
    told = in_threads([joining(port, rank, 4, 0.5) for rank in (0, 2)])
    for error in told:
        assert isinstance(error, RunError)
        assert str(error).startswith("nodes 1 (gpu-1), 3 of 4 did not come to 127.0.0.1:")


def test_a_number_of_nodes_that_differs_is_told_before_all_have_come(port):
    told = in_threads([joining(port, 0, 3), joining(port, 1, 2)])
    for error in told:
        assert isinstance(error, UserError)
        assert str(error).startswith("NNODES is 2 on node 1 (") and "but 3 on node 0 (" in str(
            error
        )


def test_a_node_rank_on_two_machines(port, monkeypatch):
    def impostor() -> Nodes:
        time.sleep(1)
        monkeypatch.setattr(socket, "gethostname", lambda: "impostor")
        return joining(port, 1, 3, 2)()

    *_, error = in_threads([joining(port, 0, 3, 2), joining(port, 1, 3, 2), impostor])
    assert isinstance(error, UserError)
    assert str(error).startswith("NODE_RANK is 1 on two machines, ")
    assert "and impostor, 127.0.0.1: give each" in str(error)


def test_a_node_that_is_started_again_waits_for_the_end_of_the_last_attempt(port):
    """A scheduler starts a dead node again before the others have noticed."""
    first = in_threads([joining(port, 0), joining(port, 1)])
    again: list[Any] = []
    thread = threading.Thread(target=lambda: again.append(joining(port, 1)()))
    thread.start()
    time.sleep(0.5)
    assert thread.is_alive()
    first.clear()  # the server of the first attempt ends with its process
    second = in_threads([joining(port, 0)])  # kept: it serves the store
    thread.join(20)
    assert again and again[0].rank == 1 and second[0].rank == 0


def test_a_node_that_waits_for_the_last_attempt_gives_up(port):
    met = in_threads([joining(port, 0), joining(port, 1)])
    (error,) = in_threads([joining(port, 1, seconds=0.1)])
    assert isinstance(error, RunError)
    assert "the last attempt of this run did not end within NODES_TIMEOUT (0.1): end" in str(error)
    assert len(met) == 2


# ---------------------------------------------------------------------------------------------
# The end
# ---------------------------------------------------------------------------------------------

RECORDS = [{"rank": rank, "host": f"gpu-{rank}", "address": f"10.0.0.{rank}"} for rank in range(3)]


def test_the_cause_is_reported_on_every_node(monkeypatch):
    monkeypatch.setattr(nodes, "REPORT_SECONDS", 5)
    store = dist.HashStore()
    ends: list[Callable[[], Any]] = [
        lambda: Nodes(0, store, RECORDS).end("rank 0: rank 5 has gone.", 1, follows=True),
        lambda: Nodes(1, store, RECORDS).end("rank 2: rank 5 has gone.", 1, follows=True),
        lambda: Nodes(2, store, RECORDS).end("rank 5: the disk is full.", 2, follows=False),
    ]
    of_0, of_1, of_2 = in_threads(ends)
    cause = "node 2 (gpu-2, 10.0.0.2): rank 5: the disk is full"
    assert of_0 == (f"{cause}; node 0 (gpu-0, 10.0.0.0): rank 0: rank 5 has gone.", 2)
    assert of_1 == (f"{cause}; node 1 (gpu-1, 10.0.0.1): rank 2: rank 5 has gone.", 2)
    assert of_2 == (f"{cause}.", 2)


def test_a_node_that_says_nothing_is_not_waited_for_for_ever(monkeypatch):
    monkeypatch.setattr(nodes, "REPORT_SECONDS", 0.2)
    end = Nodes(0, dist.HashStore(), RECORDS).end("rank 0: rank 5 has gone.", 1, follows=True)
    assert end == ("node 0 (gpu-0, 10.0.0.0): rank 0: rank 5 has gone.", 1)


def test_node_0_that_has_ended_is_named(monkeypatch):
    class Gone(dist.HashStore):
        def add(self, *_: object) -> int:
            raise dist.DistNetworkError("Connection reset by peer")

    sentence, code = Nodes(1, Gone(), RECORDS).end("rank 2: another has gone.", 1, follows=True)
    assert sentence.endswith(
        "has gone; node 0 (gpu-0, 10.0.0.0), at which the nodes met, has ended."
    )
    assert code == 1


def test_ranks_are_named_with_their_nodes(monkeypatch):
    monkeypatch.setenv("TITAN_NODES", "[]")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    leave_names([f"gpu-{n}, 10.0.0.{n}" for n in range(5)])
    assert ranks_text([2]) == "rank 2 (node 1: gpu-1, 10.0.0.1)"
    assert ranks_text([3, 4]) == "ranks 3-4 (node 1: gpu-1, 10.0.0.1; node 2: gpu-2, 10.0.0.2)"
    assert ranks_text(list(range(10))) == "ranks 0-9", "too many"


def test_the_interface_on_the_way_to_a_host():
    assert own_address("127.0.0.1") == "127.0.0.1"
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("no-such-host.invalid") is None
