"""Certificates on real connections: who gets in, and nothing below TLS 1.3."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import pytest

from blindtail.certs import create_authority, show
from blindtail.errors import AccessDenied, ConfigError, SessionLost
from blindtail.identity import Role
from blindtail.rpc import TailStub, secure_channel
from blindtail.serving import GrpcServer
from blindtail.tls import ClientTlsFiles, TlsFiles
from blindtail.wire import KeyState
from cloud.config import CloudConfig
from cloud.local import LocalCell
from tests.certificates import certificates
from tests.certs_cases import (
    YESTERDAY,
    Authority,
    Echo,
    authority_of_one_test,  # noqa: F401
    dialled,
    handshake,
    refused,
    who,
)
from tests.cloud_cases import Client, bundle

pytestmark = pytest.mark.timeout(60)


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
