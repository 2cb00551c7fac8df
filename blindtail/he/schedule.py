"""Which arrangement, baby steps and fold groups each map gets: the fastest that keys allow.

Time is what `native` needs (`blindtail.he.cost`): rotations of one ciphertext are
hoisted, so many baby steps and wide fold groups are fast, but each of their
rotations wants a key of its own, which a device makes, uploads and a cell
holds. Choices depend on the sizes of the layers and on which weights are zero,
never on their values: a tail that takes another's place comes to the same keys.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from blindtail.errors import ModelError
from blindtail.he import cost, slotmaps
from blindtail.he.container import HEADER_BYTES, SEED_BYTES
from blindtail.he.layers import Affine
from blindtail.he.operations import Groups
from blindtail.he.packing import packed_bytes
from blindtail.he.params import Parameters
from blindtail.he.spec import KeyNeed, Layout

#: The backend whose time decides.
BACKEND = "native"
#: A budget of keys where none is given: so many bytes at N = 8192, growing with N^2 as one key does.
DEFAULT_KEY_BYTES = 30_000_000
#: Of two choices this close in time, the one with fewer bytes of keys.
CLOSE = 1.02
#: Shares of an inner sum's copies that may be left unused: fewer folds, more offsets.
_SHARES = (1, 2)
#: Doubling steps that one fold group may replace, and how many states each map hands on.
_GROUP_BITS, _BEAM = 4, 48


class KeysTooLarge(ModelError):
    """No choice fits the budget of keys."""


@dataclass(frozen=True, eq=False)
class Step:
    """One map's arrangement and how its rotations are split."""

    arrangement: slotmaps.Arrangement
    baby: int  # positions
    folds: Groups


@dataclass(frozen=True)
class _Part:
    """Baby and giant steps, or the folds, of one map: seconds, and level by rotation (in slots)."""

    seconds: float
    needs: tuple[tuple[int, int], ...]
    baby: int = 0
    folds: Groups = ()


@dataclass(frozen=True, eq=False)
class _State:
    """The maps so far."""

    seconds: float
    key_bytes: int
    needs: Mapping[int, int]
    first: Layout
    steps: tuple[Step, ...]


def key_bytes(parameters: Parameters, level: int) -> int:
    """Bytes that one key at `level` adds to a container of evaluation keys."""
    primes = (*parameters.primes[: level + 1], parameters.special)
    digit = SEED_BYTES + sum(packed_bytes(parameters.ring_degree, p.bit_length()) for p in primes)
    return (level + 1) * digit


def default_budget(parameters: Parameters) -> int:
    """The budget of keys, in bytes, where none is given."""
    return round(DEFAULT_KEY_BYTES * (parameters.ring_degree / 8192) ** 2)


def choose(
    maps: Sequence[Affine],
    firsts: Sequence[tuple[Layout, slotmaps.Arrangement]],
    parameters: Parameters,
    last_period: int,
    *,
    budget: int | None = None,
    held: Iterable[KeyNeed] | None = None,
) -> tuple[Layout, list[Step]]:
    """The layout at the cut and a step for each map.

    firsts       candidates for the first map and its input
    last_period  the period of the logits, in positions
    budget       most bytes of evaluation keys, their container included; without it
                 `default_budget`, or the fewest possible where that is too little
    held         keys that devices hold already: a choice that needs exactly these, if there is one

    Tries every arrangement; of baby steps and fold groups all that no other beats
    in both time and keys. Takes tens of milliseconds. Raises `KeysTooLarge`.
    """
    allowed = None if held is None else {key.element: key.level for key in held if key.element}
    states = _search(maps, firsts, parameters, last_period, allowed)
    if allowed is not None:
        exact = [s for s in states if _elements(parameters, s.needs) == allowed]
        if exact:
            return _result(min(exact, key=lambda s: s.seconds))
        states = _search(maps, firsts, parameters, last_period, None)
    least = min(state.key_bytes for state in states)
    limit = max(default_budget(parameters), least) if budget is None else budget
    if least > limit:
        raise KeysTooLarge(
            f"this tail's evaluation keys take {least:,} bytes at least, the budget is {limit:,}: "
            "allow more, or make its layers smaller"
        )
    fitting = [state for state in states if state.key_bytes <= limit]
    fastest = min(state.seconds for state in fitting)
    close = [state for state in fitting if state.seconds <= CLOSE * fastest]
    return _result(min(close, key=lambda s: (s.key_bytes, s.seconds)))


