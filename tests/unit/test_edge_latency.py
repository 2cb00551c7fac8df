"""Latencies start at priors, follow measurements, and recover after a bad spell."""

from __future__ import annotations

import threading

import pytest

from blindtail.records import LatencyEstimate
from edge.latency import CENSORED_FACTOR, LatencyBook
from edge.priors import priors_of
from tests.edge_fakes import bundle_of

PRIOR = LatencyEstimate(0.2, 0.4)


def book(**settings: float) -> LatencyBook:
    return LatencyBook({"offload": PRIOR}, **settings)  # type: ignore[arg-type]


def test_without_samples_the_prior_holds() -> None:
    assert book().estimate("offload", 0.0) == PRIOR
    assert book().estimate("unknown", 0.0) == LatencyEstimate(0.0, 0.0)


def test_quantiles_are_those_of_the_window() -> None:
    b = book()
    for i in range(1, 101):
        b.observe("offload", i / 1000, i / 100)
    estimate = b.estimate("offload", 1.0)
    assert estimate == LatencyEstimate(0.050, 0.095, 100)


def test_one_lucky_sample_does_not_outweigh_the_prior() -> None:
    b = book()
    b.observe("offload", 0.001, 0.0)
    assert b.estimate("offload", 0.0).p95_s == PRIOR.p95_s
    for i in range(10):
        b.observe("offload", 0.001, float(i) / 10)
    assert b.estimate("offload", 1.0).p95_s == 0.001


def test_one_slow_sample_counts_at_once() -> None:
    b = book()
    b.observe("offload", 3.0, 0.0)
    assert b.estimate("offload", 0.0).p95_s == 3.0


def test_the_window_forgets_by_count_and_by_age() -> None:
    b = book(window=10)
    for i in range(10):
        b.observe("offload", 5.0, i / 10)
    for i in range(10):
        b.observe("offload", 0.1, 1 + i / 10)
    assert b.estimate("offload", 2.0).p95_s == 0.1
    assert b.estimate("offload", 2.0 + 121).samples == 0


def test_a_bad_spell_decays_towards_the_prior_while_nothing_is_tried() -> None:
    b = book(half_life_s=5.0)
    for i in range(20):
        b.observe("offload", 4.0, i / 10)
    highs = [b.estimate("offload", 2.0 + t).p95_s for t in (0, 5, 10, 20, 40)]
    assert highs == sorted(highs, reverse=True)
    assert highs[0] > 3.5
    assert highs[-1] < 0.45


def test_a_good_sample_after_a_silence_ends_the_spell() -> None:
    b = book(half_life_s=5.0)
    for i in range(50):
        b.observe("offload", 4.0, i / 10)
    b.observe("offload", 0.15, 30.0)
    estimate = b.estimate("offload", 30.0)
    assert estimate.samples == 1
    assert estimate.p95_s <= PRIOR.p95_s


def test_a_bad_sample_after_a_silence_renews_it() -> None:
    b = book(half_life_s=5.0)
    b.observe("offload", 4.0, 0.0)
    b.observe("offload", 4.0, 30.0)
    assert b.estimate("offload", 30.0).p95_s == 4.0


def test_a_low_estimate_does_not_rise_by_itself() -> None:
    b = book()
    for i in range(20):
        b.observe("offload", 0.05, i / 10)
    assert b.estimate("offload", 60.0).p95_s == 0.05


@pytest.mark.parametrize(("seconds", "expected"), [(1.0, CENSORED_FACTOR), (0.01, PRIOR.p95_s)])
def test_what_was_given_up_counts_as_longer_than_it_was_given(seconds: float, expected: float) -> None:
    b = book()
    b.observe("offload", seconds, 0.0, censored=True)
    assert b.estimate("offload", 0.0).p95_s == expected


def test_steps_in_a_row_add_up() -> None:
    b = LatencyBook({"a": LatencyEstimate(0.1, 0.2), "b": LatencyEstimate(0.3, 0.5)})
    both = b.sum(("a", "b"), 0.0)
    assert [both.p50_s, both.p95_s] == pytest.approx([0.4, 0.7])
    assert b.sum((), 0.0) == LatencyEstimate(0.0, 0.0, 0)


def test_threads_may_observe_and_ask_at_once() -> None:
    b = book(window=1000)

    def work() -> None:
        for i in range(250):
            b.observe("offload", 0.1, i / 250)
            b.estimate("offload", i / 250)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert b.estimate("offload", 1.0).samples == 1000


def test_priors_follow_bytes_rate_and_the_predicted_evaluation() -> None:
    bundle = bundle_of()
    slow, fast = priors_of(bundle, 1e6)["offload2"], priors_of(bundle, 100e6)["offload2"]
    spec = bundle.cuts[2]
    wire = (spec.uplink_bytes + spec.reply_bytes) * 8
    assert slow.p50_s - fast.p50_s == pytest.approx(wire / 1e6 - wire / 100e6)
    assert slow.samples == 0
    assert slow.p95_s > slow.p50_s
    object.__setattr__(bundle, "metrics", {"predicted_eval_s": {"2": 5.0}})
    assert priors_of(bundle, 100e6)["offload2"].p50_s > 5.0
    assert {"stage0", "exit1", "encrypt", "decrypt"} <= set(priors_of(bundle))
