"""The orchestrator's core without a network: who gets which policy, and when one is taken back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from blindtail.errors import AccessDenied, BlindtailError, ConfigError, ContainerError, Overloaded, StateError
from blindtail.identity import LOOPBACK, Identity, Role
from blindtail.metrics import OrchestratorMetrics
from blindtail.policy_document import Objectives, PolicyDocument
from blindtail.wire.control import (
    CellLoad,
    Hello,
    PeerKind,
    PolicyAck,
    PolicyChange,
    PolicyEntry,
    PolicyState,
    Report,
)
from orchestrator.config import AttachLimits, OrchestratorConfig
from orchestrator.controller import Controller
from orchestrator.peers import Peer
from orchestrator.rollout import OWN_DEFAULT
from orchestrator.store import Store
from orchestrator.sums import MOST_MODELS, MOST_NAMES

pytestmark = pytest.mark.timeout(30)

OPERATOR = Identity(Role.OPERATOR, "operator:ada")
GOOD = PolicyDocument("deadline", {"safety": 1.5}, Objectives(0.5)).encode()
BETTER = PolicyDocument("deadline", {"safety": 2.0}).encode()
BAD = PolicyDocument("threshold", {"thresholds": [0.5] * 9}).encode()


class Bench:
    """A controller with a clock of its own, and edges that say what a test wants."""

    def __init__(self, folder: Path, **settings: object) -> None:
        self.now_s = 1000.0
        self.config = OrchestratorConfig(state_dir=folder, **settings)  # type: ignore[arg-type]
        self.registry = CollectorRegistry()
        self.store = Store(folder)
        self.controller = Controller(
            self.config,
            self.store,
            OrchestratorMetrics(self.registry),
            clock=lambda: self.now_s,
            wall=lambda: 6000.0,
        )

    def edge(
        self,
        name: str,
        model: str = "toy",
        version: int = 0,
        instance: int = 0,
        role: Role | None = Role.EDGE,
    ) -> Peer:
        identity = LOOPBACK if role is None else Identity(role, name)
        hello = Hello(PeerKind.EDGE, instance.to_bytes(16, "big"), "1", ((model, "1"),), version)
        return self.controller.attach(identity, hello)

    def edges(self, number: int) -> list[Peer]:
        return [self.edge(f"edge:{i}") for i in range(number)]

    async def put(self, document: bytes, model: str = "", note: str = "") -> PolicyEntry:
        return await self.controller.set(OPERATOR, PolicyChange(model, document, note))

    def answer(self, peer: Peer, version: int, applied: bool = True, reason: str = "") -> None:
        self.controller.receive(peer, PolicyAck(version, applied, reason))

    async def in_force(self, model: str) -> tuple[int, bytes]:
        found = await self.controller.get(model)
        (entry,) = found if model else [e for e in found if not e.update.model]
        return entry.update.version, entry.update.document

    async def settle(self) -> None:
        self.now_s += self.config.settle_s + 1
        await self.controller.judge()


def run(tmp_path: Path, work: Callable[[Bench], Awaitable[None]], **settings: object) -> None:
    async def whole() -> None:
        bench = Bench(tmp_path, **settings)
        try:
            await bench.controller.load()
            bench.now_s += bench.config.settle_s + 1  # as if started long ago
            await work(bench)
        finally:
            await bench.controller.close()

    asyncio.run(whole())


async def sent(peer: Peer) -> tuple[int, bytes] | None:
    """What would go down the stream now."""
    try:
        update = await asyncio.wait_for(peer.next_update(), 0.01)
    except TimeoutError:
        return None
    return update.version, update.document


# --- who gets what --------------------------------------------------------------


def test_an_edge_gets_its_models_policy_else_the_default(tmp_path: Path) -> None:
    async def work(b: Bench) -> None:
        toy, other = b.edge("edge:1"), b.edge("edge:2", "other")
        assert await sent(toy) is None
        await b.put(GOOD)
        assert await sent(toy) == await sent(other) == (1, GOOD)
        await b.put(BETTER, "toy")
        assert (await sent(toy), await sent(other)) == ((2, BETTER), None)
        await b.put(BETTER)
        assert (await sent(toy), await sent(other)) == (None, (3, BETTER))
        assert await b.in_force("toy") == (2, BETTER)
        assert await b.in_force("unheard of") == (3, BETTER)
        assert [e.update.version for e in await b.controller.get("")] == [3, 2]
        # On attach only what the edge does not have yet.
        assert await sent(b.edge("edge:3", version=2)) is None
        assert await sent(b.edge("edge:4", version=1)) == (2, BETTER)
        assert await sent(b.edge("edge:5", version=99)) == (2, BETTER)

    run(tmp_path, work)


def test_a_slow_stream_gets_the_latest_only(tmp_path: Path) -> None:
    async def work(b: Bench) -> None:
        peer = b.edge("edge:1")
        for document in (GOOD, BETTER, GOOD):
            await b.put(document)
        assert await sent(peer) == (3, GOOD)
        assert await sent(peer) is None
        b.answer(peer, 1)  # late, and no harm
        b.answer(peer, 3)
        with pytest.raises(ContainerError, match="never sent"):
            b.answer(peer, 4)

    run(tmp_path, work)


def test_policies_are_there_after_a_restart(tmp_path: Path) -> None:
    async def before(b: Bench) -> None:
        await b.put(GOOD)
        await b.put(BETTER, "toy")

    async def after(b: Bench) -> None:
        assert await b.in_force("") == (1, GOOD)
        assert await sent(b.edge("edge:1", version=1)) == (2, BETTER)
        assert (await b.put(GOOD)).update.version == 3

    run(tmp_path, before)
    run(tmp_path, after)


def test_two_operators_at_once(tmp_path: Path) -> None:
    async def work(b: Bench) -> None:
        peer = b.edge("edge:1")
        made = await asyncio.gather(*(b.put(GOOD, note=str(i)) for i in range(5)))
        assert sorted(e.update.version for e in made) == [1, 2, 3, 4, 5]
        assert await sent(peer) == (5, GOOD)
        history = await b.controller.history("", 0)
        assert [e.state for e in history] == [PolicyState.ACTIVE] + [PolicyState.REPLACED] * 4
        assert {e.author for e in history} == {"operator:ada"}

    run(tmp_path, work)


def test_a_call_that_is_broken_off_is_done_whole(tmp_path: Path) -> None:
    async def work(b: Bench) -> None:
        peer = b.edge("edge:1")
        call = asyncio.create_task(b.put(GOOD))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert await asyncio.wait_for(peer.next_update(), 5)
        assert await b.in_force("") == (1, GOOD)

    run(tmp_path, work)


WRONG = {
    "unknown policy": (PolicyDocument("treshold").encode(), "did you mean 'threshold'"),
    "unknown parameter": (PolicyDocument("deadline", {"safty": 1}).encode(), "did you mean 'safety'"),
    "wrong value": (PolicyDocument("deadline", {"safety": "much"}).encode(), "safety must be above 0"),
    "wrong threshold": (PolicyDocument("threshold", {"thresholds": [-1]}).encode(), "0 or more"),
    "no thresholds": (PolicyDocument("threshold", {"thresholds": []}).encode(), "needs thresholds"),
    "beyond numbers": (
        b'{"policy":"deadline","parameters":{"safety":1' + b"0" * 400 + b"}}",
        "safety must be above 0",
    ),
    "no JSON": (b"deadline", "not JSON"),
    "another field": (b'{"policy":"deadline","colour":"red"}', "no field 'colour'"),
    "another objective": (b'{"policy":"deadline","objectives":{"cost":1}}', "no objective 'cost'"),
    "deadline in the past": (b'{"policy":"deadline","objectives":{"deadline_s":-1}}', "above 0"),
}


@pytest.mark.parametrize(("document", "says"), WRONG.values(), ids=WRONG.keys())
def test_what_is_not_accepted_changes_nothing(tmp_path: Path, document: bytes, says: str) -> None:
    async def work(b: Bench) -> None:
        peer = b.edge("edge:1")
        with pytest.raises(ConfigError, match=says):
            await b.put(document)
        assert await b.controller.history("", 0) == []
        assert await sent(peer) is None
        refused = b.registry.get_sample_value(
            "blindtail_orchestrator_policies_set_total", {"outcome": "refused"}
        )
        assert refused == 1

    run(tmp_path, work)


def test_a_policy_that_nobody_follows_yet(tmp_path: Path) -> None:
    async def work(b: Bench) -> None:
        b.edge("edge:1")
        assert (await b.put(GOOD, "toy", "rush hour")).note == "rush hour"
        entry = await b.put(GOOD, "unheard of", "rush hour")
        assert entry.note == "rush hour (no attached edge serves it now)"
        assert (await b.put(GOOD)).note == "no attached edge serves it now"  # toy has its own
        assert [e.note for e in await b.controller.history("", 2)] == ["", "rush hour"]
        with pytest.raises(ConfigError, match="printable"):
            await b.put(GOOD, "a\x1b[2Jb")

    run(tmp_path, work)


def test_a_store_that_fails_leaves_what_is_in_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise StateError("its disk is full")

    async def work(b: Bench) -> None:
        peer = b.edge("edge:1")
        await b.put(GOOD)
        assert await sent(peer) == (1, GOOD)
        with monkeypatch.context() as broken:
            broken.setattr(Store, "add", fails)
            broken.setattr(Store, "add_sums", fails)
            broken.setattr(Store, "add_votes", fails)
            with pytest.raises(StateError, match="disk is full"):
                await b.put(BETTER)
            assert await sent(peer) is None
            b.controller.receive(peer, Report(1.0, {"tail": 2}))
            b.answer(peer, 1)
            for _ in range(2):
                with pytest.raises(StateError):
                    await b.controller.history("", 0)
        b.controller.receive(peer, Report(1.0, {"tail": 3}))
        assert len(await b.controller.history("", 0)) == 1
        # What could not be written waited, and was not counted twice.
        assert b.store.sums() == {(100, "toy", "route", "tail"): 5}
        assert set(b.store.votes(1)) == {"edge:1"}

    run(tmp_path, work)


# --- taking a policy back ---------------------------------------------------------


@pytest.mark.parametrize(
    ("edges", "applied", "refused", "share", "at_once", "settled"),
    [
        (1, 0, 1, 0.2, True, True),
        (5, 0, 1, 0.2, True, True),
        (10, 0, 1, 0.2, False, True),  # nobody else answers at all
        (10, 4, 1, 0.2, False, True),  # a fifth of those that answered
        (10, 5, 1, 0.2, False, False),
        (10, 9, 1, 0.2, False, False),
        (10, 8, 2, 0.2, True, True),
        (5, 3, 2, 0.5, False, False),
        (5, 2, 3, 0.5, True, True),
        (3, 1, 2, 1.0, False, False),
        (3, 0, 3, 1.0, True, True),
        (4, 4, 0, 0.01, False, False),
    ],
)
def test_how_many_refusals_it_takes(
    tmp_path: Path, edges: int, applied: int, refused: int, share: float, at_once: bool, settled: bool
) -> None:
    async def work(b: Bench) -> None:
        await b.put(GOOD)
        peers = b.edges(edges)
        await b.put(BAD)
        for i, peer in enumerate(peers[: applied + refused]):
            b.answer(peer, 2, applied=i >= refused, reason="9 thresholds, 2 exits")
        await b.controller.judge()
        assert (await b.in_force("") == (3, GOOD)) is at_once
        await b.settle()
        assert (await b.in_force("") == (3, GOOD)) is settled

    run(tmp_path, work, rollback_share=share)


def test_a_rollback_as_operators_and_edges_see_it(tmp_path: Path) -> None:
    async def work(b: Bench) -> None:
        peers = b.edges(3)
        await b.put(GOOD)
        await b.put(BETTER)
        await b.put(BAD)
        for peer in peers:
            assert await sent(peer) == (3, BAD)
            b.answer(peer, 3, applied=False, reason="9 thresholds,\n2 exits\x1b[31m")
        await b.controller.judge()
        assert [await sent(peer) for peer in peers] == [(4, BETTER)] * 3
        b.answer(peers[0], 4)
        newest, bad, *_ = await b.controller.history("", 0)
        assert (bad.state, bad.refused, bad.applied) == (PolicyState.ROLLED_BACK, 3, 0)
        assert (newest.state, newest.author, newest.applied) == (PolicyState.ACTIVE, "orchestrator", 1)
        assert newest.note == (
            "rolled back from 3: refused by 3 of 3 edges: 9 thresholds, 2 exits [31m; as in version 2"
        )
        # The next bad one goes back to the same document, not to one that was itself rolled back.
        await b.put(BAD)
        for peer in peers:
            b.answer(peer, 5, applied=False)
        await b.controller.judge()
        assert await b.in_force("") == (6, BETTER)
        rolled_back = b.registry.get_sample_value("blindtail_orchestrator_rollbacks_total", {"model": ""})
        assert rolled_back == 2

    run(tmp_path, work)


def test_without_a_predecessor(tmp_path: Path) -> None:
    async def work(b: Bench) -> None:
        toy, other = b.edge("edge:1"), b.edge("edge:2", "other")
        await b.put(BAD, "toy")
        b.answer(toy, 1, applied=False)
        await b.controller.judge()
        assert await b.in_force("toy") == (2, OWN_DEFAULT.encode())  # as without an orchestrator
        # With a default policy in force, that is what such edges had before.
        await b.put(GOOD)
        await b.put(BAD, "other")
        assert await sent(other) == (4, BAD)
        b.answer(other, 4, applied=False)
        await b.controller.judge()
        assert await b.in_force("other") == (5, GOOD)

    run(tmp_path, work)


def test_one_certificate_has_one_vote(tmp_path: Path) -> None:
    async def work(b: Bench) -> None:
        good = b.edges(9)
        bad = [b.edge("edge:bad", instance=i) for i in range(20)]
        await b.put(GOOD)
        for peer in bad:
            b.answer(peer, 1, applied=False, reason="because")
        await b.controller.judge()
        for peer in good:
            b.answer(peer, 1)
        await b.settle()
        assert await b.in_force("") == (1, GOOD)
        # Another certificate makes it two of ten.
        b.answer(good[0], 1, applied=False)
        await b.controller.judge()
        assert (await b.in_force(""))[0] == 2

    run(tmp_path, work)


def test_who_is_away_keeps_its_vote(tmp_path: Path) -> None:
    async def before(b: Bench) -> None:
        await b.put(GOOD)
        for peer in b.edges(7):
            b.answer(peer, 1)
            b.controller.detach(peer)
        b.answer(b.edge("edge:bad"), 1, applied=False)
        await b.settle()
        assert await b.in_force("") == (1, GOOD)

    async def after(b: Bench) -> None:
        b.answer(b.edge("edge:bad"), 1, applied=False)
        await b.settle()
        assert await b.in_force("") == (1, GOOD)
        b.answer(b.edge("edge:bad too"), 1, applied=False)
        await b.settle()
        assert (await b.in_force(""))[0] == 2

    run(tmp_path, before)
    run(tmp_path, after)


def test_on_loopback_a_process_votes_while_it_is_there(tmp_path: Path) -> None:
    async def work(b: Bench) -> None:
        await b.put(GOOD)
        peers = [b.edge("", role=None, instance=i) for i in range(6)]
        for peer in peers[1:]:
            b.answer(peer, 1)
        b.answer(peers[0], 1, applied=False)
        await b.settle()
        assert await b.in_force("") == (1, GOOD)  # one of six
        for peer in peers[2:]:
            b.controller.detach(peer)
        await b.settle()
        assert (await b.in_force(""))[0] == 2  # one of two

    run(tmp_path, work)


def test_the_first_edge_back_does_not_decide_alone(tmp_path: Path) -> None:
    async def work(b: Bench) -> None:
        await b.put(GOOD)

    async def restarted() -> None:
        b = Bench(tmp_path)
        await b.controller.load()
        b.answer(b.edge("edge:bad"), 1, applied=False)
        await b.controller.judge()
        assert await b.in_force("") == (1, GOOD)
        for i in range(9):
            b.edge(f"edge:{i}", version=1)  # has it in force: no answer is needed
        await b.settle()
        assert await b.in_force("") == (1, GOOD)
        await b.controller.close()

    run(tmp_path, work)
    asyncio.run(restarted())


def test_edges_that_refuse_everything_start_no_chain(tmp_path: Path) -> None:
    async def work(b: Bench) -> None:
        peer = b.edge("edge:1")
        await b.put(GOOD)
        for version in (1, 2, 2):
            b.answer(peer, version, applied=False)
            await b.settle()
        assert await b.in_force("") == (2, OWN_DEFAULT.encode())
        # An operator's next one may be rolled back again.
        await b.put(BETTER)
        b.answer(peer, 3, applied=False)
        await b.settle()
        assert (await b.in_force(""))[0] == 4

    run(tmp_path, work)


def test_a_last_word_counts_and_old_versions_do_not(tmp_path: Path) -> None:
    async def work(b: Bench) -> None:
        peers = b.edges(2)
        await b.put(GOOD)
        await b.put(BETTER)
        b.answer(peers[0], 1, applied=False)  # replaced meanwhile
        b.answer(peers[1], 2, applied=False)
        b.answer(peers[1], 2)
        await b.settle()
        assert await b.in_force("") == (2, BETTER)
        (entry,) = await b.controller.get("")
        assert (entry.applied, entry.refused) == (1, 0)

    run(tmp_path, work)


# --- streams ----------------------------------------------------------------------


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


def test_the_keeper_writes_judges_and_survives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real clock: what `start` sets off."""

    async def work() -> None:
        monkeypatch.setattr("orchestrator.controller._WRITE_S", 0.0)
        monkeypatch.setattr("orchestrator.controller._TICK_S", 0.01)
        b = Bench(tmp_path)
        await b.controller.start()
        b.now_s += 10
        await b.put(GOOD)
        peer = b.edge("edge:1")
        with monkeypatch.context() as broken:
            broken.setattr(Store, "add_sums", lambda *_: 1 / 0)
            b.controller.receive(peer, Report(1.0, {"tail": 1}))
            await asyncio.sleep(0.1)
        b.answer(peer, 1, applied=False)
        for _ in range(500):
            if (await b.in_force(""))[0] == 2:
                break
            await asyncio.sleep(0.01)
        else:
            pytest.fail("it was not rolled back")
        await b.controller.close()
        store = Store(tmp_path)
        assert store.sums() == {(100, "toy", "route", "tail"): 1}
        assert store.votes(1)["edge:1"].applied is False
        store.close()

    asyncio.run(work())
