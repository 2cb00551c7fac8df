"""From certificates to identities and roles; TLS files as they are read, checked and watched."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from blindtail.certs import create_authority, issue
from blindtail.errors import AccessDenied, ConfigError
from blindtail.identity import (
    LOOPBACK,
    Identity,
    Role,
    allowed,
    check_roles,
    from_certificate,
    spiffe_id,
)
from blindtail.rpc import INSECURE_LOOPBACK, secure_channel, stamp
from blindtail.serving import identity_of
from blindtail.tls import ClientTls, ClientTlsFiles, TlsFiles
from cloud.config import CloudConfig


@pytest.mark.parametrize("role", Role)
def test_a_spiffe_id_names_role_and_name(role: Role) -> None:
    found = from_certificate(["https://else", spiffe_id(role, "a-1")], ["other"], {"cn:other": "operator"})
    assert found == Identity(role, f"{role.value}:a-1")


@pytest.mark.parametrize(
    "uris",
    [
        ["spiffe://blindtail/king/a"],
        ["spiffe://blindtail/edge"],
        ["spiffe://blindtail/edge/a/b"],
        ["spiffe://blindtail/edge/"],
        ["spiffe://blindtail/edge/a%2fb"],
        ["spiffe://blindtail/edge/a\n"],
        ["spiffe://blindtail/edge/a", "spiffe://blindtail/operator/a"],
    ],
)
def test_bad_spiffe_ids_are_refused_and_never_fall_back_to_the_common_name(uris: list[str]) -> None:
    with pytest.raises(AccessDenied):
        from_certificate(uris, ["fine"], {"cn:fine": "operator"})
    assert from_certificate([], ["fine"], {"cn:fine": "operator"}).role is Role.OPERATOR


def test_certificates_of_another_authority_are_edges_unless_settings_say_more() -> None:
    roles = {"cn:alice": "operator"}
    assert from_certificate([], ["alice"], roles) == Identity(Role.OPERATOR, "cn:alice")
    assert from_certificate([], ["bob"], roles) == Identity(Role.EDGE, "cn:bob")
    # Another trust domain's id is not ours, and a name cannot pretend to be one of ours.
    assert from_certificate(["spiffe://other/edge/x"], ["alice"], roles).role is Role.OPERATOR
    assert from_certificate([], ["operator:root"], {}) == Identity(Role.EDGE, "cn:operator:root")
    assert from_certificate([], ["edge:camera-7"], {}).name != "edge:camera-7"
    for names in ([], [""], ["a", "b"], ["a\nb"], ["\u202ea"], ["x" * 65]):
        with pytest.raises(AccessDenied):
            from_certificate([], names, {})


def test_roles_are_required() -> None:
    edge = Identity(Role.EDGE, "edge:a")
    edge.require(Role.EDGE, Role.CELL)
    LOOPBACK.require(Role.OPERATOR)
    with pytest.raises(AccessDenied, match=r"operator.*edge:a"):
        edge.require(Role.OPERATOR)


def test_patterns() -> None:
    clinic = Identity(Role.EDGE, "edge:clinic-4")
    assert allowed(clinic, ())
    assert allowed(clinic, ("cn:*", "edge:clinic-*"))
    assert not allowed(clinic, ("edge:Clinic-*",))
    assert not allowed(clinic, ("edge:clinic",))


def test_settings_with_unknown_roles_are_refused() -> None:
    check_roles({"cn:a": "operator"})
    with pytest.raises(ConfigError, match="king"):
        check_roles({"cn:a": "king"})
    with pytest.raises(ConfigError, match="king"):
        CloudConfig(roles={"cn:a": "king"})


class Call:
    """What a servicer sees of a connection."""

    def __init__(self, **found: list[bytes]) -> None:
        self._found = found

    def auth_context(self) -> dict[str, list[bytes]]:
        return self._found


def test_an_identity_is_read_from_the_connection() -> None:
    tls = {"transport_security_type": [b"ssl"], "ssl_tls_version": [b"TLSv1.3"]}
    uri = [b"spiffe://blindtail/edge/a"]
    assert identity_of(Call(**tls, peer_uri=uri, x509_common_name=[b"x"])).name == "edge:a"
    assert identity_of(Call(**tls, x509_common_name=[b"x"]), {"cn:x": "operator"}).role is Role.OPERATOR
    assert identity_of(Call(transport_security_type=[b"insecure"])) is LOOPBACK
    assert identity_of(Call()) is LOOPBACK
    for wrong in (
        {**tls, "ssl_tls_version": [b"TLSv1.2"], "peer_uri": uri},  # the second line of defence
        {"transport_security_type": [b"ssl"], "peer_uri": uri},
        {"transport_security_type": [b"local"], "peer_uri": uri},
        {**tls},  # no certificate
        {**tls, "x509_common_name": [b"\xff\xfe\n"]},
    ):
        with pytest.raises(AccessDenied):
            identity_of(Call(**wrong))


def test_tls_13_is_set_before_grpc_is_loaded() -> None:
    """gRPC reads it at its import; where that came first, servers say so and check call by call."""
    code = "from blindtail._process import TLS_13_ONLY as t; print(t)"
    env = {name: value for name, value in os.environ.items() if name != "GRPC_SSL_CIPHER_SUITES"}
    for before, says in (("", "True"), ("import grpc; ", "False")):
        done = subprocess.run(
            [sys.executable, "-c", before + code], env=env, capture_output=True, text=True, timeout=50
        )
        assert done.stdout.strip() == says, done.stderr


# -- files ------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> ClientTlsFiles:
    create_authority(tmp_path / "ca")
    made = issue(tmp_path / "ca", "me", Role.EDGE)
    return ClientTlsFiles(made.ca, made.certificate, made.key)


def renew(files: ClientTlsFiles) -> None:
    issue(files.ca.parent.parent, "me", Role.EDGE, renew=True)


def test_files_are_read_and_their_secret_is_never_shown(files: ClientTlsFiles) -> None:
    tls = files.load()
    assert tls == ClientTls(files.ca.read_bytes(), files.certificate.read_bytes(), files.key.read_bytes())
    server = TlsFiles(files.certificate, files.key, files.ca)
    assert server.as_client() == files
    assert "PRIVATE" not in repr(tls) + repr(server.load())
    secure_channel("127.0.0.1:1", files).close()


def test_a_key_that_everybody_reads_is_refused(files: ClientTlsFiles) -> None:
    for mode in (0o604, 0o644, 0o602, 0o666):
        files.key.chmod(mode)
        with pytest.raises(ConfigError, match="chmod 600"):
            files.load()
        with pytest.raises(ConfigError, match="chmod 600"):
            secure_channel("127.0.0.1:1", files)
    for mode in (0o400, 0o600, 0o640):  # a group of its own is how a container's secrets are mounted
        files.key.chmod(mode)
        files.load()


@pytest.mark.parametrize("name", ["ca", "certificate", "key"])
def test_wrong_files_are_named(files: ClientTlsFiles, name: str) -> None:
    path: Path = getattr(files, name)
    good = path.read_bytes()
    for content in (b"", b"nonsense", good[: len(good) // 2], b"\xff" * 100, b"x" * 2_000_000):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=path.name):
            files.load(0.0)
    path.unlink()
    with pytest.raises(ConfigError, match=path.name):
        files.load(0.0)
    path.write_bytes(good)
    path.chmod(0o600)
    files.load(0.0)


def test_a_key_with_a_password_is_refused_without_asking(files: ClientTlsFiles) -> None:
    from cryptography.hazmat.primitives import serialization as s

    key = s.load_pem_private_key(files.key.read_bytes(), None)
    locked = key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.BestAvailableEncryption(b"secret"))
    files.key.write_bytes(locked)
    with pytest.raises(ConfigError, match="password"):
        files.load(0.0)


def test_a_half_done_renewal_is_waited_for(files: ClientTlsFiles) -> None:
    old = files.load().certificate
    before = files.certificate.read_bytes()
    renew(files)
    after = files.certificate.read_bytes()
    files.certificate.write_bytes(before)  # the new key with the old certificate
    with pytest.raises(ConfigError, match="not a certificate and its private key"):
        files.load(0.0)

    def finish() -> None:
        time.sleep(0.15)
        files.certificate.write_bytes(after)

    thread = threading.Thread(target=finish)
    thread.start()
    assert files.load().certificate == after != old
    thread.join()


def test_stamps_change_with_every_renewal_and_with_modes(files: ClientTlsFiles) -> None:
    seen = {stamp(files)}
    assert stamp(files) in seen
    for _ in range(3):
        renew(files)
        assert stamp(files) not in seen
        seen.add(stamp(files))
    time.sleep(0.02)  # a file's times move with the system's tick
    files.key.chmod(0o400)
    assert stamp(files) not in seen
    assert stamp(None) == stamp(INSECURE_LOOPBACK) == stamp(files.load()) == ()
