"""Where each weight of a map is multiplied: found once, for arrays and sparse matrices alike.

With the input rotated by k, position s sees element content[s + k]. Of all (k, s),
in that order, at which an entry's row sees its column, the first carries it
(`blindtail.he.operations`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from blindtail.he.layout import Layout, SlotArray
from blindtail.he.sparse import FloatArray, Sparse, Weight, entries

Index = NDArray[Any]  # of whole numbers
AnySlots = TypeVar("AnySlots", FloatArray, SlotArray)

#: Positions and entries that are looked at together: they bound the memory.
_PAIRS, _CHUNK = 1 << 20, 1 << 15
#: All pairs of positions are tried where rows and columns are at so many, a power of two. Sets of
#: positions that are taken one after the other.
_FEW, _SETS = 8, 8


@dataclass(frozen=True, eq=False)
class Part:
    """Of the real or the imaginary parts of a layout.

    period   all repeats with so many positions
    offsets  that carry something, rising; those of offset i are starts[i] ... starts[i + 1] - 1 of
    places   positions below `period`
    entry    into `entries(weight)`
    """

    period: int
    offsets: Index
    starts: Index
    places: Index
    entry: Index

    def multipliers(self, values: FloatArray, positions: int) -> Iterator[tuple[int, FloatArray]]:
        """(offset, multipliers by position)."""
        for i, k in enumerate(self.offsets.tolist()):
            made = np.zeros(self.period)
            self.put(i, values, made)
            yield k, _repeated(made, positions)

    def put(self, number: int, values: FloatArray, made: FloatArray) -> None:
        """Values that offset `number` carries, at their places in `made` (period,)."""
        held = slice(self.starts[number], self.starts[number + 1])
        made[self.places[held]] = values[self.entry[held]]


@dataclass(frozen=True, eq=False)
class Met:
    """Where weights are met, and how many other than zero are met nowhere."""

    real: Part
    imaginary: Part | None
    unused: int

    @property
    def offsets(self) -> tuple[int, ...]:
        """With something to multiply, rising."""
        found = [self.real.offsets] if self.imaginary is None else [self.real.offsets, self.imaginary.offsets]
        return tuple(np.unique(np.concatenate(found)).tolist())

    def multipliers(self, values: FloatArray, positions: int) -> Iterator[tuple[int, SlotArray]]:
        """(offset, multipliers by position), offsets rising; complex where there are imaginary parts.

        (w - i w') / 2 at a position that sees x + i x'.
        """
        if self.imaginary is None:
            yield from self.real.multipliers(values, positions)
            return
        numbers = [
            {k: i for i, k in enumerate(part.offsets.tolist())} for part in (self.real, self.imaginary)
        ]
        for k in self.offsets:
            made = np.zeros(self.real.period, np.complex128)
            if k in numbers[0]:
                self.real.put(numbers[0][k], values, made.real)
                made.real /= 2
            if k in numbers[1]:
                self.imaginary.put(numbers[1][k], values, made.imag)
                made.imag *= 0.5
                np.subtract(0.0, made.imag, out=made.imag)
            yield k, _repeated(made, positions)


def _repeated(made: AnySlots, positions: int) -> AnySlots:
    return made if len(made) == positions else np.tile(made, positions // len(made))


def meet(
    weight: Weight, rows: NDArray[np.int32], layout: Layout, offsets: int, stride: int, period: int = 0
) -> Met:
    """rows (positions,): each position's row or -1; offsets 0, stride, ... below `offsets`.

    period  after which what is met repeats, a multiple of the rows' and the content's; 0: the least
    """
    missing = entries(weight) != 0
    real = _part(weight, rows, layout.index, offsets, stride, missing, period)
    other = None
    if layout.imaginary is not None:
        imaginary = np.asarray(layout.imaginary, np.int32)
        other = _part(weight, rows, imaginary, offsets, stride, missing, period)
    return Met(real, other, int(missing.sum()))


def _part(
    weight: Weight,
    rows: NDArray[np.int32],
    content: NDArray[np.int32],
    offsets: int,
    stride: int,
    missing: NDArray[np.bool_],
    period: int,
) -> Part:
    """Takes what it meets off `missing`."""
    period = period or repeat_length(content, rows)
    how = rows, content, offsets, stride, missing, period
    used, starts, places, entry = (
        _sparse(weight, *how) if isinstance(weight, Sparse) else _dense(weight, *how)
    )
    return Part(period, used, starts, places, entry)


# -- of arrays: offset by offset ----------------------------------------------------------


def _dense(
    weight: FloatArray,
    rows: NDArray[np.int32],
    content: NDArray[np.int32],
    offsets: int,
    stride: int,
    missing: NDArray[np.bool_],
    period: int,
) -> tuple[Index, Index, Index, Index]:
    """What `Part` has, of each offset in any order."""
    sets, several = _apart(rows[:period])
    turns = [(own, rows[own].astype(np.int64) * weight.shape[1]) for own in sets]
    twice = np.concatenate([content, content])
    small = _least(missing.size)
    found: list[tuple[int, Index, Index]] = []
    for k in range(0, offsets, stride):
        for own, begin in turns:
            seen, met, at = twice[k + own], own, begin
            if len(seen) and seen.min() < 0:
                held = seen >= 0
                seen, met, at = seen[held], own[held], begin[held]
            entry = at + seen
            fresh = missing[entry]
            if not fresh.all():
                met, entry = met[fresh], entry[fresh]
            if several:
                entry, first = np.unique(entry, return_index=True)
                met = met[first]
            if len(entry):
                missing[entry] = False
                found.append((k, met.astype(np.int32), entry.astype(small)))
    if not found:
        none = np.zeros(0, np.int64)
        return none, np.zeros(1, np.int64), none, none
    k_all, places, every = zip(*found, strict=True)
    del found
    ends = np.cumsum([0, *map(len, places)])
    used, first = np.unique(np.array(k_all, np.int64), return_index=True)
    return used, ends[np.append(first, len(places))], np.concatenate(places), np.concatenate(every)


def _apart(held: NDArray[np.int32]) -> tuple[list[Index], bool]:
    """Positions with something, in sets in which nothing is held twice, first those of first places.

    Where that would be many sets: all in one, and True.
    """
    order, starts = _places(held, int(held.max(initial=-1)) + 1)
    many = np.diff(starts)
    most = int(many.max(initial=0))
    if most > _SETS:
        return [np.flatnonzero(held >= 0)], True
    of = [np.flatnonzero(many > turn) for turn in range(most)]
    return [np.sort(order[starts[one] + turn]) for turn, one in enumerate(of)], False


# -- of sparse matrices: entry by entry ---------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Held:
    """Where things are: positions by thing, of each rising; those of thing i from starts[i] on, many[i]."""

    order: Index
    starts: Index
    many: Index

    @classmethod
    def of(cls, held: NDArray[np.int32], count: int) -> _Held:
        order, starts = _places(held, count)
        return cls(order, starts[:-1], np.diff(starts))

    def nth(self, turn: int) -> Index:
        """Of each thing its position number `turn`, or its last one."""
        at = self.starts + np.minimum(turn, self.many - 1)
        found: Index = self.order[np.clip(at, 0, len(self.order) - 1)]
        return found

    @property
    def kinds(self) -> NDArray[np.int8]:
        """Of each thing: at 1, 2, 4 ... `_FEW` positions at most (0, 1, 2 ...), or at more; -1: nowhere."""
        bounds = 1 << np.arange(_FEW.bit_length())
        return np.where(self.many > 0, np.searchsorted(bounds, self.many), -1).astype(np.int8)


@dataclass(frozen=True)
class _Turns:
    """Which offsets there are. A meeting counts as offset * period + position; `nowhere` is beyond all."""

    period: int
    offsets: int
    stride: int

    @property
    def nowhere(self) -> int:
        return self.period * self.period

    @property
    def kind(self) -> type[np.signedinteger[Any]]:
        return _least(self.nowhere)

    def at(self, k: Index, p: Index) -> Index:
        """k: of any whole number of periods too much or too little"""
        k = k & (self.period - 1) if not self.period & (self.period - 1) else k % self.period
        order: Index = k * self.kind(self.period) + p
        if self.offsets < self.period or self.stride > 1:
            order[(k >= self.offsets) | (k % self.stride != 0)] = self.nowhere
        return order


def _sparse(
    weight: Sparse,
    rows: NDArray[np.int32],
    content: NDArray[np.int32],
    offsets: int,
    stride: int,
    missing: NDArray[np.bool_],
    period: int,
) -> tuple[Index, Index, Index, Index]:
    """What `Part` has, of each offset by position."""
    if period % stride:
        period = len(content)
    turns = _Turns(period, min(offsets, period), stride)
    own, seen = _Held.of(rows[:period], weight.shape[0]), _Held.of(content[:period], weight.shape[1])
    entry = np.flatnonzero(missing).astype(_least(missing.size))
    r, c = weight.rows[entry], weight.columns[entry]
    several = np.int8(_FEW.bit_length() + 1)
    p_kinds, q_kinds = own.kinds[r], seen.kinds[c]
    label = np.where((p_kinds < 0) | (q_kinds < 0), np.int8(-1), p_kinds * several + q_kinds)
    found: list[Index] = []
    for one in np.flatnonzero(np.bincount(label + 1)[1:] if len(label) else label).tolist():
        part = np.flatnonzero(label == one)
        most = 1 << max(divmod(one, int(several)))
        look = _by_pairs if most <= _FEW else _by_search
        best = look(own, seen, r[part], c[part], turns)
        met = np.flatnonzero(best < turns.nowhere)
        # No two meet at one place, so that one sort of places with entries does.
        found.append(best[met].astype(np.int64) << 32 | entry[part[met]])
    order = np.sort(np.concatenate([np.zeros(0, np.int64), *found]))
    entry = (order & 0xFFFFFFFF).astype(entry.dtype)
    missing[entry] = False
    order >>= 32
    k, places = order // period, (order % period).astype(np.int32)
    starts = np.flatnonzero(np.diff(k, prepend=-1, append=period))
    return k[starts[:-1]], starts, places, entry


def _by_pairs(own: _Held, seen: _Held, r: Index, c: Index, turns: _Turns) -> Index:
    """The first meeting of each entry's row and column, which are at few positions: all pairs are tried."""
    ps, qs = (
        [held.nth(turn).astype(turns.kind) for turn in range(int(held.many[of].max()))]
        for held, of in ((own, r), (seen, c))
    )
    found = np.empty(len(r), turns.kind)
    for start in range(0, len(r), _CHUNK):
        part = slice(start, start + _CHUNK)
        best = np.full(len(r[part]), turns.nowhere, turns.kind)
        q_all = [q[c[part]] for q in qs]
        for p_of in ps:
            p = p_of[r[part]]
            for q in q_all:
                np.minimum(best, turns.at(q - p, p), out=best)
        found[part] = best
    return found


def _by_search(own: _Held, seen: _Held, r: Index, c: Index, turns: _Turns) -> Index:
    """The same: from each position of what is at fewer of them, the next of the other."""
    period, stride = turns.period, turns.stride
    ahead = int(own.many[r].sum()) <= int(seen.many[c].sum())
    walked, of = (own, r) if ahead else (seen, c)
    wanted, to = (seen, c) if ahead else (own, r)
    many = walked.many[of]
    ends = np.cumsum(many)
    # By thing, by residue, by position; from columns to rows it goes backwards.
    things = np.repeat(np.arange(len(wanted.many)), wanted.many)
    at = wanted.order[len(wanted.order) - len(things) :]
    at = at if ahead else period - 1 - at
    keys = np.sort((things * stride + at % stride) * period + at)
    found = np.empty(len(r), turns.kind)
    start = 0
    while start < len(r):
        done = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + _PAIRS, "right")))
        own_many = many[start:stop]
        begins = np.cumsum(own_many) - own_many
        within = np.arange(int(own_many.sum())) - np.repeat(begins, own_many)
        here = walked.order[np.repeat(walked.starts[of[start:stop]], own_many) + within]
        place = here if ahead else period - 1 - here
        label = np.repeat(to[start:stop].astype(np.int64) * stride, own_many) + place % stride
        k = _next(keys, label, place, period)
        p = here if ahead else (here - k) % period
        order = np.where(k < 0, turns.nowhere, turns.at(k, p))
        found[start:stop] = np.minimum.reduceat(order, begins)
        start = stop
    return found


