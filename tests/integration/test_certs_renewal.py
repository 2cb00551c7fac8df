"""Certificates that change while connections are open: no restart, and no call that fails."""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path

import pytest

from blindtail import serving
from blindtail.certs import create_authority, issue, show
from blindtail.errors import BlindtailError, ConfigError, TailUnavailable
from blindtail.identity import Role
from blindtail.line import Line
from blindtail.tls import ClientTlsFiles, TlsFiles
from tests.certs_cases import (
    YESTERDAY,
    Authority,
    Echo,
    authority_of_one_test,  # noqa: F401
    dialled,
    handshake,
    methods,
    refused,
    who,
)

pytestmark = pytest.mark.timeout(60)


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
