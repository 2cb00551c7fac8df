"""A cell attached to an orchestrator: its load goes up, and nothing of it depends on the orchestrator."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from blindtail.errors import ConfigError
from blindtail.ports import below_ephemeral, free_port
from blindtail.rpc import INSECURE_LOOPBACK, TailStub, secure_channel
from blindtail.wire import KeyState
from blindtail.wire.control import PeerKind, Report
from blindtail.wire.policies import FleetPeer
from cloud.config import CloudConfig
from cloud.control import CellControl
from cloud.local import LocalCell
from orchestrator.config import OrchestratorConfig
from orchestrator.local import LocalOrchestrator
from tests.clock import until
from tests.cloud_cases import Client, bundle

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def orchestrator() -> Iterator[LocalOrchestrator]:
    with LocalOrchestrator(config=OrchestratorConfig(report_interval_s=0.1)) as running:
        yield running


def cell_for(address: str, folder: Path, registry: CollectorRegistry | None = None) -> LocalCell:
    config = CloudConfig(orchestrator=address)
    return LocalCell([bundle()], backend="clear", state_dir=folder, config=config, registry=registry)


def fleet(orchestrator: LocalOrchestrator) -> list[FleetPeer]:
    with orchestrator.policies() as client:
        return client.fleet()


def test_models_and_load_reach_the_orchestrator(orchestrator: LocalOrchestrator, tmp_path: Path) -> None:
    registry = CollectorRegistry()
    with cell_for(orchestrator.address, tmp_path, registry) as cell:
        assert cell.control is not None
        assert cell.control.wait_connected(20)
        assert registry.get_sample_value("blindtail_cloud_orchestrator_attached") == 1
        with secure_channel(cell.address, INSECURE_LOOPBACK) as channel:
            client = Client(TailStub(channel))
            assert client.upload_and_wait() is KeyState.READY
            session = client.register().session
            for seed in range(5):
                client.evaluate(session, seed)
        seen: list[Report] = []

        def reported() -> bool:
            seen.extend(peer.report for peer in fleet(orchestrator))
            return sum(s.samples for r in set_of(seen) for s in r.steps if s.step == "evaluate") >= 5

        until(reported)
        (peer,) = fleet(orchestrator)
        assert peer.hello.kind is PeerKind.CELL
        assert peer.hello.address == cell.address
        assert peer.report.models == (("toy", "1"),)
        load = peer.report.load
        assert load is not None
        assert (load.evaluators, load.sessions, load.queue_depth, load.draining) == (1, 1, 0, False)
        assert load.key_store_bytes > 0
        timings = {s.step: s for r in set_of(seen) for s in r.steps}
        assert set(timings) == {"evaluate", "queue"}
        assert 0 < timings["evaluate"].p50_s <= timings["evaluate"].p95_s < 60
        cell.drain(0.0)
        until(lambda: (fleet(orchestrator)[0].report.load or load).draining)
        start_s = time.monotonic()
    assert time.monotonic() - start_s < 15
    until(lambda: fleet(orchestrator) == [])


def set_of(reports: list[Report]) -> list[Report]:
    """Reports without repetitions: the fleet shows the last one until the next comes."""
    kept: list[Report] = []
    for report in reports:
        if report not in kept:
            kept.append(report)
    return kept


def test_a_cell_serves_without_its_orchestrator(tmp_path: Path) -> None:
    port = free_port()
    with cell_for(f"127.0.0.1:{port}", tmp_path / "cell") as cell:
        assert cell.control is not None
        assert not cell.control.wait_connected(0.3)
        with secure_channel(cell.address, INSECURE_LOOPBACK) as channel:
            client = Client(TailStub(channel))
            assert client.upload_and_wait() is KeyState.READY
            assert client.evaluate(client.register().session, 1).eval_s > 0
        with LocalOrchestrator(port=port, config=OrchestratorConfig(report_interval_s=0.1)) as orchestrator:
            assert cell.control.wait_connected(20)
            until(lambda: [p.report.load for p in fleet(orchestrator)] != [None])
        until(lambda: cell.control is not None and not cell.control.connected)
        # Stopped and started, it is another process to the orchestrator.
        cell.stop()
        assert cell.control is None
        cell.start()


def test_what_can_be_started_again_is_where_no_connection_takes_its_port(
    orchestrator: LocalOrchestrator, tmp_path: Path
) -> None:
    wanted = below_ephemeral()
    if not wanted:
        pytest.skip("this machine's ephemeral range leaves no room below it")
    with cell_for(orchestrator.address, tmp_path) as cell:
        assert {cell.port, orchestrator.port} <= set(wanted)


def test_a_busy_gateway_is_not_waited_for(orchestrator: LocalOrchestrator, tmp_path: Path) -> None:
    """The gateway's loop stands still: the stream stays, with what is known."""
    with cell_for(orchestrator.address, tmp_path) as cell:
        assert cell.control is not None
        assert cell.control.wait_connected(20)

        until(lambda: [p.report.models for p in fleet(orchestrator)] == [(("toy", "1"),)])

        async def stall() -> None:
            time.sleep(2.5)  # noqa: ASYNC251

        stalling = threading.Thread(target=cell.call, args=(stall,))
        stalling.start()
        time.sleep(2.0)
        (peer,) = fleet(orchestrator)
        assert peer.reported_s < 1.9  # one came since the loop stopped
        assert peer.report.models == (("toy", "1"),)
        stalling.join()


def test_settings(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="on loopback"):
        CloudConfig(orchestrator="control.example:50061")
    with pytest.raises(ConfigError, match="not an address"):
        CloudConfig(orchestrator="nowhere")
    with LocalCell([bundle()], backend="clear", state_dir=tmp_path) as cell:
        assert cell.control is None
        assert cell.gateway is not None

        async def without() -> CellControl | None:
            assert cell.gateway is not None
            return CellControl.of(cell.gateway, 1)

        assert cell.call(without) is None
