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

from blindtail.errors import ModelError
from blindtail.he import cost, grids, slotmaps
from blindtail.he.assemble import activation_ops
from blindtail.he.container import HEADER_BYTES, SEED_BYTES
from blindtail.he.elementwise import ScaleOp
from blindtail.he.layout import Layout
from blindtail.he.normal import Normal
from blindtail.he.operations import Groups
from blindtail.he.packing import packed_bytes
from blindtail.he.params import Parameters
from blindtail.he.rotation_splits import (
    BACKEND,
    CLOSE,
    WORD_BYTES,
    Part,
    Spent,
    Weights,
    folds,
    frontier,
    splits,
)
from blindtail.he.spec import KeyNeed

#: A budget of keys where none is given: so many bytes at N = 8192, growing with N^2 as one key does.
DEFAULT_KEY_BYTES = 30_000_000
#: How many states each map hands on.
_BEAM = 48


class KeysTooLarge(ModelError):
    """No choice fits the budget of keys."""


@dataclass(frozen=True, eq=False)
class Step:
    """One map's arrangement and how its rotations are split."""

    arrangement: slotmaps.Arrangement
    baby: int  # positions
    folds: Groups


@dataclass(frozen=True, eq=False)
class State:
    """The maps so far: a choice for each, and what they cost.

    key_bytes  of the evaluation keys' container
    needs      turn (in slots; ~t conjugates as well) -> highest level
    """

    spent: Spent
    price: float
    key_bytes: int
    needs: Mapping[int, int]
    first: Layout
    steps: tuple[Step, ...]


_FASTEST = Weights()


def key_bytes(parameters: Parameters, level: int) -> int:
    """Bytes that one key at `level` adds to a container of evaluation keys."""
    primes = (*parameters.primes[: level + 1], parameters.special)
    digit = SEED_BYTES + sum(packed_bytes(parameters.ring_degree, p.bit_length()) for p in primes)
    return (level + 1) * digit


def default_budget(parameters: Parameters) -> int:
    """The budget of keys, in bytes, where none is given."""
    return round(DEFAULT_KEY_BYTES * (parameters.ring_degree / 8192) ** 2)


def choose(
    tail: Normal,
    firsts: Sequence[tuple[Layout, slotmaps.Arrangement]],
    parameters: Parameters,
    last_period: int,
    *,
    budget: int | None = None,
    held: Iterable[KeyNeed] | None = None,
) -> tuple[Layout, list[Step]]:
    """The layout at the cut and a step for each map: the fastest within a budget of keys.

    firsts       candidates for the first map and its input
    last_period  the period of the logits, in positions
    budget       most bytes of evaluation keys, their container included; without it
                 `default_budget`, or the fewest possible where that is too little
    held         keys that devices hold already: a choice that needs exactly these, if there is one

    Tries every arrangement; of baby steps and fold groups all that no other beats
    in both time and keys. Takes tens of milliseconds. Raises `KeysTooLarge`.
    """
    if held is not None:
        allowed = {key.element: key.level for key in held if key.element}
        states = search(tail, firsts, parameters, last_period, allowed=allowed)
        exact = [s for s in states if _elements(parameters, s.needs) == allowed]
        if exact:
            return _result(min(exact, key=lambda s: s.price))
    states = search(tail, firsts, parameters, last_period)
    least = min(state.key_bytes for state in states)
    limit = max(default_budget(parameters), least) if budget is None else budget
    if least > limit:
        raise KeysTooLarge(
            f"this tail's evaluation keys take {least:,} bytes at least, the budget is {limit:,}: "
            "allow more, or make its layers smaller"
        )
    return _result(cheapest([state for state in states if state.key_bytes <= limit]))


def cheapest(states: Sequence[State]) -> State:
    """The least price; of those within `CLOSE` of it the fewest bytes of keys."""
    least = min(state.price for state in states)
    close = [state for state in states if state.price <= CLOSE * least]
    return min(close, key=lambda s: (s.key_bytes, s.price))


def _result(state: State) -> tuple[Layout, list[Step]]:
    return state.first, list(state.steps)


def _elements(parameters: Parameters, needs: Mapping[int, int]) -> dict[int, int]:
    return {parameters.turn_element(turn): level for turn, level in needs.items()}


