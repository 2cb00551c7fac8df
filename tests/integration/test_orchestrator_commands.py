"""Operators' commands, and an orchestrator's process that is killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blindtail import cli
from blindtail.ports import free_port
from blindtail.wire.policies import PolicyChange
from orchestrator.local import LocalOrchestrator
from orchestrator.policies_client import PoliciesClient
from tests.attach_cases import Host
from tests.clock import until
from tests.orchestrator_service_cases import (
    FAST,
    OTHER,
    orchestrator_of_one_test,  # noqa: F401
    two_edges,
)

pytestmark = pytest.mark.timeout(60)

ROOT = Path(__file__).resolve().parents[2]


def blindtail(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    out, err = capsys.readouterr()
    return int(left.value.code or 0), out, err


def test_commands(
    orchestrator: LocalOrchestrator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("--orchestrator", orchestrator.address, "--plaintext")
    run: Callable[..., tuple[int, str, str]] = lambda *a: blindtail(capsys, "policy", *a, *where)  # noqa: E731
    assert run("get") == (0, "no policy is set: edges go by their own\n", "")
    code, out, _ = run("set", "--policy", "deadline", "--set", "safety=1.2", "--deadline", "0.5")
    assert (code, out.splitlines()) == (
        0,
        [
            "version 1: deadline, safety = 1.2, deadline of 0.5 s",
            "applied by 0 of 0 attached edges, refused by 0",
            "no attached edge serves it now",
        ],
    )
    file = tmp_path / "fast.toml"
    file.write_text('policy = "edge-only"\nobjectives = { deadline_s = 0.1 }\n')
    with two_edges(orchestrator.address) as (one, _):
        code, out, _ = run("set", str(file), "--note", "rush hour", "--json")
        found = json.loads(out)
        assert (code, found["version"], found["applied"], found["following"]) == (0, 2, 2, 2)
        assert found["document"]["objectives"] == {"deadline_s": 0.1}
        one.refuse = "no\x1b[31m thanks"
        code, out, _ = run("set", "--policy", "cloud-only", "--model", "toy")
        assert code == 1
        assert out.splitlines()[-1] == (
            "rolled back from 3: refused by 1 of 2 edges: no [31m thanks; as in version 2: "
            "version 4 is in force"
        )
        code, out, _ = run("fleet")
        assert out.splitlines()[-1] == "2 edges and 0 cells attached"
        assert "edge  loopback  toy 1  policy" in out
        assert [p["kind"] for p in json.loads(run("fleet", "--json")[1])] == ["edge", "edge"]
        assert run("usage")[1].startswith("no edge has reported an answer in the last 24 hours")
        one.answers = 4
        until(lambda: run("usage")[1].startswith("toy  4 answers: tail 4 (100.0%)"))
        assert json.loads(run("usage", "--hours", "1", "--json")[1])["toy"]["route"] == {"tail": 4}
    code, out, _ = run("history")
    assert [line for line in out.splitlines() if line.startswith("version")] == [
        "version 4  for toy  active",
        "version 3  for toy  rolled back",
        "version 2  for all models without one of their own  active",
        "version 1  for all models without one of their own  replaced",
    ]
    assert [e["version"] for e in json.loads(run("get", "--model", "toy", "--json")[1])] == [4]
    assert [e["version"] for e in json.loads(run("history", "--limit", "1", "--json")[1])] == [4]


WRONG = {
    "closest name": (("set", "--policy", "deadlin"), 2, "did you mean 'deadline'"),
    "closest parameter": (("set", "--policy", "deadline", "--set", "safty=1"), 2, "did you mean 'safety'"),
    "no pair": (("set", "--policy", "deadline", "--set", "safety"), 2, "NAME=VALUE"),
    "nothing": (("set",), 2, "say which policy"),
    "file and flags": (("set", "x.toml", "--policy", "deadline"), 2, "not both"),
    "no file": (("set", "not-there.toml"), 2, "there is no settings file"),
    "deadline": (("set", "--policy", "deadline", "--deadline", "-1"), 2, "above 0"),
}


@pytest.mark.parametrize(("arguments", "code", "says"), WRONG.values(), ids=WRONG.keys())
def test_wrong_requests(
    orchestrator: LocalOrchestrator,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    code: int,
    says: str,
) -> None:
    where = ("--orchestrator", orchestrator.address, "--plaintext")
    left, out, err = blindtail(capsys, "policy", *arguments, *where)
    assert (left, out) == (code, "")
    assert says in err
    assert len(err.splitlines()) == 1


def test_nobody_there(capsys: pytest.CaptureFixture[str]) -> None:
    address = f"127.0.0.1:{free_port()}"
    code, _, err = blindtail(capsys, "policy", "get", "--orchestrator", address, "--plaintext")
    assert code == 1
    assert f"no orchestrator answers at {address}" in err


class Process:
    """`blindtail orchestrator`, started; ended with the block."""

    def __init__(self, folder: Path, *more: str) -> None:
        self.announce = folder / "orchestrator.json"
        command = [sys.executable, "-m", "blindtail", "orchestrator", "--json"]
        command += ["--state-dir", str(folder / "state"), "--announce", str(self.announce), *more]
        self.child = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def ready(self) -> dict[str, Any]:
        assert self.child.stdout is not None
        announced: dict[str, Any] = json.loads(self.child.stdout.readline())
        assert json.loads(self.announce.read_text()) == announced
        return announced

    def end(self, number: int) -> tuple[int, str]:
        """(exit code, what it wrote to standard error)."""
        self.child.send_signal(number)
        _, err = self.child.communicate(timeout=20)
        return self.child.returncode, err

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        if self.child.poll() is None:
            self.end(signal.SIGKILL)


def test_killed_and_started_again(tmp_path: Path) -> None:
    """Edges go on, come back, and find the policy as it was."""
    port, metrics_port = free_port(), free_port()
    flags = ("--port", str(port), "--metrics-port", str(metrics_port))
    address = f"127.0.0.1:{port}"
    host = Host()
    with (
        Process(tmp_path, *flags) as first,
        host.attached(address) as attachment,
    ):
        assert first.ready()["address"] == address
        assert attachment.wait_connected(5)
        with PoliciesClient(address, "insecure-loopback") as client:
            client.set(PolicyChange("", FAST))
            client.set(PolicyChange("toy", OTHER))
            until(lambda: host.version == 2)
            before = client.history()
        first.end(signal.SIGKILL)
        until(lambda: not attachment.connected)
        assert host.version == 2
        host.answers += 4
        with Process(tmp_path, *flags) as second, PoliciesClient(address, "insecure-loopback") as client:
            second.ready()
            assert attachment.wait_connected(5)
            after = client.history()
            assert [(e.update, e.state, e.note) for e in after] == [
                (e.update, e.state, e.note) for e in before
            ]
            newcomer = Host("other")
            with newcomer.attached(address):
                until(lambda: newcomer.version == 1)
            assert client.set(PolicyChange("toy", FAST)).update.version == 3
            until(lambda: host.version == 3)
            page = (
                urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=5).read().decode()
            )
            assert 'blindtail_orchestrator_peers{kind="edge",model="toy"} 1.0' in page
            assert 'blindtail_orchestrator_policy_version{model="toy"} 3.0' in page
            # Two of them cannot share what they remember.
            with Process(tmp_path, "--port", "0") as third:
                assert third.child.wait(20) == 2
                assert "another orchestrator uses the state directory" in third.end(0)[1]
            code, err = second.end(signal.SIGTERM)
            assert code == 0
            assert "Traceback" not in err
            assert not second.announce.exists()
