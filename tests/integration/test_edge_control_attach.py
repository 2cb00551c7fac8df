"""An edge and a real orchestrator: policies come down, counts go up, and each does without the other."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blindtail import cli
from blindtail.certs import create_authority, issue
from blindtail.identity import Role
from blindtail.policy_document import Objectives, PolicyDocument
from blindtail.rpc import INSECURE_LOOPBACK, Credentials
from blindtail.tls import ClientTlsFiles, TlsFiles
from blindtail.wire.control import PeerKind
from blindtail.wire.policies import PolicyChange, PolicyState
from edge.runtime import EdgeRuntime
from orchestrator.config import OrchestratorConfig
from orchestrator.local import LocalOrchestrator
from orchestrator.policy import EdgeOnly
from tests.clock import until
from tests.edge_fakes import FakeTail, bundle_of, image

pytestmark = pytest.mark.timeout(60)

CONFIG = OrchestratorConfig(report_interval_s=0.1, settle_s=0.5)


@pytest.fixture
def orchestrator(tmp_path: Path) -> Iterator[LocalOrchestrator]:
    with LocalOrchestrator(state_dir=tmp_path / "control", config=CONFIG) as running:
        yield running


def opened(
    orchestrator: LocalOrchestrator,
    state_dir: Path,
    credentials: Credentials = INSECURE_LOOPBACK,
    **bundle: Any,
) -> EdgeRuntime:
    """A runtime with a tail at hand, whose own policy never offloads."""
    edge = EdgeRuntime(bundle_of(**bundle), {2: FakeTail()}, EdgeOnly((0.9, 0.9)), deadline_s=30.0)
    edge.attach(orchestrator.address, credentials, state_dir)
    return edge


def hand_down(
    orchestrator: LocalOrchestrator,
    policy: str,
    deadline_s: float | None = None,
    credentials: Credentials = INSECURE_LOOPBACK,
    **parameters: Any,
) -> int:
    """The new version."""
    document = PolicyDocument(policy, parameters, Objectives(deadline_s)).encode()
    with orchestrator.policies(credentials) as client:
        return client.set(PolicyChange("", document)).update.version


def test_policies_come_down_and_counts_go_up(orchestrator: LocalOrchestrator, tmp_path: Path) -> None:
    with opened(orchestrator, tmp_path / "edge") as edge:
        assert edge.wait_attached(10)
        assert edge.infer(image()).route == "exit2"  # its own policy
        version = hand_down(orchestrator, "threshold", 5.0)
        until(lambda: edge.status().policy_version == version, "the policy did not come")
        status = edge.status()
        assert (status.policy, status.deadline_s, status.orchestrator) == ("threshold", 5.0, "attached")
        answers = [edge.infer(image()) for _ in range(4)]
        assert {(a.route, a.extra["policy_version"]) for a in answers} == {("tail", float(version))}
        totals = {"exit2": 0, "tail": 0}

        def arrived() -> bool:
            with orchestrator.policies() as client:
                (peer,) = client.fleet()
                (entry,) = client.get()
            totals.update(peer.report.routes)
            return totals["tail"] == 4 and entry.applied == 1

        until(arrived, f"the reports did not come: {totals}")
        with orchestrator.policies() as client:
            (peer,) = client.fleet()
        assert (peer.hello.kind, peer.hello.models) == (PeerKind.EDGE, (("toy", "1"),))
        assert peer.hello.policy_version == version
        assert peer.report.tail == "ready"


def test_the_last_policy_holds_while_the_orchestrator_is_away(
    orchestrator: LocalOrchestrator, tmp_path: Path
) -> None:
    first = hand_down(orchestrator, "threshold", 5.0)
    with opened(orchestrator, tmp_path / "edge") as edge:
        assert edge.wait_attached(10)
        assert edge.status().policy_version == first
        orchestrator.stop()
        until(lambda: edge.status().orchestrator == "away", "the edge did not notice")
        assert edge.infer(image()).route == "tail"
    with opened(orchestrator, tmp_path / "edge") as edge:  # a restart while it is away
        assert not edge.wait_attached(0.2)
        assert (edge.status().policy_version, edge.deadline_s) == (first, 5.0)
        assert edge.infer(image()).route == "tail"
        orchestrator.start()
        second = hand_down(orchestrator, "edge-only", 4.0)
        until(lambda: edge.status().policy_version == second, "the edge did not pick up")
        assert (edge.infer(image()).route, edge.deadline_s) == ("exit2", 4.0)


def test_a_refused_policy_is_rolled_back_and_costs_no_answer(
    orchestrator: LocalOrchestrator, tmp_path: Path
) -> None:
    with opened(orchestrator, tmp_path / "a") as a, opened(orchestrator, tmp_path / "b") as b:
        assert a.wait_attached(10)
        assert b.wait_attached(10)
        good = hand_down(orchestrator, "threshold", 5.0)
        until(lambda: a.status().policy_version == b.status().policy_version == good, "not applied")
        bad = hand_down(orchestrator, "threshold", 1.0, thresholds=[0.1, 0.1, 0.1])
        until(lambda: a.status().policy_version > bad, "not rolled back")
        assert (a.status().policy, a.deadline_s, a.infer(image()).route) == ("threshold", 5.0, "tail")
        with orchestrator.policies() as client:
            states = {e.update.version: e.state for e in client.history()}
        assert states[bad] is PolicyState.ROLLED_BACK


def test_runtimes_of_one_site_share_a_state_directory(
    orchestrator: LocalOrchestrator, tmp_path: Path
) -> None:
    with opened(orchestrator, tmp_path / "site") as a, opened(orchestrator, tmp_path / "site") as b:
        assert a.wait_attached(10)
        assert b.wait_attached(10)
        version = hand_down(orchestrator, "threshold")
        until(lambda: a.status().policy_version == b.status().policy_version == version, "not applied")
        with orchestrator.policies() as client:
            assert len({peer.hello.instance for peer in client.fleet()}) == 2
    assert [p.name for p in (tmp_path / "site").iterdir()] == ["policy-toy.json"]


def test_the_command_follows_the_orchestrator_and_says_so(
    orchestrator: LocalOrchestrator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle_of().save(tmp_path / "edge.bt")
    np.save(tmp_path / "dim.npy", image())
    version = hand_down(orchestrator, "edge-only", 5.0)

    def infer(*flags: str) -> str:
        arguments = ["infer", str(tmp_path / "edge.bt"), str(tmp_path / "dim.npy"), *flags]
        with pytest.raises(SystemExit) as left:
            cli.main([*arguments, "--state-dir", str(tmp_path / "edge"), "--plaintext"])
        captured = capsys.readouterr()
        assert not left.value.code, captured.err
        return captured.out

    said = json.loads(infer("--orchestrator", orchestrator.address, "--json"))
    assert (said["policy"], said["orchestrator"]) == ("edge-only", "attached")
    assert said["extra"]["policy_version"] == version
    orchestrator.stop()
    text = infer("--orchestrator", orchestrator.address, "--wait", "0.1")
    assert f"policy edge-only, version {version}; orchestrator away" in text
    assert "policy" not in infer()  # without the flag nobody is followed


def test_over_mutual_tls_and_through_a_renewal(tmp_path: Path) -> None:
    ca = tmp_path / "ca"
    create_authority(ca)
    made = issue(ca, "control-1", Role.ORCHESTRATOR)
    config = OrchestratorConfig(report_interval_s=0.1, tls=TlsFiles(made.certificate, made.key, made.ca))

    def client(name: str, role: Role, renew: bool = False) -> ClientTlsFiles:
        files = issue(ca, name, role, renew=renew)
        return ClientTlsFiles(files.ca, files.certificate, files.key)

    camera, alice = client("camera-7", Role.EDGE), client("alice", Role.OPERATOR)
    with (
        LocalOrchestrator(state_dir=tmp_path / "control", config=config) as orchestrator,
        opened(orchestrator, tmp_path / "edge", camera) as edge,
    ):
        assert edge.wait_attached(10)
        assert hand_down(orchestrator, "threshold", credentials=alice) == 1
        until(lambda: edge.status().policy_version == 1, "not applied")

        def stream() -> tuple[str, float]:
            """Whose the one stream is, and its age."""
            with orchestrator.policies(alice) as operator:
                (peer,) = operator.fleet()
            return peer.identity, peer.attached_s

        identity, old_s = stream()
        assert identity == "edge:camera-7"
        time.sleep(2.0)
        assert stream()[1] > old_s + 1.9  # ages grow: a younger stream is another one
        client("camera-7", Role.EDGE, renew=True)
        issue(ca, "control-1", Role.ORCHESTRATOR, renew=True)

        def dialled_again() -> bool:
            with orchestrator.policies(alice) as operator:
                peers = operator.fleet()
            return len(peers) == 1 and peers[0].attached_s < old_s + 1.9

        until(dialled_again, "the renewed certificate was not used")
        hand_down(orchestrator, "edge-only", credentials=alice)
        until(lambda: edge.status().policy_version == 2, "not applied after the renewal")
        with opened(orchestrator, tmp_path / "fake", alice) as stranger:  # an operator is no edge
            assert not stranger.wait_attached(1)
