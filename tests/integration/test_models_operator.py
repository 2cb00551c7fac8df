"""Who may change the models of a cell, who may use them, and the operator's command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import cloud.operator_cli
from blindtail.errors import AccessDenied, BlindtailError
from blindtail.rpc import ClientTlsFiles, TailStub, secure_channel
from blindtail.wire import KeyState
from cloud.config import CloudConfig, TlsFiles
from cloud.local import LocalCell
from cloud.operator_cli import register
from cloud.operator_client import OperatorClient
from tests.certificates import certificates
from tests.cloud_cases import Client, bundle
from tests.model_cases import file_of

pytestmark = pytest.mark.timeout(60)


# --- identities ---------------------------------------------------------------------


def test_only_operators_change_models_and_only_allowed_edges_use_them(tmp_path: Path) -> None:
    tls = certificates(tmp_path / "tls", "localhost", "alice", "camera-1", "stranger")
    config = CloudConfig(
        tls=TlsFiles(tls["localhost.pem"], tls["localhost.key"], tls["ca.pem"]),
        roles={"cn:alice": "operator"},
    )

    def credentials(name: str) -> ClientTlsFiles:
        return ClientTlsFiles(tls["ca.pem"], tls[f"{name}.pem"], tls[f"{name}.key"])

    def edge_of(name: str) -> Client:
        return Client(TailStub(secure_channel(cell.address, credentials(name))))

    model = file_of(tmp_path, "1")
    with LocalCell([], backend="clear", state_dir=tmp_path / "state", config=config) as cell:
        with OperatorClient(cell.address, credentials("camera-1")) as impostor:
            calls: list[Callable[[], object]] = [
                lambda: impostor.push(model),
                impostor.models,
                lambda: impostor.canary("toy", "1", 0.5),
                lambda: impostor.rollback("toy"),
                lambda: impostor.drop("toy", "1"),
            ]
            for call in calls:
                with pytest.raises(AccessDenied, match="role operator; the certificate shown is cn:camera-1"):
                    call()
        with OperatorClient(cell.address, credentials("alice")) as operator:
            operator.push(model, ["cn:camera-*"])
            edge, stranger = edge_of("camera-1"), edge_of("stranger")
            assert edge.upload_and_wait() is KeyState.READY
            session = edge.register().session
            assert edge.evaluate(session).version == "1"
            for call in (stranger.register, stranger.status, stranger.upload):
                with pytest.raises(AccessDenied, match=r"'toy' version 1 is not for cn:stranger"):
                    call()
            operator.push(model, ["cn:stranger"])  # the same file: who may use it changes
            with pytest.raises(AccessDenied, match="not for cn:camera-1"):
                edge.evaluate(session)
            assert stranger.register().keys is KeyState.MISSING
            operator.push(model)
            assert edge.evaluate(session).version == "1"  # allowed again, with its keys and session


# --- the command ------------------------------------------------------------------------


def run(*arguments: str) -> tuple[int, str]:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.callback()(lambda: None)
    register(app)
    done = CliRunner().invoke(app, ["model", *arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output


def test_the_command_serves_several_cells_and_says_which_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cloud.operator_cli, "_QUIET_S", 0.0)  # the progress bar is shown at once
    with (
        LocalCell([], backend="clear", state_dir=tmp_path / "a") as cell,
        LocalCell([bundle()], backend="clear", state_dir=tmp_path / "b") as second,
    ):
        both = ("--cell", cell.address, "--cell", second.address, "--plaintext")
        one, two = str(file_of(tmp_path, "1")), str(file_of(tmp_path, "2"))
        code, text = run("push", one, two, *both, "--allow", "loopback")
        assert code == 0
        assert text.count("toy    2") == 2
        code, text = run("canary", "toy", "2", "--share", "0.25", *both)
        assert (code, text.count("0.25")) == (0, 2)
        second.stop()
        code, text = run("rollback", "toy", *both)
        assert code == 1
        assert f"blindtail: {second.address}: " in text
        assert f"{cell.address}:\n" in text  # and the one that runs did it
        code, text = run("drop", "toy", "2", *both, "--json")
        assert code == 1
        answers = json.loads(text[text.index("[{") :])
        assert [("models" in a, a.get("error")) for a in answers] == [
            (True, None),
            (False, "TailUnavailable"),
        ]
        code, text = run("list", "--cell", cell.address, "--plaintext")
        assert code == 0
        assert "loopback" in text
        assert "a push brings it back" in text
        assert run("list", "dog", "--cell", cell.address, "--plaintext")[1].count("no model") == 1


def test_wrong_requests_to_the_command(tmp_path: Path) -> None:
    for arguments, text in (
        (("push", str(tmp_path / "no.bt"), "--cell", "127.0.0.1:9", "--plaintext"), "there is no file"),
        (("list", "--cell", "127.0.0.1:9"), "--ca, --certificate and --key, or --plaintext"),
        (("list", "--cell", "127.0.0.1:9", "--plaintext", "--ca", "x"), "exclude each other"),
    ):
        with pytest.raises(BlindtailError, match=text):
            run(*arguments)
    code, text = run("list", "--cell", "cell.example:1", "--plaintext")
    assert code == 1
    assert "plaintext is for loopback only" in text
