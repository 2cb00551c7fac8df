"""Where each weight of a map is multiplied: found once, for arrays and sparse matrices alike.

With the input rotated by k, position s sees element content[s + k]. Of all (k, s),
in that order, at which an entry's row sees its column, the first carries it
(`blindtail.he.operations`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blindtail.he.sparse import FloatArray, Sparse, Weight, entries
from blindtail.he.spec import Layout

Index = NDArray[np.int64]

#: Pairs of positions that are looked at together: they bound the memory.
_PAIRS = 1 << 22


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
        for i, k in enumerate(self.offsets):
            held = slice(self.starts[i], self.starts[i + 1])
            made = np.zeros(self.period)
            made[self.places[held]] = values[self.entry[held]]
            yield int(k), np.tile(made, positions // self.period)


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
    k, places, entry = _sparse(weight, *how) if isinstance(weight, Sparse) else _dense(weight, *how)
    missing[entry] = False
    used, starts = np.unique(k, return_index=True)
    return Part(period, used, np.append(starts, len(k)), places, entry)


def _dense(
    weight: FloatArray,
    rows: NDArray[np.int32],
    content: NDArray[np.int32],
    offsets: int,
    stride: int,
    missing: NDArray[np.bool_],
    period: int,
) -> tuple[Index, Index, Index]:
    """Offset by offset; (offset, position, entry), offsets rising."""
    own, inner, left = rows[:period], weight.shape[1], missing.copy()
    found: list[tuple[Index, Index, Index]] = []
    for k in range(0, offsets, stride):
        seen = np.roll(content, -k)[:period]
        usable = np.flatnonzero((own >= 0) & (seen >= 0))
        entry = own[usable].astype(np.int64) * inner + seen[usable]
        fresh = left[entry]
        entry, first = np.unique(entry[fresh], return_index=True)
        if len(entry):
            left[entry] = False
            found.append((np.full(len(entry), k, np.int64), usable[fresh][first], entry))
    if not found:
        return (np.zeros(0, np.int64),) * 3
    k_all, places, every = (np.concatenate(part) for part in zip(*found, strict=True))
    return k_all, places, every


def _sparse(
    weight: Sparse,
    rows: NDArray[np.int32],
    content: NDArray[np.int32],
    offsets: int,
    stride: int,
    missing: NDArray[np.bool_],
    period: int,
) -> tuple[Index, Index, Index]:
    """Entry by entry, over the positions of its row and of its column; (offset, position, entry)."""
    if period % stride:
        period = len(content)
    by_row, row_starts = _places(rows[:period], weight.shape[0])
    by_column, column_starts = _places(content[:period], weight.shape[1])
    entry = np.flatnonzero(missing)
    r, c = weight.rows[entry], weight.columns[entry]
    across = np.diff(column_starts)[c]
    pairs = np.diff(row_starts)[r] * across
    met = pairs > 0
    entry, r, c, across, pairs = entry[met], r[met], c[met], across[met], pairs[met]
    ends = np.cumsum(pairs)
    best = np.zeros(len(entry), np.int64)
    nowhere = np.int64(period) * period
    at = 0
    while at < len(entry):
        done = int(ends[at - 1]) if at else 0
        stop = max(at + 1, int(np.searchsorted(ends, done + _PAIRS, "right")))
        many = pairs[at:stop]
        begins = np.cumsum(many) - many
        within = np.arange(int(many.sum())) - np.repeat(begins, many)
        wide = np.repeat(across[at:stop], many)
        p = by_row[np.repeat(row_starts[r[at:stop]], many) + within // wide]
        q = by_column[np.repeat(column_starts[c[at:stop]], many) + within % wide]
        k = (q - p) % period
        order = np.where((k < offsets) & (k % stride == 0), k * period + p, nowhere)
        best[at:stop] = np.minimum.reduceat(order, begins)
        at = stop
    met = best < nowhere
    entry, best = entry[met], best[met]
    order = np.argsort(best, kind="stable")
    best, entry = best[order], entry[order]
    return best // period, best % period, entry


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
