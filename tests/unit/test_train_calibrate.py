"""Temperatures, calibration error and thresholds, against cases worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blindtail.errors import DataError
from blindtail.train.calibrate import (
    NEVER,
    accuracy_of,
    calibration_error,
    choose_thresholds,
    fit_temperature,
    negative_log_likelihood,
    route,
    softmax,
)


def calibrated_logits(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits whose softmax is the true distribution the labels are drawn from."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0.0, 2.0, (n, 5))
    labels = np.array([rng.choice(5, p=p) for p in softmax(logits)])
    return logits, labels


@pytest.mark.parametrize("factor", [0.3, 1.0, 4.0])
def test_the_temperature_that_was_applied_is_found(factor: float) -> None:
    logits, labels = calibrated_logits(4_000)
    found = fit_temperature(logits * factor, labels)
    assert found == pytest.approx(factor, rel=0.06)
    best = negative_log_likelihood(logits * factor, labels, found)
    for other in (found * 0.98, found * 1.02):
        assert best <= negative_log_likelihood(logits * factor, labels, other)


def test_scaling_improves_calibration() -> None:
    logits, labels = calibrated_logits(4_000)
    sharp = logits * 4.0
    before = calibration_error(softmax(sharp), labels)
    after = calibration_error(softmax(sharp, fit_temperature(sharp, labels)), labels)
    assert before > 0.1
    assert after < 0.02


def test_calibration_error_by_hand() -> None:
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]])
    labels = np.array([0, 1, 0, 0])
    # two images at 0.9, half right: 0.4 off; two at 0.6, all right: 0.4 off
    assert calibration_error(probabilities, labels) == pytest.approx(0.4)


def test_softmax_of_huge_logits_is_finite() -> None:
    assert softmax(np.array([[1e30, -1e30]])).tolist() == [[1.0, 0.0]]


def case(seed: int, n: int = 400, exits: int = 2) -> tuple[list, list, np.ndarray]:
    """Random confidences that mean something: an exit is right with its confidence's probability."""
    rng = np.random.default_rng(seed)
    ease = rng.random(n)
    confidences = [1 / (1 + np.exp(3 - 6 * ease - rng.normal(0, 1 / (i + 1), n))) for i in range(exits)]
    correct = [rng.random(n) < 0.3 + 0.7 * c for c in confidences]
    return confidences, correct, rng.random(n) < 0.95


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    share=st.sampled_from([0.0, 0.1, 0.3, 0.6, 1.0]),
    exits=st.integers(1, 3),
    steps=st.sampled_from([None, 4, 20]),
)
def test_the_share_is_met_and_never_exceeded(seed: int, share: float, exits: int, steps: int | None) -> None:
    confidences, correct, tail = case(seed, exits=exits)
    if steps is not None:  # many ties
        confidences = [np.round(c * steps) / steps for c in confidences]
    thresholds = choose_thresholds(confidences, correct, tail, share=share)
    chosen = route(confidences, thresholds)
    offloaded = float((chosen == exits).mean())
    assert offloaded <= share + 1e-12
    if steps is None and exits == 1:
        assert offloaded == pytest.approx(share, abs=0.0026)
    assert all(0.0 <= t <= NEVER for t in thresholds)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_early_exits_cost_no_more_than_the_tolerance(seed: int) -> None:
    confidences, correct, tail = case(seed)
    alone = choose_thresholds(confidences[1:], correct[1:], tail, share=0.3)
    without = accuracy_of(route(confidences[1:], alone), correct[1:], tail)
    both = choose_thresholds(confidences, correct, tail, share=0.3, tolerance=0.1)
    gain = max(float(tail.mean() - correct[1].mean()), 0.0)
    assert accuracy_of(route(confidences, both), correct, tail) >= without - 0.1 * gain - 1e-12


def test_a_perfect_first_exit_takes_all_it_can() -> None:
    """Exit 1 is always right above 0.5, so that its threshold falls to about 0.5."""
    rng = np.random.default_rng(0)
    first = rng.random(2_000)
    second = rng.random(2_000)
    thresholds = choose_thresholds(
        [first, second],
        [first > 0.5, rng.random(2_000) < 0.9],
        np.ones(2_000, dtype=bool),
        share=0.2,
    )
    assert thresholds[0] < 0.55


def test_route_takes_the_first_exit_that_is_sure() -> None:
    confidences = [np.array([0.9, 0.2, 0.2]), np.array([0.1, 0.8, 0.3])]
    assert route(confidences, (0.5, 0.5)).tolist() == [0, 1, 2]
    assert route(confidences, (NEVER, 0.0)).tolist() == [1, 1, 1]


def test_no_images_is_an_error() -> None:
    empty = np.zeros(0)
    with pytest.raises(DataError):
        fit_temperature(np.zeros((0, 3)), empty.astype(int))
    with pytest.raises(DataError):
        choose_thresholds([empty], [empty.astype(bool)], empty.astype(bool), share=0.3)
