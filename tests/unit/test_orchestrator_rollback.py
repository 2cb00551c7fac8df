"""When edges refuse a policy: how many it takes, whose word counts, and what is in force then."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from blindtail.wire.policies import PolicyState
from orchestrator.rollout import OWN_DEFAULT
from tests.orchestrator_cases import BAD, BETTER, GOOD, Bench, run, sent

pytestmark = pytest.mark.timeout(30)


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
