"""Plain numbers for reports: quantiles, AUROC, the accuracy-offload curve. numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def accuracy(predicted: Ints, labels: Ints) -> float | None:
    """Share of equal labels, both (n,); None without images."""
    return float(np.mean(predicted == labels)) if len(labels) else None


def quantiles(seconds: Sequence[float] | Floats) -> dict[str, float | None]:
    """p50, p95 and p99 of latencies in seconds; None each without samples."""
    if not len(seconds):
        return {"p50": None, "p95": None, "p99": None}
    p50, p95, p99 = np.percentile(np.asarray(seconds, np.float64), [50, 95, 99])
    return {"p50": float(p50), "p95": float(p95), "p99": float(p99)}


def top_margin(scores: Floats) -> Floats:
    """Largest score less the second largest: (n, classes) -> (n,)."""
    ordered = np.sort(scores, axis=1)
    return np.asarray(ordered[:, -1] - ordered[:, -2])


def softmax(logits: Floats) -> Floats:
    """(n, classes) -> (n, classes)."""
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(e / e.sum(axis=1, keepdims=True))


def auroc(scores: Floats, labels: Ints) -> float | None:
    """Area under the ROC curve, one class against the rest, mean over classes.

    scores (n, classes), labels (n,). By ranks, ties counted half (the Mann-Whitney
    statistic). Classes without positives or without negatives are left out; None
    when none remains.
    """
    areas = []
    for c in range(scores.shape[1]):
        positive = labels == c
        count = int(positive.sum())
        if not 0 < count < len(labels):
            continue
        _, inverse, sizes = np.unique(scores[:, c], return_inverse=True, return_counts=True)
        last = np.cumsum(sizes)
        ranks = (last - (sizes - 1) / 2)[inverse]  # mean rank of equal scores, from 1
        rest = len(labels) - count
        areas.append((ranks[positive].sum() - count * (count + 1) / 2) / (count * rest))
    return float(np.mean(areas)) if areas else None


def early_answer(confidences: Floats, threshold: Floats) -> Ints:
    """Index of the first exit that is sure, or -1: (n, exits) and (exits,) -> (n,)."""
    sure = confidences >= threshold
    return np.where(sure.any(axis=1), sure.argmax(axis=1), -1)


def offload_curve(
    confidences: Floats, exit_labels: Ints, tail_labels: Ints, labels: Ints, thresholds: Sequence[float]
) -> list[dict[str, Any]]:
    """Accuracy against offloaded share, sweeping the exits' thresholds.

    confidences and exit_labels (n, exits), tail_labels and labels (n,), thresholds:
    the model's own, one per exit; the curve passes through them. A point answers
    from the first exit whose confidence reaches its threshold, and from the tail
    where none does. The last exit's threshold goes from 0 (nothing offloaded) to
    beyond 1; then, with that exit shut, the one before it, up to everything
    offloaded.
    """
    return [
        _point(confidences, exit_labels, tail_labels, labels, np.array(t))
        for t in _sweep(confidences, thresholds)
    ]


def _sweep(confidences: Floats, thresholds: Sequence[float]) -> list[list[float]]:
    """Threshold vectors with rising offloaded share, the model's own among them."""
    shut = float(np.nextafter(max(1.0, confidences.max(initial=1.0)), 2.0))
    now = [float(t) for t in thresholds]
    steps: list[list[float]] = []
    for last in reversed(range(len(now))):
        start = 0.0 if last == len(now) - 1 else now[last]
        reach = confidences[(confidences[:, :last] < now[:last]).all(axis=1), last]
        values = {start, now[last], shut}
        if len(reach):
            values |= set(np.quantile(reach, np.linspace(0, 1, 33)).tolist())
        steps += [[*now[:last], v, *now[last + 1 :]] for v in sorted(values) if v >= start]
        now[last] = shut
    return steps


def _point(
    confidences: Floats, exit_labels: Ints, tail_labels: Ints, labels: Ints, thresholds: Floats
) -> dict[str, Any]:
    chosen = early_answer(confidences, thresholds)
    early = np.take_along_axis(exit_labels, np.maximum(chosen, 0)[:, None], 1)[:, 0]
    predicted = np.where(chosen < 0, tail_labels, early)
    return {
        "thresholds": thresholds.tolist(),
        "offloaded_share": float(np.mean(chosen < 0)),
        "accuracy": float(np.mean(predicted == labels)),
    }


def gain_share(overall: float, best_exit: float, tail: float) -> float | None:
    """How much of what the tail gains over the best exit `overall` reaches; None without a gain."""
    return (overall - best_exit) / (tail - best_exit) if tail > best_exit else None
