"""How the noise goes through a program: variances per slot, operation by operation.

`blindtail.he.noise` has what each primitive adds. What is added to independent noise adds
up in variance; operands of a sum or a product may come from one value, so there standard
deviations add up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from blindtail.he import noise
from blindtail.he.elementwise import Linear, Op, ProductOp, SquareOp, SumOp
from blindtail.he.operations import MapOp
from blindtail.he.params import Parameters


@dataclass(frozen=True)
class Operand:
    """What calibration says of one value that an operation reads, and of its multipliers."""

    rms_in: float  # over slots; of complex ones the modulus
    power: float = 0.0  # mean over slots of the sum of squared multipliers; scattered rows: over theirs
    weight_power: float = 0.0  # mean squared weight
    products: int = 0
    baby_turns: int = 0


@dataclass(frozen=True)
class Stats:
    """What calibration says of one operation."""

    operands: tuple[Operand, ...]
    max_out: float  # over slots, undefined ones too
    rms_out: float  # over slots; where rows are scattered, over theirs
    giant_turns: int = 0
    folds: tuple[tuple[int, bool], ...] = ()  # turns in each group, and whether it adds the conjugate
    copies: int = 1  # positions that hold the same output
    alike: int = 1  # copies of the last map's input with the same noise (`slotmaps.alike`)


@dataclass(frozen=True)
class Noise:
    """Slot variances in the logits, copies averaged, in units of the final scale."""

    typical: float
    worst: float  # in the slots that `noise.keyswitch_peak` hits


@dataclass(frozen=True)
class _Held:
    """Of a value: `peak` is a slot's excess (`noise.keyswitch_peak`), which sums do not average."""

    variance: float
    peak: float


def propagate(
    ops: Sequence[Op],
    stats: Sequence[Stats],
    scales: Sequence[float],
    parameters: Parameters,
    hoisted: bool = False,
    results: int = 1,
) -> Noise:
    """Follow the noise through the program, which ends in a map: of `seal`, or of `native`.

    scales   of every value, those of the inputs first
    results  maps that it ends in, one for each ciphertext of the logits: the noisiest counts
    hoisted  as `native` does it: digits that it hoists are centred, a quarter of the variance and no
             excess; rotations of one fold group share a rounding (`Program.error_bounds`)

    `peak` is of the slots hit in the last map, before that of all hit slots together.
    """
    switching = _Switching(parameters, hoisted)
    values = [_Held(noise.fresh(parameters), 0.0)] * (len(scales) - len(ops))
    ends: list[Noise] = []
    for own, (op, s) in enumerate(zip(ops, stats, strict=True), start=len(values)):
        read = [values[own - back] for back in op.backs]
        units = [scales[own - back] for back in op.backs]
        if isinstance(op, Linear):
            plain = [scales[own] * parameters.primes[op.level] / unit for unit in units]
            products = _Products(op.level, s, read, units, plain, switching)
            if own >= len(scales) - results:
                ends.append(_last(products))
            elif isinstance(op, MapOp):
                values.append(_map(products))
            else:
                values.append(_multiples(products))
        elif isinstance(op, SumOp):
            deviation = sum(math.sqrt(v.variance) for v in read)
            peak = sum(math.sqrt(v.peak) for v in read) ** 2
            extra = 0.0 if op.constant is None else noise.encoding(parameters)
            values.append(_Held(deviation**2 + extra, peak))
        else:
            values.append(_product(op, s, read, units, parameters))
    return Noise(max(end.typical for end in ends), max(end.worst for end in ends))


@dataclass(frozen=True)
class _Switching:
    """Variances of key switches, on `seal` or on `native`."""

    parameters: Parameters
    hoisted: bool

    @property
    def turning(self) -> float:
        """Share of the excess that a hoisted rotation has."""
        return 0.0 if self.hoisted else 1.0

    def baby(self, level: int) -> float:
        switch = noise.keyswitch(self.parameters, level)
        return (switch - noise.rounding(self.parameters)) / 4 if self.hoisted else switch

    def fold(self, turns: int, level: int) -> float:
        """What a group of so many turns adds."""
        switch = noise.keyswitch(self.parameters, level)
        if not self.hoisted:
            return turns * switch
        rounding = noise.rounding(self.parameters)
        return turns * (switch - rounding) / 4 + turns**2 * rounding


@dataclass(frozen=True)
class _Products:
    """What a linear operation reads, each value times plaintexts; to be added up and rescaled.

    units  scales of the values
    plain  scales of the plaintexts
    """

    level: int
    stats: Stats
    read: Sequence[_Held]
    units: Sequence[float]
    plain: Sequence[float]
    switching: _Switching


