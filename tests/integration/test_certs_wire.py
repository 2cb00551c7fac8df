"""Certificates on real connections: who gets in, renewal without a restart, and nothing below TLS 1.3."""

from __future__ import annotations

import asyncio
import datetime
import logging
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from blindtail import serving
from blindtail.certs import create_authority, issue, show
from blindtail.errors import AccessDenied, BlindtailError, ConfigError, SessionLost, TailUnavailable
from blindtail.identity import Role
from blindtail.line import Line
from blindtail.rpc import Credentials, TailStub, from_rpc_error, secure_channel, server_options
from blindtail.serving import GrpcServer, answer, identity_of
from blindtail.tls import ClientTlsFiles, TlsFiles
from blindtail.wire import KeyState
from cloud.config import CloudConfig
from cloud.local import LocalCell
from tests.certificates import certificates
from tests.cloud_cases import Client, bundle

pytestmark = pytest.mark.timeout(60)

Call = Callable[[bytes], bytes]


class Echo:
    """A `GrpcServer` on a thread: `Who` says who calls, `Only` is for operators, `Slow` takes its time."""

    def __init__(
        self, tls: TlsFiles | None, roles: dict[str, str] | None = None, connection_age_s: float = 3600.0
    ) -> None:
        self.roles = roles or {}
        methods = {
            name: grpc.unary_unary_rpc_method_handler(method)
            for name, method in (("Who", self._who), ("Only", self._only), ("Slow", self._slow))
        }
        self._server = GrpcServer(
            "127.0.0.1",
            0,
            tls,
            {"test.Echo": methods},
            options=server_options(1 << 16, connection_age_s, 5.0),
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self.port = 0

    async def _who(self, data: bytes, context: Any) -> bytes:
        async def call() -> bytes:
            return str(identity_of(context, self.roles)).encode()

        return await answer(context, call)

    async def _only(self, data: bytes, context: Any) -> bytes:
        async def call() -> bytes:
            identity_of(context, self.roles).require(Role.OPERATOR)
            return b"done"

        return await answer(context, call)

    async def _slow(self, data: bytes, context: Any) -> bytes:
        await asyncio.sleep(float(data))
        return b"late"

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def __enter__(self) -> Echo:
        self._thread.start()
        self.port = asyncio.run_coroutine_threadsafe(self._server.start(), self._loop).result(10)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._server.stop(0.1), self._loop).result(10)
        asyncio.run_coroutine_threadsafe(self._drain(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _drain(self) -> None:
        tasks = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass
class Authority:
    folder: Path

    def server(self, name: str = "cell-1", **more: Any) -> TlsFiles:
        made = issue(self.folder, name, Role.CELL, **more)
        return TlsFiles(made.certificate, made.key, made.ca)

    def client(self, name: str = "camera-7", role: Role = Role.EDGE, **more: Any) -> ClientTlsFiles:
        made = issue(self.folder, name, role, **more)
        return ClientTlsFiles(made.ca, made.certificate, made.key)


YESTERDAY = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    create_authority(tmp_path / "ca", now=YESTERDAY)
    return Authority(tmp_path / "ca")


def methods(channel: grpc.Channel) -> dict[str, Call]:
    """Method -> call; every error is a blindtail one."""

    def made(name: str) -> Call:
        raw = channel.unary_unary(f"/test.Echo/{name}", None, None)

        def call(data: bytes) -> bytes:
            try:
                return bytes(raw(data, timeout=5))
            except grpc.RpcError as error:
                raise from_rpc_error(error) from error
            except ValueError as error:
                raise TailUnavailable("closed") from error

        return call

    return {name: made(name) for name in ("Who", "Only", "Slow")}


@contextmanager
def dialled(address: str, credentials: Credentials) -> Iterator[dict[str, Call]]:
    with secure_channel(address, credentials) as channel:
        yield methods(channel)


def who(address: str, credentials: Credentials) -> str:
    with dialled(address, credentials) as call:
        return call["Who"](b"").decode()


def refused(address: str, credentials: Credentials) -> bool:
    with pytest.raises(BlindtailError) as error:
        who(address, credentials)
    return isinstance(error.value, TailUnavailable)


def handshake(
    port: int, files: ClientTlsFiles | None, ca: Path, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3
) -> tuple[str, str]:
    """(TLS version, serial of the server's certificate) as OpenSSL sees them. Raises `OSError`."""
    context = ssl.create_default_context(cafile=str(ca))
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["h2"])
    if files is not None:
        context.load_cert_chain(files.certificate, files.key)
    with (
        socket.create_connection(("127.0.0.1", port), timeout=5) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as connection,
    ):
        shown = connection.getpeercert()
        assert shown is not None
        connection.settimeout(2)
        # Under TLS 1.3 the server's verdict on our certificate comes after the handshake.
        if connection.recv(1) == b"":
            raise ConnectionResetError("closed by the server")
        return str(connection.version()), str(shown["serialNumber"]).lower().lstrip("0")


# -- who gets in ----------------------------------------------------------------------


def test_only_tls_13_with_a_certificate_of_ours_gets_in(authority: Authority, tmp_path: Path) -> None:
    tls, edge = authority.server(), authority.client()
    create_authority(tmp_path / "other")
    stranger = Authority(tmp_path / "other").client()
    expired = authority.client("expired", days=0.5, now=YESTERDAY)
    ca = tls.client_ca
    with Echo(tls) as server:
        assert handshake(server.port, edge, ca) == ("TLSv1.3", show(tls.certificate).serial.lstrip("0"))
        with pytest.raises(OSError, match=r"(?i)handshake|protocol|alert|reset|closed \(EOF\)"):
            handshake(server.port, edge, ca, ssl.TLSVersion.TLSv1_2)
        with pytest.raises(OSError, match=r"(?i)certificate required|reset|closed"):
            handshake(server.port, None, ca)
        with pytest.raises(OSError, match=r"(?i)unknown ca|reset|closed|alert"):
            handshake(server.port, stranger, ca)
        with pytest.raises(OSError, match=r"(?i)expired|reset|closed|alert"):
            handshake(server.port, expired, ca)
        # The same with our own client.
        assert who(server.address, edge) == "edge:camera-7"
        theirs = ClientTlsFiles(ca, stranger.certificate, stranger.key)  # trusts us; we do not trust it
        assert refused(server.address, theirs)
        assert refused(server.address, expired)
        assert refused(server.address, stranger)  # does not trust us either
        assert refused(server.address, "insecure-loopback")
        assert refused(server.address, None)


def test_an_edges_certificate_cannot_play_a_server(authority: Authority) -> None:
    edge, camera = authority.client(), authority.client("camera-8")
    with Echo(TlsFiles(edge.certificate, edge.key, edge.ca)) as impostor:
        named = ClientTlsFiles(camera.ca, camera.certificate, camera.key, server_name="camera-7")
        assert refused(impostor.address, camera)
        assert refused(impostor.address, named)


def test_a_cells_certificate_is_for_its_hosts(authority: Authority) -> None:
    edge = authority.client()
    with Echo(authority.server(hosts=["cell.example"])) as server:
        assert refused(server.address, edge)
        named = ClientTlsFiles(edge.ca, edge.certificate, edge.key, server_name="cell.example")
        assert who(server.address, named) == "edge:camera-7"


def test_roles_decide_and_names_of_another_authority_get_theirs_from_settings(
    authority: Authority, tmp_path: Path
) -> None:
    made = certificates(tmp_path / "foreign", "server", "alice", "bob")

    def foreign(name: str) -> ClientTlsFiles:
        return ClientTlsFiles(made["ca.pem"], made[f"{name}.pem"], made[f"{name}.key"])

    with Echo(authority.server()) as server:
        with dialled(server.address, authority.client()) as call, pytest.raises(AccessDenied, match="edge:"):
            call["Only"](b"")
        with dialled(server.address, authority.client("alice", Role.OPERATOR)) as call:
            assert (call["Who"](b""), call["Only"](b"")) == (b"operator:alice", b"done")
    tls = TlsFiles(made["server.pem"], made["server.key"], made["ca.pem"])
    with Echo(tls, {"cn:alice": "operator"}) as server:
        with dialled(server.address, foreign("alice")) as call:
            assert (call["Who"](b""), call["Only"](b"")) == (b"cn:alice", b"done")
        with dialled(server.address, foreign("bob")) as call, pytest.raises(AccessDenied, match="cn:bob"):
            call["Only"](b"")


def test_a_server_does_not_start_with_an_open_key_or_in_plaintext_for_others(authority: Authority) -> None:
    tls = authority.server()
    tls.key.chmod(0o644)
    server = Echo(tls)
    with pytest.raises(ConfigError, match="chmod 600"):
        asyncio.run(server._server.start())
    server._loop.close()
    plain = GrpcServer("0.0.0.0", 0, None, {}, options=[])
    with pytest.raises(ConfigError, match="loopback only"):
        asyncio.run(plain.start())


# -- renewal ------------------------------------------------------------------------------


def test_renewals_on_both_sides_fail_no_call(authority: Authority) -> None:
    """A server and a client that are busy while their certificates are renewed again and again."""
    tls, edge = authority.server(), authority.client()
    failures: list[str] = []
    counts: list[int] = [0]
    stop = threading.Event()
    with Echo(tls) as server:
        line = Line(server.address, edge, methods)

        def work() -> None:
            while not stop.is_set():
                try:
                    with line.use() as call:
                        assert call["Who"](b"") == b"edge:camera-7"
                    counts[0] += 1
                except Exception as error:
                    failures.append(repr(error))
                time.sleep(0.002)

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        serials = [handshake(server.port, edge, tls.client_ca)[1]]
        with line.use() as first:
            pass
        with dialled(server.address, edge) as held:
            held["Who"](b"")
            for _ in range(3):
                authority.server(renew=True)
                authority.client(renew=True)
                serials.append(handshake(server.port, edge, tls.client_ca)[1])
                time.sleep(1.1)  # a line looks at its files once a second
            assert held["Who"](b"") == b"edge:camera-7"  # an old connection lives on
        with line.use() as last:
            assert last is not first  # the client really dialled anew
        stop.set()
        for thread in threads:
            thread.join()
        line.close()
        with pytest.raises(BlindtailError), line.use() as call:
            call["Who"](b"")
    assert failures == []
    assert counts[0] >= 10
    assert len(set(serials)) == 4
    assert serials[-1] == show(tls.certificate).serial.lstrip("0")


def test_a_call_in_flight_survives_the_change_of_its_channel(authority: Authority) -> None:
    edge = authority.client()
    replies: list[bytes] = []
    with Echo(authority.server()) as server:
        line = Line(server.address, edge, methods)

        def slow() -> None:
            with line.use() as call:
                replies.append(call["Slow"](b"4.0"))

        thread = threading.Thread(target=slow)
        thread.start()
        time.sleep(1.05)
        authority.client(renew=True)
        with line.use() as call:
            assert call["Who"](b"") == b"edge:camera-7"
            assert replies == []  # still on its way, over the old channel
        thread.join()
        line.close()
    assert replies == [b"late"]


def test_a_changed_client_authority_counts_for_new_connections(authority: Authority, tmp_path: Path) -> None:
    tls, edge = authority.server(), authority.client()
    create_authority(tmp_path / "next")
    made = issue(tmp_path / "next", "camera-9", Role.EDGE)
    newcomer = ClientTlsFiles(tls.client_ca, made.certificate, made.key)
    trusted = tls.client_ca.with_name("clients.pem")
    old_ca = tls.client_ca.read_bytes()

    def trust(*authorities: bytes) -> None:
        part = trusted.with_suffix(".part")
        part.write_bytes(b"".join(authorities))
        os.replace(part, trusted)

    trust(old_ca)
    files = TlsFiles(tls.certificate, tls.key, trusted)
    with Echo(files) as server, dialled(server.address, edge) as held:
        assert held["Who"](b"") == b"edge:camera-7"
        assert refused(server.address, newcomer)
        trust(old_ca, made.ca.read_bytes())  # both, while devices change over
        assert who(server.address, newcomer) == "edge:camera-9"
        assert who(server.address, edge) == "edge:camera-7"
        trust(made.ca.read_bytes())
        assert who(server.address, newcomer) == "edge:camera-9"
        assert refused(server.address, edge)
        assert held["Who"](b"") == b"edge:camera-7"


def test_open_connections_end_in_order_and_an_authority_that_went_loses_them(
    authority: Authority, tmp_path: Path
) -> None:
    tls, edge = authority.server(), authority.client()
    create_authority(tmp_path / "next")
    trusted = tls.client_ca.with_name("clients.pem")
    trusted.write_bytes(tls.client_ca.read_bytes())
    files = TlsFiles(tls.certificate, tls.key, trusted)
    with Echo(files, connection_age_s=0.3) as server, dialled(server.address, edge) as call:
        slow: list[bytes] = []
        thread = threading.Thread(target=lambda: slow.append(call["Slow"](b"1.0")))
        thread.start()
        end_s = time.monotonic() + 1.5
        while time.monotonic() < end_s:  # several connections later: not one call failed
            assert call["Who"](b"") == b"edge:camera-7"
        thread.join()
        assert slow == [b"late"]
        part = trusted.with_suffix(".part")
        part.write_bytes((tmp_path / "next" / "ca.pem").read_bytes())
        os.replace(part, trusted)

        def until_refused() -> None:
            end_s = time.monotonic() + 30
            while time.monotonic() < end_s:
                call["Who"](b"")

        with pytest.raises(TailUnavailable):
            until_refused()


@pytest.mark.parametrize("retry_s", [0.0, 60.0])
def test_bad_new_files_keep_the_old_ones_and_one_line_is_logged(
    authority: Authority, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, retry_s: float
) -> None:
    monkeypatch.setattr(serving, "_RETRY_S", retry_s)
    tls, edge = authority.server(), authority.client()
    old = show(tls.certificate).serial.lstrip("0")
    old_certificate = tls.certificate.read_bytes()
    caplog.set_level(logging.INFO, "blindtail.serving")

    def lines() -> list[str]:
        found = [r.getMessage() for r in caplog.records if r.name == "blindtail.serving"]
        caplog.clear()
        return [text for text in found if "TLS files" in text]

    def serial() -> str:
        return handshake(server.port, edge, tls.client_ca)[1]

    with Echo(tls) as server:
        assert serial() == old
        assert lines() == []
        authority.server(renew=True)
        new_certificate = tls.certificate.read_bytes()
        tls.certificate.write_bytes(old_certificate)  # the moment between the two files
        assert [serial() for _ in range(5)] == [old] * 5
        assert who(server.address, edge) == "edge:camera-7"
        (said,) = lines()
        assert "the old ones stay" in said
        assert "PRIVATE" not in said
        tls.certificate.write_bytes(new_certificate)
        new = serial()
        assert new == show(tls.certificate).serial.lstrip("0") != old
        assert lines() == ["TLS files loaded again"]
        for damage in (
            lambda: tls.certificate.write_bytes(new_certificate[:200]),
            lambda: tls.key.chmod(0o644),
            lambda: tls.key.unlink(),
            lambda: tls.client_ca.write_bytes(b""),
        ):
            time.sleep(0.02)  # a file's times move with the system's tick
            kept = edge.ca.read_bytes()
            damage()
            assert [handshake(server.port, edge, edge.ca)[1] for _ in range(3)] == [new] * 3
            assert len(lines()) == 1
            assert edge.ca.read_bytes() == kept
    # What is damaged now would not have been accepted at the start.
    with pytest.raises(ConfigError):
        tls.load(0.0)


def test_a_server_with_an_expired_certificate_says_so_and_recovers(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    edge = authority.client()
    with Echo(authority.server(days=0.5, now=YESTERDAY)) as server:
        assert "has expired" in caplog.text
        assert refused(server.address, edge)
        caplog.clear()
        authority.server(renew=True)
        assert who(server.address, edge) == "edge:camera-7"
        assert "has expired" not in caplog.text


# -- a cell -------------------------------------------------------------------------------


def test_two_edges_of_a_cell_cannot_touch_each_others_sessions_and_keys(
    authority: Authority, tmp_path: Path
) -> None:
    config = CloudConfig(tls=authority.server())
    with LocalCell([bundle()], backend="clear", state_dir=tmp_path / "cell", config=config) as cell:

        def client(name: str, role: Role = Role.EDGE) -> Client:
            return Client(TailStub(secure_channel(cell.address, authority.client(name, role))))

        alice, bob, boss = client("alice"), client("bob"), client("boss", Role.OPERATOR)
        assert alice.upload_and_wait() is KeyState.READY
        session = alice.register().session
        alice.evaluate(session)
        assert bob.status() is KeyState.MISSING  # the same hash, another identity
        assert bob.register().keys is KeyState.MISSING
        with pytest.raises(SessionLost):
            bob.evaluate(session)
        for call in (boss.register, boss.status, boss.upload):
            with pytest.raises(AccessDenied, match="role edge"):
                call()
        with pytest.raises(AccessDenied, match="role edge"):
            boss.evaluate(session)
        alice.evaluate(session)  # undisturbed
