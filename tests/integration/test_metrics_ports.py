"""Exporters: what a port serves, how it ends, one for each actor of a site; and certificates' ends."""

from __future__ import annotations

import asyncio
import socket
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from blindtail.bundle import CloudBundle
from blindtail.errors import ConfigError
from blindtail.metrics import EdgeMetrics, OrchestratorMetrics, check_metrics_port, expiry, serve_metrics
from blindtail.metrics.certificate import not_after
from blindtail.ports import free_port
from blindtail.rpc import ClientTlsFiles
from cloud.local import LocalCell
from edge.app import run_site
from edge.config import EdgeConfig
from tests.certificates import certificates
from tests.edge_fakes import bundle_of, image, program

pytest.importorskip("ray")
pytestmark = pytest.mark.timeout(60)

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape(port: int) -> Samples:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as reply:
        families = text_string_to_metric_families(reply.read().decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for f in families for s in f.samples}


def test_a_port_serves_one_registry_and_ends_cleanly() -> None:
    registry = CollectorRegistry()
    OrchestratorMetrics(registry).policy_set(True)
    port = free_port(neighbours=2)
    check_metrics_port("127.0.0.1", port)
    before = set(threading.enumerate())
    stop = serve_metrics("127.0.0.1", port, registry)
    found = scrape(port)
    assert found["blindtail_orchestrator_policies_set_total", (("outcome", "accepted"),)] == 1
    assert not [name for name, _ in found if not name.startswith("blindtail_")]
    for taken in (check_metrics_port, lambda host, p: serve_metrics(host, p, registry)):
        with pytest.raises(ConfigError, match="choose another metrics_port"):
            taken("127.0.0.1", port)
    stop()
    assert set(threading.enumerate()) <= before
    serve_metrics("127.0.0.1", port, registry)()  # free again


@pytest.fixture
def cell() -> Iterator[LocalCell]:
    with LocalCell([CloudBundle("toy", "1", {2: program()})], backend="clear") as made:
        yield made


def test_each_actor_of_a_site_has_a_port(cell: LocalCell, tmp_path: Path) -> None:
    from edge.actor import EdgeActor

    bundle_of(spec=program().spec).save(tmp_path / "edge.bt")
    port = free_port(neighbours=2)
    config = EdgeConfig(
        tmp_path / "edge.bt",
        cloud=cell.address,
        plaintext=True,
        backend="clear",
        policy="cloud-only",
        state_dir=tmp_path / "state",
        actors=2,
        metrics_port=port,
    )

    async def both() -> tuple[Samples, Samples]:
        actors = [EdgeActor(config, index) for index in range(2)]
        try:
            assert all([await actor.wait_ready(30) for actor in actors])
            for _ in range(3):
                assert (await actors[1].infer(image(1))).route == "tail"
            # An actor that is restarted while its port is taken answers all the same.
            third = EdgeActor(config, 1)
            assert (await third.infer(image(1))).label >= 0
            await third.close()
            return scrape(port), scrape(port + 1)
        finally:
            for actor in actors:
                await actor.close()

    first, second = asyncio.run(both())
    answers = ("blindtail_edge_requests_total", (("model", "toy"), ("route", "tail")))
    assert answers not in first
    assert second[answers] == 3
    ready = ("blindtail_edge_tail_state", (("cut", "2"), ("model", "toy"), ("state", "ready")))
    assert first[ready] == second[ready] == 1
    uploads = ("blindtail_edge_key_upload_seconds_count", (("model", "toy"),))
    assert first.get(uploads, 0) + second.get(uploads, 0) >= 1
    assert ("blindtail_edge_uplink_bytes_total", (("model", "toy"),)) in second
    check_metrics_port("127.0.0.1", port)
    check_metrics_port("127.0.0.1", port + 1)


def test_a_taken_or_impossible_port_is_told_at_the_door(tmp_path: Path) -> None:
    bundle_of(spec=program().spec).save(tmp_path / "edge.bt")
    port = free_port(neighbours=2)
    config = EdgeConfig(tmp_path / "edge.bt", actors=2, metrics_port=port)
    with socket.create_server(("127.0.0.1", port + 1)), pytest.raises(ConfigError, match=str(port + 1)):
        next(run_site(config, image(0)[None]))
    with pytest.raises(ConfigError, match="metrics_port"):
        EdgeConfig(tmp_path / "edge.bt", actors=3, metrics_port=65534)
    assert EdgeConfig(tmp_path / "edge.bt", actors=2, metrics_port=65534).metrics_port_of(1) == 65535
    assert EdgeConfig(tmp_path / "edge.bt").metrics_port_of(1) == 0


def test_the_end_of_a_certificate(tmp_path: Path) -> None:
    files = certificates(tmp_path / "tls", "cell")
    for name in ("cell.pem", "ca.pem"):
        pem = files[name].read_bytes()
        wanted = x509.load_pem_x509_certificate(pem).not_valid_after_utc.timestamp()
        assert not_after(pem.decode()) == wanted
    whole = files["cell.pem"].read_text()
    assert not_after(whole + files["ca.pem"].read_text()) == not_after(whole)  # the first of a chain
    registry = CollectorRegistry()
    metrics = EdgeMetrics(registry, "toy")
    metrics.watch_certificate(expiry(files["cell.pem"]))
    name = "blindtail_certificate_expiry_timestamp_seconds"
    assert registry.get_sample_value(name) == not_after(whole)
    files["cell.pem"].write_text("no certificate")
    assert registry.get_sample_value(name) is None
    files["cell.pem"].write_text(whole)  # renewed: seen without a restart
    assert registry.get_sample_value(name) == not_after(whole)
    files["cell.pem"].unlink()
    assert registry.get_sample_value(name) is None
    assert expiry(None)() is None


def test_what_is_no_certificate_is_refused(tmp_path: Path) -> None:
    import ssl

    files = certificates(tmp_path / "tls", "cell")
    der = ssl.PEM_cert_to_DER_cert(files["cell.pem"].read_text())
    for cut in range(0, len(der), 7):
        try:
            not_after(ssl.DER_cert_to_PEM_cert(der[:cut]))
        except ValueError:
            continue
        raise AssertionError(f"{cut} of {len(der)} bytes were taken for a certificate")
    for text in ("", files["cell.key"].read_text(), "-----END CERTIFICATE----------BEGIN CERTIFICATE-----"):
        with pytest.raises(ValueError, match="no certificate"):
            not_after(text)


def test_an_edge_with_tls_tells_the_end_of_its_certificate(tmp_path: Path) -> None:
    from edge.actor import EdgeActor

    files = certificates(tmp_path / "tls", "edge")
    bundle_of(spec=program().spec).save(tmp_path / "edge.bt")
    port = free_port(neighbours=2)
    tls = ClientTlsFiles(files["ca.pem"], files["edge.pem"], files["edge.key"])
    actor = EdgeActor(EdgeConfig(tmp_path / "edge.bt", tls=tls, metrics_port=port))
    try:
        found = scrape(port)
    finally:
        asyncio.run(actor.close())
    wanted = not_after(files["edge.pem"].read_text())
    assert found["blindtail_certificate_expiry_timestamp_seconds", ()] == wanted
