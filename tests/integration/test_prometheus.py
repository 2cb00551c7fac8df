"""A real Prometheus with the shipped rules scrapes a live run, and an alert fires when an evaluator dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from blindtail.bundle import CloudBundle
from blindtail.metrics import EdgeMetrics, serve_metrics
from blindtail.metrics.table import TABLE
from blindtail.ports import free_port
from blindtail.rpc import INSECURE_LOOPBACK
from edge.processes import Child
from edge.runtime import EdgeRuntime
from orchestrator.local import LocalOrchestrator
from tests import tools
from tests.cell_process import wait_for
from tests.edge_fakes import bundle_of, image, program

pytest.importorskip("ray")
pytestmark = pytest.mark.timeout(120)
SHIPPED = Path(__file__).resolve().parents[2] / "deploy" / "prometheus"


@dataclass
class Prometheus:
    """A running one."""

    port: int

    def get(self, path: str, **query: str) -> Any:
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=10) as reply:
            return json.load(reply)["data"]

    def value(self, expression: str) -> float | None:
        """Of an expression with one series; None when there is none."""
        found = self.get("query", query=expression)["result"]
        return float(found[0]["value"][1]) if found else None

    def alerts(self) -> dict[str, str]:
        """Alert -> pending or firing."""
        return {a["labels"]["alertname"]: a["state"] for a in self.get("alerts")["alerts"]}


@dataclass
class Live:
    prometheus: Prometheus
    edge: EdgeRuntime
    announce: Path


def configuration(folder: Path, ports: dict[str, int]) -> Path:
    """The shipped configuration: other ports, looked at every second. The rules are the shipped ones."""
    content = yaml.safe_load((SHIPPED / "prometheus.yml").read_text())
    content["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    content["rule_files"] = [str(SHIPPED / path) for path in content["rule_files"]]
    jobs = {job["job_name"]: job for job in content["scrape_configs"]}
    assert set(ports) <= set(jobs)
    content["scrape_configs"] = [
        {**jobs[name], "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]} for name, port in ports.items()
    ]
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    binary = tools.require("prometheus")
    folder = tmp_path_factory.mktemp("live")
    ports = {f"blindtail-{role}": free_port() for role in ("cell", "edge", "orchestrator")}
    CloudBundle("toy", "1", {2: program()}).save(folder / "cloud.bt")
    announce = folder / "cell.json"
    command = ["blindtail", "cloud", str(folder / "cloud.bt"), "--backend", "clear", "--evaluators", "2"]
    command += ["--state-dir", str(folder / "cell"), "--announce", str(announce)]
    command += ["--metrics-port", str(ports["blindtail-cell"])]
    with ExitStack() as stack:
        registry = CollectorRegistry()
        orchestrator = stack.enter_context(LocalOrchestrator(registry=registry))
        stack.callback(serve_metrics("127.0.0.1", ports["blindtail-orchestrator"], registry))
        command += ["--orchestrator", orchestrator.address]
        cell = stack.enter_context(Child("cell", command, folder / "cell.log"))
        port = free_port()
        process = subprocess.Popen(
            [
                str(binary),
                f"--config.file={configuration(folder, ports)}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
                "--log.level=warn",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        stack.callback(process.wait, 20)
        stack.callback(process.terminate)
        registry = CollectorRegistry()
        metrics = EdgeMetrics(registry, "toy")
        stack.callback(serve_metrics("127.0.0.1", ports["blindtail-edge"], registry))
        address = cell.announcement(announce, 90)["address"]
        edge = stack.enter_context(
            EdgeRuntime.open(
                bundle_of(spec=program().spec),
                address,
                credentials=INSECURE_LOOPBACK,
                policy="cloud-only",
                backend="clear",
                state_dir=folder / "edge",
                orchestrator=orchestrator.address,
                metrics=metrics,
            )
        )
        assert edge.wait_ready(60), edge.status().tails
        prometheus = Prometheus(port)

        def up() -> bool:
            try:
                return prometheus.value("sum(up)") == len(ports)
            except OSError:
                return False

        wait_for(up, "Prometheus does not reach all three roles", 30)
        yield Live(prometheus, edge, announce)


def test_a_live_run_is_scraped(live: Live) -> None:
    answers = [live.edge.infer(image(i % 4)) for i in range(20)]
    assert {a.route for a in answers} == {"tail"}
    prometheus = live.prometheus

    def counted() -> bool:
        # The first two evaluations were the edge's own, of zeros.
        return (
            prometheus.value('blindtail_edge_requests_total{model="toy", route="tail"}') == 20
            and prometheus.value('blindtail_cloud_requests_total{model="toy", outcome="ok"}') == 22
            and prometheus.value("sum(blindtail_cloud_evaluator_evaluations_total)") == 22
            and prometheus.value("sum(blindtail_orchestrator_answers_total)") == 20
        )

    wait_for(counted, "the counts do not arrive", 20)
    assert prometheus.value('blindtail_cloud_requests_total{model="toy", version="1", outcome="ok"}') == 22
    assert prometheus.value('blindtail_edge_tail_state{state="ready"}') == 1
    assert prometheus.value("sum(blindtail_edge_tail_state)") == 1
    assert prometheus.value("blindtail_edge_key_upload_seconds_count") == 1
    assert prometheus.value("sum(blindtail_cloud_evaluator_key_loads_total)") >= 1
    assert prometheus.value("min(blindtail_cloud_evaluator_resident_bytes)") > 10e6
    assert prometheus.value("sum(blindtail_orchestrator_peers)") == 2
    assert prometheus.value("blindtail_edge_orchestrator_attached") == 1
    assert prometheus.value("blindtail_cloud_orchestrator_attached") == 1
    assert prometheus.value("count(blindtail_build_info)") == 3
    names = {n for n in prometheus.get("label/__name__/values") if n.startswith("blindtail_")}
    known = {
        f"{stem}{end}"
        for m in TABLE
        for stem in (m.name, m.exported)
        for end in ("", "_bucket", "_sum", "_count", "_created")
    }
    assert names <= known
    assert len(names) > 30
    rules = [r for g in prometheus.get("rules")["groups"] for r in g["rules"]]
    assert rules
    assert {r["health"] for r in rules} == {"ok"}


def test_an_alert_fires_when_an_evaluator_is_killed(live: Live) -> None:
    prometheus = live.prometheus
    assert prometheus.value("blindtail_cloud_evaluators") == 2
    assert prometheus.value("blindtail_cloud_evaluator_restarts_total") == 0
    assert "BlindtailEvaluatorDied" not in prometheus.alerts()
    pid = json.loads(live.announce.read_text())["evaluators"][0]["pid"]
    os.kill(pid, signal.SIGKILL)
    start_s = time.monotonic()

    def firing() -> bool:
        return prometheus.alerts().get("BlindtailEvaluatorDied") == "firing"

    wait_for(firing, "no alert", 20)
    print(f"\nBlindtailEvaluatorDied fires {time.monotonic() - start_s:.1f} s after SIGKILL")
    assert prometheus.value("blindtail_cloud_evaluator_restarts_total") == 1
    assert "BlindtailCellDown" not in prometheus.alerts()
    assert live.edge.infer(image(1)).route == "tail"  # the other one answers
    wait_for(lambda: prometheus.value("blindtail_cloud_evaluators") == 2, "the evaluator did not return", 30)
