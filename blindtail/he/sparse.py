"""Sparse matrices of weights: what a convolution is, as an affine map.

Rows in order, within a row columns in order (CSR with the row of each entry kept
beside): enough for what a compiler and a check do with weights, which is not much.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blindtail.errors import ModelError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int32]
IndexArray = NDArray[np.int64]

#: A matrix of more elements than this (8 MB) with at most this share of them non-zero is kept sparse.
LARGE, SHARE = 1 << 20, 0.25
#: Rows that are made dense together for a product.
_BAND = 64


@dataclass(frozen=True, eq=False)
class Sparse:
    """A matrix by its non-zero entries, float64.

    shape          (out, in)
    rows, columns  of each entry, int32, by row and then by column, none twice
    values         none of them zero

    Takes the place of an array where one is multiplied (`@`, `*` by a number or by one
    number a column) or transposed. Raises `ModelError` when entries are not as said.
    """

    shape: tuple[int, int]
    rows: IntArray
    columns: IntArray
    values: FloatArray

    #: numpy leaves `array @ sparse` to this class.
    __array_ufunc__ = None

    def __post_init__(self) -> None:
        rows, columns = (np.asarray(v, np.int32) for v in (self.rows, self.columns))
        values = np.asarray(self.values, np.float64)
        if not rows.shape == columns.shape == values.shape or rows.ndim != 1:
            raise ModelError("a sparse matrix needs a row, a column and a value for each entry")
        if len(rows):
            place = rows.astype(np.int64) * self.shape[1] + columns
            inside = rows.min() >= 0 and columns.min() >= 0 and columns.max() < self.shape[1]
            if not (inside and rows.max() < self.shape[0] and (np.diff(place) > 0).all() and values.all()):
                raise ModelError("a sparse matrix's entries must be inside it, in order, and not zero")
        for key, array in (("rows", rows), ("columns", columns), ("values", values)):
            object.__setattr__(self, key, array)

    @classmethod
    def of(cls, dense: FloatArray) -> Sparse:
        """The same matrix."""
        rows, columns = np.nonzero(dense)
        return cls(dense.shape, rows, columns, dense[rows, columns])  # type: ignore[arg-type]

    @classmethod
    def unordered(cls, shape: tuple[int, int], rows: Any, columns: Any, values: FloatArray) -> Sparse:
        """From entries in any order, none twice; zeros are left out."""
        rows, columns, held = np.asarray(rows), np.asarray(columns), values != 0
        if not held.all():
            rows, columns, values = rows[held], columns[held], values[held]
        place = rows.astype(np.int64) * shape[1] + columns
        if (np.diff(place) > 0).all():
            return cls(shape, rows, columns, values)
        order = _order(place, shape[0] * shape[1])
        return cls(shape, rows[order], columns[order], values[order])

    @classmethod
    def block(cls, shape: tuple[int, int], rows: IntArray, columns: IntArray, held: FloatArray) -> Sparse:
        """`held` at these rows and columns, both rising; nothing elsewhere."""
        if held.all():
            r, c, values = np.repeat(rows, len(columns)), np.tile(columns, len(rows)), held.reshape(-1)
        else:
            down, across = np.nonzero(held)
            r, c, values = rows[down], columns[across], held[down, across]
        return cls(shape, r[:0], c[:0], values[:0])._sound(r, c, values)

    def part(self, kept: NDArray[Any]) -> Sparse:
        """Some entries alone: rising numbers, or True for each that stays."""
        return self._sound(self.rows[kept], self.columns[kept], self.values[kept])

    def _sound(self, rows: IntArray, columns: IntArray, values: FloatArray) -> Sparse:
        """Of this shape, from arrays of the types above that are known to be in order: not checked again."""
        made = object.__new__(Sparse)
        for key, value in (("shape", self.shape), ("rows", rows), ("columns", columns), ("values", values)):
            object.__setattr__(made, key, value)
        return made

    @property
    def starts(self) -> NDArray[np.int64]:
        """Of each row's entries, and the end: (out + 1,)."""
        return np.searchsorted(self.rows, np.arange(self.shape[0] + 1)).astype(np.int64)

    @property
    def T(self) -> Sparse:
        return Sparse.unordered(self.shape[::-1], self.columns, self.rows, self.values)

    def filled(self, values: FloatArray) -> Sparse:
        """Other values, none zero, in the same places."""
        if values.dtype == np.float64 and values.shape == self.values.shape and values.all():
            return self._sound(self.rows, self.columns, values)
        return Sparse(self.shape, self.rows, self.columns, values)

    def dense(self) -> FloatArray:
        out = np.zeros(self.shape)
        out[self.rows, self.columns] = self.values
        return out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self.dense() if dtype is None else self.dense().astype(dtype)

    def bands(self) -> Iterator[tuple[IndexArray, IndexArray, FloatArray]]:
        """(rows, columns that some of them reads, these rows and columns as a dense array); each row once.

        Rows go together by the first column that they read: of a convolution, all channels of
        neighbouring pixels, which read few columns.
        """
        starts, width = self.starts, self.shape[1]
        first = np.append(self.columns, 0)[starts[:-1]]
        order = np.argsort(first, kind="stable")
        local, seen = np.zeros(width, np.int64), np.zeros(width, bool)
        for top in range(0, self.shape[0], _BAND):
            rows = order[top : top + _BAND]
            many = starts[rows + 1] - starts[rows]
            within = np.arange(int(many.sum())) - np.repeat(np.cumsum(many) - many, many)
            held = np.repeat(starts[rows], many) + within
            own = self.columns[held]
            seen[:] = False
            seen[own] = True
            used = np.flatnonzero(seen)
            local[used] = np.arange(len(used))
            block = np.zeros((len(rows), len(used)))
            block[np.repeat(np.arange(len(rows)), many), local[own]] = self.values[held]
            yield rows, used, block

    def __matmul__(self, other: FloatArray) -> FloatArray:
        """(in,) or (in, n)."""
        if other.ndim == 1:
            summed = np.bincount(self.rows, self.values * other[self.columns], self.shape[0])
            return np.asarray(summed, np.float64)
        made, other = np.zeros((self.shape[0], other.shape[1])), np.ascontiguousarray(other)
        for rows, columns, block in self.bands():
            made[rows] = block @ other[columns]
        return made

    def __rmatmul__(self, other: FloatArray) -> FloatArray:
        """(out,) or (n, out) before the matrix."""
        if other.ndim == 1:
            summed = np.bincount(self.columns, self.values * other[self.rows], self.shape[1])
            return np.asarray(summed, np.float64)
        return (self.T @ other.T).T

    def __mul__(self, factor: float | FloatArray) -> Sparse:
        """By a number, or by one for each column (in,)."""
        each = np.asarray(factor, np.float64)
        times = self.values * (each[self.columns] if each.ndim else each)
        held = times != 0
        return Sparse(self.shape, self.rows[held], self.columns[held], times[held])

    __rmul__ = __mul__

    def __abs__(self) -> Sparse:
        return self.filled(np.abs(self.values))

    def max(self) -> float:
        """Of all elements, zeros too."""
        return float(self.values.max(initial=0.0))

    def __truediv__(self, divisor: float) -> Sparse:
        return self.filled(self.values / divisor)


