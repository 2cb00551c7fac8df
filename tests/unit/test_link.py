"""The shaped link has the rate and the delay it says, counts and records every byte, and breaks on demand."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from blindtail.errors import ConfigError, StateError
from blindtail.link import ShapedLink
from blindtail.ports import free_port

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def echo() -> Iterator[str]:
    """A server that sends everything back."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    def answer(connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(1 << 16):
                    connection.sendall(data)
            except OSError:
                pass

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.getsockname()[1]}"
    server.shutdown(socket.SHUT_RDWR)
    server.close()


def dial(link: ShapedLink) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", link.port), timeout=20)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def ping(connection: socket.socket, data: bytes = b"x") -> float:
    start_s = time.monotonic()
    connection.sendall(data)
    read(connection, len(data))
    return time.monotonic() - start_s


def read(connection: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        piece = connection.recv(min(1 << 16, count - len(data)))
        if not piece:
            break
        data += piece
    return bytes(data)


def is_broken(connection: socket.socket) -> bool:
    try:
        connection.sendall(b"x")
        return connection.recv(1) == b""
    except ConnectionError:
        return True


def push(connection: socket.socket, data: bytes) -> bytes:
    """Sends and reads back at the same time."""
    thread = threading.Thread(target=connection.sendall, args=(data,))
    thread.start()
    back = read(connection, len(data))
    thread.join()
    return back


@pytest.mark.parametrize("rate_bps", [4e6, 40e6])
def test_the_rate_is_within_a_tenth(echo: str, rate_bps: float) -> None:
    data = os.urandom(int(rate_bps / 8))  # one second's worth
    with ShapedLink(echo, rate_bps=rate_bps) as link, dial(link) as connection:
        ping(connection)
        start_s = time.monotonic()
        assert push(connection, data) == data
        took_s = time.monotonic() - start_s
        counts = link.counts()
    assert len(data) * 8 / took_s == pytest.approx(rate_bps, rel=0.10)
    assert counts.up_bytes == counts.down_bytes == len(data) + 1


def test_connections_share_the_rate(echo: str) -> None:
    data = os.urandom(250_000)
    took: list[float] = []

    def one() -> None:
        with dial(link) as connection:
            start_s = time.monotonic()
            push(connection, data)
            took.append(time.monotonic() - start_s)

    with ShapedLink(echo, rate_bps=8e6) as link:
        threads = [threading.Thread(target=one) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert max(took) == pytest.approx(0.5, rel=0.2)


def test_the_delay_is_that_of_a_round_trip(echo: str) -> None:
    with ShapedLink(echo, delay_s=0.04) as link, dial(link) as connection:
        ping(connection)
        trips = sorted(ping(connection) for _ in range(5))
    assert trips[0] >= 0.08
    assert trips[2] < 0.11


def test_jitter_keeps_the_order(echo: str) -> None:
    data = bytes(range(256)) * 400
    with (
        ShapedLink(echo, rate_bps=50e6, delay_s=0.001, jitter_s=0.01, seed=3) as link,
        dial(link) as connection,
    ):
        assert push(connection, data) == data


def test_directions_have_their_own_rates(echo: str) -> None:
    with ShapedLink(echo, rate_bps=(None, 8e6)) as link, dial(link) as connection:
        data = bytes(500_000)
        start_s = time.monotonic()
        push(connection, data)
        assert time.monotonic() - start_s == pytest.approx(0.5, rel=0.2)


def test_an_unshaped_link_is_fast(echo: str) -> None:
    data = bytes(50_000_000)
    with ShapedLink(echo) as link, dial(link) as connection:
        start_s = time.monotonic()
        push(connection, data)
        rate_bps = len(data) * 8 / (time.monotonic() - start_s)
    assert rate_bps > 400e6  # far above what is shaped, also on a busy machine


def test_everything_is_recorded_per_connection_and_direction(echo: str, tmp_path: Path) -> None:
    with ShapedLink(echo, record=tmp_path / "wire") as link:
        for text in (b"first needle", b"second needle"):
            with dial(link) as connection:
                ping(connection, text)
        time.sleep(0.1)
    found = {p.name: p.read_bytes() for p in (tmp_path / "wire").iterdir()}
    assert found == {
        "0001.up": b"first needle",
        "0001.down": b"first needle",
        "0002.up": b"second needle",
        "0002.down": b"second needle",
    }


def test_a_stalled_link_holds_bytes_and_lets_them_go(echo: str) -> None:
    with ShapedLink(echo) as link, dial(link) as connection:
        ping(connection)
        link.stall()
        connection.sendall(b"held")
        connection.settimeout(0.3)
        with pytest.raises(TimeoutError):
            connection.recv(4)
        connection.settimeout(10)
        link.resume()
        assert read(connection, 4) == b"held"


def test_a_cut_link_resets_and_refuses_until_resumed(echo: str) -> None:
    with ShapedLink(echo) as link:
        with dial(link) as connection:
            ping(connection)
            link.cut()
            assert is_broken(connection)
        with dial(link) as refused:
            assert is_broken(refused)
        link.resume()
        with dial(link) as connection:
            assert ping(connection) < 5


def test_the_end_of_one_side_reaches_the_other(echo: str) -> None:
    with ShapedLink(echo, delay_s=0.01) as link, dial(link) as connection:
        connection.sendall(b"last words")
        connection.shutdown(socket.SHUT_WR)
        assert read(connection, 100) == b"last words"


def test_a_target_that_does_not_answer_ends_the_connection() -> None:
    with ShapedLink(f"127.0.0.1:{free_port()}") as link, dial(link) as connection:
        connection.settimeout(5)
        assert is_broken(connection)


def test_closing_is_clean_and_frees_the_port(echo: str) -> None:
    port = free_port()
    link = ShapedLink(echo, port=port).open()
    connection = dial(link)
    ping(connection)
    link.close()
    link.close()
    connection.close()
    with ShapedLink(echo, port=port) as again:
        assert again.port == port


def test_a_port_in_use_is_a_clear_error(echo: str) -> None:
    with ShapedLink(echo) as link, pytest.raises(ConfigError, match=str(link.port)):
        ShapedLink(echo, port=link.port).open()


@pytest.mark.parametrize(
    "settings",
    [{"rate_bps": 0.0}, {"rate_bps": -1.0}, {"delay_s": -0.1}, {"jitter_s": -1.0}, {"target": "nowhere"}],
)
def test_wrong_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        ShapedLink(**{"target": "127.0.0.1:1", **settings})  # type: ignore[arg-type]


def test_it_must_be_opened_first() -> None:
    with pytest.raises(StateError):
        ShapedLink("127.0.0.1:1").stall()


def test_it_runs_as_a_process(echo: str, tmp_path: Path) -> None:
    announce = tmp_path / "link.json"
    arguments = ["--target", echo, "--delay-s", "0.01", "--rate-bps", "20e6", "--announce", str(announce)]
    process = subprocess.Popen([sys.executable, "-m", "blindtail.link", *arguments], stdout=subprocess.PIPE)
    try:
        end_s = time.monotonic() + 20
        while not announce.exists():
            assert process.poll() is None
            assert time.monotonic() < end_s
            time.sleep(0.02)
        said = json.loads(announce.read_text())
        assert said["pid"] == process.pid
        with socket.create_connection(("127.0.0.1", said["port"]), timeout=10) as connection:
            assert ping(connection, b"hello") >= 0.02
            process.send_signal(signal.SIGUSR1)
            time.sleep(0.2)
            connection.sendall(b"held")
            connection.settimeout(0.3)
            with pytest.raises(TimeoutError):
                connection.recv(4)
            process.send_signal(signal.SIGUSR2)
            connection.settimeout(10)
            assert read(connection, 4) == b"held"
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0
    assert json.loads(out.splitlines()[-1])["up_bytes"] == 9
