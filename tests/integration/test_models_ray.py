"""Models pushed into a running `blindtail cloud`: its evaluator and gateway processes die and come back."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import cloud.evaluator
from blindtail.bundle import save_program
from blindtail.errors import ModelWithdrawn, TailError
from blindtail.he.clear import ClearDecryptor, ClearEncryptor
from blindtail.rpc import INSECURE_LOOPBACK
from blindtail.wire import KeyState
from cloud.evaluator import EvaluatorActor
from cloud.keyfolder import program_path
from cloud.operator_client import OperatorClient
from tests.cell_process import launch, until_ready, wait_for
from tests.cloud_cases import Client, activation, clear_keys
from tests.model_cases import file_of, logits_of, retrained

pytest.importorskip("ray")
pytestmark = pytest.mark.timeout(180)


def ask(edge: Client, session: bytes, count: int) -> tuple[Counter[str], set[str]]:
    """Versions that answered, and evaluators; every reply is checked to be that version's."""
    versions: Counter[str] = Counter()
    evaluators = set()
    for seed in range(count):
        reply = edge.evaluate(session, seed)
        assert np.allclose(edge.logits(reply), logits_of(reply.version, seed), atol=1e-9)
        versions[reply.version] += 1
        evaluators.add(reply.evaluator)
    return versions, evaluators


def test_an_evaluator_reads_what_it_does_not_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The actor's class, in this process: a program that it was never told of is read from disk."""
    monkeypatch.setattr(cloud.evaluator, "end_without_raylet", lambda: None)
    monkeypatch.setattr(cloud.evaluator, "limit_threads", lambda threads: None)
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    one, two = (retrained(version).spec.program_id for version in "12")
    for version, program_id in (("1", one), ("2", two)):
        save_program(program_path(tmp_path, program_id), retrained(version))
    evaluator = EvaluatorActor(tmp_path, [one], "clear", 1 << 20, 1)
    (tmp_path / "source").write_bytes(clear_keys())
    evaluator._engine._evaluators[one].prepare_keys(tmp_path / "source", tmp_path / "keys")
    container = ClearEncryptor(retrained("1").spec).encrypt(activation())
    outcome = evaluator.evaluate(f"{one}:{two}", str(tmp_path / "keys"), b"", container)
    assert outcome[0] == "ok"
    got = ClearDecryptor(retrained("1").spec).decrypt(outcome[1][0])
    assert np.allclose(got, logits_of("2"), atol=1e-9)
    assert evaluator.load([two, "0" * 64])[:2] == ("error", "BundleError")
    assert set(evaluator._engine.names) == {one, f"{one}:{two}"}  # all or none
    evaluator.unload([f"{one}:{two}"])
    assert list(evaluator._opened) == [one]


def test_push_share_die_and_drop_without_a_restart(tmp_path: Path) -> None:
    running = launch(tmp_path, "--evaluators", "2", empty=True)
    try:
        announced = until_ready(running)
        assert announced["models"] == []
        with OperatorClient(announced["address"], INSECURE_LOOPBACK) as operator:
            operator.push(file_of(tmp_path, "1"))
            operator.push(file_of(tmp_path, "2"))
            edge = running.client()
            assert edge.upload_and_wait() is KeyState.READY
            session = edge.register().session
            assert ask(edge, session, 4)[0] == {"1": 4}
            operator.canary("toy", "2", 0.5)
            counts, _ = ask(edge, session, 60)
            assert 7 <= counts["2"] <= 53  # 6 standard deviations

            # Every evaluator dies: those that take their places hold what was pushed since the start.
            for evaluator in announced["evaluators"]:
                os.kill(evaluator["pid"], signal.SIGKILL)
            old = {e["name"] for e in announced["evaluators"]}
            wait_for(
                lambda: len(new := {e["name"] for e in running.read()["evaluators"]}) == 2 and not new & old,
                "the evaluators did not come back",
            )
            counts, evaluators = ask(edge, session, 60)
            assert 7 <= counts["2"] <= 53
            assert not evaluators & old

            # The gateway dies: its successor serves what was pushed, with the same shares.
            os.kill(running.read()["gateway_pid"], signal.SIGKILL)
            end_s = time.monotonic() + 60
            while True:
                try:
                    session = edge.register().session
                    edge.evaluate(session)
                    break
                except TailError:
                    assert time.monotonic() < end_s, "the gateway did not come back"
                    time.sleep(0.1)
            assert {e.version: e.share for e in operator.models()} == {"1": 0, "2": 0.5}
            operator.rollback("toy")
            assert ask(edge, session, 4)[0] == {"1": 4}
            operator.drop("toy", "1")
            with pytest.raises(ModelWithdrawn, match="version 2 is served instead"):
                edge.evaluate(session)
            wait_for(
                lambda: running.read()["models"] == [{"model": "toy", "version": "2"}],
                "the announcement did not follow",
            )
            log = (tmp_path / "state" / "cell.log").read_text()
            for event in ("toy 2: pushed", "toy 2: share 0.5", "shares rolled back", "toy 1: withdrawn"):
                assert event in log
    finally:
        running.stop()
