"""The stability gate: do the ranges of a tail hold on data that they were not measured on?

A square doubles the logarithm of what goes in. Through a chain of squares a value
slightly outside the range seen in calibration is far outside it at the end, and
ranges that grow from map to map soon grow doubly exponentially ("escaping
activations": Garimella et al., "Sisyphus: A Cautionary Tale of Using Low-Degree
Polynomial Activations in Privacy-Preserving Deep Learning", 2021). An encrypted
value far outside its range wraps around the modulus, and the answer is plainly wrong.

Measured for each layer, before and after every activation: max |x| and its 99.9%
quantile on calibration data; max |x| on held-out data over that of calibration; the
growth from map to map; and the slope of log max |x| over the maps by least squares.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import pairwise
from typing import Any

import numpy as np

from blindtail.errors import ModelError
from blindtail.he.layers import Affine, FloatArray, Layer, outputs
from blindtail.he.scales import HEADROOM, LIKE_HEADROOM
from blindtail.he.spec import TailSpec

_log = logging.getLogger(__name__)

#: Held-out over calibrated range beyond which nothing keeps values from wrapping: |value| * scale lies below
#: q / `HEADROOM` on calibration data, and q / 2 is the wrap. The logits always use all of that, and so
#: does a square whose scale is the largest that fits: what a map gives may then grow by the square
#: root. Mostly it takes more, since a message's coefficients are smaller than its largest slot.
ESCAPE_RATIO = HEADROOM / 2
#: Half of that room, in bits.
WARN_RATIO = math.sqrt(ESCAPE_RATIO)
#: Max over 99.9% quantile of a map. Normally distributed values have 1.3 to 1.6; trained tails that lose
#: nothing on held-out data had at most 3. Beyond, a few images set the range: the next one of their
#: kind is as likely to go far beyond it. Never more than a warning by itself, since one loud
#: channel among a thousand quiet ones looks the same.
WARN_PEAK = 4.0
#: Slopes of ln max |x| for each map, a factor of 7 and of 20. Measured on 90 chains of x^2 trained on the
#: digits and on Fashion-MNIST (2 to 10 maps, with and without batch norm): those that came within two
#: points of the best had at most 1.8, those that lost more than ten nearly all 2.2 and more. All these
#: bounds together refused none of the former and warned of one; of the latter they refused 32 and
#: warned of 5 in 40, and the others had collapsed or were under-trained. 2.5 or 4 for the
#: second bound, 3 or 6 for the peak change one or two verdicts in 90.
WARN_SLOPE, ESCAPE_SLOPE = 2.0, 3.0
#: Maps that make a trend. Between two, the slope says how weights are shared out among them, no more.
TREND_MAPS = 3
#: Every fifth row of calibration data is kept aside where no held-out data is given, if that leaves
#: this many: the largest value of fewer rows is chance.
KEPT_ASIDE, LEAST_ROWS = 5, 20
_QUANTILE = 0.999
#: Smaller ranges count as this: a layer that gives nothing but zeros has no logarithm.
_FLOOR = 2.0**-40

#: An activation or logits this far beyond what was calibrated are out of range at the edge: as much as a
#: tail that takes the place of an older one may use (`blindtail.he.scales.LIKE_HEADROOM`).
RANGE_MARGIN = HEADROOM / LIKE_HEADROOM

WAYS_OUT = (
    "add a range penalty in training, normalise before the activation (batch norm), use fewer squares, "
    "or calibrate on more and more varied images"
)


class Verdict(StrEnum):
    """What the gate says of a layer, or of a tail: the worst of its layers'."""

    OK = "ok"
    WARN = "warn"
    ESCAPES = "escapes"


_ORDER = list(Verdict)


