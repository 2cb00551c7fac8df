"""A whole orchestrator over gRPC: edges, operators, and hostile peers."""

from __future__ import annotations

import threading
from pathlib import Path

import grpc
import pytest

from blindtail.errors import BlindtailError, ConfigError, ContainerError, Overloaded, TailUnavailable
from blindtail.policy_document import PolicyDocument
from blindtail.rpc import from_rpc_error, secure_channel
from blindtail.wire.control import CONTROL, Report, Welcome, encode_up
from blindtail.wire.policies import PolicyChange, PolicyState
from orchestrator import servicer
from orchestrator.config import AttachLimits, OrchestratorConfig
from orchestrator.local import LocalOrchestrator
from tests.attach_cases import Host
from tests.clock import until
from tests.orchestrator_service_cases import (
    FAST,
    HELLO,
    OTHER,
    attach,
    orchestrator_of_one_test,  # noqa: F401
    two_edges,
)

pytestmark = pytest.mark.timeout(60)


def test_a_policy_on_its_way_and_back(orchestrator: LocalOrchestrator) -> None:
    with two_edges(orchestrator.address) as (one, two), orchestrator.policies() as client:
        first = client.set(PolicyChange("", FAST, "rush hour"))
        assert (first.update.version, first.note, first.author) == (1, "rush hour", "loopback")
        until(lambda: one.version == two.version == 1)
        until(lambda: client.get()[0].applied == 2)
        one.refuse = "no such stage"
        client.set(PolicyChange("toy", OTHER))
        until(lambda: client.history()[0].update.version == 3)
        newest, bad, _ = client.history()
        assert bad.state is PolicyState.ROLLED_BACK
        assert newest.note == "rolled back from 2: refused by 1 of 2 edges: no such stage; as in version 1"
        assert newest.update.document == FAST
        until(lambda: two.version == 3)
        with pytest.raises(ConfigError, match="did you mean 'threshold'"):
            client.set(PolicyChange("", PolicyDocument("treshold").encode()))
        assert len(client.history()) == 3


def test_the_fleet(orchestrator: LocalOrchestrator) -> None:
    with two_edges(orchestrator.address) as (one, _), orchestrator.policies() as client:
        one.answers = 3

        def counted() -> bool:
            return any(peer.report.routes.get("tail") == 3 for peer in client.fleet())

        until(counted)
        peers = client.fleet()
        assert {p.hello.instance for p in peers} >= {one.instance}
        assert all(p.identity == "loopback" and 0 <= p.reported_s < 5 for p in peers)
        counted_for = {(c.model, c.kind, c.name): c.total for c in client.usage()}
        assert counted_for[("toy", "route", "tail")] == 3
        assert client.usage("other") == []
    with orchestrator.policies() as client:
        until(lambda: client.fleet() == [])


def test_it_stops_at_once_and_its_edges_come_back(orchestrator: LocalOrchestrator) -> None:
    host = Host()
    with host.attached(orchestrator.address) as attachment:
        assert attachment.wait_connected(5)
        with orchestrator.policies() as client:
            client.set(PolicyChange("", FAST))
        until(lambda: host.version == 1)
        for _ in range(2):
            orchestrator.stop()
            until(lambda: not attachment.connected)
            with orchestrator.policies() as client, pytest.raises(TailUnavailable, match="no orchestrator"):
                client.get()
            orchestrator.start()
            assert attachment.wait_connected(5)
            with orchestrator.policies() as client:
                assert client.get()[0].update.version == 1


# --- peers that misbehave ---------------------------------------------------------

REPORT = encode_up(Report(1.0))


HOSTILE: dict[str, tuple[list[bytes], type[BlindtailError], str]] = {
    "no hello": ([REPORT], ContainerError, "must be a Hello"),
    "rubbish": ([b"\xff" * 50], ContainerError, "not a AttachUp"),
    "rubbish later": ([HELLO, b"\xff" * 50], ContainerError, "not a AttachUp"),
    "hello twice": ([HELLO, HELLO], ContainerError, "after its Hello"),
    "too large": ([HELLO, bytes(100_000)], ContainerError, "accepted"),
    "far too large": ([HELLO, bytes(5_000_000)], Overloaded, "larger than max"),
    "a flood": ([HELLO, *[REPORT] * 500], Overloaded, "messages a second"),
}


@pytest.mark.parametrize(("messages", "error", "says"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_bad_stream_ends_alone(
    orchestrator: LocalOrchestrator, messages: list[bytes], error: type[BlindtailError], says: str
) -> None:
    host = Host()
    with host.attached(orchestrator.address) as attachment, orchestrator.policies() as client:
        assert attachment.wait_connected(5)
        with pytest.raises(error, match=says):
            attach(orchestrator.address, messages)
        until(lambda: len(client.fleet()) == 1)
        assert attachment.connected
        client.set(PolicyChange("", FAST))
        until(lambda: host.version == 1)


def test_a_peer_that_says_nothing(orchestrator: LocalOrchestrator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servicer, "HELLO_S", 0.1)
    over = threading.Event()
    silent = iter(lambda: over.wait(5), False)
    with secure_channel(orchestrator.address, "insecure-loopback") as channel:
        call = channel.stream_stream(f"/{CONTROL}/Attach", None, None)(silent, timeout=5)
        with pytest.raises(grpc.RpcError) as raised:
            list(call)
    over.set()
    assert "no Hello came" in str(from_rpc_error(raised.value))
    assert attach(orchestrator.address, []) == []  # ended before it began
    assert attach(orchestrator.address, [HELLO, REPORT]) == [Welcome(0.1)]


def test_no_room(tmp_path: Path) -> None:
    config = OrchestratorConfig(attach=AttachLimits(total=1))
    with LocalOrchestrator(config=config) as running, Host().attached(running.address) as attachment:
        assert attachment.wait_connected(5)
        with pytest.raises(Overloaded, match="most accepted"):
            attach(running.address, [HELLO])