def _sums(of: _Products) -> tuple[float, float]:
    """Variance of the sum of products, and the excess of a slot that is hit; rescaled."""
    s, parameters, baby = of.stats, of.switching.parameters, of.switching.baby(of.level)
    switch, excess = noise.keyswitch(parameters, of.level), noise.keyswitch_peak(parameters, of.level)
    variance = turned = 0.0
    for held, unit, factor, one in zip(of.read, of.units, of.plain, s.operands, strict=True):
        variance += (held.variance * s.alike + (baby if one.baby_turns else 0.0)) * one.power * factor**2
        variance += one.products * noise.encoding(parameters) * (unit * one.rms_in) ** 2
    variance += s.giant_turns * switch
    for held, factor, one in zip(of.read, of.plain, s.operands, strict=True):
        # An input element's excess reaches every output through one weight each; a
        # rotated copy's own stays in the slots that it hits, one per giant step.
        variance += s.alike * held.peak * one.weight_power * factor**2
        turned += of.switching.turning * one.power * factor**2 * (one.baby_turns > 0)
    peak = excess * (turned / (s.giant_turns + 1) + (s.giant_turns > 0))
    q = parameters.primes[of.level]
    return variance / q**2 + noise.rounding(parameters), peak / q**2


def _map(of: _Products) -> _Held:
    s, switching = of.stats, of.switching
    variance, peak = _sums(of)
    excess = switching.turning * noise.keyswitch_peak(switching.parameters, of.level - 1)
    peak *= s.giant_turns + 1
    for m, conjugate in s.folds:
        # x and its conjugate have the same real part: it doubles, noise and all.
        merged = (m + 1) * (2 if conjugate else 1)
        variance = merged * variance + switching.fold(m, of.level - 1)
        peak = (4 if conjugate else 1) * peak + m * excess
    return _Held(variance + noise.encoding(switching.parameters), peak)


def _last(of: _Products) -> Noise:
    s, switching = of.stats, of.switching
    variance, peak = _sums(of)
    excess = switching.turning * noise.keyswitch_peak(switching.parameters, of.level - 1)
    # Folding merges copies, noise and all: averaging them afterwards gains
    # only on what was added since. A sum over r merged copies, averaged over
    # `copies`, keeps r^2 / copies of a slot's variance.
    # What group i adds, m rotations of one ciphertext, is merged by those after it.
    merged, later, added = 1.0, 0.0, 0.0
    for m, _ in reversed(s.folds):
        later += m * merged**2
        added += switching.fold(m, of.level - 1) * merged**2
        merged *= m + 1
    variance = (variance * merged**2 + added + noise.encoding(switching.parameters)) / s.copies
    peak = (peak * merged**2 + excess * later) / s.copies**2
    return Noise(variance, variance + peak)


def _multiples(of: _Products) -> _Held:
    """By element: nothing is turned and nothing averaged."""
    parameters = of.switching.parameters
    q = parameters.primes[of.level]
    deviation = peak = encoded = 0.0
    for held, unit, factor, one in zip(of.read, of.units, of.plain, of.stats.operands, strict=True):
        deviation += math.sqrt(held.variance * one.power) * factor
        peak += math.sqrt(held.peak * one.power) * factor
        encoded += noise.encoding(parameters) * (unit * one.rms_in) ** 2
    variance = (deviation**2 + encoded) / q**2 + noise.rounding(parameters) + noise.encoding(parameters)
    return _Held(variance, peak**2 / q**2)


def _product(
    op: SquareOp | ProductOp, s: Stats, read: Sequence[_Held], units: Sequence[float], parameters: Parameters
) -> _Held:
    q = parameters.primes[op.level]
    switch, excess = noise.keyswitch(parameters, op.level), noise.keyswitch_peak(parameters, op.level)
    left, right = read[0], read[-1]
    # One operand's error meets the other operand.
    sides = s.operands[-1].rms_in * units[-1], s.operands[0].rms_in * units[0]
    if isinstance(op, SquareOp):
        gain = 4 * (s.operands[0].rms_in * units[0]) ** 2
        variance = gain * left.variance + 2 * left.variance**2
        peak = gain * left.peak
    else:
        deviation = sides[0] * math.sqrt(left.variance) + sides[1] * math.sqrt(right.variance)
        variance = deviation**2 + 2 * left.variance * right.variance
        peak = (sides[0] * math.sqrt(left.peak) + sides[1] * math.sqrt(right.peak)) ** 2
    return _Held((variance + switch) / q**2 + noise.rounding(parameters), (peak + excess) / q**2)


__all__ = ["Noise", "Operand", "Stats", "propagate"]