@dataclass(frozen=True)
class LayerRange:
    """What one layer gives out. Infinite where it overflowed or was undefined.

    largest, quantile  max |x| and the 99.9% quantile of |x| on calibration data
    held_out           max |x| on held-out data; None without any
    growth             of a map: its range over that of the map before; None for others
    problem            what is wrong, for people; empty when the verdict is ok
    """

    name: str
    activation: bool
    largest: float
    quantile: float
    held_out: float | None
    growth: float | None
    verdict: Verdict
    problem: str

    @property
    def ratio(self) -> float | None:
        """Held-out over calibrated range; None without held-out data."""
        return None if self.held_out is None else _over(self.held_out, self.largest)

    @property
    def peak(self) -> float:
        """The largest value seen over the calibrated quantile."""
        return _over(max(self.largest, self.held_out or 0.0), self.quantile)

    def to_json(self) -> dict[str, Any]:
        """Strict JSON: null for what is not finite, or not known."""
        numbers = {
            "largest": self.largest,
            "quantile": self.quantile,
            "held_out": self.held_out,
            "ratio": self.ratio,
            "growth": self.growth,
        }
        kind = "activation" if self.activation else "map"
        return {
            "name": self.name,
            "kind": kind,
            **{key: _plain(value) for key, value in numbers.items()},
            "verdict": self.verdict.value,
            "problem": self.problem,
        }


@dataclass(frozen=True)
class Stability:
    """The gate's findings for one tail.

    slope     of ln range over the maps, each one step; None with fewer than two. Infinite
              when some range is
    rows      of calibration data, and of held-out data (0 = too few to keep any aside)
    kept      True when the held-out rows are a part of the calibration data, kept aside
    """

    layers: tuple[LayerRange, ...]
    slope: float | None
    rows: tuple[int, int]
    kept: bool

    @property
    def verdict(self) -> Verdict:
        return max((layer.verdict for layer in self.layers), key=_ORDER.index)

    @property
    def problems(self) -> tuple[LayerRange, ...]:
        """Layers that are not ok, those that escape first, else in their order."""
        found = [layer for layer in self.layers if layer.verdict is not Verdict.OK]
        return tuple(sorted(found, key=lambda layer: -_ORDER.index(layer.verdict)))

    def line(self) -> str:
        """The findings in one line."""
        ratios = [layer.ratio for layer in self.layers if layer.ratio is not None]
        held = (
            f"held-out ranges at most {max(ratios):.3g} of calibrated ones" if ratios else "no held-out data"
        )
        if self.kept:
            held += " (a fifth of the calibration data kept aside)"
        maps = sum(not layer.activation for layer in self.layers)
        trend = ""
        if self.slope is not None:
            grow = f"a factor of {_exp(self.slope):.3g}" if math.isfinite(self.slope) else "overflow"
            trend = f", {grow} from map to map"
        return f"{self.verdict.value}: {maps} map{'s' if maps > 1 else ''}, {held}{trend}"

    def to_json(self) -> dict[str, Any]:
        """Strict JSON: null for what is not finite, or not known."""
        return {
            "verdict": self.verdict.value,
            "slope": None if self.slope is None else _plain(self.slope),
            "calibration_rows": self.rows[0],
            "held_out_rows": self.rows[1],
            "held_out": "kept aside" if self.kept else "given" if self.rows[1] else "none",
            "layers": [layer.to_json() for layer in self.layers],
        }


def check(layers: Sequence[Layer], calibration: FloatArray, held_out: FloatArray | None = None) -> Stability:
    """Measure a tail, its layers as `blindtail.he.frontend.fold_tail` gives them.

    calibration  activations at the cut, (n, features), n >= 1
    held_out     others, (m, features). Without any, every fifth row of calibration data is kept
                 aside (`KEPT_ASIDE`), if there are `LEAST_ROWS`; compiling still uses all of them

    A network that overflows escapes; nothing is raised.
    """
    kept = held_out is None and len(calibration) >= LEAST_ROWS
    if kept:
        aside = np.arange(len(calibration)) % KEPT_ASIDE == KEPT_ASIDE - 1
        calibration, held_out = calibration[~aside], calibration[aside]
    here = _ranges(layers, calibration)
    there = None if held_out is None or not len(held_out) else _ranges(layers, held_out)
    largest = [one[0] if there is None else max(one[0], there[i][0]) for i, one in enumerate(here)]
    maps = [i for i, layer in enumerate(layers) if isinstance(layer, Affine)]
    slope = log_slope([largest[i] for i in maps])
    growths = {i: _over(largest[i], largest[before]) for before, i in pairwise(maps)}
    steepest = max(growths, key=growths.__getitem__) if len(maps) >= TREND_MAPS else None
    found = []
    for i, (layer, (most, quantile)) in enumerate(zip(layers, here, strict=True)):
        measured = LayerRange(
            layer.name,
            not isinstance(layer, Affine),
            most,
            quantile,
            None if there is None else there[i][0],
            growths.get(i),
            Verdict.OK,
            "",
        )
        found.append(_judged(measured, slope if i == steepest else None))
    return Stability(tuple(found), slope, (len(calibration), 0 if held_out is None else len(held_out)), kept)


