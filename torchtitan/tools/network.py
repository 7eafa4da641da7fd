"""Addresses and network interfaces of this machine."""

import contextlib
import fcntl
import socket
import struct
from pathlib import Path

_GET_ADDRESS = 0x8915  # Linux's SIOCGIFADDR


def address_of(host: str) -> str:
    """Numeric address of a host. Raises OSError."""
    return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])


def own_address(towards: str) -> str:
    """Address of this machine on the way to a host. Raises OSError."""
    family, kind, _, _, address = socket.getaddrinfo(towards, 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # of a datagram socket: nothing is sent
        return probe.getsockname()[0]


def interface_towards(host: str) -> str | None:
    """Name of this machine's interface on the way to a host; None where it can't be found."""
    with contextlib.suppress(OSError):
        address = own_address(host)
        has_address = _has_address_6 if ":" in address else _has_address_4
        return next((name for _, name in socket.if_nameindex() if has_address(name, address)), None)
    return None


def _has_address_4(interface: str, address: str) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            request = struct.pack("256s", interface.encode()[:15])
            answer = fcntl.ioctl(probe.fileno(), _GET_ADDRESS, request)
        except OSError:  # an interface without an address
            return False
    return socket.inet_ntoa(answer[20:24]) == address


def _has_address_6(interface: str, address: str) -> bool:
    packed = socket.inet_pton(socket.AF_INET6, address.partition("%")[0]).hex()
    lines = Path("/proc/net/if_inet6").read_text().splitlines()
    return any({packed, interface} <= set(line.split()) for line in lines)
