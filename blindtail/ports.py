"""TCP ports that are known before anything listens there, or after it has stopped.

A server that is given port 0 gets one from the kernel together with the right to it.
Where two processes must agree on a port beforehand, or a server comes back at the
same address, there is a gap in which nobody holds it. Out of the kernel's ephemeral
range it may be lost in this gap: any outgoing connection of this machine gets a local
port from there. Not even a peer that dials the server again is harmless: dialling a
port that nobody listens on, it may be given this very port, is then connected to
itself, and keeps it. So such ports come from below that range.
"""

from __future__ import annotations

import errno
import secrets
import socket
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")  # of IPv6 as well
#: Below are the ports of services, and those that Ray gives its workers (10002 to 19999).
_LOWEST = 20_000
#: How often the kernel is asked where the range above is used up, or there is none.
_TRIES = 100


def below_ephemeral(path: Path = _EPHEMERAL) -> range:
    """Ports that no outgoing connection is given; empty where that leaves no room or is not known."""
    try:
        low = int(path.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return range(0)
    return range(_LOWEST, low)


class Ports:
    """Hands out free ports of `wanted`, none twice; of the kernel's choice where no more of them is free.

    It starts at a random one, so that processes which choose at the same time choose differently.
    Safe from any thread.
    """

    def __init__(self, wanted: range) -> None:
        self._wanted = wanted
        self._next = secrets.randbelow(len(wanted)) if wanted else 0
        self._given: set[int] = set()
        self._lock = threading.Lock()

    def free(self, host: str, neighbours: int = 1) -> int:
        """The first of `neighbours` ports in a row. Raises `OSError`: none, or not this machine's address."""
        with self._lock:
            for first in self._candidates(host):
                ports = range(first, first + neighbours)
                if ports[-1] < 65536 and self._given.isdisjoint(ports) and _free(host, ports):
                    self._given.update(ports)
                    return first
        raise OSError(errno.EADDRINUSE, "no free port was found")

    def _candidates(self, host: str) -> Iterator[int]:
        for _ in self._wanted:
            port = self._wanted[self._next]
            self._next = (self._next + 1) % len(self._wanted)
            yield port
        for _ in range(_TRIES):
            with socket.socket(_family(host)) as probe:
                probe.bind((host, 0))
                port = int(probe.getsockname()[1])
            yield port


@cache
def _ports() -> Ports:
    return Ports(below_ephemeral())


def free_port(host: str = "127.0.0.1", neighbours: int = 1) -> int:
    """A TCP port that is free now, and not given to anybody else in this process.

    host        address to listen on
    neighbours  so many in a row are free; the first one is returned

    Raises `OSError` when there is none, or the address is not this machine's.
    """
    return _ports().free(host, neighbours)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _free(host: str, ports: range) -> bool:
    """Without SO_REUSEADDR, so that a port with connections that have just ended is not free either."""
    for port in ports:
        with socket.socket(_family(host)) as probe:
            try:
                probe.bind((host, port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    return False
                raise
    return True


__all__ = ["Ports", "below_ephemeral", "free_port"]
