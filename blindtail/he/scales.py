"""Scales and noise: the exact scale of every step, and the error that a program ends with.

Scales are chosen by coordinate descent on the predicted error of the logits,
under the bound that every value fits its modulus with room
(|value| * scale < q / 4 at every step, from calibration data).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from blindtail.errors import ModelError
from blindtail.he import noise
from blindtail.he.layers import Affine
from blindtail.he.operations import landing_scale, leading_scale
from blindtail.he.params import Parameters
from blindtail.he.spec import TailSpec

#: q / HEADROOM bounds |value| * scale; half of q is the wrap.
HEADROOM = 4.0
#: The same for a tail that must keep an older one's output scale: up to a quarter larger logits.
LIKE_HEADROOM = 3.2
#: q_0 over this is the largest scale of logits, however small they are: SEAL takes none as large as q_0.
LEAST_ROOM = 2.0
_LOG_SCALES = [x / 2 for x in range(36, 81)]


class LogitsTooLarge(ModelError):
    """Devices would read them wrongly; times `factor` they would just fit."""

    def __init__(self, message: str, factor: float) -> None:
        super().__init__(message)
        self.factor = factor


@dataclass(frozen=True)
class Stats:
    """What calibration says of one map: its input, its multipliers, its output."""

    rms_in: float  # over slots; of complex ones the modulus
    power: float  # mean over slots of the sum of squared multipliers
    weight_power: float  # mean squared weight
    products: int
    baby_turns: int
    giant_turns: int
    folds: tuple[tuple[int, bool], ...]  # turns in each group, and whether it adds the conjugate
    copies: int  # positions that hold the same output
    max_out: float  # over slots, undefined ones too
    rms_out: float


def choose_scales(
    maps: Sequence[Affine], stats: Sequence[Stats], parameters: Parameters, like: TailSpec | None
) -> list[float]:
    """[input scale, scale after each map]: coordinate descent on the predicted output noise.

    First and last are those of `like`, where it is given.
    """
    final = parameters.primes[0] / max(HEADROOM * stats[-1].max_out, LEAST_ROOM)
    scales = [2.0**30] * len(maps) + [final]
    if like is not None:
        largest = parameters.primes[0] / (LIKE_HEADROOM * like.reply.scale)
        if stats[-1].max_out > largest:
            raise LogitsTooLarge(
                f"{maps[-1].name}: logits reach {stats[-1].max_out:.3g} on calibration data, but devices "
                f"read up to {largest:.3g}: train with a range penalty, shrink the last layer, or hand out "
                "a new edge.bt",
                largest / stats[-1].max_out,
            )
        scales[0], scales[-1] = like.input_scale, min(final, like.reply.scale)
    for _ in range(3):
        for i in range(0 if like is None else 1, len(maps)):
            best = (math.inf, scales[i])
            for log_scale in _LOG_SCALES:
                trial = [*scales[:i], 2.0**log_scale, *scales[i + 1 :]]
                if _fits(trial, stats, parameters):
                    best = min(best, (_typical(stats, trial, parameters), trial[i]))
            if math.isinf(best[0]):
                continue
            scales[i] = best[1]
    if not _fits(scales, stats, parameters):
        worst = max(range(len(maps)), key=lambda i: stats[i].max_out)
        raise ModelError(
            f"{maps[worst].name}: values reach {stats[worst].max_out:.3g} on calibration data, too large for "
            "the modulus; add a range penalty in training, or normalise before the activation"
        )
    if like is not None:
        scales = _landing_on([*scales[:-1], like.reply.scale], parameters)
    return [float(s) for s in scales]


def _typical(stats: Sequence[Stats], scales: Sequence[float], parameters: Parameters) -> float:
    """The noise that scales end with; infinite where squares drive it out of range."""
    try:
        return propagate(stats, scales, parameters).typical
    except OverflowError:
        return math.inf


def _landing_on(scales: Sequence[float], parameters: Parameters) -> list[float]:
    """The last scale is fixed: moves the one before by parts in 10^12 until a plaintext leads there."""
    for step in range(256):
        trial = list(scales)
        if len(scales) > 2:
            trial[-2] *= 1 + step * 2.0**-40
        level, scale = parameters.max_level, trial[0]
        for target in trial[1:-1]:
            scale = landing_scale(scale, target, parameters.primes[level])
            scale = scale * scale / parameters.primes[level - 1]
            level -= 2
        if leading_scale(scale, trial[-1], parameters.primes[level]) is not None:
            return trial
    raise ModelError("no scale of the last map leads to the one that devices expect: hand out a new edge.bt")


def _fits(scales: Sequence[float], stats: Sequence[Stats], parameters: Parameters) -> bool:
    """|value| * scale < q / 4 before and after every rescale, and plaintexts worth encoding."""
    level, scale = parameters.max_level, scales[0]
    for index, (target, s) in enumerate(zip(scales[1:], stats, strict=True)):
        plain = target * parameters.primes[level] / scale
        if not 2.0**12 <= plain <= 2.0**50:
            return False
        level -= 1
        modulus = math.prod(parameters.primes[: level + 1])
        if s.max_out * target * HEADROOM > modulus * (1 + 1e-9):
            return False
        scale = target
        if index < len(stats) - 1:
            if s.max_out**2 * scale**2 * HEADROOM > modulus:
                return False
            scale = scale * scale / parameters.primes[level]
            level -= 1
            if scale < 2.0**16:
                return False
    return True


@dataclass(frozen=True)
class Noise:
    """Slot variances in the logits, copies averaged, in units of the final scale."""

    typical: float
    worst: float  # in the slots that `noise.keyswitch_peak` hits


def propagate(stats: Sequence[Stats], scales: Sequence[float], parameters: Parameters) -> Noise:
    """Follow the noise through the program.

    `peak` is a slot's excess (`noise.keyswitch_peak`), which sums do not average:
    of the slots hit in the last map, before that of all hit slots together.
    """
    level, scale = parameters.max_level, scales[0]
    variance, peak = noise.fresh(parameters), 0.0
    for index, (target, s) in enumerate(zip(scales[1:], stats, strict=True)):
        q = parameters.primes[level]
        plain = target * q / scale
        switch, excess = noise.keyswitch(parameters, level), noise.keyswitch_peak(parameters, level)
        variance = (variance + (switch if s.baby_turns else 0.0)) * s.power * plain**2
        variance += s.products * noise.encoding(parameters) * (scale * s.rms_in) ** 2
        variance += s.giant_turns * switch
        # An input element's excess reaches every output through one weight each; a
        # rotated copy's own stays in the slots that it hits, one per giant step.
        variance += peak * s.weight_power * plain**2
        hits = s.giant_turns + 1
        peak = excess * (s.power * plain**2 * (s.baby_turns > 0) / hits + (s.giant_turns > 0))
        level -= 1
        variance, peak = variance / q**2 + noise.rounding(parameters), peak / q**2
        switch, excess = noise.keyswitch(parameters, level), noise.keyswitch_peak(parameters, level)
        scale = target
        if index == len(stats) - 1:
            # Folding merges copies, noise and all: averaging them afterwards gains
            # only on what was added since. A sum over r merged copies, averaged over
            # `copies`, keeps r^2 / copies of a slot's variance.
            # What group i adds, m rotations of one ciphertext, is merged by those after it.
            merged, later = 1.0, 0.0
            for m, _ in reversed(s.folds):
                later += m * merged**2
                merged *= m + 1
            variance = (variance * merged**2 + switch * later + noise.encoding(parameters)) / s.copies
            peak = (peak * merged**2 + excess * later) / s.copies**2
            return Noise(variance, variance + peak)
        peak *= hits
        for m, conjugate in s.folds:
            # x and its conjugate have the same real part: it doubles, noise and all.
            merged = (m + 1) * (2 if conjugate else 1)
            variance, peak = merged * variance + m * switch, (4 if conjugate else 1) * peak + m * excess
        variance += noise.encoding(parameters)
        q = parameters.primes[level]
        gain = 4 * (s.rms_out * scale) ** 2
        variance = (gain * variance + 2 * variance**2 + switch) / q**2 + noise.rounding(parameters)
        peak = (gain * peak + excess) / q**2
        scale = scale * scale / q
        level -= 1
    raise AssertionError("a tail has at least one map")


__all__ = ["HEADROOM", "LIKE_HEADROOM", "LogitsTooLarge", "Noise", "Stats", "choose_scales", "propagate"]
