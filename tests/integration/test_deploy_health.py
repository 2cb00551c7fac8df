"""`blindtail health` against a live cell, with and without TLS, and against what is not one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from blindtail import cli, wire
from blindtail.health_cli import check
from blindtail.rpc import INSECURE_LOOPBACK, ClientTls
from cloud.config import CloudConfig, TlsFiles
from cloud.local import LocalCell
from tests.certificates import certificates
from tests.cloud_cases import bundle

pytestmark = pytest.mark.timeout(60)


def run(*flags: str) -> int:
    with pytest.raises(SystemExit) as left:
        cli.main(["health", *flags])
    return int(left.value.code or 0)


def test_a_serving_cell_a_draining_one_and_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with LocalCell([bundle()], backend="clear", state_dir=tmp_path) as cell:
        assert run(cell.address, "--plaintext", "--json") == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["status"], found["serving"], found["error"]) == ("SERVING", True, None)
        assert 0 < found["seconds"] < 10
        assert run(cell.address, "--plaintext", "--service", wire.SERVICE) == 0
        assert "is serving" in capsys.readouterr().out
        assert run(cell.address, "--plaintext", "--service", "no.such.Service") == 1
        assert "UNKNOWN" in capsys.readouterr().out
        address = cell.address
    assert run(address, "--plaintext", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["status"], found["serving"]) == ("UNREACHABLE", False)


def test_not_serving_is_told_from_unreachable(tmp_path: Path) -> None:
    """A cell without evaluators answers, and says no."""
    with LocalCell([bundle()], backend="clear", state_dir=tmp_path) as cell:
        assert cell.gateway is not None
        members = type(cell.gateway.pool).members
        type(cell.gateway.pool).members = property(lambda pool: [])  # type: ignore[misc]
        try:
            end_s = time.monotonic() + 10.0  # the health service looks a few times a second
            while (found := check(cell.address, INSECURE_LOOPBACK))["serving"] and time.monotonic() < end_s:
                time.sleep(0.02)
        finally:
            type(cell.gateway.pool).members = members  # type: ignore[misc]
        assert (found["status"], found["error"]) == ("NOT_SERVING", None)


def test_over_mutual_tls_as_a_process(tmp_path: Path) -> None:
    made = certificates(tmp_path / "certs", "server", "probe")
    strange = certificates(tmp_path / "strange", "probe")
    config = CloudConfig(tls=TlsFiles(made["server.pem"], made["server.key"], made["ca.pem"]))
    with LocalCell([bundle()], backend="clear", state_dir=tmp_path / "cell", config=config) as cell:
        command = [sys.executable, "-m", "blindtail", "health", cell.address, "--ca", str(made["ca.pem"])]
        command += ["--certificate", str(made["probe.pem"]), "--key", str(made["probe.key"])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, env={**os.environ})
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(f"{cell.address} is serving")
        pem, key = strange["probe.pem"].read_bytes(), strange["probe.key"].read_bytes()
        stranger = check(cell.address, ClientTls(made["ca.pem"].read_bytes(), pem, key))
        assert (stranger["status"], stranger["serving"]) == ("UNREACHABLE", False)
        assert check(cell.address, INSECURE_LOOPBACK)["status"] == "UNREACHABLE"


def test_a_port_where_nobody_answers_costs_no_more_than_the_timeout() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        found = check(f"127.0.0.1:{silent.getsockname()[1]}", INSECURE_LOOPBACK, timeout_s=0.3)
    assert (found["status"], found["seconds"] < 2) == ("UNREACHABLE", True)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["127.0.0.1:1"], "say how to connect"),
        (["127.0.0.1:1", "--ca", "ca.pem"], "all three"),
        (["127.0.0.1:1", "--plaintext", "--ca", "ca.pem"], "exclude each other"),
        (["127.0.0.1:1", "--ca", "a", "--certificate", "b", "--key", "c"], "cannot read the TLS file"),
        (["cell.example:50051", "--plaintext"], "loopback only"),
        (["127.0.0.1", "--plaintext"], "host:port"),
        (["127.0.0.1:1", "--plaintext", "--timeout", "0"], "--timeout"),
    ],
)
def test_a_wrong_request_is_said(flags: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*flags) == 2
    assert text in capsys.readouterr().err
