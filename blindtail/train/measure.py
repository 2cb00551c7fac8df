"""What a trained split network is worth: accuracies, calibration, and the accuracy-offload curve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blindtail.models.data import Images
from blindtail.models.split import SplitModel
from blindtail.train.calibrate import (
    FloatArray,
    accuracy_of,
    calibration_error,
    choose_thresholds,
    fit_temperature,
    route,
    softmax,
)

#: Shares of images offloaded at which the accuracy-offload curve is given.
CURVE_SHARES = tuple(round(0.05 * k, 2) for k in range(21))


@dataclass(frozen=True)
class Verdicts:
    """One split's logits: per exit (n, classes), and the (last) tail's; labels (n,)."""

    exits: tuple[NDArray[np.float32], ...]
    tail: NDArray[np.float32]
    labels: NDArray[np.int64]

    @classmethod
    def of(cls, model: SplitModel, data: Images) -> Verdicts:
        logits = [t.numpy() for t in model.logits(data.pixels)]
        return cls(tuple(logits[: len(model.exits_after)]), logits[-1], data.labels)

    def take(self, count: int) -> Verdicts:
        """The first `count` images."""
        return Verdicts(tuple(e[:count] for e in self.exits), self.tail[:count], self.labels[:count])

    @property
    def exits_correct(self) -> tuple[NDArray[np.bool_], ...]:
        return tuple(e.argmax(axis=1) == self.labels for e in self.exits)

    @property
    def tail_correct(self) -> NDArray[np.bool_]:
        correct: NDArray[np.bool_] = self.tail.argmax(axis=1) == self.labels
        return correct

    def confidences(self, temperatures: Sequence[float]) -> tuple[FloatArray, ...]:
        """Per exit (n,): the largest probability after temperature scaling."""
        pairs = zip(self.exits, temperatures, strict=True)
        return tuple(softmax(logits, t).max(axis=1) for logits, t in pairs)


@dataclass(frozen=True)
class Calibration:
    """Per exit: temperature, and the default confidence threshold."""

    temperatures: tuple[float, ...]
    thresholds: tuple[float, ...]

    @classmethod
    def fit(cls, validation: Verdicts, offload_share: float) -> Calibration:
        """See `fit_temperature` and `choose_thresholds`."""
        temperatures = tuple(fit_temperature(e, validation.labels) for e in validation.exits)
        thresholds = choose_thresholds(
            validation.confidences(temperatures),
            validation.exits_correct,
            validation.tail_correct,
            share=offload_share,
        )
        return cls(temperatures, thresholds)


def accuracies(verdicts: Verdicts) -> dict[str, float]:
    """Accuracy of every exit alone ("exit1", ...) and of the tail for all images ("tail")."""
    rows = {f"exit{i + 1}": float(c.mean()) for i, c in enumerate(verdicts.exits_correct)}
    return {**rows, "tail": float(verdicts.tail_correct.mean())}


def curve(verdicts: Verdicts, temperatures: Sequence[float]) -> list[dict[str, float]]:
    """Accuracy when the last exit's least confident images are offloaded, at each of `CURVE_SHARES`."""
    confidence = verdicts.confidences(temperatures)[-1]
    order = np.argsort(confidence, kind="stable")
    exit_correct, tail_correct = verdicts.exits_correct[-1], verdicts.tail_correct
    rows = []
    for share in CURVE_SHARES:
        offloaded = order[: round(share * len(order))]
        correct = exit_correct.copy()
        correct[offloaded] = tail_correct[offloaded]
        rows.append({"share": share, "accuracy": float(correct.mean())})
    return rows


def routed(verdicts: Verdicts, calibration: Calibration) -> dict[str, Any]:
    """What the default thresholds do: shares per route, accuracy, and the part of the tail's gain kept.

    `gain_kept` = (accuracy - best exit) / (tail for all - best exit); None when
    the tail gains nothing on these images.
    """
    chosen = route(verdicts.confidences(calibration.temperatures), calibration.thresholds)
    accuracy = accuracy_of(chosen, verdicts.exits_correct, verdicts.tail_correct)
    best = max(float(c.mean()) for c in verdicts.exits_correct)
    gain = float(verdicts.tail_correct.mean()) - best
    names = [*(f"exit{i + 1}" for i in range(len(verdicts.exits))), "tail"]
    return {
        "images": len(chosen),
        "shares": {name: float((chosen == i).mean()) for i, name in enumerate(names)},
        "accuracy": accuracy,
        "tail_gain": gain,
        "gain_kept": (accuracy - best) / gain if gain > 0 else None,
    }


def calibration_errors(verdicts: Verdicts, temperatures: Sequence[float]) -> dict[str, dict[str, float]]:
    """Expected calibration error of each exit, before and after temperature scaling."""
    return {
        f"exit{i + 1}": {
            "before": calibration_error(softmax(logits), verdicts.labels),
            "after": calibration_error(softmax(logits, t), verdicts.labels),
        }
        for i, (logits, t) in enumerate(zip(verdicts.exits, temperatures, strict=True))
    }
