"""Which plan an objective gets when the error counts: estimated for many plans, then compiled.

How large errors may be is told by the objective, or by the margins of calibration data where it
bounds how often another logit may become the largest (`blindtail.he.margins`).

The estimate follows the noise as the compiler does (`blindtail.he.scales`), with
statistics of layers in place of those of slots: no plaintext is made for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from blindtail.errors import ModelError
from blindtail.he import grids, plan, schedule
from blindtail.he.diagonals import repeat_length
from blindtail.he.elementwise import Op, SquareOp
from blindtail.he.layers import FloatArray
from blindtail.he.layout import GARBAGE, Layout
from blindtail.he.margins import largest_deviation
from blindtail.he.normal import Normal
from blindtail.he.objective import DISAGREEMENT, ERROR, NoPlan, Objective
from blindtail.he.operations import MapOp
from blindtail.he.params import PRIME_BITS, Parameters
from blindtail.he.plan import Plan
from blindtail.he.program import Program
from blindtail.he.propagation import Operand, Stats, propagate
from blindtail.he.scales import Draft, choose_scales
from blindtail.he.schedule import Step
from blindtail.he.slotmaps import Arrangement, alike
from blindtail.he.sparse import entries

#: What primes smaller than usual may cost where the objective does not say.
DEFAULT_ERROR = 2e-3
#: Standard deviations that one logit in some ten thousand exceeds.
DEVIATIONS = 4.0


def error(worst_noise: float, largest: float) -> float:
    """The metric "error": from a logit's standard deviation on `native` and the largest |logit|."""
    return DEVIATIONS * worst_noise / max(1.0, largest)


def wanted(objective: Objective) -> bool:
    """Whether a choice has to look at errors: they are bounded, or primes may be smaller."""
    return bool({ERROR, DISAGREEMENT} & set(objective.at_most)) or len(plan.sizes(objective)) > 1


def resolved(objective: Objective, logits: FloatArray) -> Objective:
    """With a bound on the error by which no more labels change than the objective allows.

    logits  exact ones of calibration data, (n, classes)

    Raises `ModelError` as `margins.largest_deviation` does.
    """
    share = objective.at_most.get(DISAGREEMENT)
    if share is None:
        return objective
    accepted = error(largest_deviation(logits, share), float(np.abs(logits).max()))
    accepted = min(accepted, objective.at_most.get(ERROR, math.inf))
    return replace(objective, at_most={**objective.at_most, ERROR: accepted})


def judged(objective: Objective, program: Program, deviation: float, largest: float) -> float:
    """The error of a compiled program that bounds are held against.

    deviation  of a logit on `native`. Labels are kept on every backend, and on the images that errors
               grow most for: where disagreement is bounded it is the program's own prediction that counts
    """
    if DISAGREEMENT in objective.at_most:
        deviation = max(deviation, program.spec.predicted_noise)
    return error(deviation, largest)


def all_compete(objective: Objective) -> bool:
    """Whether smaller primes may be cheaper, and not only what a bound asks for."""
    return bool(objective.weights.get("uplink_bytes")) or DISAGREEMENT in objective.at_most


def bound(objective: Objective, parameters: Parameters) -> float:
    """The largest `error` that is accepted."""
    usual = parameters.primes[-1] > 1 << (PRIME_BITS - 1)
    return objective.at_most.get(ERROR, math.inf if usual else DEFAULT_ERROR)


def candidates(
    tail: Normal, x: FloatArray, objective: Objective, lanes: int, ring_degree: int | None
) -> Iterator[tuple[Plan, float]]:
    """Plans that keep the objective's bounds, with the estimated error, the wanted one first.

    Primes are as large as the bounds allow; where `all_compete`, the cheapest are first.
    Raises `NoPlan` where there is none.
    """
    measured, known = Estimate(tail, x), dict[int, grids.Ways]()
    least, problem = math.inf, NoPlan("")
    kept: list[tuple[Plan, float]] = []
    for bits in plan.sizes(objective):
        for precise in (False, True):
            try:
                found = plan.fitting(
                    tail, objective, lanes, ring_degree, bits=bits, precise=precise, known=known
                )
            except NoPlan as refused:
                problem = refused
                continue
            except ModelError:
                if bits == PRIME_BITS:  # of smaller primes there may be too few
                    raise
                continue
            errors = [measured.error(made) for made in found]
            least = min(least, *errors)
            accepted = bound(objective, found[0].parameters)
            kept += [(made, e) for made, e in zip(found, errors, strict=True) if e <= accepted]
        if kept and not all_compete(objective):
            break
    if not kept:
        if math.isinf(least):
            raise problem
        raise too_coarse(objective, least)
    close = schedule.CLOSE * min(objective.value(made.costs) for made, _ in kept)

    def order(one: tuple[Plan, float]) -> tuple[bool, float, int]:
        value, keys = objective.value(one[0].costs), one[0].costs.key_bytes
        return value > close, value if value > close else keys, keys  # of equals, that with smaller primes

    yield from sorted(kept, key=order)


def too_coarse(objective: Objective, least: float) -> NoPlan:
    bound, told = objective.at_most.get(ERROR, DEFAULT_ERROR), ""
    if DISAGREEMENT in objective.at_most:
        told = f", as disagreement <= {objective.at_most[DISAGREEMENT]:g} asks,"
    return NoPlan(
        f"no plan keeps error <= {bound:.3g}{told} within the other bounds (the least is {least:.2g}): allow "
        "more bytes or more error, or train with a range penalty"
    )


