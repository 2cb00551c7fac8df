"""One ciphertext a value, or several in a smaller ring: what an objective wants of both kinds of plans.

`compile_tail` takes what `best` says, and `blindtail plan` shows it beside the common front of both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from blindtail.errors import ModelError
from blindtail.he import plan, tiling
from blindtail.he.layers import Layer
from blindtail.he.normal import Normal, normalised
from blindtail.he.objective import METRICS, NoPlan, Objective
from blindtail.he.params import PRIME_BITS
from blindtail.he.plan import Plan
from blindtail.he.slotmaps import TooWide
from blindtail.he.sparse import entries
from blindtail.he.tiling import Tiling
from blindtail.progress import Span

#: Weights of one map from which on several ciphertexts are looked at only where one does not do.
_LARGE = 30_000_000

One = TypeVar("One")


def cheaper(
    tail: Normal,
    objective: Objective,
    lanes: int,
    ring_degree: int | None,
    in_one: Callable[[], tuple[float, One]],
    span: Span | None = None,
) -> One | Tiling:
    """What `in_one` finds with a value for the objective, or a tiling where that is worth less.

    Or where `in_one` raises `TooWide` or `NoPlan`; they are raised again where there is no tiling either,
    but for a `TooWide` where tilings break bounds: then their `NoPlan` is.
    """
    found = None if is_large(tail) else in_several(tail, objective, lanes, ring_degree, span)
    try:
        value, one = in_one()
    except (TooWide, NoPlan) as problem:
        only = isinstance(problem, TooWide)
        found = found or in_several(tail, objective, lanes, ring_degree, span, only=only)
        if found is None:
            raise
        return found
    return found if found is not None and objective.value(found.costs) < value else one


def in_several(
    tail: Normal,
    objective: Objective,
    lanes: int,
    ring_degree: int | None,
    span: Span | None = None,
    *,
    only: bool = False,
) -> Tiling | None:
    """The first of `tilings`, None where there is none."""
    return next(tilings(tail, objective, lanes, ring_degree, span, only=only), None)


def tilings(
    tail: Normal,
    objective: Objective,
    lanes: int,
    ring_degree: int | None,
    span: Span | None = None,
    *,
    only: bool = False,
) -> Iterator[Tiling]:
    """Values over several ciphertexts of the smallest ring, where one of that ring does not hold them.

    Of a larger ring where the most ciphertexts there may be do not. One for each size of primes that the
    objective looks at, the largest first; raises `TooWide` where no ring holds the values, and `NoPlan`
    where bounds leave none and there is nothing else (`only`).
    """
    refused: NoPlan | None = None
    some = False
    for bits in plan.sizes(objective):
        try:
            found = _of_size(tail, objective, lanes, ring_degree, bits, span)
        except NoPlan as error:
            refused = refused or error
            continue
        if found is not None:
            some = True
            yield found
    if only and refused is not None and not some:
        raise refused


def _of_size(
    tail: Normal, objective: Objective, lanes: int, ring_degree: int | None, bits: int, span: Span | None
) -> Tiling | None:
    """With primes of so many bits."""
    problem = TooWide(f"no ring has slots for {lanes} lanes: use fewer")
    features, most = tail.maps[0].weight.shape[1], objective.at_most.get("uplink_bytes", math.inf)
    try:
        rings = plan.rings(tail.depth, ring_degree, bits)
    except ModelError:
        if bits == PRIME_BITS:
            raise
        return None  # there may be too few smaller primes
    for parameters in rings:
        positions = parameters.slots // lanes
        if not positions:
            continue
        if max(features / 2, *(len(step.bias) for step in tail.maps)) <= positions:
            return None
        least = tiling.uplink_bytes(parameters, -(-features // (2 * positions)))
        if least > most:
            raise NoPlan(
                f"no tiling keeps uplink_bytes <= {most:g} (the least is {least:,}): allow more, or cut later"
            )
        try:
            return tiling.choose(tail, parameters, objective, lanes=lanes, span=span)
        except NoPlan:
            raise
        except TooWide as error:
            problem = error
        except ModelError:
            return None  # a larger ring, or the reason why none does
    raise problem


def best(
    layers: Sequence[Layer], objective: Objective, *, lanes: int = 1, ring_degree: int | None = None
) -> Plan | Tiling:
    """What `compile_tail` takes for this objective; bounds on errors stand aside, and where they or the
    uplink ask for it, it may take smaller primes.

    Raises as `plan.best` does, where no tiling keeps the bounds either.
    """

    def in_one() -> tuple[float, Plan]:
        made = plan.best(layers, objective, lanes=lanes, ring_degree=ring_degree)
        return objective.value(made.costs), made

    return cheaper(normalised(layers), objective, lanes, ring_degree, in_one)


def front(layers: Sequence[Layer], *, lanes: int = 1, ring_degree: int | None = None) -> list[Plan | Tiling]:
    """Plans of both kinds that no other beats in all of `METRICS`, fastest first.

    Of tilings those that are best in one metric each, and the fastest within the usual budget of keys.
    Raises `ModelError` when no ring fits and nothing can be tiled.
    """
    tail = normalised(layers)
    try:
        ones = plan.front(layers, lanes=lanes, ring_degree=ring_degree)
    except TooWide:
        several = _tilings(tail, lanes, ring_degree)
        if not several:
            raise
        return _unbeaten(several)
    return _unbeaten([*ones, *([] if is_large(tail) else _tilings(tail, lanes, ring_degree))])


def _tilings(tail: Normal, lanes: int, ring_degree: int | None) -> list[Tiling]:
    """For one objective each; none where one ciphertext of the smallest ring holds all, or nothing fits."""
    wishes = [plan.fastest(tail, ring_degree), *(Objective({metric: 1.0}) for metric in METRICS)]
    found = (in_several(tail, wish, lanes, ring_degree) for wish in wishes)
    return [one for one in found if one is not None]


def describe(made: Plan | Tiling) -> dict[str, Any]:
    """For people and JSON; of several ciphertexts with `ciphertexts`, a number for each value."""
    if isinstance(made, Plan):
        return made.describe()
    return {
        **made.describe(),
        "prime_bits": made.parameters.primes[-1].bit_length(),
        "lanes": made.first.lanes,
        "complex_slots": made.first.halved,
        **{name: made.costs.of(name) for name in METRICS},
    }


def _unbeaten(found: Iterable[Plan | Tiling]) -> list[Plan | Tiling]:
    """Fastest first; of those that cost the same, the first found."""
    kept: list[Plan | Tiling] = []
    for one in found:
        if not any(other.costs.beats(one.costs) or other.costs == one.costs for other in kept):
            kept = [other for other in kept if not one.costs.beats(other.costs)] + [one]
    return sorted(kept, key=lambda one: (one.costs.total_s, one.costs.key_bytes))


def is_large(tail: Normal) -> bool:
    """Of which several ciphertexts are looked at only where one does not do."""
    return max(len(entries(step.weight)) for step in tail.maps) > _LARGE


__all__ = ["best", "cheaper", "describe", "front", "in_several", "is_large", "tilings"]
