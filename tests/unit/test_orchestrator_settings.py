"""Settings of the orchestrator, and how policies and peers are shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from blindtail.config import assignments, load_config
from blindtail.errors import ConfigError
from blindtail.policy_document import Objectives, PolicyDocument
from blindtail.serving import TlsFiles
from blindtail.wire.control import CellLoad, Hello, PeerKind, PolicyUpdate, Report
from blindtail.wire.policies import FleetPeer, PolicyEntry, PolicyState
from orchestrator.config import AttachLimits, OrchestratorConfig, default_state_dir
from orchestrator.texts import document_text, entry_json, entry_text, peer_json, peer_text

TOML = """
host = "0.0.0.0"
port = 50061
state_dir = "state"
metrics_port = 9100
rollback_share = 0.5
roles = { "cn:alice" = "operator" }
attach = { total = 10, messages_per_s = 5 }

[tls]
certificate = "orchestrator.pem"
key = "orchestrator.key"
client_ca = "ca.pem"
"""


def test_settings_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "o.toml").write_text(TOML)
    found = load_config(OrchestratorConfig, tmp_path / "o.toml", {"port": 7})
    assert found == OrchestratorConfig(
        host="0.0.0.0",
        port=7,
        state_dir=tmp_path / "state",
        metrics_port=9100,
        rollback_share=0.5,
        roles={"cn:alice": "operator"},
        attach=AttachLimits(total=10, messages_per_s=5.0),
        tls=TlsFiles(tmp_path / "orchestrator.pem", tmp_path / "orchestrator.key", tmp_path / "ca.pem"),
    )


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"port": 70000}, "port must be"),
        ({"metrics_port": -1}, "metrics_port must be"),
        ({"host": "0.0.0.0"}, "without TLS"),
        ({"rollback_share": 0.0}, "rollback_share"),
        ({"rollback_share": 1.1}, "rollback_share"),
        ({"report_interval_s": 0.0}, "report_interval_s"),
        ({"shutdown_grace_s": -1.0}, "shutdown_grace_s"),
        ({"retention_s": 0.0}, "retention_s"),
        ({"settle_s": -1.0}, "settle_s"),
        ({"attach.total": 0}, "attach.total"),
        ({"attach.per_identity": 0}, "attach.per_identity"),
        ({"roles": {"cn:alice": "queen"}}, "unknown role|known roles"),
        ({"rolback_share": 0.1}, "did you mean 'rollback_share'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_settings(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_config(OrchestratorConfig, None, wrong)


def test_where_state_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert default_state_dir() == tmp_path / "blindtail" / "orchestrator"
    monkeypatch.delenv("XDG_STATE_HOME")
    assert default_state_dir() == Path.home() / ".local/state/blindtail/orchestrator"


def test_pairs_of_a_flag() -> None:
    assert assignments(["safety=1.2", "thresholds=[0.5, 0.6]", " name = deadline", "x="]) == {
        "safety": 1.2,
        "thresholds": [0.5, 0.6],
        "name": " deadline",
        "x": "",
    }
    for wrong in ("safety", "=1"):
        with pytest.raises(ConfigError, match="NAME=VALUE"):
            assignments([wrong])


ENTRY = PolicyEntry(
    PolicyUpdate(7, "toy", PolicyDocument("deadline", {"safety": 1.2}, Objectives(0.5)).encode()),
    PolicyState.ROLLED_BACK,
    1e9,
    "operator:ada",
    "rush\x1b[2J hour",
    2,
    1,
)


def test_a_policy_in_words() -> None:
    text = entry_text(ENTRY)
    assert "version 7  for toy  rolled back" in text
    assert "deadline, safety = 1.2, deadline of 0.5 s" in text
    assert "operator:ada; applied by 2 attached, refused by 1" in text
    assert "\x1b" not in text
    unreadable = PolicyEntry(PolicyUpdate(1, "", b"\xff"), PolicyState.ACTIVE, 0.0, "a")
    assert "cannot read" in document_text(unreadable.update.document)
    assert entry_json(unreadable)["document"] is None
    assert "all models without" in entry_text(unreadable)
    assert entry_json(ENTRY)["document"]["parameters"] == {"safety": 1.2}


@pytest.mark.parametrize(
    ("kind", "report", "reported_s", "shown"),
    [
        (PeerKind.EDGE, Report(0.0), -1.0, "no report yet"),
        (
            PeerKind.EDGE,
            Report(2.0, {"tail": 3, "exit1": 9}, {"deadline": 1}, uplink_bytes=1500, tail="ready"),
            1.0,
            "tail ready; exit1 9, tail 3 in 2.0 s; fallbacks: deadline 1; 1.5 KB up, 0.0 KB back (1 s ago)",
        ),
        (PeerKind.EDGE, Report(2.0), 300.0, "no answers in 2.0 s (5 min ago)"),
        (PeerKind.CELL, Report(2.0), 1.0, "no load reported (1 s ago)"),
        (
            PeerKind.CELL,
            Report(2.0, load=CellLoad(2, 3, 0.25, 4, 1, 5_000_000, True)),
            1.0,
            "2 evaluators (1 restarts), 3 waiting (0.25 s), 4 sessions, 5.0 MB of keys, DRAINING (1 s ago)",
        ),
    ],
    ids=["new", "edge", "idle edge", "new cell", "cell"],
)
def test_a_peer_in_words(kind: PeerKind, report: Report, reported_s: float, shown: str) -> None:
    hello = Hello(kind, bytes(16), "1", (("toy\x07", "1"),), 3, "cell:50051" * (kind is PeerKind.CELL))
    peer = FleetPeer(hello, "edge:camera", 90_000.0 * 2, reported_s, report)
    first, second = peer_text(peer).splitlines()
    assert second.strip() == shown
    assert first.startswith(f"{kind.value}  edge:camera  toy  1  ")
    assert first.endswith("attached for 2 d")
    assert ("policy 3" in first) is (kind is PeerKind.EDGE)
    found = peer_json(peer)
    assert found["reported_s"] == (None if reported_s < 0 else reported_s)
    assert (found["load"] is None) is (report.load is None)
