"""What an evaluator's process says of itself with each reply, and how it is exported."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from blindtail.errors import KeysMissing
from blindtail.he.backends import Keys
from blindtail.he.clear import ClearEncryptor
from blindtail.metrics import CloudMetrics, EvaluatorCounters
from cloud.engine import Engine
from tests.cloud_cases import activation, clear_keys, program


def test_an_engine_counts_evaluations_loads_and_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tail = program()
    name = tail.spec.program_id
    engine = Engine({name: tail}, "clear", 1)  # room for one key set
    assert engine.counters[:3] == (0, 0, 0)
    (tmp_path / "source").write_bytes(clear_keys())
    paths = [tmp_path / "one", tmp_path / "two"]
    container = ClearEncryptor(tail.spec).encrypt(activation())
    evaluator = engine._evaluators[name]
    load_keys = evaluator.load_keys

    def weighed(path: Path) -> Keys:
        keys = load_keys(path)
        keys.memory_bytes = 700  # clear keys weigh nothing
        return keys

    monkeypatch.setattr(evaluator, "load_keys", weighed)
    for path in paths:
        evaluator.prepare_keys(tmp_path / "source", path)
        for _ in range(3):
            engine.evaluate(name, str(path), container)
    first = engine.counters
    assert (first.evaluations, first.key_loads) == (6, 2)
    assert first.loaded_key_bytes == 700
    assert first.resident_bytes > 1e7
    with pytest.raises(KeysMissing):
        engine.evaluate(name, str(tmp_path / "three"), container)
    assert engine.counters.evaluations == 6


def test_evaluators_are_exported_by_their_place() -> None:
    registry = CollectorRegistry()
    metrics = CloudMetrics(registry)
    up = {0: EvaluatorCounters(5, 1, 300, 9_000), 2: EvaluatorCounters()}
    metrics.watch(
        queue_depth=lambda: 0,
        backlog_s=lambda: 0,
        sessions=lambda: 0,
        key_store_bytes=lambda: 0,
        evaluators=lambda: len(up),
        restarts=lambda: 0,
        counters=lambda: up,
    )

    def value(name: str, place: int) -> float | None:
        return registry.get_sample_value(f"blindtail_cloud_evaluator_{name}", {"evaluator": str(place)})

    assert value("evaluations_total", 0) == 5
    assert value("key_loads_total", 0) == 1
    assert value("loaded_key_bytes", 0) == 300
    assert value("resident_bytes", 0) == 9_000
    assert value("evaluations_total", 2) == 0
    assert value("resident_bytes", 2) is None  # it has not replied yet
    del up[0]  # it died: what it held is gone with it
    assert value("loaded_key_bytes", 0) is None
