"""How well an exit's confidence tells its right answers from its wrong ones. numpy only.

A score is higher where an exit is surer of itself. Its AUROC is the chance that a right answer has a
higher score than a wrong one (Hendrycks and Gimpel, ICLR 2017); its AURC is the mean error rate among the
surest answers, over all shares that may be answered (Geifman et al., "Bias-Reduced Uncertainty Estimation",
ICLR 2019), and says what an early exit is for: how wrong it is where it answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from blindtail.errors import DataError
from blindtail.train.calibrate import FloatArray, softmax

BoolArray = NDArray[np.bool_]


def probability(p: FloatArray) -> FloatArray:
    """The largest of the probabilities p, (n, classes)."""
    return np.asarray(p.max(axis=1))


def entropy(p: FloatArray) -> FloatArray:
    """1 - H(p) / log classes: 1 for one class alone, 0 for all alike (BranchyNet, ICPR 2016)."""
    held = np.where(p > 0, p, 1.0)
    return np.asarray(1.0 + (held * np.log(held)).sum(axis=1) / np.log(max(2, p.shape[1])))


def margin(p: FloatArray) -> FloatArray:
    """From the largest probability to the next."""
    if p.shape[1] < 2:
        return np.ones(len(p))
    top = np.sort(p, axis=1)
    return np.asarray(top[:, -1] - top[:, -2])


#: Scores by name, of probabilities (n, classes).
SCORES: Mapping[str, Callable[[FloatArray], FloatArray]] = MappingProxyType(
    {"probability": probability, "entropy": entropy, "margin": margin}
)


def auroc(scores: FloatArray, correct: BoolArray) -> float | None:
    """Chance that a right answer has the higher score, ties counted half; None where all are right or wrong.

    scores, correct  (n,)
    """
    right, wrong = int(correct.sum()), int((~correct).sum())
    if not right or not wrong:
        return None
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks = (ends - (counts - 1) / 2)[place]  # of equals, the mean
    return float((ranks[correct].sum() - right * (right + 1) / 2) / (right * wrong))


def aurc(scores: FloatArray, correct: BoolArray) -> float:
    """Mean over k of the error rate of the k surest answers; of equally sure ones, as if in random order.

    scores, correct  (n,). Raises `DataError` without any.
    """
    if not len(scores):
        raise DataError("confidence is judged by answers: there are none")
    _, place, counts = np.unique(-scores, return_inverse=True, return_counts=True)
    rate = np.bincount(place, ~correct) / counts  # of each group of equals
    return float((np.cumsum(rate[np.sort(place)]) / np.arange(1, len(scores) + 1)).mean())


def failure_prediction(
    logits: NDArray[np.float32], labels: NDArray[np.int64], temperature: float = 1.0
) -> dict[str, dict[str, float | None]]:
    """Both areas of every score, and the AURC of one that is never mistaken ("best"), for one exit.

    logits (n, classes), labels (n,)
    """
    p = softmax(logits, temperature)
    correct = np.asarray(logits.argmax(axis=1) == labels)
    found: dict[str, dict[str, float | None]] = {
        name: {"auroc": auroc(score(p), correct), "aurc": aurc(score(p), correct)}
        for name, score in SCORES.items()
    }
    return {**found, "best": {"auroc": None, "aurc": aurc(correct.astype(np.float64), correct)}}


__all__ = ["SCORES", "aurc", "auroc", "entropy", "failure_prediction", "margin", "probability"]
