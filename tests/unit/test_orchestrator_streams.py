"""Streams of edges and cells at the orchestrator: who may open one, what it may say, what is kept of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from blindtail.errors import AccessDenied, BlindtailError, ContainerError, Overloaded
from blindtail.identity import LOOPBACK, Identity, Role
from blindtail.wire.control import CellLoad, Hello, PeerKind, PolicyAck, Report
from orchestrator.config import AttachLimits
from orchestrator.peers import Peer
from orchestrator.sums import MOST_MODELS, MOST_NAMES
from tests.orchestrator_cases import GOOD, OPERATOR, Bench, run, sent

pytestmark = pytest.mark.timeout(30)


def cell_hello(instance: int = 0) -> Hello:
    return Hello(PeerKind.CELL, instance.to_bytes(16, "big"), "1", (("toy", "1"),), address="cell:50051")


def test_a_certificate_says_what_one_is(tmp_path: Path) -> None:
    async def work(b: Bench) -> None:
        edge, cell = Identity(Role.EDGE, "edge:1"), Identity(Role.CELL, "cell:a")
        with pytest.raises(AccessDenied, match="role cell"):
            b.controller.attach(edge, cell_hello())
        with pytest.raises(AccessDenied, match="role edge"):
            b.controller.attach(cell, Hello(PeerKind.EDGE, bytes(16), "1", (("toy", "1"),)))
        with pytest.raises(AccessDenied):
            b.controller.attach(OPERATOR, cell_hello())
        b.controller.attach(cell, cell_hello())
        b.controller.attach(LOOPBACK, cell_hello())
        assert len(b.controller.fleet()) == 2
        for models in ((), (("a", "1"), ("b", "1"))):
            with pytest.raises(ContainerError, match="its one model"):
                b.controller.attach(edge, Hello(PeerKind.EDGE, bytes(16), "1", models))

    run(tmp_path, work)


def test_streams_are_bounded(tmp_path: Path) -> None:
    async def work(b: Bench) -> None:
        for i in range(3):
            b.edge("edge:many", instance=i)
        with pytest.raises(Overloaded, match="one identity"):
            b.edge("edge:many", instance=3)
        peers = [b.edge(f"edge:{i}") for i in range(2)]
        with pytest.raises(Overloaded, match="5 streams are attached"):
            b.edge("edge:one more")
        b.controller.detach(peers[0])
        b.controller.detach(peers[0])
        b.edge("edge:one more")

    run(tmp_path, work, attach=AttachLimits(total=5, per_identity=3))


def test_a_process_that_dials_again_replaces_its_stream(tmp_path: Path) -> None:
    async def work(b: Bench) -> None:
        old = b.edge("edge:1", instance=7)
        new = b.edge("edge:1", instance=7)
        with pytest.raises(BlindtailError, match="attached again"):
            await old.next_update()
        b.controller.detach(old)  # its end is noticed late
        assert len(b.controller.fleet()) == 1
        await b.put(GOOD)
        assert await sent(new) == (1, GOOD)
        # Another device with the same bytes is another one.
        b.edge("edge:2", instance=7)
        assert len(b.controller.fleet()) == 2

    run(tmp_path, work, attach=AttachLimits(total=5, per_identity=1))


def test_a_flood_ends_its_stream(tmp_path: Path) -> None:
    async def work(b: Bench) -> None:
        peer = b.edge("edge:1")
        for _ in range(20):  # twice a second's worth at once
            b.controller.receive(peer, Report(1.0))
        with pytest.raises(Overloaded, match="10 messages a second"):
            b.controller.receive(peer, Report(1.0))
        b.now_s += 0.5
        for _ in range(5):
            b.controller.receive(peer, Report(1.0))
        with pytest.raises(Overloaded):
            b.controller.receive(peer, Report(1.0))

    run(tmp_path, work, attach=AttachLimits(messages_per_s=10.0))


def test_messages_that_do_not_belong(tmp_path: Path) -> None:
    async def work(b: Bench) -> None:
        edge = b.edge("edge:1")
        cell = b.controller.attach(LOOPBACK, cell_hello())
        await b.put(GOOD)
        wrong: list[tuple[Peer, object]] = [
            (edge, edge.hello),
            (edge, PolicyAck(0, True)),
            (edge, PolicyAck(2, True)),
            (cell, PolicyAck(1, False)),
            (cell, cell.hello),
        ]
        for peer, message in wrong:
            with pytest.raises(ContainerError):
                b.controller.receive(peer, message)

    run(tmp_path, work)


def test_reports_are_shown_and_summed(tmp_path: Path) -> None:
    async def work(b: Bench) -> None:
        edge, cell = b.edge("edge:1"), b.controller.attach(LOOPBACK, cell_hello())
        assert [p.reported_s for p in b.controller.fleet()] == [-1, -1]
        report = Report(2.0, {"exit1": 3, "tail": 1}, {"deadline": 1}, uplink_bytes=100, tail="ready")
        b.controller.receive(edge, report)
        b.controller.receive(edge, report)
        b.controller.receive(cell, Report(2.0, {"tail": 10**6}, load=CellLoad(evaluators=2)))
        b.now_s += 5
        shown = {p.hello.kind: p for p in b.controller.fleet()}
        assert shown[PeerKind.EDGE].report == report
        assert shown[PeerKind.EDGE].reported_s == 5
        assert shown[PeerKind.CELL].report.load == CellLoad(evaluators=2)
        assert b.controller.fleet(with_reports=False)[0].report == Report(0.0)
        await b.controller.history("", 0)
        assert b.store.sums() == {
            (100, "toy", "route", "exit1"): 6,
            (100, "toy", "route", "tail"): 2,
            (100, "toy", "fallback", "deadline"): 2,
            (100, "toy", "bytes", "uplink"): 200,
        }

    run(tmp_path, work)


def test_names_that_peers_invent_are_bounded(tmp_path: Path) -> None:
    async def work(b: Bench) -> None:
        for i in range(70):
            peer = b.edge(f"edge:{i}", model=f"model-{i}")
            b.controller.receive(peer, Report(1.0, {f"route-{k}": 2**64 - 1 for k in range(200)}))
        await b.controller.history("", 0)
        sums = b.store.sums()
        assert len({model for _, model, _, _ in sums}) == MOST_MODELS + 1
        assert len(sums) == (MOST_MODELS + 1) * (MOST_NAMES + 1)
        assert max(sums.values()) <= 2**62

    run(tmp_path, work)
