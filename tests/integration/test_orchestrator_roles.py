"""Who may do what at an orchestrator, over mutual TLS."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from blindtail.certs import create_authority, issue
from blindtail.errors import AccessDenied, TailUnavailable
from blindtail.identity import Role
from blindtail.rpc import ClientTlsFiles
from blindtail.serving import TlsFiles
from blindtail.wire.control import PeerKind, Welcome, encode_up
from blindtail.wire.policies import PolicyChange
from orchestrator.config import OrchestratorConfig
from orchestrator.local import LocalOrchestrator
from tests.attach_cases import Host
from tests.certificates import certificates
from tests.clock import until
from tests.orchestrator_service_cases import FAST, HELLO, OTHER, attach

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def issued(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ClientTlsFiles]:
    folder = tmp_path_factory.mktemp("certs") / "authority"
    create_authority(folder)
    made = {}
    for name, role in (
        ("control", Role.ORCHESTRATOR),
        ("camera", Role.EDGE),
        ("a", Role.CELL),
        ("ada", Role.OPERATOR),
    ):
        files = issue(folder, name, role)
        made[name] = ClientTlsFiles(files.ca, files.certificate, files.key)
    return made


@pytest.fixture
def secured(tmp_path: Path, issued: dict[str, ClientTlsFiles]) -> Iterator[LocalOrchestrator]:
    own = issued["control"]
    config = OrchestratorConfig(tls=TlsFiles(own.certificate, own.key, own.ca), report_interval_s=0.1)
    with LocalOrchestrator(state_dir=tmp_path, config=config) as running:
        yield running


def test_roles_over_mutual_tls(secured: LocalOrchestrator, issued: dict[str, ClientTlsFiles]) -> None:
    edge, cell = Host(), Host(kind=PeerKind.CELL)
    with (
        edge.attached(secured.address, issued["camera"]) as one,
        cell.attached(secured.address, issued["a"]) as two,
        secured.policies(issued["ada"]) as client,
    ):
        assert one.wait_connected(5)
        assert two.wait_connected(5)
        assert client.set(PolicyChange("", FAST)).author == "operator:ada"
        until(lambda: edge.version == 1)
        assert {p.identity for p in client.fleet()} == {"edge:camera", "cell:a"}
        assert cell.version == 0  # policies are for edges
        for name in ("camera", "a", "control"):
            with secured.policies(issued[name]) as stranger:
                for call in (
                    stranger.get,
                    stranger.fleet,
                    stranger.usage,
                    lambda: stranger.set(PolicyChange("", OTHER)),
                ):
                    with pytest.raises(AccessDenied, match="role operator"):
                        call()
        edge_hello, cell_hello = HELLO, encode_up(cell.hello())
        for name, hello, says in (
            ("camera", cell_hello, "role cell"),
            ("a", edge_hello, "role edge"),
            ("ada", edge_hello, "role edge or cell"),
            ("control", cell_hello, "role edge or cell"),
        ):
            with pytest.raises(AccessDenied, match=says):
                attach(secured.address, [hello], issued[name])
        assert len(client.history()) == 1
    with pytest.raises(TailUnavailable):
        attach(secured.address, [HELLO])  # no TLS


def test_a_certificate_of_another_authority(tmp_path: Path) -> None:
    """Roles of strangers' certificates come from the settings."""
    files = certificates(tmp_path / "certs", "control", "alice", "bob")

    def of(name: str) -> ClientTlsFiles:
        return ClientTlsFiles(files["ca.pem"], files[f"{name}.pem"], files[f"{name}.key"])

    config = OrchestratorConfig(
        tls=TlsFiles(files["control.pem"], files["control.key"], files["ca.pem"]),
        roles={"cn:alice": "operator"},
    )
    with LocalOrchestrator(state_dir=tmp_path / "state", config=config) as running:
        with running.policies(of("alice")) as client:
            assert client.set(PolicyChange("", FAST)).author == "cn:alice"
        with running.policies(of("bob")) as client, pytest.raises(AccessDenied):
            client.get()
        assert attach(running.address, [HELLO], of("bob"))[0] == Welcome(2.0)


def test_a_renewed_certificate_is_used(tmp_path: Path) -> None:
    create_authority(tmp_path / "authority")
    own = issue(tmp_path / "authority", "control", Role.ORCHESTRATOR)
    mine = issue(tmp_path / "authority", "camera", Role.EDGE)
    config = OrchestratorConfig(
        tls=TlsFiles(own.certificate, own.key, own.ca), report_interval_s=0.1, settle_s=0.3
    )
    changes: list[bool] = []
    credentials = ClientTlsFiles(mine.ca, mine.certificate, mine.key)
    with (
        LocalOrchestrator(state_dir=tmp_path / "state", config=config) as running,
        Host().attached(running.address, credentials, on_change=changes.append) as attachment,
    ):
        assert attachment.wait_connected(5)
        issue(tmp_path / "authority", "camera", Role.EDGE, renew=True)
        until(lambda: changes == [True, False, True])