def _order(place: IndexArray, end: int) -> IndexArray:
    """Numbers of places, all below `end`, by place. No place is there twice."""
    bits = len(place).bit_length()
    if end.bit_length() + bits > 63:
        return np.argsort(place)
    # A sort of numbers takes a fraction of an argsort's time.
    both = np.sort(place << bits | np.arange(len(place)))
    both &= (1 << bits) - 1
    return both


#: What an affine map's weight may be.
Weight = FloatArray | Sparse


def applied_to(weight: Weight, x: FloatArray) -> FloatArray:
    """(n, in) -> (n, out): x @ weight.T, of a sparse matrix without making its transpose."""
    return (weight @ x.T).T if isinstance(weight, Sparse) else x @ weight.T


def compact(weight: Weight) -> Weight:
    """Sparse where that is much smaller, else dense: by size and share of zeros alone."""
    size = weight.shape[0] * weight.shape[1]
    if isinstance(weight, Sparse):
        return weight if worthwhile(size, len(weight.values)) else weight.dense()
    if size > LARGE and worthwhile(size, int(np.count_nonzero(weight))):
        return Sparse.of(weight)
    return weight


def worthwhile(size: int, entries: int) -> bool:
    """Whether a matrix of `size` elements with so many non-zero ones is kept sparse."""
    return size > LARGE and entries <= SHARE * size


def entries(weight: Weight) -> FloatArray:
    """All numbers that there are, flat: of a dense matrix the zeros too."""
    return weight.values if isinstance(weight, Sparse) else weight.reshape(-1)


def many_in_rows(weight: Weight) -> IndexArray:
    """Numbers other than zero in each row, (out,)."""
    if isinstance(weight, Sparse):
        return np.bincount(weight.rows, minlength=weight.shape[0])
    found: IndexArray = np.count_nonzero(weight, axis=1)
    return found


def has_zeros(weight: Weight) -> bool:
    return isinstance(weight, Sparse) or not weight.all()


def unions(weight: Weight, sets: Sequence[IntArray]) -> list[IntArray]:
    """For each set of rows, the columns that some of them reads, rising."""
    if isinstance(weight, Sparse):
        starts = weight.starts
        return [
            np.unique(np.concatenate([weight.columns[starts[r] : starts[r + 1]] for r in rows]))
            if len(rows)
            else np.zeros(0, np.int32)
            for rows in sets
        ]
    return [np.flatnonzero((weight[rows] != 0).any(axis=0)).astype(np.int32) for rows in sets]


__all__ = [
    "LARGE",
    "SHARE",
    "Sparse",
    "Weight",
    "applied_to",
    "compact",
    "entries",
    "has_zeros",
    "many_in_rows",
    "unions",
    "worthwhile",
]