def _result(state: _State) -> tuple[Layout, list[Step]]:
    return state.first, list(state.steps)


def _elements(parameters: Parameters, needs: Mapping[int, int]) -> dict[int, int]:
    return {parameters.galois_element(step): level for step, level in needs.items()}


def _search(
    maps: Sequence[Affine],
    firsts: Sequence[tuple[Layout, slotmaps.Arrangement]],
    parameters: Parameters,
    last_period: int,
    allowed: Mapping[int, int] | None,
) -> list[_State]:
    """States after the last map. By layout, because all that follows depends on nothing else."""
    level, n = parameters.max_level, parameters.ring_degree
    sizes = [key_bytes(parameters, at) for at in range(level + 1)]
    relinearise = sizes[level - 1] if len(maps) > 1 else 0
    states: dict[Layout, list[_State]] = {}
    for first, arrangement in firsts:
        start = _State(0.0, HEADER_BYTES + relinearise, {}, first, ())
        made = _extend([start], arrangement, first.lanes, level, parameters, sizes, allowed)
        states.setdefault(arrangement.out_layout, []).extend(made)
    for index, step in enumerate(maps[1:], start=1):
        level -= 2
        squared = cost.seconds(BACKEND, n, [cost.square(level + 1, BACKEND)], request=False)
        rows, following = step.weight.shape[0], dict[Layout, list[_State]]()
        for layout, before in states.items():
            kept = _fewer(before, allowed is None)
            handed = _thinned(kept) if allowed is None else kept
            waiting = [replace(s, seconds=s.seconds + squared) for s in handed]
            if index == len(maps) - 1:
                ways = [slotmaps.outer(layout, rows, last_period)]
            else:
                summed = (slotmaps.inner(layout, rows, share) for share in _SHARES)
                ways = [slotmaps.outer(layout, rows), *(made for made in summed if made is not None)]
            for arrangement in ways:
                made = _extend(waiting, arrangement, layout.lanes, level, parameters, sizes, allowed)
                following.setdefault(arrangement.out_layout, []).extend(made)
        states = following
    return [state for held in states.values() for state in _fewer(held, allowed is None)]


