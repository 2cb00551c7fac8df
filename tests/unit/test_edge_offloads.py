"""What an offload takes with a ticket and without: one window for both, and what a ticket saves apart."""

from __future__ import annotations

import pytest

from blindtail.records import LatencyEstimate, TailTimings
from edge.latency import LatencyBook
from edge.offloads import Offloads
from edge.priors import predicted_eval_s, priors_of
from tests.edge_fakes import bundle_of

PRIOR = LatencyEstimate(0.1, 0.2)


def book(predicted_s: float = 0.05) -> Offloads:
    return Offloads(LatencyBook({"offload1": PRIOR}, settled=1), {1: predicted_s})


def timings(eval_s: float, ticket: bool = False) -> TailTimings:
    return TailTimings(0.0, eval_s, ticket=ticket)


def test_both_start_from_the_prediction() -> None:
    offloads = book()
    assert (offloads.eval_online_s(1), offloads.eval_total_s(1), offloads.saved_s(1)) == (0.05, 0.05, 0.0)
    assert offloads.estimate(1, True, 0.0) == offloads.estimate(1, False, 0.0) == PRIOR
    bundle = bundle_of()
    latencies = LatencyBook(priors_of(bundle))
    assert Offloads.of(bundle, latencies).eval_total_s(2) == predicted_eval_s(bundle, 2) > 0


def test_a_ticket_takes_off_what_it_saves() -> None:
    offloads = book()
    offloads.observe(1, 0.040, timings(0.020), 1.0)
    offloads.observe(1, 0.025, timings(0.005, ticket=True), 1.1)
    assert offloads.saved_s(1) == pytest.approx(0.015)
    without, by_ticket = offloads.estimate(1, False, 1.1), offloads.estimate(1, True, 1.1)
    # The answer by ticket would have taken as long as the other without it.
    assert (without.p50_s, without.p95_s) == pytest.approx((0.040, 0.040))
    assert (by_ticket.p50_s, by_ticket.p95_s) == pytest.approx((0.025, 0.025))
    assert by_ticket.samples == without.samples == 2


def test_both_are_smoothed_apart() -> None:
    offloads = book()
    for eval_s in (0.010, 0.020):
        offloads.observe(1, 0.1, timings(eval_s), 1.0)
    for eval_s in (0.001, 0.002):
        offloads.observe(1, 0.1, timings(eval_s, ticket=True), 1.0)
    assert offloads.eval_total_s(1) == pytest.approx(0.012)
    assert offloads.eval_online_s(1) == pytest.approx(0.0012)


def test_a_slow_link_is_noticed_by_either() -> None:
    offloads = book()
    offloads.observe(1, 0.040, timings(0.020), 1.0)
    for _ in range(20):
        offloads.observe(1, 0.525, timings(0.005, ticket=True), 1.2)
    assert offloads.estimate(1, False, 1.2).p50_s == pytest.approx(0.540)
    offloads.gave_up(1, 1.0, 1.3)
    assert offloads.estimate(1, True, 1.3).p95_s > 0.5


def test_an_offload_never_takes_less_than_its_evaluation() -> None:
    offloads = book()
    offloads.observe(1, 0.30, timings(0.25), 1.0)
    offloads.observe(1, 0.02, timings(0.01, ticket=True), 1.0)
    offloads.observe(1, 0.02, timings(0.01), 1.0)
    found = offloads.estimate(1, True, 1.0)
    assert 0.01 <= found.p50_s <= found.p95_s
    # A ticket that saves nothing (a busy cell) never makes an offload longer.
    slow = book()
    slow.observe(1, 0.02, timings(0.01), 1.0)
    slow.observe(1, 0.03, timings(0.02, ticket=True), 1.0)
    assert slow.saved_s(1) == 0.0
    assert slow.estimate(1, True, 1.0) == slow.estimate(1, False, 1.0)


def test_a_cloud_that_does_not_keep_up_is_not_counted_on() -> None:
    offloads = book()
    offloads.observe(1, 0.040, timings(0.020), 1.0)
    offloads.observe(1, 0.025, timings(0.005, ticket=True), 1.0, sent=True)
    assert offloads.estimate(1, True, 1.0).p95_s == pytest.approx(0.025)
    offloads.observe(1, 0.040, timings(0.020), 1.0, sent=True)
    once = offloads.estimate(1, True, 1.0)
    assert (once.p50_s, once.p95_s) == pytest.approx((0.025, 0.040))
    for _ in range(4):
        offloads.observe(1, 0.040, timings(0.020), 1.0, sent=True)
    assert offloads.estimate(1, True, 1.0) == offloads.estimate(1, False, 1.0)
    # Nobody may be offloading because of that: it is tried again after a while.
    assert offloads.estimate(1, True, 31.0).p95_s < offloads.estimate(1, False, 31.0).p95_s
