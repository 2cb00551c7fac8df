"""Ports that are listened on later: out of reach of outgoing connections, and never given twice."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from blindtail.errors import ConfigError
from blindtail.ports import Ports, below_ephemeral, free_port
from blindtail.serving import probe_port

HOST = "127.0.0.1"


@pytest.fixture
def three() -> range:
    """Neighbours that are free."""
    first = free_port(neighbours=3)
    return range(first, first + 3)


def test_ports_are_below_what_outgoing_connections_get() -> None:
    wanted = below_ephemeral()
    if not wanted:
        pytest.skip("this machine's ephemeral range leaves no room below it")
    ports = [free_port() for _ in range(20)]
    assert all(port in wanted for port in ports)
    assert probe_port("localhost", 0) in wanted
    with socket.create_server((HOST, ports[0])) as server:  # positive control: that is where it begins
        outgoing = [socket.create_connection(server.getsockname()) for _ in range(5)]
        assert all(connection.getsockname()[1] >= wanted.stop for connection in outgoing)
        for connection in outgoing:
            connection.close()


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("32768\t60999\n", range(20_000, 32_768)),
        ("20001 60999", range(20_000, 20_001)),
        ("1024 65535", range(0)),
        ("", range(0)),
        ("none", range(0)),
    ],
)
def test_the_range_follows_the_kernels(content: str, wanted: range, tmp_path: Path) -> None:
    path = tmp_path / "range"
    path.write_text(content)
    assert list(below_ephemeral(path)) == list(wanted)
    assert not below_ephemeral(tmp_path / "not there")


def test_none_is_given_twice() -> None:
    with ThreadPoolExecutor(8) as pool:
        ports = list(pool.map(lambda _: free_port(), range(200)))
        pairs = list(pool.map(lambda _: free_port(neighbours=2), range(50)))
    given = [*ports, *pairs, *(port + 1 for port in pairs)]
    assert len(set(given)) == len(given)


def test_processes_begin_elsewhere() -> None:
    wanted = range(20_000, 30_000)
    assert len({Ports(wanted).free(HOST) for _ in range(5)}) > 1


def test_a_taken_port_is_left_out(three: range) -> None:
    assert {Ports(three[1:2]).free(HOST)} == {three[1]}  # positive control
    with socket.create_server((HOST, three[1])):
        ports = Ports(three)
        assert {ports.free(HOST), ports.free(HOST)} == {three[0], three[2]}
        assert Ports(three[:1]).free(HOST, 2) not in three  # its neighbour is taken
    assert Ports(three[:1]).free(HOST, 2) == three[0]


@pytest.mark.parametrize("neighbours", [1, 2])
def test_where_the_range_has_none_the_kernel_chooses(three: range, neighbours: int) -> None:
    used_up = Ports(three[:1])
    assert used_up.free(HOST) == three[0]
    for ports, before in ((Ports(range(0)), []), (used_up, [three[0]])):
        found = [ports.free(HOST, neighbours) for _ in range(20)]
        given = [port + i for port in found for i in range(neighbours)]
        assert len({*before, *given}) == len(before) + len(given)
        for port in given:
            socket.create_server((HOST, port)).close()


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(OSError, match="assign"):
        free_port("192.0.2.1")
    with pytest.raises(ConfigError, match="not this machine's"):
        probe_port("192.0.2.1", 0)
