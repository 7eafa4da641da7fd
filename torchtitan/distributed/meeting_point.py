"""The store in which the ranks of a run meet, at MASTER_ADDR and MASTER_PORT, before any group.

torch's client waits in C++ for a wrong address, prints its stack at every try, and may wait for
ever for a server that is not a store: so the address and port are checked first.
"""

import errno
import os
import socket
import threading
import time
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from torchtitan.distributed.agreement import LINGER_SECONDS, Meeting
from torchtitan.tools.errors import UserError
from torchtitan.tools.launcher import Launch

# A host name may resolve only a little after its machine has started.
_RESOLVE_SECONDS = 10.0
_rounds = 0  # meetings of this process
_stores: dict[tuple[str, int, bool], dist.Store] = {}  # a server stops when its object is freed


class NotFound(UserError):
    """No store answered at the address in time."""


@dataclass(frozen=True)
class Words:
    """Names in the error messages of a meeting.

    server: who serves the store.
    limit: the setting that says how long to wait.
    """

    server: str = "rank 0"
    limit: str = "comm.init_timeout_seconds"


def meet(launch: Launch, seconds: float) -> Meeting:
    """Join the store of a run of several ranks. Raises `UserError` where that fails.

    seconds: how long to wait for the store, and later, in the meeting, for other ranks.
    """
    global _rounds
    _rounds += 1
    # torchrun's agent keeps one store over its restarts (torch 2.11-2.13): without a prefix, ranks
    # would read the addresses of the last attempt, or of the last run of this process.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    keeps_store = launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = _kept_store(launch.master_addr, launch.master_port, keeps_store, seconds)
    store = dist.PrefixStore(f"attempt_{attempt}_{_rounds}", store)
    try:
        taken = store.add(f"here/{launch.rank}", 1) > 1
    except (dist.DistError, RuntimeError) as error:
        address = f"{launch.master_addr}:{launch.master_port}"
        raise _not_found(address, seconds, str(error), Words()) from None
    if taken:
        raise UserError(
            f"the environment variable RANK is {launch.rank}, which another process at "
            f"{launch.master_addr}:{launch.master_port} already has: give each process a RANK of "
            "its own, and each run a MASTER_PORT of its own."
        )
    return Meeting(store, launch.rank, launch.world_size, seconds, keeps_store)


def refuse(launch: Launch, sentence: str) -> bool:
    """Tell the ranks that wait for this one why it can't join.

    Returns whether rank 0 reports the same sentence to its user.
    """
    if launch.world_size == 1:
        return True
    try:
        return meet(launch, LINGER_SECONDS).refuse(sentence)
    except UserError:  # no other rank is waiting
        return launch.rank == 0


def _kept_store(address: str, port: int, keeps_store: bool, seconds: float) -> dist.Store:
    key = address, port, keeps_store
    if key not in _stores:
        _stores[key] = open_store(*key, seconds, min(seconds, _RESOLVE_SECONDS))
    return _stores[key]


def open_store(
    address: str,
    port: int,
    keeps_store: bool,
    seconds: float,
    resolve_seconds: float,
    words: Words = Words(),
) -> dist.TCPStore:
    """Open the store at this address. Raises `UserError`: `NotFound` where a later try may succeed.

    keeps_store: whether this process serves it.
    seconds: how long to wait for the server.
    resolve_seconds: how long to wait until the address's name resolves.
    """
    deadline = time.monotonic() + seconds
    _resolve(address, port, time.monotonic() + resolve_seconds, words)
    if keeps_store:
        _check_port(port)
    else:
        _wait_for_server(address, port, deadline, seconds, words)
    made: list[dist.TCPStore | Exception] = []

    def make() -> None:
        try:
            store = dist.TCPStore(
                address,
                port,
                is_master=keeps_store,
                timeout=timedelta(seconds=seconds),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except (dist.DistError, RuntimeError) as error:
            made.append(error)
        else:
            made.append(store)

    # A server of another kind may accept and never answer, and torch would wait for ever.
    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    thread.join(max(1.0, deadline - time.monotonic()))
    if made and isinstance(made[0], dist.TCPStore):
        return made[0]
    reason = str(made[0]) if made else "another kind of server answers"
    raise _not_found(f"{address}:{port}", seconds, reason, words)


def _resolve(address: str, port: int, deadline: float, words: Words) -> None:
    while True:
        try:
            socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
            return
        except (OSError, UnicodeError) as error:  # UnicodeError: no valid host name
            if isinstance(error, UnicodeError) or time.monotonic() > deadline:
                kind = UserError if isinstance(error, UnicodeError) else NotFound
                raise kind(
                    f"the environment variable MASTER_ADDR is '{address[:80]}', which does not "
                    f"resolve to an address on this machine ({error}): set it to the name or "
                    f"address of the machine of {words.server}."
                ) from None
        time.sleep(0.2)


def _check_port(port: int) -> None:
    """Raise `UserError` where this process can't listen on the port."""
    with socket.socket(socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                return  # torch may still listen in another way
            taken = error.errno == errno.EADDRINUSE
            why = "another process listens" if taken else "this user may not listen"
            raise UserError(
                f"the environment variable MASTER_PORT is {port}, on which {why}: set it to a free "
                "port, the same for all processes (torchrun --standalone chooses one by itself)."
            ) from None


def _wait_for_server(
    address: str, port: int, deadline: float, seconds: float, words: Words
) -> None:
    while True:
        try:
            socket.create_connection((address, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                reason = error.strerror or str(error)
                raise _not_found(f"{address}:{port}", seconds, reason, words) from None
        time.sleep(0.1)


def _not_found(address: str, seconds: float, reason: str, words: Words) -> NotFound:
    first_line = reason.strip().partition("\n")[0][:200]
    return NotFound(
        f"{words.server} was not found at MASTER_ADDR:MASTER_PORT ({address}) within "
        f"{words.limit} ({seconds:g}; {first_line}): check that all processes were started, with "
        "the same address (torchrun: --rdzv-endpoint) of a machine that all reach."
    )