class Estimate:
    """Errors of plans for one tail: of a chain of maps and squares, others are not estimated.

    x  calibration activations, (n, features)
    """

    def __init__(self, tail: Normal, x: FloatArray) -> None:
        self._tail, self._maps = tail, tail.maps
        exact, values = tail.values(x)
        self._inputs = [(v**2).mean(axis=0) for v in values]  # mean squares by element, before each map
        self._outputs = [(y**2).mean(axis=0) for y in exact]
        self._largest = [float(np.abs(y).max()) for y in exact]
        self._scales: dict[object, list[float]] = {}
        self._weights = [float((entries(step.weight) ** 2).sum()) for step in tail.maps]

    @property
    def largest(self) -> float:
        """|logit|."""
        return self._largest[-1]

    def error(self, made: Plan) -> float:
        """About what the compiled plan's error is; infinite where no scales fit, 0 where it is not known.

        Scales are chosen for the first plan of its kind; those of others hardly differ.
        """
        if not self._tail.is_chain:
            return 0.0
        draft, layout = self._draft(made), made.steps[-1].arrangement.out_layout
        parameters, last = made.parameters, made.steps[-1]
        kind = parameters, layout, tuple(step.arrangement.kind for step in made.steps), len(last.folds)
        try:
            if kind not in self._scales:
                self._scales[kind] = choose_scales(draft, parameters, None, last.arrangement.scattered)
            scales = self._scales[kind]
            every = draft.scales(scales, parameters)
            worst = propagate(draft.ops, draft.stats, every, parameters, hoisted=True).worst
        except (ModelError, OverflowError):
            return math.inf
        return error(math.sqrt(worst) / scales[-1], self.largest)

    def _draft(self, made: Plan) -> Draft:
        """Operations without weights: their kinds, levels and statistics are what counts."""
        ops, stats, layout = list[Op](), list[Stats](), made.first
        none, level = np.zeros((1, 1)), made.parameters.max_level
        for index, how in enumerate(made.steps):
            made_of, name = how.arrangement, self._maps[index].name
            ops.append(
                MapOp(
                    name=name,
                    level=level,
                    weight=none,
                    bias=none[0],
                    in_layout=layout,
                    out_layout=made_of.out_layout,
                    rows=made_of.rows,
                    offsets=made_of.offsets,
                    stride=made_of.stride,
                    baby=how.baby,
                    folds=how.folds,
                    in_scale=2.0,
                    out_scale=2.0,
                )
            )
            stats.append(self._stats(index, made.steps, layout))
            layout, level = made_of.out_layout, level - 2
            if index + 1 < len(made.steps):
                before = stats[-1]
                ops.append(SquareOp(f"square{index}", level + 1, layout, 2.0, 2.0))
                stats.append(Stats((Operand(before.rms_out),), before.max_out**2, before.rms_out**2))
        return Draft(tuple(ops), tuple(stats), {})

    def _stats(self, index: int, steps: Sequence[Step], layout: Layout) -> Stats:
        how = steps[index]
        arrangement, weight = how.arrangement, self._maps[index].weight
        offsets = np.asarray(arrangement.used or range(0, arrangement.offsets, arrangement.stride))
        power, out = self._weights[index] / _period(arrangement, layout), arrangement.out_layout
        rms_out = math.sqrt(_mean(out, self._outputs[index]))
        if arrangement.scattered:  # as in the compiler: where there is something
            power /= float((arrangement.rows >= 0).mean())
            rms_out /= math.sqrt(float((out.index >= 0).mean()))
        operand = Operand(
            rms_in=math.sqrt(_mean(layout, self._inputs[index])),
            power=power / 4 if layout.imaginary is not None else power,
            weight_power=self._weights[index] / math.prod(weight.shape),
            products=len(offsets),
            baby_turns=len(np.unique(offsets % how.baby)) - 1,
        )
        return Stats(
            operands=(operand,),
            max_out=self._largest[index],
            rms_out=rms_out,
            giant_turns=int(offsets[-1]) // how.baby,
            folds=tuple((len(group), min(group) < 0) for group in how.folds),
            copies=arrangement.copies,
            alike=alike([step.arrangement for step in steps], index),
        )


def _period(arrangement: Arrangement, layout: Layout) -> int:
    """Positions after which multipliers repeat."""
    parts = [layout.index, arrangement.rows]
    if layout.imaginary is not None:
        parts.append(np.asarray(layout.imaginary, np.int32))
    return repeat_length(*parts)


def _mean(layout: Layout, squares: FloatArray) -> float:
    """Mean of squared slots; what is undefined is taken as an average element."""
    index = layout.index
    total = float(squares[index[index >= 0]].sum()) + float((index == GARBAGE).sum() * squares.mean())
    if layout.imaginary is not None:
        other = np.asarray(layout.imaginary, np.int32)
        total += float(squares[other[other >= 0]].sum())
    return total / len(index)


__all__ = [
    "DEFAULT_ERROR",
    "DEVIATIONS",
    "Estimate",
    "all_compete",
    "bound",
    "candidates",
    "error",
    "judged",
    "resolved",
    "too_coarse",
    "wanted",
]
