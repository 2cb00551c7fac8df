"""Scales: the exact scale of every step, so that values fit and the logits' error is least.

What multiplies with plaintexts (maps, multiples) can land on any scale; squares and products
follow from their operands, and what is added to another value takes its scale. Scales are
chosen by coordinate descent on the predicted error of the logits (`blindtail.he.propagation`),
under the bound that every value fits its modulus with room (|value| * scale < q / 4 at
every step, from calibration data).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from blindtail.errors import ModelError
from blindtail.he.elementwise import Linear, Op, ProductOp, ScaleOp, SquareOp
from blindtail.he.operations import MapOp, landing_scale, leading_scales
from blindtail.he.params import Parameters
from blindtail.he.propagation import Stats, propagate
from blindtail.he.spec import TailSpec

#: q / HEADROOM bounds |value| * scale; half of q is the wrap.
HEADROOM = 4.0
#: The same for a tail that must keep an older one's output scale: up to a quarter larger logits.
LIKE_HEADROOM = 3.2
#: q_0 over this is the largest scale of logits, however small they are: SEAL takes none as large as q_0.
LEAST_ROOM = 2.0
_LOG_SCALES = [x / 2 for x in range(36, 81)]
_TRIES = 256


class LogitsTooLarge(ModelError):
    """Devices would read them wrongly; times `factor` they would just fit."""

    def __init__(self, message: str, factor: float) -> None:
        super().__init__(message)
        self.factor = factor


@dataclass(frozen=True, eq=False)
class Draft:
    """A program whose scales are still to be chosen.

    ops      at their levels, their scales without meaning
    stats    of each
    ties     index of an operation that multiplies with plaintexts -> value whose scale it takes
    inputs   ciphertexts that the activation lies over
    results  last operations that give the logits' ciphertexts; they have one scale
    """

    ops: tuple[Op, ...]
    stats: tuple[Stats, ...]
    ties: Mapping[int, int]
    inputs: int = 1
    results: int = 1

    @property
    def free(self) -> list[int]:
        """Operations that choose their scale."""
        return [i for i, op in enumerate(self.ops) if isinstance(op, Linear) and i not in self.ties]

    def scales(self, chosen: Sequence[float], parameters: Parameters) -> list[float]:
        """Of every value: the input's and the free ones' as `chosen`, in their order; the rest follows."""
        left = iter(chosen)
        values = [next(left)] * self.inputs
        for i, op in enumerate(self.ops):
            read = [values[len(values) - back] for back in op.backs]
            if isinstance(op, Linear):
                values.append(values[self.ties[i]] if i in self.ties else next(left))
            elif isinstance(op, SquareOp | ProductOp):
                values.append(read[0] * read[-1] / parameters.primes[op.level])
            else:
                values.append(read[0])
        return values


def choose_scales(
    draft: Draft, parameters: Parameters, like: TailSpec | None, hoisted: bool = False
) -> list[float]:
    """Scales of the input and of each free operation: coordinate descent on the predicted output noise.

    First and last are those of `like`, where it is given. hoisted: as for `propagate`
    """
    ops, max_out = draft.ops, max(s.max_out for s in draft.stats[-draft.results :])
    final = parameters.primes[0] / max(HEADROOM * max_out, LEAST_ROOM)
    free = draft.free
    scales = [*_start(draft, parameters, final), final]
    if like is not None:
        largest = parameters.primes[0] / (LIKE_HEADROOM * like.reply.scale)
        if max_out > largest:
            raise LogitsTooLarge(
                f"{ops[-1].name}: logits reach {max_out:.3g} on calibration data, but devices "
                f"read up to {largest:.3g}: train with a range penalty, shrink the last layer, or hand out "
                "a new edge.bt",
                largest / max_out,
            )
        scales[0], scales[-1] = like.input_scale, min(final, like.reply.scale)
    for _ in range(3):
        for i in range(0 if like is None else 1, len(free)):
            best = (math.inf, scales[i])
            for log_scale in _LOG_SCALES:
                trial = [*scales[:i], 2.0**log_scale, *scales[i + 1 :]]
                if _fits(draft, trial, parameters):
                    best = min(best, (_typical(draft, trial, parameters, hoisted), trial[i]))
            if math.isinf(best[0]):
                continue
            scales[i] = best[1]
    if not _fits(draft, scales, parameters):
        worst = max(free, key=lambda i: draft.stats[i].max_out)
        raise ModelError(
            f"{ops[worst].name}: values reach {draft.stats[worst].max_out:.3g} on calibration data, too "
            "large for the modulus; add a range penalty in training, or normalise before the activation"
        )
    if like is not None:
        scales[-1] = like.reply.scale
    return [float(s) for s in scales]


def _start(draft: Draft, parameters: Parameters, final: float) -> list[float]:
    """Equal scales that fit, 2^30 or the next best; 2^30 where none does."""
    many = len(draft.free)
    for log_scale in (30.0, *reversed(_LOG_SCALES)):
        scales = [2.0**log_scale] * many
        if _fits(draft, [*scales, final], parameters):
            return scales
    return [2.0**30] * many


def _typical(draft: Draft, chosen: Sequence[float], parameters: Parameters, hoisted: bool) -> float:
    """The noise that scales end with; infinite where squares drive it out of range."""
    try:
        scales = draft.scales(chosen, parameters)
        return propagate(draft.ops, draft.stats, scales, parameters, hoisted, draft.results).typical
    except OverflowError:
        return math.inf


def _fits(draft: Draft, chosen: Sequence[float], parameters: Parameters) -> bool:
    """|value| * scale < q / 4 before and after every rescale, and plaintexts worth encoding."""
    scales = draft.scales(chosen, parameters)
    for own, (op, s) in enumerate(zip(draft.ops, draft.stats, strict=True), start=draft.inputs):
        read, target = [scales[own - back] for back in op.backs], scales[own]
        after = math.prod(parameters.primes[: op.out_level + 1])
        if isinstance(op, Linear):
            q = parameters.primes[op.level]
            if not all(2.0**12 <= target * q / scale <= 2.0**50 for scale in read):
                return False
        elif isinstance(op, SquareOp | ProductOp):
            if s.max_out * read[0] * read[-1] * HEADROOM > after * parameters.primes[op.level]:
                return False
            if target < 2.0**16:
                return False
        if s.max_out * target * HEADROOM > after * (1 + 1e-9):
            return False
    return True


def with_scales(
    draft: Draft, chosen: Sequence[float], parameters: Parameters, exact_end: bool = False
) -> tuple[Op, ...]:
    """The operations with scales to the last bit, next to those chosen.

    exact_end  the last one's is not next to the chosen one, but it

    Where operands cannot be brought to one scale to the last bit, what comes before moves by
    parts in 10^12 until they can. Raises `ModelError` when nothing helps.
    """
    for step in range(_TRIES):
        moved = [chosen[0], *(s * (1 + step * 2.0**-40) for s in chosen[1:-1]), chosen[-1]]
        made = _exact(draft, moved, parameters, exact_end)
        if made is not None:
            return made
    if exact_end:
        raise ModelError(
            "no scale of the last map leads to the one that devices expect: hand out a new edge.bt"
        )
    names = ", ".join(op.name for op in draft.ops if len(op.backs) > 1)
    raise ModelError(
        f"no scales bring what {names} adds up to one scale to the last bit: "
        "change the width of a layer or the ring degree"
    )


def _exact(
    draft: Draft, chosen: Sequence[float], parameters: Parameters, exact_end: bool
) -> tuple[Op, ...] | None:
    left = iter(chosen)
    values, made = [next(left)] * draft.inputs, list[Op]()
    for i, op in enumerate(draft.ops):
        read = tuple(values[len(values) - back] for back in op.backs)
        q = parameters.primes[op.level]
        if isinstance(op, Linear):
            if i in draft.ties:
                target = values[draft.ties[i]]
            else:
                target = next(left)
                if not (exact_end and i + draft.results >= len(draft.ops)):
                    target = _landing(read, target, q)
            if leading_scales(read, target, q) is None:
                return None
            made.append(_linear(op, read, target))
        elif isinstance(op, SquareOp):
            target = read[0] * read[0] / q
            made.append(replace(op, in_scale=read[0], out_scale=target))
        elif isinstance(op, ProductOp):
            target = read[0] * read[1] / q
            made.append(replace(op, in_scales=(read[0], read[1]), out_scale=target))
        else:
            if len(set(read)) > 1:
                return None
            target = read[0]
            made.append(replace(op, scale=target))
        values.append(target)
    return tuple(made)


def _landing(read: Sequence[float], target: float, q: int) -> float:
    """The scale next to `target` that products of plaintexts with all operands can land on."""
    found = landing_scale(read[0], target, q)
    for step in range(_TRIES):
        if len(read) == 1 or leading_scales(read, found, q) is not None:
            return found
        found = landing_scale(read[0], target * (1 + (step + 1) * 2.0**-48), q)
    return found


def _linear(op: MapOp | ScaleOp, read: Sequence[float], target: float) -> Op:
    if isinstance(op, ScaleOp):
        return replace(op, in_scales=tuple(read), out_scale=target)
    others = tuple(replace(term, in_scale=scale) for term, scale in zip(op.others, read[1:], strict=True))
    return op.at(op.level, read[0], target, others)


__all__ = ["HEADROOM", "LIKE_HEADROOM", "Draft", "LogitsTooLarge", "choose_scales", "with_scales"]
