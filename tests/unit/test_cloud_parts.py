"""Settings, registry, sessions, engine and metrics of a cell."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from blindtail.bundle import CloudBundle
from blindtail.config import load_config
from blindtail.errors import BundleError, ConfigError, KeysMissing, ProgramMismatch, SessionLost
from blindtail.metrics import CloudMetrics, EdgeMetrics
from cloud.config import CloudConfig, SessionLimits, TlsFiles
from cloud.engine import Engine
from cloud.evaluator import in_pieces
from cloud.registry import Registry, open_bundles
from cloud.sessions import Sessions
from tests.clock import FakeClock
from tests.cloud_cases import activation, bundle, clear_keys, program


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"host": "0.0.0.0"}, "loopback only"),
        ({"port": 65536}, "port"),
        ({"port": -1}, "port"),
        ({"evaluators": 0}, "evaluators"),
        ({"threads": 0}, "threads"),
        ({"backend": "plain"}, "backend"),
        ({"metrics_port": 70000}, "metrics_port"),
        ({"queue": {"jobs": 0}}, "queue.jobs"),
        ({"keys": {"budget_bytes": -1}}, "keys.budget_bytes"),
        ({"sessions": {"idle_s": 0}}, "sessions.idle_s"),
        ({"evalautors": 2}, "evaluators"),
        ({"queue": {"job": 2}}, "queue.jobs"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        load_config(CloudConfig, None, {"models": ["m.bt"], **settings})


def test_a_settings_file_reads_as_documented(tmp_path: Path) -> None:
    path = tmp_path / "cell.toml"
    path.write_text(
        'models = ["cloud.bt"]\nhost = "0.0.0.0"\nport = 50051\n'
        'tls = { certificate = "cell.pem", key = "cell.key", client_ca = "edges.pem" }\n'
        "queue = { jobs = 256 }\nkeys = { budget_bytes = 4000000000 }\n"
    )
    config = load_config(CloudConfig, path, {"evaluators": 3})
    assert config.models == (tmp_path / "cloud.bt",)
    assert config.tls == TlsFiles(tmp_path / "cell.pem", tmp_path / "cell.key", tmp_path / "edges.pem")
    assert (config.port, config.evaluators, config.keys.budget_bytes) == (50051, 3, 4_000_000_000)
    with pytest.raises(ConfigError, match=r"cell\.key"):
        config.tls.load()


def test_models_that_are_missing_or_given_twice(tmp_path: Path) -> None:
    assert open_bundles([]) == []  # a cell may start empty: models are pushed to it
    with pytest.raises(BundleError, match=r"no\.bt"):
        open_bundles([tmp_path / "no.bt"])
    (tmp_path / "damaged.bt").write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(BundleError, match=r"damaged\.bt"):
        open_bundles([tmp_path / "damaged.bt"])
    with pytest.raises(ConfigError, match="twice"):
        Registry([bundle(), bundle()], "clear")


def test_the_registry_tells_which_versions_differ() -> None:
    registry = Registry([bundle(0, version="1"), bundle(1, version="2")], "clear")
    ids = [program(0).spec.program_id, program(1).spec.program_id]
    assert registry.find("toy", "2", ids[1]).version == "2"
    assert registry.models == [("toy", "1"), ("toy", "2")]
    with pytest.raises(ProgramMismatch, match="version 3, the cloud holds version 1, 2"):
        registry.find("toy", "3", ids[0])
    with pytest.raises(ProgramMismatch, match=r"'dog'.*serves toy"):
        registry.find("dog", "1", ids[0])
    with pytest.raises(ProgramMismatch, match=f"{ids[1][:12]}.*{ids[0][:12]}"):
        registry.find("toy", "1", ids[1])
    with pytest.raises(ProgramMismatch, match="no program"):
        registry.by_program("0" * 64)


def test_two_versions_may_share_a_program() -> None:
    shared = [bundle(0, version="1"), bundle(0, version="2")]
    registry = Registry(shared, "seal")
    assert len(registry.programs) == 1
    assert registry.largest_container_bytes == program().spec.uplink_bytes
    assert registry.find("toy", "2", program().spec.program_id).version == "2"


def test_sessions_end_by_idling_and_belong_to_one_identity() -> None:
    clock = FakeClock(0.0)
    sessions = Sessions(SessionLimits(idle_s=10), clock)
    entry = Registry([bundle()], "clear").entries[0]
    first, second = (sessions.open(who, entry, bytes(32)) for who in "ab")
    assert len(first.id) == 16
    assert first.id != second.id
    assert sessions.use(first.id, "a") is first
    with pytest.raises(SessionLost):
        sessions.use(first.id, "b")
    with pytest.raises(SessionLost):
        sessions.use(bytes(16), "a")
    clock.now = 8
    sessions.use(first.id, "a")
    clock.now = 12
    assert len(sessions) == 2
    sessions.use(first.id, "a")
    with pytest.raises(SessionLost, match="register again"):
        sessions.use(second.id, "b")
    assert len(sessions) == 1


def test_sessions_are_bounded_by_identity_and_over_all() -> None:
    sessions = Sessions(SessionLimits(per_identity=2, total=3), FakeClock(0.0))
    entry = Registry([bundle()], "clear").entries[0]
    opened = [sessions.open("a", entry, bytes(32)) for _ in range(3)]
    with pytest.raises(SessionLost):
        sessions.use(opened[0].id, "a")
    sessions.use(opened[1].id, "a")  # now opened[2] is the oldest
    sessions.open("b", entry, bytes(32))
    sessions.open("c", entry, bytes(32))
    assert len(sessions) == 3
    sessions.use(opened[1].id, "a")
    with pytest.raises(SessionLost):
        sessions.use(opened[2].id, "a")
    sessions.clear()
    assert len(sessions) == 0


def test_the_engine_keeps_keys_and_notices_that_they_are_gone(tmp_path: Path) -> None:
    from blindtail.he.clear import ClearEncryptor

    tail = program()
    engine = Engine({tail.spec.program_id: tail}, "clear", 1)
    (tmp_path / "source").write_bytes(clear_keys())
    evaluator = engine._evaluators[tail.spec.program_id]
    paths = [tmp_path / name for name in ("one", "two", "three")]
    container = ClearEncryptor(tail.spec).encrypt(activation())
    for path in paths:
        evaluator.prepare_keys(tmp_path / "source", path)
        reply, seconds, _ = engine.evaluate(tail.spec.program_id, str(path), container)
        assert seconds > 0
    paths[0].unlink()
    with pytest.raises(KeysMissing):
        engine.evaluate(tail.spec.program_id, str(paths[0]), container)
    assert engine.evaluate(tail.spec.program_id, str(paths[1]), container)[0] == reply


def _text(registry: CollectorRegistry) -> str:
    return generate_latest(registry).decode()


def test_cloud_metrics_count_and_fold_unknown_labels() -> None:
    registry = CollectorRegistry()
    metrics = CloudMetrics(registry)
    metrics.watch(
        queue_depth=lambda: 3,
        backlog_s=lambda: 0.5,
        sessions=lambda: 2,
        key_store_bytes=lambda: 99,
        evaluators=lambda: 1,
        restarts=lambda: 4,
    )
    metrics.evaluated("toy", "ok", 0.1, "1")
    metrics.evaluated("toy", "SomethingNew")
    metrics.waited(0.01)
    metrics.uploaded("ok")
    text = _text(registry)
    assert 'blindtail_cloud_requests_total{model="toy",outcome="ok",version="1"} 1.0' in text
    assert 'outcome="other"' in text
    assert "blindtail_cloud_queue_depth 3.0" in text
    assert "blindtail_cloud_key_store_bytes 99.0" in text
    assert "blindtail_cloud_evaluator_restarts_total 4.0" in text


def test_edge_metrics_count_by_bounded_labels() -> None:
    registry = CollectorRegistry()
    metrics = EdgeMetrics(registry, "toy")
    metrics.answered("tail", 0.2, None, 1000, 100)
    metrics.answered("exit1", 0.01, "deadline", 0, 0)
    for i in range(200):
        metrics.answered(f"exit{i}", 0.01, "novel", 0, 0)
    metrics.keys_uploaded(3.0)
    text = _text(registry)
    assert 'blindtail_edge_requests_total{model="toy",route="tail"} 1.0' in text
    assert 'blindtail_edge_fallbacks_total{model="toy",reason="deadline"} 1.0' in text
    assert 'reason="other"' in text
    assert 'blindtail_edge_uplink_bytes_total{model="toy"} 1000.0' in text
    assert sum(line.startswith("blindtail_edge_requests_total") for line in text.splitlines()) <= 65


def test_a_bundle_survives_the_key_stores_copy(tmp_path: Path) -> None:
    CloudBundle("toy", "1", {0: program()}).save(tmp_path / "x.bt")
    assert CloudBundle.open(tmp_path / "x.bt").programs[0].spec.program_id == program().spec.program_id


def test_a_container_crosses_in_pieces_that_ray_sends_along() -> None:
    for size in (0, 1, 96_000, 96_001, 123_032, 500_000):
        container = bytes(i % 251 for i in range(size))
        pieces = in_pieces(container)
        assert b"".join(pieces) == container
        assert all(0 < len(piece) < 100 * 1024 for piece in pieces)
