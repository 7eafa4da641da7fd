"""Emulate several nodes on one Linux machine: network namespaces joined by a switch, links shaped.

Each node is a network namespace with one interface, `uplink`: a veth whose other end is connected
to a bridge in a namespace of its own, the switch. Nothing outside of these namespaces is changed,
so the addresses (10.99.0.0/24) can't clash with others. Traffic inside a node goes over that
namespace's `lo`; traffic that leaves the node is counted by `uplink`'s transmit counter.
Standard library only; needs root, iproute2 and a kernel that permits it (CAP_NET_ADMIN).
"""

import os
import shutil
import signal
import subprocess
from collections.abc import Sequence

from torchtitan.tools.errors import UserError

LINK = "uplink"  # the name of a node's interface, inside the node
# Long enough that no queue overflows: networks between nodes drop no packets, and packets that TCP
# sends again would be counted twice.
_QUEUE_MS = 500
# Jumbo frames, as between real nodes; and one frame a packet, so that each is counted with its
# headers (the kernel else counts the headers of up to 64 kB once).
_FRAMES = ("mtu", "9000", "gso_max_segs", "1")


def check_can_emulate() -> None:
    """Raise `UserError` where this machine or this user can't make network namespaces."""
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise UserError(
            f"Emulating nodes needs the command '{missing[0]}', which is not installed: install "
            "iproute2 (apt-get install iproute2)."
        )
    if os.geteuid() != 0:
        raise UserError(
            f"Emulating nodes makes network namespaces, which needs root, but this is user "
            f"{os.geteuid()}: run it with sudo."
        )


class EmulatedNodes:
    """Nodes that exist inside of a `with` block and are removed at its end, whatever happens.

    Their names contain the process id, so that two emulations don't clash.

    num_nodes: 2 to 250.
    rate_mbit: of each link, in both directions; 0 = unlimited.
    """

    def __init__(self, num_nodes: int, rate_mbit: float):
        assert 2 <= num_nodes <= 250, num_nodes
        self.prefix = f"titan{os.getpid()}"
        self.switch = f"{self.prefix}switch"
        self.names = [f"{self.prefix}node{n}" for n in range(num_nodes)]
        self.rate_mbit = rate_mbit
        self._processes: list[subprocess.Popen] = []

    def __enter__(self) -> "EmulatedNodes":
        try:
            self._build()
        except subprocess.CalledProcessError as error:
            self._tear_down()
            raise UserError(
                f"Emulating nodes failed at '{' '.join(error.cmd)}' ({error.stderr.strip()}): run "
                "it on a machine or in a container with CAP_NET_ADMIN and CAP_SYS_ADMIN."
            ) from error
        except BaseException:
            self._tear_down()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._tear_down()

    def address(self, node: int) -> str:
        return f"10.99.0.{node + 1}"

    def start(self, node: int, command: Sequence[str], **options) -> subprocess.Popen:
        """Start a process on a node; it is killed at the end if it still runs.

        options: of `Popen`.
        """
        inside = ["ip", "netns", "exec", self.names[node], *command]
        # A session of its own: Ctrl-C reaches only this process, which then ends it.
        process = subprocess.Popen(inside, start_new_session=True, **options)
        self._processes.append(process)
        return process

    def _build(self) -> None:
        for name in (self.switch, *self.names):
            _run("ip", "netns", "add", name)
        _run("ip", "-n", self.switch, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", self.switch, "link", "set", "bridge", "up")
        for n, name in enumerate(self.names):
            port = f"port{n}"
            pair = ["type", "veth", "peer", "name", port, "netns", self.switch]
            _run("ip", "-n", name, "link", "add", LINK, *pair)
            _run("ip", "-n", self.switch, "link", "set", port, "master", "bridge", "up", *_FRAMES)
            _run("ip", "-n", name, "addr", "add", f"{self.address(n)}/24", "dev", LINK)
            _run("ip", "-n", name, "link", "set", LINK, "up", *_FRAMES)
            _run("ip", "-n", name, "link", "set", "lo", "up")
            if self.rate_mbit:
                shape = ["rate", f"{self.rate_mbit}mbit", "burst", "64kb"]
                shape += ["latency", f"{_QUEUE_MS}ms"]
                _run("tc", "-n", name, "qdisc", "add", "dev", LINK, "root", "tbf", *shape)
                _run("tc", "-n", self.switch, "qdisc", "add", "dev", port, "root", "tbf", *shape)

    def _tear_down(self) -> None:
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must wait for this
        try:
            for process in self._processes:
                process.kill()
            for process in self._processes:
                process.wait()
            for name in (*self.names, self.switch):  # removes their interfaces, too
                subprocess.run(["ip", "netns", "del", name], capture_output=True)
        finally:
            signal.signal(signal.SIGINT, handler)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
