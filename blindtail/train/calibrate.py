"""Temperatures and thresholds of early exits, from validation data. numpy only.

Temperature scaling and the expected calibration error: Guo et al., "On
Calibration of Modern Neural Networks", ICML 2017.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blindtail.errors import DataError

FloatArray = NDArray[np.float64]

#: A threshold that no confidence reaches: this exit never answers.
NEVER = 1.01


def softmax(logits: NDArray[Any], temperature: float = 1.0) -> FloatArray:
    """(n, classes) -> probabilities, in float64."""
    z = np.asarray(logits, np.float64) / temperature
    z = np.exp(z - z.max(axis=1, keepdims=True))
    return np.asarray(z / z.sum(axis=1, keepdims=True))


def negative_log_likelihood(logits: NDArray[Any], labels: NDArray[np.int64], temperature: float) -> float:
    """Mean over images, in nats."""
    z = np.asarray(logits, np.float64) / temperature
    z = z - z.max(axis=1, keepdims=True)
    return float(np.mean(np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(labels)), labels]))


def fit_temperature(logits: NDArray[Any], labels: NDArray[np.int64]) -> float:
    """The temperature in [0.05, 20] of the smallest negative log-likelihood.

    It is convex in 1 / temperature, hence has one minimum over log(temperature):
    a golden-section search finds it to 1e-4. Raises `DataError` without images.
    """
    if len(labels) == 0:
        raise DataError("calibration needs validation images")
    ratio = (math.sqrt(5.0) - 1.0) / 2.0
    low, high = math.log(0.05), math.log(20.0)
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    loss_a = negative_log_likelihood(logits, labels, math.exp(a))
    loss_b = negative_log_likelihood(logits, labels, math.exp(b))
    while high - low > 1e-4:
        if loss_a < loss_b:
            high, b, loss_b = b, a, loss_a
            a = high - ratio * (high - low)
            loss_a = negative_log_likelihood(logits, labels, math.exp(a))
        else:
            low, a, loss_a = a, b, loss_b
            b = low + ratio * (high - low)
            loss_b = negative_log_likelihood(logits, labels, math.exp(b))
    return math.exp((low + high) / 2.0)


def calibration_error(probabilities: FloatArray, labels: NDArray[np.int64], bins: int = 15) -> float:
    """Expected calibration error: mean |accuracy - confidence| over equal-width bins, by their share."""
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    total = 0.0
    for k in range(bins):
        inside = which == k
        if inside.any():
            total += inside.mean() * abs(float(correct[inside].mean()) - float(confidence[inside].mean()))
    return float(total)


def choose_thresholds(
    confidences: Sequence[FloatArray],
    exits_correct: Sequence[NDArray[np.bool_]],
    tail_correct: NDArray[np.bool_],
    *,
    share: float,
    tolerance: float = 0.02,
) -> tuple[float, ...]:
    """One confidence threshold per exit, so that `share` of the images, never more, reach the tail.

    confidences, exits_correct  per exit, (n,), in the order of the exits
    tail_correct                (n,), the clear tail's verdicts
    tolerance                   part of the tail's gain over the last exit that
                                earlier exits may cost together

    1. Earlier exits never answer. The last exit's threshold is the confidence
       that `share` of the images stay below. This gives accuracy A.
    2. From the first exit on: lower its threshold through 101 quantiles of its
       confidence, from the top, as long as accuracy stays at A - `tolerance` *
       gain or above; stop at the first that falls below, since a lower one that
       does not would be luck. Each time, the last threshold is set again so that `share`
       of all images reach the tail.

    So the offloads are spent where the last exit is least sure, and an earlier
    exit answers only what it answers at almost no cost. Fewer than `share`
    are offloaded when confidences tie at the threshold (an image is offloaded
    when it lies strictly below), or when earlier exits leave fewer. Raises
    `DataError` without images.
    """
    count = len(tail_correct)
    if count == 0:
        raise DataError("choosing thresholds needs validation images")
    last = len(confidences) - 1
    wanted = int(share * count)

    def complete(earlier: list[float]) -> list[float]:
        """Thresholds of the earlier exits -> of all exits."""
        waiting = np.ones(count, dtype=bool)
        for i in range(last):
            waiting &= confidences[i] < earlier[i]
        pool = np.sort(confidences[last][waiting])
        return [*earlier, NEVER if len(pool) <= wanted else float(pool[wanted])]

    def accuracy(thresholds: list[float]) -> float:
        return accuracy_of(route(confidences, thresholds), exits_correct, tail_correct)

    earlier = [NEVER] * last
    gain = float(tail_correct.mean()) - float(exits_correct[last].mean())
    floor = accuracy(complete(earlier)) - tolerance * max(gain, 0.0)
    for i in range(last):
        for candidate in np.unique(np.quantile(confidences[i], np.linspace(0.0, 1.0, 101)))[::-1]:
            lower = [*earlier[:i], float(candidate), *earlier[i + 1 :]]
            if accuracy(complete(lower)) < floor:
                break
            earlier = lower
    return tuple(complete(earlier))


def route(confidences: Sequence[FloatArray], thresholds: Sequence[float]) -> NDArray[np.int64]:
    """Which exit answers each image, (n,): the first sure enough; len(thresholds) = the tail."""
    chosen = np.full(len(confidences[0]), len(thresholds), dtype=np.int64)
    for i in reversed(range(len(thresholds))):
        chosen[confidences[i] >= thresholds[i]] = i
    return chosen


def accuracy_of(
    chosen: NDArray[np.int64],
    exits_correct: Sequence[NDArray[np.bool_]],
    tail_correct: NDArray[np.bool_],
) -> float:
    """Accuracy when each image is answered by its `chosen` exit, or by the tail."""
    table = np.stack([*exits_correct, tail_correct])  # (exits + 1, n)
    return float(table[chosen, np.arange(len(chosen))].mean())
