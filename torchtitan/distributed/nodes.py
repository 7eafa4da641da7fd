"""Meeting of a run's nodes before torchrun starts: one that is missing or started differently is
named, by host, address and node rank.

The launcher of each node (scripts/launch.py) writes its record to the store of node 0 at
MASTER_ADDR and MASTER_PORT, which torchrun then uses too. Node 0 compares the records. When a run
fails, each launcher writes how its node ended, so that all of them report the cause.
"""

import argparse
import contextlib
import json
import os
import secrets
import socket
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from torchtitan.distributed.meeting_point import NotFound, Words, open_store
from torchtitan.tools.errors import RunError, UserError, some
from torchtitan.tools.logging import logger
from torchtitan.tools.network import address_of, interface_towards, own_address
from torchtitan.tools.node_names import leave_names

# Optional environment variable: hosts by node rank, for messages about nodes that never came.
NODE_NAMES = "NODE_NAMES"
_WORDS = Words("node 0", "NODES_TIMEOUT")
_REMIND_SECONDS = 30.0
# Node 0 reports which nodes are missing; the others wait this much longer, to read its report.
_LATER = 15.0
# How long a node that has failed waits for the reports of the others.
REPORT_SECONDS = 10.0

Record = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Place of this node in the run.

    seconds: how long to wait for the last node.
    settings: values that are equal on all nodes, by the variable that sets them.
    """

    rank: int
    count: int
    address: str
    port: int
    seconds: float
    settings: dict[str, int | str]


def read_place(options: argparse.Namespace) -> Place | None:
    """Read this node's place from torchrun's options. Raises `UserError`.

    Returns None for a single node, and for a rendezvous other than the static one, in which nodes
    have no rank before they meet.
    """
    several = options.nnodes.isdecimal() and int(options.nnodes) > 1
    if not several or options.standalone or options.rdzv_backend != "static":
        return None
    count, rank = int(options.nnodes), options.node_rank
    if not 0 <= rank < count:
        raise UserError(
            f"NODE_RANK is {rank}, but must be from 0 to {count - 1}, below NNODES ({count}): give "
            "each machine a number of its own."
        )
    if not 1 <= options.master_port <= 65535:
        raise UserError(
            f"MASTER_PORT is {options.master_port}, but must be a free port of node 0, from 1 to "
            "65535, the same on each machine."
        )
    pairs = (pair.split("=", 1) for pair in options.rdzv_conf.split(",") if "=" in pair)
    seconds = float(dict(pairs).get("timeout", 600))
    settings = {
        "NNODES": count,
        "NGPU": options.nproc_per_node,
        "MAX_RESTARTS": options.max_restarts,
    }
    return Place(rank, count, options.master_addr, options.master_port, seconds, settings)


class Nodes:
    """All nodes of a run, which have met.

    store: of node 0. It serves torchrun too, as long as this object exists there.
    records: by node rank.
    """

    def __init__(self, rank: int, store: dist.Store, records: list[Record]) -> None:
        self.rank = rank
        self._store = store
        self._records = records

    def describe(self, rank: int) -> str:
        return _describe(self._records[rank])

    def end(self, sentence: str, code: int, *, follows: bool) -> tuple[str, int]:
        """Report how this node failed, and find the cause in the reports of all nodes.

        follows: whether the cause is on another node.

        Returns the last message of the run, and its exit code.
        """
        own = {"node": self.rank, "sentence": sentence, "code": code, "follows": follows}
        reports: list[Record] = []
        # A store whose machine is gone answers neither yes nor no.
        thread = threading.Thread(target=self._exchange, args=(own, reports), daemon=True)
        thread.start()
        thread.join(2 * REPORT_SECONDS)
        text = f"{self.describe(self.rank)}: {sentence}"
        causes = [each for each in reports if not each["follows"]] if follows else []
        if causes and causes[0]["node"] != self.rank:
            node, why = causes[0]["node"], causes[0]["sentence"].rstrip(".")
            return f"{self.describe(node)}: {why}; {text}", causes[0]["code"]
        if not reports and self.rank:
            text = f"{text.rstrip('.')}; {self.describe(0)}, at which the nodes met, has ended."
        return text, code

    def _exchange(self, own: Record, reports: list[Record]) -> None:
        """Write this node's report, and append all of them to `reports`, in the order in which
        they came."""
        deadline = time.monotonic() + REPORT_SECONDS
        with contextlib.suppress(dist.DistError, RuntimeError):
            self._store.set(f"report/{self._store.add('reports', 1)}", json.dumps(own))
            while (count := self._store.add("reports", 0)) < len(self._records):
                if time.monotonic() > deadline:
                    break
                time.sleep(0.1)
            reports += [json.loads(self._store.get(f"report/{n + 1}")) for n in range(count)]
            read = self._store.add("read", 1)
            while self.rank == 0 and read < count and time.monotonic() < deadline + 1:
                time.sleep(0.05)
                read = self._store.add("read", 0)


def meet_nodes(place: Place) -> Nodes:
    """Wait until all nodes have come.

    Raises `UserError` where they are started differently, and `RunError` where one does not come,
    which another attempt may mend.
    """
    logger.info(
        "Node %d of %d on %s: meeting the others at %s:%d, within %g seconds",
        place.rank,
        place.count,
        socket.gethostname(),
        place.address,
        place.port,
        place.seconds,
    )
    try:
        store = _join(place)
        if place.rank == 0:
            verdict = _judge(place, store)
            store.set("verdict", json.dumps(verdict))
        else:
            store.wait(["verdict"], timedelta(seconds=place.seconds + _LATER))
            verdict = json.loads(store.get("verdict"))
    except NotFound as error:
        raise RunError(str(error)) from None
    except (dist.DistError, RuntimeError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise RunError(
            f"node 0 at {place.address}:{place.port} ended before all nodes had come ({reason}): "
            "read its last line, and start again."
        ) from None
    if "sentence" in verdict:
        _linger(place, store, verdict["came"])
        raise (UserError if verdict["code"] == 2 else RunError)(verdict["sentence"])
    records = verdict["nodes"]
    leave_names([_where(record) for record in records])
    # gloo's own choice, the address that the host's name resolves to, is often the loopback.
    name = interface_towards(records[1]["address"] if place.rank == 0 else place.address)
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    return Nodes(place.rank, store, records)


def _join(place: Place) -> dist.Store:
    """Write this node's record to the store of a meeting that has not ended.

    Where the last attempt of this run has not ended yet, because the scheduler starts a dead node
    again before the others have noticed, wait for its end.
    """
    deadline, warned = time.monotonic() + place.seconds, False
    while True:
        left = max(1.0, deadline - time.monotonic())
        opened = open_store(place.address, place.port, place.rank == 0, left, left, _WORDS)
        store = dist.PrefixStore("nodes", opened)
        try:
            if _write_record(place, store):
                return store
        except (dist.DistError, RuntimeError):  # the last attempt is just ending
            pass
        if time.monotonic() > deadline:
            raise NotFound(
                f"node {place.rank} has been started again, but the last attempt of this run "
                f"did not end within NODES_TIMEOUT ({place.seconds:g}): end it on node 0."
            )
        if not warned:
            logger.warning("The last attempt of this run still runs on node 0: waiting for its end")
            warned = True
        del store, opened  # a new one each time: this one may be of a server that has ended
        time.sleep(0.5)


def _write_record(place: Place, store: dist.Store) -> bool:
    """Write this node's record, unless the meeting has ended. Raises `UserError` for a node rank
    that two machines have."""
    key, own = f"node/{place.rank}", _record(place)
    text = json.dumps(own)
    first = json.loads(store.compare_set(key, "", text))
    if first["host"] != own["host"]:
        raise UserError(
            f"NODE_RANK is {place.rank} on two machines, {_where(first)} and {_where(own)}: "
            "give each a number of its own, and each run a MASTER_PORT of its own."
        )
    if first != own and store.check(["verdict"]):
        return False
    store.set(key, text)
    return True


def _judge(place: Place, store: dist.Store) -> Record:
    """Wait for the records of all nodes. Returns them, or the sentence with which all end."""
    own = json.loads(store.get("node/0"))
    came: dict[int, Record] = {}
    began = time.monotonic()
    remind = began + _REMIND_SECONDS
    while len(came) < place.count:
        missing = [rank for rank in range(place.count) if rank not in came]
        for rank in missing:
            if not store.check([f"node/{rank}"]):
                continue
            came[rank] = json.loads(store.get(f"node/{rank}"))
            if difference := _difference(own, came[rank]):
                return {"sentence": difference, "code": 2, "came": len(came)}
        if len(came) == place.count:
            break
        now, names = time.monotonic(), _names([rank for rank in missing if rank not in came])
        if now > began + place.seconds:
            sentence = (
                f"{names} of {place.count} did not come to {place.address}:{place.port} within "
                f"NODES_TIMEOUT ({place.seconds:g}): check that it was started there, with this "
                "MASTER_ADDR and MASTER_PORT, and reaches that address."
            )
            return {"sentence": sentence, "code": 1, "came": len(came)}
        if now > remind:
            logger.warning("Waiting for %s of %d", names, place.count)
            remind = now + _REMIND_SECONDS
        time.sleep(0.1)
    # A node that was started again meanwhile has written a newer record.
    return {"nodes": [json.loads(store.get(f"node/{rank}")) for rank in range(place.count)]}


def _difference(own: Record, other: Record) -> str | None:
    for name, value in own["settings"].items():
        if other["settings"].get(name) != value:
            return (
                f"{name} is {other['settings'].get(name)} on {_describe(other)}, but {value} on "
                f"{_describe(own)}: set it to the same value on all nodes."
            )
    return None


def _linger(place: Place, store: dist.Store, came: int) -> None:
    """On node 0, keep the store until those that came have read the verdict, a few seconds at
    most."""
    with contextlib.suppress(dist.DistError, RuntimeError):
        read, deadline = store.add("told", 1), time.monotonic() + REPORT_SECONDS
        while place.rank == 0 and read < came and time.monotonic() < deadline:
            time.sleep(0.05)
            read = store.add("told", 0)


def _record(place: Place) -> Record:
    """Describe this node for the others; MASTER_ADDR must resolve by now."""
    address = address_of(place.address) if place.rank == 0 else own_address(place.address)
    host = socket.gethostname()
    return {
        "rank": place.rank,
        "host": host,
        "address": address,
        "process": secrets.token_hex(8),  # tells a launcher from one that the same node had before
        "settings": place.settings,
    }


def _where(record: Record) -> str:
    return f"{record['host']}, {record['address']}"


def _describe(record: Record) -> str:
    return f"node {record['rank']} ({_where(record)})"


def _names(ranks: list[int]) -> str:
    """Name nodes that have not come: "node 1 (gpu-17)", hosts where NODE_NAMES has them."""
    hosts = os.environ.get(NODE_NAMES, "").split()
    named = [f"{rank} ({hosts[rank]})" if rank < len(hosts) else f"{rank}" for rank in ranks]
    return f"node{'s' if len(ranks) > 1 else ''} {some(named, ', ', 8)}"