def search(
    tail: Normal,
    firsts: Sequence[tuple[Layout, slotmaps.Arrangement]],
    parameters: Parameters,
    last_period: int,
    *,
    weights: Weights = _FASTEST,
    allowed: Mapping[int, int] | None = None,
    exhaustive: bool = False,
    ways: grids.Ways | None = None,
    periodic: bool = False,
) -> list[State]:
    """States after the last map that no other beats in both price and keys, as far as was looked.

    weights     what the price is
    allowed     keys by Galois element and their levels: states that need no other, all of them
    exhaustive  leave nothing out: minutes for three maps
    ways        of these maps in this ring, where they were made already
    periodic    the last map but one ends with copies of its outputs: at the cost of time, the
                last one needs fewer folds, whose noise is large beside q_0
    """
    top, n = parameters.max_level, parameters.ring_degree
    sizes = [key_bytes(parameters, at) for at in range(top + 1)]
    levels = [top - depth for depth in tail.depths[0]]
    # By the layouts of values that are still read, because all that follows depends on nothing else.
    states: dict[tuple[Layout, ...], list[State]] = {}
    ways = ways or grids.Ways(tail, parameters.slots, firsts[0][0].lanes)
    pruned = allowed is None and not exhaustive
    asked = cost.seconds(BACKEND, n, [])  # what every request costs
    nothing = Spent(asked, cost.seconds(BACKEND, n, [], part="online"), 0)
    relinearise = relinearisation(tail, top)
    own = HEADER_BYTES + (sizes[relinearise] if relinearise else 0)
    for first, arrangement in firsts:
        if periodic and len(tail.maps) == 2 and not grids.repeats(arrangement):
            continue
        start = State(nothing, weights.price(nothing), own, {}, first, ())
        parts = _Parts(arrangement, first.lanes, levels[0], n, weights, tail.is_chain)
        made = _extend([start], parts, parameters, sizes, allowed, pruned)
        if made:  # all with the same layouts
            states.setdefault(_live(tail, made[0]), []).extend(made)
    for index in range(1, len(tail.maps)):
        between = activated(tail, index - 1, levels[index - 1] - 1, n)
        following: dict[tuple[Layout, ...], list[State]] = {}
        for before in states.values():
            handed: Sequence[State] = before if exhaustive else _fewer(before, pruned)
            waiting = [_after(s, between, weights) for s in (_thinned(handed) if pruned else handed)]
            layouts = tuple(_layout(waiting[0], value) for value, _ in tail.sources(index))
            main = layouts[0]
            for arrangement in ways.later(index, layouts, last_period):
                if periodic and index == len(tail.maps) - 2 and not grids.repeats(arrangement):
                    continue
                parts = _Parts(arrangement, main.lanes, levels[index], n, weights, False)
                made = _extend(waiting, parts, parameters, sizes, allowed, pruned)
                if made:
                    following.setdefault(_live(tail, made[0]), []).extend(made)
        states = following
    return [state for held in states.values() for state in _fewer(held, pruned)]


def _layout(state: State, value: int) -> Layout:
    """Of a value: the input's, or what an activation keeps of its map's."""
    return state.first if value == 0 else state.steps[value - 1].arrangement.out_layout


def _live(tail: Normal, state: State) -> tuple[Layout, ...]:
    """Layouts of the values that maps to come read."""
    done = len(state.steps)
    read = {value for index in range(done, len(tail.maps)) for value, _ in tail.sources(index)}
    return tuple(_layout(state, value) for value in sorted(read) if value <= done)


def relinearisation(tail: Normal, top: int) -> int:
    """The highest level of a product of ciphertexts, for an input at level `top`; 0 where there is none."""
    # An activation's first product is at the level of its map's result.
    found = [
        top - at - 1 for at, act in zip(tail.depths[0], tail.activations, strict=False) if act.degree > 1
    ]
    return max(found, default=0)


def activated(tail: Normal, index: int, level: int, n: int) -> Spent:
    """An activation; a plain square behind the first map is cheaper with a ticket."""
    if tail.activations[index].coefficients is None:
        return _squared(level, n, index == 0 and tail.is_chain)
    ops = activation_ops(tail.activations[index], level)
    seconds = cost.seconds(BACKEND, n, [cost.count(op, BACKEND) for op in ops], request=False)
    plain = sum((len(op.backs) * (op.level + 2) + op.level) for op in ops if isinstance(op, ScaleOp))
    return Spent(seconds, seconds, plain * n * WORD_BYTES)