def _next(keys: Index, label: Index, place: Index, period: int) -> Index:
    """From a place on, how far it is to the next key of this label (label * period + place), or -1."""
    last = np.append(keys, -1)
    at = np.searchsorted(keys, label * period + place)
    beyond = last[at] // period != label
    at[beyond] = np.searchsorted(keys, label[beyond] * period)  # once around
    held: Index = np.where(last[at] // period == label, (last[at] - place) % period, -1)
    return held


def _least(size: int) -> type[np.signedinteger[Any]]:
    """The type for numbers below this."""
    return np.int32 if size <= np.iinfo(np.int32).max else np.int64


def _places(held: NDArray[np.int32], count: int) -> tuple[Index, Index]:
    """Positions ordered by what they hold, and where each thing's begin (count + 1,)."""
    order = np.argsort(held, kind="stable").astype(np.int64)
    return order, np.searchsorted(held[order], np.arange(count + 1)).astype(np.int64)


def repeat_length(*contents: NDArray[np.int32]) -> int:
    """The smallest power of two with which all repeat."""
    positions, period = len(contents[0]), 1
    while period < positions:
        if all((a.reshape(-1, period) == a[:period]).all() for a in contents):
            return period
        period *= 2
    return positions


__all__ = ["Met", "Part", "meet", "repeat_length"]