def log_slope(ranges: Sequence[float]) -> float | None:
    """Least-squares slope of ln range over 0, 1, 2, ...; None for fewer than two ranges."""
    if len(ranges) < 2:
        return None
    logs = np.log(np.maximum(ranges, _FLOOR))
    if not np.isfinite(logs).all():
        return math.inf
    steps = np.arange(len(logs)) - (len(logs) - 1) / 2
    return float(steps @ logs / (steps @ steps))


def enforce(found: Stability, where: str, *, allow_unstable: bool = False) -> None:
    """Warn of each layer that is not ok, in one line; raise `ModelError` for a tail that escapes.

    where  how the tail is called in messages ("tail at cut 1"); with `allow_unstable` an
           escaping one is warned of as well
    """
    for layer in found.problems:
        if layer.verdict is Verdict.ESCAPES and not allow_unstable:
            raise ModelError(
                f"{where}, {layer.name}: {layer.problem}; {WAYS_OUT}. allow_unstable=True (--allow-unstable) "
                "compiles it all the same"
            )
        _log.warning("%s, %s: %s", where, layer.name, layer.problem)


def logit_bound(spec: TailSpec) -> float:
    """Largest |logit| that a program was compiled for: a reply's scale says it (`choose_scales`)."""
    return spec.parameters.primes[0] / (HEADROOM * spec.reply.scale)


def _ranges(layers: Sequence[Layer], x: FloatArray) -> list[tuple[float, float]]:
    """Of each layer's outputs (max |x|, quantile of |x|); infinite where any is not finite."""
    found = []
    with np.errstate(all="ignore"):
        for out in outputs(layers, x):
            size = np.abs(out)
            most = float(size.max())  # NaN if any is
            finite = math.isfinite(most)
            quantile = float(np.quantile(size, _QUANTILE, overwrite_input=True)) if finite else math.inf
            found.append((most if finite else math.inf, quantile))
    return found


def _judged(layer: LayerRange, slope: float | None) -> LayerRange:
    """The layer with its verdict; `slope` where it answers for the trend over the maps."""

    def verdict(word: Verdict, problem: str) -> LayerRange:
        return replace(layer, verdict=word, problem=problem)

    if math.isinf(layer.largest) or layer.held_out == math.inf:
        return verdict(Verdict.ESCAPES, "values overflow")
    ratio, peak = layer.ratio or 0.0, layer.peak
    beyond = f"on held-out data values reach {ratio:.3g} times the calibrated range"
    if ratio > ESCAPE_RATIO:
        return verdict(Verdict.ESCAPES, f"{beyond}, above {ESCAPE_RATIO:g}: they may wrap")
    problems = []
    if slope is not None and slope > WARN_SLOPE:
        grow = f"ranges grow by a factor of {_exp(slope):.3g} from map to map, most of all here"
        if slope > ESCAPE_SLOPE:
            return verdict(Verdict.ESCAPES, f"{grow} ({layer.growth:.3g})")
        problems.append(f"{grow} ({layer.growth:.3g})")
    if peak > WARN_PEAK and not layer.activation:
        problems.append(f"a few values are {peak:.3g} times the 99.9% quantile")
    if len(problems) == 2:
        return verdict(Verdict.ESCAPES, ", and ".join(problems))
    if ratio > WARN_RATIO:
        problems.append(f"{beyond}, above {WARN_RATIO:.2f}")
    return verdict(Verdict.WARN, ", and ".join(problems)) if problems else layer


def _over(part: float, whole: float) -> float:
    """A ratio of ranges; 1 when both are infinite."""
    return 1.0 if math.isinf(part) and math.isinf(whole) else max(part, _FLOOR) / max(whole, _FLOOR)


def _exp(slope: float) -> float:
    return math.exp(min(slope, 700.0))


def _plain(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


__all__ = [
    "ESCAPE_RATIO",
    "ESCAPE_SLOPE",
    "RANGE_MARGIN",
    "WARN_PEAK",
    "WARN_RATIO",
    "WARN_SLOPE",
    "LayerRange",
    "Stability",
    "Verdict",
    "check",
    "enforce",
    "log_slope",
    "logit_bound",
]
