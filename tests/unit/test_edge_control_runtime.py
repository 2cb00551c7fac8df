"""Policies from an orchestrator in a runtime: each request is answered under one of them, whole."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
from prometheus_client import CollectorRegistry

from blindtail.errors import ConfigError, StateError
from blindtail.metrics import EdgeMetrics
from blindtail.records import Action, Decision, DecisionContext
from blindtail.wire.control import encode_up
from edge.control import PolicyControl, Rules
from edge.runtime import EdgeRuntime
from orchestrator.policy import EdgeOnly, ExitThreshold, Policy
from tests.edge_fakes import FakeTail, bundle_of, image
from tests.policy_cases import Strange, update

UNSURE = 60


def runtime(tail: FakeTail | None = None, **settings: Any) -> EdgeRuntime:
    return EdgeRuntime(bundle_of(), {2: tail or FakeTail()}, EdgeOnly((0.9, 0.9)), **settings)


def control_of(edge: EdgeRuntime, state_dir: Path) -> PolicyControl:
    return PolicyControl(edge.bundle, edge._rules, edge._use, edge._report, state_dir)


def test_deadlines_request_before_objective_before_default(tmp_path: Path) -> None:
    tail = FakeTail()
    with runtime(tail, deadline_s=30.0) as edge:
        control = control_of(edge, tmp_path)

        def remaining(deadline_s: float | None = None) -> float:
            assert edge.infer(image(1, UNSURE), deadline_s).route == "tail"
            found = tail.calls.pop()
            assert found is not None
            return found

        assert control.receive(update(1, "threshold")).applied
        assert 20 < remaining() <= 30
        assert control.receive(update(2, "threshold", deadline_s=10.0)).applied
        assert 5 < remaining() <= 10
        assert 55 < remaining(60.0) <= 60
        assert 1 < remaining(2.0) <= 2
        assert edge.deadline_s == 10.0


def test_answers_and_status_say_which_policy_decided(tmp_path: Path) -> None:
    with runtime() as edge:
        assert "policy_version" not in edge.infer(image(1, UNSURE)).extra
        assert (edge.status().policy_version, edge.status().orchestrator) == (0, "")
        control_of(edge, tmp_path).receive(update(6, "threshold", deadline_s=5.0))
        answer, status = edge.infer(image(1, UNSURE)), edge.status()
    assert (answer.route, answer.extra["policy_version"]) == ("tail", 6.0)
    assert (status.policy, status.policy_version, status.deadline_s) == ("threshold", 6, 5.0)


def test_a_swap_in_the_middle_of_requests_gives_each_one_consistent_pair() -> None:
    """A thousand swaps under eight threads: every request sees the policy that goes with its deadline."""
    mixed: list[tuple[float | None, float]] = []

    class Paired(Policy):
        """Expects the deadline that it was handed down with."""

        name: ClassVar[str] = "paired"

        def __init__(self, deadline_s: float) -> None:
            self.deadline_s = deadline_s

        def decide(self, context: DecisionContext) -> Decision:
            if context.deadline_s != self.deadline_s:
                mixed.append((context.deadline_s, self.deadline_s))
            time.sleep(0)
            return Decision(Action.EXIT, 1) if context.last_stage else Decision(Action.CONTINUE)

    rules = [Rules(Paired(float(100 + i)), float(100 + i), i + 1) for i in range(2)]
    versions: list[float] = []
    stop = threading.Event()
    with runtime() as edge:
        edge._use(rules[0])

        def ask() -> None:
            while not stop.is_set():
                versions.append(edge.infer(image(1, UNSURE)).extra["policy_version"])

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for i in range(1000):
            edge._use(rules[i % 2])
            time.sleep(0.0005)
        stop.set()
        for thread in threads:
            thread.join()
    assert mixed == []
    assert set(versions) == {1.0, 2.0}


def test_a_policy_that_fails_later_costs_no_answer(caplog: pytest.LogCaptureFixture) -> None:
    def fails(context: DecisionContext) -> Decision:
        raise RuntimeError("only with real images")

    with EdgeRuntime(bundle_of(), {2: FakeTail()}, Strange(fails)) as edge:
        assert edge.infer(image(1, UNSURE)).route == "exit2"
    assert "policy strange failed" in caplog.text


def test_reports_hold_sums_since_the_last_one_and_nothing_of_an_image() -> None:
    with runtime() as edge:
        edge._use(Rules(ExitThreshold((0.9, 0.9)), None, 1))
        for _ in range(3):
            edge.infer(image(1, UNSURE))
        edge.infer(image(1, 250))
        first = edge._report(2.0)
        assert first.routes == {"tail": 3, "exit1": 1}
        assert (first.fallbacks, first.interval_s, first.tail) == ({}, 2.0, "ready")
        assert first.uplink_bytes == 3 * 64
        assert {"offload2", "stage0", "exit0"} <= {s.step for s in first.steps}
        assert all(s.samples > 0 for s in first.steps)
        again = edge._report(2.0)
        assert (again.routes, again.uplink_bytes) == ({}, 0)
        edge.infer(image(1, UNSURE))
        assert edge._report(2.0).routes == {"tail": 1}
        assert edge.status().routes == {"tail": 4, "exit1": 1}  # the status counts from the start
        assert encode_up(first).count(b"confidence") == 0


def test_a_runtime_is_attached_once(tmp_path: Path) -> None:
    edge = runtime()
    with pytest.raises(ConfigError, match="host:port"):
        edge.attach("nowhere", "insecure-loopback", tmp_path)
    with pytest.raises(ConfigError, match="loopback"):
        edge.attach("control.example:50061", "insecure-loopback", tmp_path)
    edge.attach("127.0.0.1:1", "insecure-loopback", tmp_path)
    assert edge.status().orchestrator == "away"
    assert not edge.wait_attached(0.05)
    with pytest.raises(StateError):
        edge.attach("127.0.0.1:1", "insecure-loopback", tmp_path)
    edge.close()
    with pytest.raises(StateError):
        edge.attach("127.0.0.1:1", "insecure-loopback", tmp_path)


def test_metrics_tell_the_version_in_force_and_the_verdicts(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    with runtime(metrics=EdgeMetrics(registry, "toy")) as edge:
        edge.attach("127.0.0.1:1", "insecure-loopback", tmp_path)
        assert edge._control is not None
        edge._control.receive(update(3, "threshold"))
        edge._control.receive(update(4, "quantum"))

        def value(name: str, **labels: str) -> float | None:
            return registry.get_sample_value(f"blindtail_edge_{name}", {"model": "toy", **labels})

        assert value("policy_version") == 3
        assert value("orchestrator_attached") == 0
        assert value("policy_updates_total", outcome="applied") == 1
        assert value("policy_updates_total", outcome="refused") == 1
