"""How one map's rotations may be split into baby and giant steps, and its sums into fold groups.

Each way has its predicted time and the keys that it wants; `blindtail.he.schedule` combines those of
all maps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from blindtail.he import cost, slotmaps
from blindtail.he.cost import Counts
from blindtail.he.operations import Groups, in_slots

#: The backend whose time decides: by the reference's constants, never by what was measured on this machine
#: (`blindtail.he.calibration`), so that a model compiles to the same program everywhere.
BACKEND = "native"
#: Of two choices this close in time, the one with fewer bytes of keys.
CLOSE = 1.02
#: Bytes of a plaintext's or key's word, for primes below 2^30.
WORD_BYTES = 4
#: Doubling steps that one fold group may replace.
_GROUP_BITS = 4


class Spent(NamedTuple):
    """What adds up from map to map: predicted seconds, those with a ticket, and bytes of plaintexts."""

    total_s: float
    online_s: float
    plain_bytes: int

    def plus(self, other: Spent) -> Spent:
        return Spent(
            self.total_s + other.total_s,
            self.online_s + other.online_s,
            self.plain_bytes + other.plain_bytes,
        )


class Weights(NamedTuple):
    """Of the three numbers in `Spent`: their weighted sum is what a search minimises, beside keys."""

    total_s: float = 1.0
    online_s: float = 0.0
    plain_bytes: float = 0.0

    def price(self, spent: Spent) -> float:
        return (
            self.total_s * spent.total_s
            + self.online_s * spent.online_s
            + (self.plain_bytes * spent.plain_bytes)
        )


@dataclass(frozen=True)
class Part:
    """Baby and giant steps, or the folds, of one map: costs, and level by turn (in slots)."""

    spent: Spent
    price: float
    needs: tuple[tuple[int, int], ...]
    baby: int = 0
    folds: Groups = ()


@lru_cache(maxsize=256)
def splits(
    operands: tuple[tuple[int, ...], ...], unit: int, level: int, n: int, weights: Weights, first: bool
) -> tuple[Part, ...]:
    """Baby steps for each number of giant steps, and powers of two, which share keys with folds.

    operands  offsets that are used, rising, in `unit` slots, of each
    """
    most = max(offsets[-1] for offsets in operands)
    count = most + 1
    wanted = {-(-count // giants) for giants in range(1, count + 1)}
    wanted |= {1 << bit for bit in range(count.bit_length())}
    every, found = [np.asarray(offsets) for offsets in operands], []
    for baby in sorted(wanted):
        giants = most // baby
        turns = [np.unique(offsets % baby) for offsets in every]
        turned = sum(int(np.count_nonzero(found)) for found in turns)
        spent = spent_on(level, n, (turned, giants, sum(map(len, operands)), ()), first)
        # Further operands have digits of their own.
        digits = Counts(0, 0, (len(operands) - 1) * (level + 1) * (level + 2), 0, 0)
        apart = cost.seconds(BACKEND, n, [digits], request=False)
        spent = spent.plus(Spent(apart, apart, 0))
        steps = [int(b) for b in np.unique(np.concatenate(turns)) if b]
        needs = tuple((r * unit, level) for r in (*steps, *([baby] if giants else [])))
        found.append(Part(spent, weights.price(spent), needs, baby=baby))
    return tuple(found)


@lru_cache(maxsize=256)
def folds(
    step: int, bits: int, conjugate: bool, lanes: int, level: int, n: int, weights: Weights, first: bool
) -> tuple[Part, ...]:
    """Each way to share doubling steps among groups, widest first and widest last.

    The conjugate is one step more, in the first or the last group.
    """
    without = spent_on(level, n, (0, 0, 0, ()), first)
    found = []
    for shares in _partitions(bits + conjugate, _GROUP_BITS):
        turns = tuple((1 << b) - 1 for b in shares)
        with_them = spent_on(level, n, (0, 0, 0, turns), first)
        spent = Spent(with_them.total_s - without.total_s, with_them.online_s - without.online_s, 0)
        places = sorted({0, len(shares) - 1}) if conjugate else [None]
        for order, place in itertools.product(sorted({shares, shares[::-1]}), places):
            groups = slotmaps.fold_groups(step, order, place)
            needs = tuple((in_slots(f, lanes), level - 1) for group in groups for f in group)
            found.append(Part(spent, weights.price(spent), needs, folds=groups))
    return tuple(found)


def spent_on(level: int, n: int, turns: tuple[int, int, int, tuple[int, ...]], first: bool) -> Spent:
    """Of baby steps, giant steps, products and fold groups at one level."""
    whole = cost.seconds(BACKEND, n, [cost.affine(level, *turns, BACKEND)], request=False)
    online = whole
    if first:
        online = cost.seconds(BACKEND, n, [cost.affine_online(level, *turns)], False, cost.BARE)
    return Spent(whole, online, (turns[2] * (level + 2) + level) * n * WORD_BYTES)


def _partitions(total: int, largest: int) -> list[tuple[int, ...]]:
    if not total:
        return [()]
    return [
        (first, *rest)
        for first in range(min(total, largest), 0, -1)
        for rest in _partitions(total - first, first)
    ]


def frontier(parts: Sequence[Part], sizes: Sequence[int]) -> list[Part]:
    """Parts that no smaller one matches in price."""
    fastest, found = math.inf, []
    for part in sorted(parts, key=lambda p: (sum(sizes[at] for _, at in p.needs), p.price)):
        if part.price < fastest * CLOSE:
            found.append(part)
            fastest = min(fastest, part.price)
    return found


__all__ = [
    "BACKEND",
    "CLOSE",
    "WORD_BYTES",
    "Part",
    "Spent",
    "Weights",
    "folds",
    "frontier",
    "splits",
]
