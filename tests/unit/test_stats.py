"""Numbers of reports against independent computations."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from edge import stats


@pytest.mark.parametrize("ties", [False, True])
def test_auroc_is_the_mean_of_one_against_the_rest(ties: bool) -> None:
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 4, 200)
    scores = rng.normal(size=(200, 4)) + 1.5 * np.eye(4)[labels]
    if ties:
        scores = np.round(scores)
    expected = np.mean([roc_auc_score(labels == c, scores[:, c]) for c in range(4)])
    assert stats.auroc(scores, labels) == pytest.approx(expected, abs=1e-12)


def test_auroc_without_both_kinds_is_not_defined() -> None:
    assert stats.auroc(np.zeros((3, 2)), np.array([0, 0, 0])) is None


def test_quantiles_and_accuracy_without_samples() -> None:
    assert stats.quantiles([]) == {"p50": None, "p95": None, "p99": None}
    assert stats.accuracy(np.zeros(0, np.int64), np.zeros(0, np.int64)) is None
    assert stats.quantiles([0.1, 0.2, 0.3])["p50"] == pytest.approx(0.2)


def test_margin_is_best_less_second() -> None:
    assert stats.top_margin(np.array([[1.0, 5.0, 3.0], [2.0, 2.0, 0.0]])).tolist() == [2.0, 0.0]


def test_offload_curve_runs_from_nothing_to_everything() -> None:
    confidences = np.array([[0.9, 0.95], [0.3, 0.6], [0.2, 0.4]])
    exit_labels = np.array([[0, 0], [1, 0], [1, 1]])
    tail, truth = np.array([0, 1, 0]), np.array([0, 1, 0])
    # Image 0 leaves at exit 1, image 1 at exit 2 (wrong), image 2 is offloaded (right).
    assert stats.early_answer(confidences, np.array([0.5, 0.5])).tolist() == [0, 1, -1]
    points = stats.offload_curve(confidences, exit_labels, tail, truth, [0.5, 0.5])
    assert points[0]["offloaded_share"] == 0.0
    assert (points[-1]["offloaded_share"], points[-1]["accuracy"]) == (1.0, 1.0)
    shares = [p["offloaded_share"] for p in points]
    assert shares == sorted(shares)
    own = [p for p in points if p["thresholds"] == [0.5, 0.5]]
    assert [(p["offloaded_share"], p["accuracy"]) for p in own] == [pytest.approx((1 / 3, 2 / 3))]


def test_the_curve_of_many_images_rises_in_share() -> None:
    rng = np.random.default_rng(0)
    confidences = rng.uniform(size=(300, 3))
    labels = rng.integers(0, 5, 300)
    points = stats.offload_curve(confidences, rng.integers(0, 5, (300, 3)), labels, labels, [0.9, 0.8, 0.6])
    shares = [p["offloaded_share"] for p in points]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)
    assert [0.9, 0.8, 0.6] in [p["thresholds"] for p in points]


def test_gain_share() -> None:
    assert stats.gain_share(0.92, 0.90, 0.925) == pytest.approx(0.8)
    assert stats.gain_share(0.92, 0.90, 0.90) is None
