"""Tickets in a runtime: when one is used, what it saves, and what is said of it."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from blindtail.errors import InputError, TailUnavailable
from blindtail.records import Decision, DecisionContext, TailReply, TailTimings
from edge.activity import Activity
from edge.latency import LatencyBook
from edge.offloads import Offloads
from orchestrator.policy import CloudOnly, DeadlineAware
from tests.clock import FakeClock
from tests.edge_fakes import FEATURES, FakeTail, NumberedTicket, image, reply
from tests.runtime_cases import THRESHOLDS, UNSURE, runtime


def by_ticket(container: bytes, _: float | None) -> TailReply:
    """A cloud that has done its work ahead for every seed that it is shown."""
    shown = len(container) > 8 * FEATURES
    eval_s = 0.004 if shown else 0.020
    return TailReply(reply().container, TailTimings(0.0, eval_s, "fake", ticket=shown), eval_s)


def test_a_ticket_is_used_while_one_is_there_and_told_in_the_answer() -> None:
    tail = FakeTail(by_ticket, waiting=[NumberedTicket(1), NumberedTicket(2)])
    assert tail.cipher is not None
    with runtime(tail) as edge:
        answers = [edge.infer(image(1, UNSURE)) for _ in range(3)]
        assert edge.status().by_ticket == 2
    assert [a.route for a in answers] == ["tail"] * 3
    assert [a.extra.get("ticket") for a in answers] == [1.0, 1.0, None]
    assert [a.timings.eval_s for a in answers] == [0.004, 0.004, 0.020]
    assert len(tail.cipher.used) == 2


def test_an_answer_that_the_cloud_gave_without_its_ticket_counts_as_one_without() -> None:
    tail = FakeTail(waiting=[NumberedTicket(1)])
    with runtime(tail) as edge:
        answer = edge.infer(image(1, UNSURE))
        assert edge.status().by_ticket == 0
    assert "ticket" not in answer.extra


def test_a_ticket_of_a_failed_request_is_gone() -> None:
    def fail(_: bytes, __: float | None) -> TailReply:
        raise TailUnavailable("x")

    tail = FakeTail(fail, waiting=[NumberedTicket(1), NumberedTicket(2)])
    with runtime(tail) as edge:
        edge.infer(image(1, UNSURE))
        assert tail.tickets == 1
        tail.behave = by_ticket
        assert edge.infer(image(1, UNSURE)).extra["ticket"] == 1.0
    assert tail.cipher is not None
    assert [int.from_bytes(seed, "big") for seed in tail.cipher.used] == [1, 2]


def test_a_policy_sees_what_a_ticket_saves() -> None:
    seen: list[DecisionContext] = []

    class Watching(CloudOnly):
        def decide(self, context: DecisionContext) -> Decision:
            seen.append(context)
            return super().decide(context)

    tail = FakeTail(by_ticket, waiting=[NumberedTicket(1)])
    with runtime(tail, Watching()) as edge:
        for _ in range(2):
            edge.infer(image(1, UNSURE))
        tail.waiting.append(NumberedTicket(2))
        edge.infer(image(1, UNSURE))
    at_cut = [c for c in seen if c.cut_here]
    assert [c.ticket for c in at_cut] == [True, False, True]
    assert at_cut[0].eval_s == at_cut[0].eval_online_s == at_cut[0].eval_total_s
    last = at_cut[2]
    assert (last.eval_online_s, last.eval_total_s) == pytest.approx((0.004, 0.020))
    assert last.eval_s == last.eval_online_s
    assert at_cut[1].eval_s == at_cut[1].eval_total_s
    assert [c.eval_s for c in seen if not c.cut_here] == [None] * (len(seen) - 3)


def test_a_deadline_that_only_a_ticket_can_meet() -> None:
    clock = FakeClock()
    offloads = Offloads(LatencyBook(settled=1), {2: 0.5})
    offloads.observe(2, 0.60, TailTimings(0.0, 0.50), clock())
    offloads.observe(2, 0.15, TailTimings(0.0, 0.05, ticket=True), clock())
    tail = FakeTail(by_ticket, waiting=[NumberedTicket(1)])
    with runtime(tail, DeadlineAware(THRESHOLDS), clock=clock, offloads=offloads) as edge:
        routes = [edge.infer(image(1, UNSURE), deadline_s=0.3).route for _ in range(2)]
    assert routes == ["tail", "exit2"]


def test_requests_are_known_to_the_ones_who_wait_for_quiet() -> None:
    activity = Activity()
    quiet: list[bool] = []

    def look(_: bytes, __: float | None) -> TailReply:
        quiet.append(activity.quiet(0.0))
        return reply()

    with runtime(FakeTail(look), activity=activity) as edge:
        assert activity.quiet(0.0)
        edge.infer(image(1, UNSURE))
        asyncio.run(edge.infer_async(image(1, UNSURE)))
        with pytest.raises(InputError):
            edge.infer(np.zeros((3, 3), np.uint8))
        assert activity.quiet(0.0)
    assert quiet == [False, False]
