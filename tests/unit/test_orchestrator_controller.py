"""The orchestrator's core without a network: who gets which policy."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from blindtail.errors import ConfigError, ContainerError, StateError
from blindtail.policy_document import PolicyDocument
from blindtail.wire.control import Report
from blindtail.wire.policies import PolicyState
from orchestrator.store import Store
from tests.orchestrator_cases import BETTER, GOOD, Bench, run, sent

pytestmark = pytest.mark.timeout(30)


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
