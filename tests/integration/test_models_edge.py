"""What an edge notices of its cell's models: nothing of a canary, a clear word when it is withdrawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import edge.backoff
from blindtail.bundle import CloudBundle
from blindtail.he.dataflow import finish
from blindtail.he.operations import MapOp
from blindtail.he.program import Program
from blindtail.rpc import INSECURE_LOOPBACK
from cloud.local import LocalCell
from cloud.operator_client import OperatorClient
from edge.runtime import EdgeRuntime
from edge.tail import TailState
from orchestrator.policy import ExitThreshold
from tests.clock import until
from tests.edge_fakes import bundle_of, image, program

pytestmark = pytest.mark.timeout(120)
UNSURE = image(1, 60)


def sharper() -> Program:
    """The same answers with more contrast, for the same edges."""
    base = program()
    *others, last = base.ops
    assert isinstance(last, MapOp)
    ops = (*others, replace(last, bias=last.bias + 0.5))
    return Program(finish(ops, base.spec), ops)


def test_an_edge_through_canary_withdrawal_and_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edge.backoff, "HOPELESS_S", 0.3)  # asks again after this long
    bundle = bundle_of(spec=program().spec)
    CloudBundle(bundle.model, bundle.version, {2: program()}).save(tmp_path / "old.bt")
    CloudBundle(bundle.model, "new", {2: sharper()}).save(tmp_path / "new.bt")
    with (
        LocalCell([], backend="clear", state_dir=tmp_path / "cell") as cell,
        OperatorClient(cell.address, INSECURE_LOOPBACK) as operator,
        EdgeRuntime.open(
            bundle,
            cell.address,
            credentials=INSECURE_LOOPBACK,
            policy=ExitThreshold((0.9, 0.9)),
            state_dir=tmp_path / "edge",
            backend="clear",
        ) as device,
    ):
        # A cell without the model: the edge says so, and finds it by itself once it is pushed.
        until(lambda: device.status().tails[2].state is TailState.MISMATCH)
        assert "nor any other yet" in device.status().tails[2].problem
        operator.push(tmp_path / "old.bt")
        until(lambda: device.status().tails[2].state is TailState.READY, limit_s=60.0)
        own = device.infer(UNSURE, deadline_s=20.0)
        assert (own.route, own.fallback) == ("tail", None)
        uploads = device.status().tails[2].registrations

        # Another version answers: the same label, no new session, no new keys.
        operator.push(tmp_path / "new.bt")
        operator.canary(bundle.model, "new", 1)
        answer = device.infer(UNSURE, deadline_s=20.0)
        assert (answer.route, answer.label) == ("tail", own.label)
        assert {e.version: e.requests for e in operator.models()}["new"] == 1
        assert device.status().tails[2].registrations == uploads

        # Withdrawn: the first request that meets it, and those after it, are answered by exits.
        operator.rollback(bundle.model)
        operator.drop(bundle.model, bundle.version)
        answer = device.infer(UNSURE, deadline_s=20.0)
        assert (answer.route, answer.fallback) == ("exit2", "refused")
        answer = device.infer(UNSURE, deadline_s=20.0)
        assert (answer.route, answer.fallback) == ("exit2", "unavailable")
        status = device.status().tails[2]
        assert status.state is TailState.MISMATCH
        assert "has withdrawn" in status.problem
        assert "version new is served instead" in status.problem

        # Pushed again: the edge comes back by itself, with its keys.
        operator.push(tmp_path / "old.bt")
        until(lambda: device.status().tails[2].state is TailState.READY, limit_s=60.0)
        assert device.infer(UNSURE, deadline_s=20.0).route == "tail"
