"""How often noise changes which logit is largest, from the margins of calibration data.

Each logit's error is taken as Gaussian with the same standard deviation s. A logit that is d
below the largest overtakes it when the difference of their errors exceeds d: that difference
deviates by at most 2 s, whatever the two have in common, so the chance is at most Q(d / 2 s),
and a row's is at most the sum over its logits.

The rows are a sample of what devices will see: two standard errors of its mean are added, and
there have to be three times as many rows as one in a share, so that a share that no row shows is
still below it (the rule of three, 95%).
"""

from __future__ import annotations

import math

import numpy as np

from blindtail.errors import ModelError
from blindtail.he.layers import FloatArray
from blindtail.he.objective import DISAGREEMENT

#: Halvings of the interval in which the largest deviation lies: nine digits.
_HALVINGS = 30
#: Deviations beyond which a Gaussian's tail is nothing (2e-16).
_FAR = 8.2


def disagreement(logits: FloatArray, deviation: float) -> float:
    """Share of rows (n, classes) whose largest logit such errors change, at most, as expected.

    deviation  standard deviation of each logit's error, in logits
    """
    return float(_chances(_gaps(logits), deviation).mean())


def largest_deviation(logits: FloatArray, share: float) -> float:
    """The largest standard deviation of errors by which at most `share` of images like these rows change
    their largest logit.

    logits  of calibration data, (n, classes), exact; infinite is returned for a single class

    Raises `ModelError` for fewer rows than show such a share, and where ties alone exceed it.
    """
    if len(logits) * share < 3:
        raise ModelError(
            f"{DISAGREEMENT} <= {share:g} is judged by the margins of at least {math.ceil(3 / share):,} rows "
            f"of calibration data, and there are {len(logits):,}: give more of it, or allow more"
        )
    gaps = _gaps(logits)
    if not gaps.size:
        return math.inf
    high = float(gaps.max()) / 2
    if not high or _share(gaps, high * 2.0**-_HALVINGS) > share:
        ties = float((gaps.min(axis=1) <= high * 2.0**-_HALVINGS).mean())
        raise ModelError(
            f"no errors are small enough for {DISAGREEMENT} <= {share:g}: of {ties:.2%} of the calibration "
            "data two logits are the largest; train longer, or allow more"
        )
    low = high * 2.0**-_HALVINGS
    while _share(gaps, high) <= share:
        low, high = high, 2 * high  # all rows are that sure of themselves
    for _ in range(_HALVINGS):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if _share(gaps, middle) <= share else (low, middle)
    return low


def _gaps(logits: FloatArray) -> FloatArray:
    """From the largest logit to each of the others, (n, classes - 1)."""
    ordered = np.sort(np.asarray(logits, np.float64), axis=1)
    return ordered[:, -1:] - ordered[:, :-1]


def _share(gaps: FloatArray, deviation: float) -> float:
    """Of the images that rows are a sample of."""
    chances = _chances(gaps, deviation)
    return float(chances.mean() + 2 * chances.std() / math.sqrt(len(chances)))


def _chances(gaps: FloatArray, deviation: float) -> FloatArray:
    """Of each row."""
    far = gaps / (2 * deviation)
    rows, columns = np.nonzero(far < _FAR)
    chances = np.fromiter(
        (math.erfc(at / math.sqrt(2)) / 2 for at in far[rows, columns].tolist()), np.float64, len(rows)
    )
    return np.minimum(np.bincount(rows, chances, len(gaps)), 1.0)


__all__ = ["disagreement", "largest_deviation"]
