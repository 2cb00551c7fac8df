"""Metrics: bounded whatever comes in, made from the table, read when scraped."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Callable

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from blindtail.metrics import CloudMetrics, EdgeMetrics, EvaluatorCounters, OrchestratorMetrics
from blindtail.metrics.metric import MOST_COMBINATIONS, Label, Metric, Role
from blindtail.metrics.series import Family, RoleMetrics, bounded
from blindtail.metrics.table import TABLE, TAIL_STATES, of_role
from edge.tail import FALLBACK_REASONS, TailState

#: Names a peer or a file may bring: many, long, empty, and such as break a text format.
HOSTILE = [*(f"name-{i}" for i in range(1500)), "x" * 100_000, "", 'a"b\\c\n}', "\u202e\x00", "other"]


def flood_edge(registry: CollectorRegistry) -> None:
    metrics = EdgeMetrics(registry, HOSTILE[0])
    for name in HOSTILE:
        metrics.answered(name, 0.1, name, 10, 10)
    metrics.watch(lambda: dict.fromkeys(range(2000), "no such state"))
    metrics.watch_control(policy_version=lambda: 3, attached=lambda: True)
    metrics.policy_update(True)
    metrics.keys_uploaded(1.0)


def flood_cloud(registry: CollectorRegistry) -> None:
    metrics = CloudMetrics(registry)
    for i, name in enumerate(HOSTILE):
        metrics.evaluated(name, name, 0.1, HOSTILE[-i])
        metrics.evaluated(f"name-{i % 30}", "ok", 0.1, f"name-{i % 31}")
        metrics.uploaded(name)
        metrics.key_transfer(name, name)
        metrics.tickets(name, name)
    metrics.watch(
        queue_depth=lambda: 1,
        backlog_s=lambda: 1,
        sessions=lambda: 1,
        key_store_bytes=lambda: 1,
        evaluators=lambda: 1,
        restarts=lambda: 1,
        shares=lambda: {(name, other): 0.5 for name in HOSTILE[:60] for other in HOSTILE[:60]},
        counters=lambda: {place: EvaluatorCounters(place, 1, 1, 1) for place in range(5000)},
        ticket_bytes=lambda: dict.fromkeys(HOSTILE, 7),
    )
    metrics.watch_control(lambda: True)


def flood_orchestrator(registry: CollectorRegistry) -> None:
    metrics = OrchestratorMetrics(registry)
    for name in HOSTILE:
        metrics.policy_set(False)
        metrics.acked(name, True)
        metrics.rolled_back(name)
        metrics.reported(name, name, dict.fromkeys(HOSTILE[-6:], 1), dict.fromkeys(HOSTILE[-6:], 1))
        metrics.stream_error(name)
    metrics.watch(
        peers=lambda: {(name, name): 1 for name in HOSTILE},
        policy_versions=lambda: dict.fromkeys(HOSTILE, 4),
    )


FLOODS: dict[Role, Callable[[CollectorRegistry], None]] = {
    "edge": flood_edge,
    "cell": flood_cloud,
    "orchestrator": flood_orchestrator,
}


@pytest.mark.parametrize("role", FLOODS)
def test_no_peer_and_no_file_grows_the_series(role: Role) -> None:
    registry = CollectorRegistry()
    FLOODS[role](registry)
    metrics = of_role(role)
    found: Counter[str] = Counter()
    folded = set()
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        if family.name.endswith("_created"):
            continue
        metric = metrics[family.name]  # nothing is exported that the table does not name
        names = {label.name for label in metric.labels}
        labels = {
            tuple(sorted((k, v) for k, v in sample.labels.items() if k != "le")) for sample in family.samples
        }
        assert all({k for k, _ in row} == names for row in labels)
        assert all(len(v) <= 100 for row in labels for _, v in row)
        for label in metric.labels:
            if not label.cap:
                assert {v for row in labels for k, v in row if k == label.name} <= {*label.values, "other"}
        found[family.name] = len(labels)
        assert len(labels) <= metric.most_series, family.name
        folded |= {family.name for row in labels if "other" in dict(row).values()}
    assert set(found) == set(metrics)  # a metric that was not flooded would prove nothing
    floodable = {m.name for m in metrics.values() if m.labels and m.name != "blindtail_build_info"}
    own_model_only = {n for n in floodable if [x.name for x in metrics[n].labels] == ["model"]}
    if role == "edge":  # one model, the bundle's, in each of its metrics
        floodable -= own_model_only | {"blindtail_edge_policy_updates"}
    if role == "orchestrator":
        floodable -= {"blindtail_orchestrator_policies_set"}
    assert floodable <= folded


def test_memory_is_bounded_as_the_series_are() -> None:
    """Folded names are not remembered: 100,000 of them leave nothing behind."""
    metrics = CloudMetrics(CollectorRegistry())
    for i in range(2000):
        metrics.evaluated(f"m{i}", "ok", 0.1, f"v{i}")
    gc.collect()
    before = sys.getallocatedblocks()
    for i in range(100_000):
        metrics.evaluated(f"flood{i}", f"o{i}", 0.1, f"w{i}")
    gc.collect()
    assert sys.getallocatedblocks() - before < 1000


def test_combinations_end_before_the_product_of_the_caps() -> None:
    metric = Metric(
        ("cell",), "x", "counter", "", "1", (Label("a", cap=40), Label("b", cap=40), Label("c", ("y",)))
    )
    family = Family(metric, CollectorRegistry())
    for i in range(40):
        for j in range(40):
            family.at(str(i), str(j), "y").inc()
    assert MOST_COMBINATIONS < len(family._bound) <= metric.most_series < 41 * 41 * 2
    assert family.at("39", "39", "y") is family.at("other", "other", "y")
    assert family.at("0", "1", "y") is not family.at("other", "other", "y")
    rows = {(str(i), str(j), "y"): 1.0 for i in range(40) for j in range(40)}
    made = bounded(metric, rows)
    assert len(made) <= metric.most_series
    assert sum(made.values()) == 1600  # folding loses no count


def test_a_flood_of_names_does_not_hide_a_busy_model() -> None:
    metric = of_role("orchestrator")["blindtail_orchestrator_peers"]
    rows = {("edge", f"aaa{i}"): 1.0 for i in range(500)} | {("edge", "zebra"): 7.0}
    made = bounded(metric, rows)
    assert made["edge", "zebra"] == 7.0
    assert made["edge", "other"] == 500 - 31
    versions = of_role("orchestrator")["blindtail_orchestrator_policy_version"]
    assert max(bounded(versions, {(f"m{i}",): float(i) for i in range(99)}).values()) == 98.0


def test_a_series_is_bound_once() -> None:
    family = Family(of_role("edge")["blindtail_edge_requests"], CollectorRegistry())
    assert family.at("m", "tail") is family.at("m", "tail")


def test_counts_of_a_peer_cannot_break_a_counter() -> None:
    registry = CollectorRegistry()
    metrics = OrchestratorMetrics(registry)
    metrics.reported("edge", "m", {"tail": -5, "exit1": 10**30, "exit2": 3})

    def value(route: str) -> float | None:
        return registry.get_sample_value(
            "blindtail_orchestrator_answers_total", {"model": "m", "route": route}
        )

    assert value("tail") == 0
    assert value("exit1") == 1e9
    assert value("exit2") == 3


def test_a_value_that_changes_while_it_is_read() -> None:
    """Live values belong to a loop on another thread: one bad moment costs no scrape."""
    registry = CollectorRegistry()
    metrics = CloudMetrics(registry)
    failures = [RuntimeError("dictionary changed size during iteration")]

    def backlog_s() -> float:
        if failures:
            raise failures.pop()
        return 4.0

    watched = dict.fromkeys(
        ["queue_depth", "sessions", "key_store_bytes", "evaluators", "restarts"], lambda: 1
    )
    metrics.watch(backlog_s=backlog_s, **watched)
    assert registry.get_sample_value("blindtail_cloud_backlog_seconds") == 4.0
    failures.extend(RuntimeError() for _ in range(3))
    assert registry.get_sample_value("blindtail_cloud_backlog_seconds") is None
    assert registry.get_sample_value("blindtail_cloud_draining") is None  # nobody gave a function


def test_the_state_of_a_tail_is_one_hot() -> None:
    registry = CollectorRegistry()
    metrics = EdgeMetrics(registry, "m")
    state = ["keys"]
    metrics.watch(lambda: {2: state[0]})

    def hot() -> list[str]:
        families = text_string_to_metric_families(generate_latest(registry).decode())
        rows = [s for f in families if f.name == "blindtail_edge_tail_state" for s in f.samples]
        assert len(rows) == len(TAIL_STATES)
        return [s.labels["state"] for s in rows if s.value]

    assert hot() == ["keys"]
    state[0] = "ready"
    assert hot() == ["ready"]
    absent = registry.get_sample_value("blindtail_edge_orchestrator_attached", {"model": "m"})
    assert absent is None


def test_labels_follow_the_code_that_makes_them() -> None:
    assert {s.name.lower() for s in TailState} == set(TAIL_STATES)
    reasons = next(x for x in of_role("edge")["blindtail_edge_fallbacks"].labels if x.name == "reason")
    assert {word for _, word in FALLBACK_REASONS} == set(reasons.values)


def test_the_table_keeps_its_own_rules() -> None:
    names = [m.name for m in TABLE]
    assert len(set(names)) == len(names)
    for metric in TABLE:
        assert metric.name.startswith("blindtail_")
        assert metric.unit in {"1", "seconds", "bytes"}
        assert metric.unit == "1" or metric.name.endswith(f"_{metric.unit}")
        assert not metric.name.endswith("_total")
        assert bool(metric.buckets) == (metric.kind == "histogram")
        assert all(bool(label.values) != bool(label.cap) for label in metric.labels)
        assert metric.help.endswith(".")


@pytest.mark.parametrize("make", [CloudMetrics, OrchestratorMetrics, lambda r: EdgeMetrics(r, "m")])
def test_every_role_says_what_it_runs(make: Callable[[CollectorRegistry], RoleMetrics]) -> None:
    registry = CollectorRegistry()
    metrics = make(registry)
    text = generate_latest(registry).decode()
    assert text.count('blindtail_build_info{release="') == 1
    assert registry.get_sample_value("blindtail_certificate_expiry_timestamp_seconds") is None
    metrics.watch_certificate(lambda: 2e9)
    assert registry.get_sample_value("blindtail_certificate_expiry_timestamp_seconds") == 2e9