def _squared(level: int, n: int, first: bool) -> Spent:
    """A square; only the first is cheaper with a ticket."""
    whole = cost.seconds(BACKEND, n, [cost.square(level, BACKEND)], request=False)
    online = cost.seconds(BACKEND, n, [cost.square_online(level)], False, cost.BARE) if first else whole
    return Spent(whole, online, 0)


def _after(state: State, spent: Spent, weights: Weights) -> State:
    return replace(state, spent=state.spent.plus(spent), price=state.price + weights.price(spent))


@dataclass(frozen=True, eq=False)
class _Parts:
    """The ways to split one map's rotations, priced."""

    arrangement: slotmaps.Arrangement
    lanes: int
    level: int
    n: int
    weights: Weights
    first: bool  # of the tail: a ticket covers it

    def splits(self) -> Sequence[Part]:
        made = self.arrangement
        main = made.used or tuple(range(0, made.offsets, made.stride))
        counted = tuple(tuple(k // made.stride for k in offsets) for offsets in (main, *made.more))
        return splits(counted, made.stride * self.lanes, self.level, self.n, self.weights, self.first)

    def folds(self) -> Sequence[Part]:
        made = self.arrangement
        turns = made.fold_step, made.fold_bits, made.complex_input
        return folds(*turns, self.lanes, self.level, self.n, self.weights, self.first)


def _extend(
    states: Sequence[State],
    parts: _Parts,
    parameters: Parameters,
    sizes: Sequence[int],
    allowed: Mapping[int, int] | None,
    pruned: bool,
) -> list[State]:
    """Every state with every split of one more map's rotations; only with `allowed` keys, if given."""
    divided, folded = parts.splits(), parts.folds()
    if pruned:
        divided, folded = frontier(divided, sizes), frontier(folded, sizes)
    elif allowed is not None:
        divided = [part for part in divided if _within(part, parameters, allowed)]
        folded = [part for part in folded if _within(part, parameters, allowed)]
    found = []
    for state, split, group in itertools.product(states, divided, folded):
        needs, size = dict(state.needs), state.key_bytes
        for turn, at in (*split.needs, *group.needs):
            held = needs.get(turn)
            if held is None or held < at:
                needs[turn] = at
                size += sizes[at] - (0 if held is None else sizes[held])
        step = Step(parts.arrangement, split.baby * parts.arrangement.stride, group.folds)
        spent = state.spent.plus(split.spent).plus(group.spent)
        price = state.price + split.price + group.price
        found.append(State(spent, price, size, needs, state.first, (*state.steps, step)))
    return found


def _within(part: Part, parameters: Parameters, allowed: Mapping[int, int]) -> bool:
    return all(allowed.get(parameters.turn_element(turn), -1) >= level for turn, level in part.needs)


def _fewer(states: Sequence[State], bounded: bool) -> list[State]:
    """Of states with the same keys the cheapest; if `bounded`, those that no smaller one beats."""
    best: dict[frozenset[tuple[int, int]], State] = {}
    for state in states:
        keys = frozenset(state.needs.items())
        if keys not in best or state.price < best[keys].price:
            best[keys] = state
    if not bounded:
        return list(best.values())
    least, found = math.inf, []
    for state in sorted(best.values(), key=lambda s: (s.key_bytes, s.price)):
        if state.price < least:
            found.append(state)
            least = state.price
    return found


def _thinned(states: Sequence[State]) -> Sequence[State]:
    """At most `_BEAM` of a frontier, spread evenly over it; both its ends stay."""
    if len(states) <= _BEAM:
        return states
    return [states[i * (len(states) - 1) // (_BEAM - 1)] for i in range(_BEAM)]


__all__ = [
    "BACKEND",
    "CLOSE",
    "DEFAULT_KEY_BYTES",
    "WORD_BYTES",
    "KeysTooLarge",
    "Spent",
    "State",
    "Step",
    "Weights",
    "activated",
    "cheapest",
    "choose",
    "default_budget",
    "key_bytes",
    "relinearisation",
    "search",
]