def _extend(
    states: Sequence[_State],
    arrangement: slotmaps.Arrangement,
    lanes: int,
    level: int,
    parameters: Parameters,
    sizes: Sequence[int],
    allowed: Mapping[int, int] | None,
) -> list[_State]:
    """Every state with every split of one more map's rotations; only with `allowed` keys, if given."""
    unit, n = arrangement.stride * lanes, parameters.ring_degree
    splits: Sequence[_Part] = _splits(arrangement.offsets // arrangement.stride, unit, level, n)
    folds: Sequence[_Part] = _folds(arrangement.fold_step, arrangement.fold_bits, lanes, level, n)
    if allowed is None:
        splits, folds = _frontier(splits, sizes), _frontier(folds, sizes)
    else:
        splits = [part for part in splits if _within(part, parameters, allowed)]
        folds = [part for part in folds if _within(part, parameters, allowed)]
    found = []
    for state, split, group in itertools.product(states, splits, folds):
        needs, size = dict(state.needs), state.key_bytes
        for rotation, at in (*split.needs, *group.needs):
            held = needs.get(rotation)
            if held is None or held < at:
                needs[rotation] = at
                size += sizes[at] - (0 if held is None else sizes[held])
        step = Step(arrangement, split.baby * arrangement.stride, group.folds)
        seconds = state.seconds + split.seconds + group.seconds
        found.append(_State(seconds, size, needs, state.first, (*state.steps, step)))
    return found


def _within(part: _Part, parameters: Parameters, allowed: Mapping[int, int]) -> bool:
    return all(allowed.get(parameters.galois_element(step), -1) >= level for step, level in part.needs)


@lru_cache(maxsize=256)
def _splits(count: int, unit: int, level: int, n: int) -> tuple[_Part, ...]:
    """Baby steps for each number of giant steps, and powers of two, which share keys with folds."""
    wanted = {-(-count // giants) for giants in range(1, count + 1)}
    wanted |= {1 << bit for bit in range(count.bit_length())}
    found = []
    for baby in sorted(wanted):
        giants = -(-count // baby) - 1
        rotations = [*range(1, baby), *([baby] if giants else [])]
        counts = cost.affine(level, baby - 1, giants, count, (), BACKEND)
        spent = cost.seconds(BACKEND, n, [counts], request=False)
        found.append(_Part(spent, tuple((r * unit, level) for r in rotations), baby=baby))
    return tuple(found)


@lru_cache(maxsize=256)
def _folds(step: int, bits: int, lanes: int, level: int, n: int) -> tuple[_Part, ...]:
    """Each way to share doubling steps among groups, widest first and widest last."""
    without = cost.affine(level, 0, 0, 0, (), BACKEND)
    nothing = cost.seconds(BACKEND, n, [without], request=False)
    found = []
    for shares in _partitions(bits, _GROUP_BITS):
        for order in {shares, shares[::-1]}:
            groups = slotmaps.fold_groups(step, order)
            counts = cost.affine(level, 0, 0, 0, [len(g) for g in groups], BACKEND)
            spent = cost.seconds(BACKEND, n, [counts], request=False) - nothing
            needs = tuple((f * lanes, level - 1) for group in groups for f in group)
            found.append(_Part(spent, needs, folds=groups))
    return tuple(found)


def _partitions(total: int, largest: int) -> list[tuple[int, ...]]:
    if not total:
        return [()]
    return [
        (first, *rest)
        for first in range(min(total, largest), 0, -1)
        for rest in _partitions(total - first, first)
    ]


def _frontier(parts: Sequence[_Part], sizes: Sequence[int]) -> list[_Part]:
    """Parts that no smaller one matches in time."""
    fastest, found = math.inf, []
    for part in sorted(parts, key=lambda p: (sum(sizes[at] for _, at in p.needs), p.seconds)):
        if part.seconds < fastest * CLOSE:
            found.append(part)
            fastest = min(fastest, part.seconds)
    return found


def _fewer(states: Sequence[_State], bounded: bool) -> list[_State]:
    """Of states with the same keys the fastest; if `bounded`, those that no smaller one beats."""
    best: dict[frozenset[tuple[int, int]], _State] = {}
    for state in states:
        keys = frozenset(state.needs.items())
        if keys not in best or state.seconds < best[keys].seconds:
            best[keys] = state
    if not bounded:
        return list(best.values())
    fastest, found = math.inf, []
    for state in sorted(best.values(), key=lambda s: (s.key_bytes, s.seconds)):
        if state.seconds < fastest:
            found.append(state)
            fastest = state.seconds
    return found


def _thinned(states: Sequence[_State]) -> Sequence[_State]:
    """At most `_BEAM` of a frontier, spread evenly over it; both its ends stay."""
    if len(states) <= _BEAM:
        return states
    return [states[i * (len(states) - 1) // (_BEAM - 1)] for i in range(_BEAM)]


__all__ = ["CLOSE", "DEFAULT_KEY_BYTES", "KeysTooLarge", "Step", "choose", "default_budget", "key_bytes"]
