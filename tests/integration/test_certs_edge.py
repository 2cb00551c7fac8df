"""A whole edge and a whole cell over mutual TLS, while certificates and authorities change under them."""

from __future__ import annotations

import shutil
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from blindtail import line
from blindtail.bundle import CloudBundle
from blindtail.certs import create_authority, issue
from blindtail.errors import ConfigError
from blindtail.identity import Role
from blindtail.rpc import secure_channel
from blindtail.tls import ClientTlsFiles, TlsFiles
from cloud.config import CloudConfig
from cloud.local import LocalCell
from edge.runtime import EdgeRuntime
from orchestrator.policy import CloudOnly
from tests.edge_fakes import bundle_of, image, program

pytestmark = pytest.mark.timeout(120)


def test_renewal_and_a_new_authority_without_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[bytes] = []  # the certificate of every dial

    def dialled(address: str, credentials: Any, **more: Any) -> Any:
        shown.append(credentials.certificate)
        return secure_channel(address, credentials, **more)

    monkeypatch.setattr(line, "secure_channel", dialled)
    old, new = tmp_path / "old", tmp_path / "new"
    create_authority(old)
    create_authority(new)
    server, device = tmp_path / "server", tmp_path / "device"
    cell_files = issue(old, "cell-1", Role.CELL, out=server)
    edge_files = issue(old, "camera-7", Role.EDGE, out=device)
    tls = TlsFiles(cell_files.certificate, cell_files.key, cell_files.ca)
    credentials = ClientTlsFiles(edge_files.ca, edge_files.certificate, edge_files.key)

    def trust(folder: Path, *authorities: Path) -> None:
        part = folder / "ca.part"
        part.write_bytes(b"".join((a / "ca.pem").read_bytes() for a in authorities))
        part.replace(folder / "ca.pem")

    def swap(authority: Path, name: str, role: Role, folder: Path) -> None:
        """As `certs issue --force` renews, but by another authority: the key first, then the certificate."""
        made = issue(authority, name, role, out=tmp_path / f"{name}-{authority.name}")
        for source in (made.key, made.certificate):
            part = folder / f"{source.name}.part"
            shutil.copy(source, part)
            part.replace(folder / source.name)

    seen: Counter[str] = Counter()
    stop = threading.Event()
    cell = LocalCell(
        [CloudBundle("toy", "1", {2: program()})],
        backend="seal",
        state_dir=tmp_path / "cell",
        config=CloudConfig(tls=tls),
    )
    with (
        cell,
        EdgeRuntime.open(
            bundle_of(spec=program().spec),
            cell.address,
            credentials=credentials,
            policy=CloudOnly(),
            state_dir=tmp_path / "edge",
        ) as edge,
    ):
        assert edge.wait_ready(60), edge.status()

        def work() -> None:
            while not stop.is_set():
                answer = edge.infer(image(1, 60))
                seen[answer.fallback or answer.route] += 1
                time.sleep(0.005)

        thread = threading.Thread(target=work)
        thread.start()
        issue(old, "cell-1", Role.CELL, out=server, renew=True)  # the ordinary renewal
        issue(old, "camera-7", Role.EDGE, out=device, renew=True)
        time.sleep(1.3)  # a line looks at its files once a second
        trust(server, old, new)  # then another authority, step by step
        trust(device, old, new)
        swap(new, "camera-7", Role.EDGE, device)
        swap(new, "cell-1", Role.CELL, server)
        time.sleep(1.3)
        stop.set()
        thread.join()
        assert set(seen) == {"tail"}, seen
        assert seen["tail"] >= 10
        registrations = [t.registrations for t in edge.status().tails.values()]
        assert registrations == [1]  # the session went on
        assert credentials.certificate.read_bytes() in shown  # over a channel with the last certificate
        assert len(set(shown)) == 3
        trust(server, new)
        trust(device, new)
        cell.stop()
        cell.start()  # every connection is new: only the new authority's certificates serve now
        end_s = time.monotonic() + 20
        while edge.infer(image(1, 60)).route != "tail":
            assert time.monotonic() < end_s, edge.status()
            time.sleep(0.05)


def test_an_edge_does_not_start_with_an_open_key(tmp_path: Path) -> None:
    create_authority(tmp_path / "ca")
    made = issue(tmp_path / "ca", "camera-7", Role.EDGE)
    made.key.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        EdgeRuntime.open(
            bundle_of(spec=program().spec),
            "127.0.0.1:1",
            credentials=ClientTlsFiles(made.ca, made.certificate, made.key),
            state_dir=tmp_path / "edge",
        )
