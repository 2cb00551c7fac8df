"""What maps between tile tensors take, counted without making them: products, rotations, splits, seconds.

Where a value lies over tiles, all its elements are held at the same places beside the first one, so
that the offset at which a weight is met (`blindtail.he.diagonals`) follows from the first places of its
row and of its column by one table for all weights of a pair of shapes. A pair is then a few passes over
the weights, whatever the number of tiles; `blindtail.he.tiled.between` makes the map of what is chosen,
with the same products and rotations.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from blindtail.errors import ModelError
from blindtail.he import cost
from blindtail.he.diagonals import repeat_length
from blindtail.he.operations import Groups, in_slots
from blindtail.he.schedule import BACKEND, WORD_BYTES
from blindtail.he.slotmaps import fold_groups
from blindtail.he.sparse import Sparse, Weight
from blindtail.he.tiled import Placed, sums
from blindtail.he.tiles import IntArray, TileShape

BoolArray = NDArray[np.bool_]
#: Entries of bitmaps that are quick to look through.
_BITMAP = 1 << 18


# -- where a value's elements are -----------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Places:
    """Of a shape's content, or of the rows that its positions work on.

    tile, place  (size,): of each element's first position
    copies       positions beside the first that hold the same, itself included
    repeats      (tiles,): the least power of two of positions with which each tile repeats
    """

    tile: IntArray
    place: IntArray
    copies: IntArray
    repeats: IntArray

    @classmethod
    def of(cls, shape: TileShape, rows: bool) -> Places:
        held = shape.rows() if rows else shape.content()
        positions, flat = held.shape[1], held.reshape(-1)
        found = np.flatnonzero(flat >= 0)[::-1]
        first = np.zeros(shape.size, np.int64)
        first[flat[found]] = found  # the last one written is the first there is
        copies = np.flatnonzero(held[first[0] // positions] == 0) - first[0] % positions
        repeats = [repeat_length(tile) for tile in held]
        tile, place = first // positions, first % positions
        return cls(*(np.asarray(a, np.int32) for a in (tile, place, copies, repeats)))


class Known:
    """A placed value, and where its elements are: found when first asked for."""

    def __init__(self, placed: Placed) -> None:
        self.placed = placed

    @property
    def tiles(self) -> int:
        return self.placed.shape.tiles

    @cached_property
    def content(self) -> Places:
        """As what is read; of halved values the second half, in imaginary parts, is where the first is."""
        found = Places.of(self.placed.shape, False)
        if not self.placed.halved:
            return found
        tile, place = (np.concatenate([part, part]) for part in (found.tile, found.place))
        return Places(tile, place, found.copies, found.repeats)

    @cached_property
    def rows(self) -> Places:
        return Places.of(self.placed.shape, True)

    @cached_property
    def period(self) -> int:
        """With which all tiles repeat, as what is read."""
        return int(self.content.repeats.max())


def _entries(weight: Weight) -> tuple[IntArray, IntArray]:
    """Rows and columns of weights other than zero."""
    if isinstance(weight, Sparse):
        return weight.rows, weight.columns
    rows, columns = np.nonzero(weight)
    return rows.astype(np.int32), columns.astype(np.int32)


# -- one map ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Part:
    """Of one value that a map reads.

    turns  (tile that is read, offset) of all products but for doubles, two rows, by tile
    last   (tiles of the output,): the largest offset, -1 where there is no weight
    """

    products: int
    turns: IntArray
    last: IntArray


class Operand:
    """The weights of one value that a map reads, counted between any two shapes."""

    def __init__(self, weight: Weight) -> None:
        self._rows, self._columns = _entries(weight)

        self._size = weight.shape[0] * weight.shape[1]

    def least(self, source: Known, target: Known) -> int:
        """Products that there are at least."""
        if len(self._rows) == self._size:
            return source.tiles * target.tiles
        return -(-len(self._rows) // (source.placed.shape.positions * (1 + source.placed.halved)))

    def part(self, source: Known, target: Known, period: int) -> _Part:
        """period: with which all repeats, a power of two."""
        content, rows = source.content, target.rows
        k = content.place[self._columns]
        k -= rows.place[self._rows]
        k &= period - 1
        table = _first(content.copies, rows.copies, period)
        if table is not None:
            k = table[k]
        pairs = source.tiles * period
        if target.tiles > 1:
            k += (rows.tile * np.int32(pairs))[self._rows]
        if source.tiles > 1:
            k += (content.tile * np.int32(period))[self._columns]
        found = _distinct(k, target.tiles * pairs)
        tile, turn = np.divmod(found, pairs)
        last, starts = np.full(target.tiles, -1, np.int32), np.flatnonzero(np.diff(tile, prepend=-1))
        last[tile[starts]] = np.maximum.reduceat(turn % period, starts) if len(starts) else -1
        turns = _distinct(turn, pairs)
        return _Part(len(found), np.stack(np.divmod(turns, period)), last)


def _first(held: IntArray, work: IntArray, period: int) -> IntArray | None:
    """(period,): of first places of a row and a column so far apart, the least offset of any of their copies.

    None where that is the distance itself.
    """
    held, work = _distinct(held % period, period), _distinct(work % period, period)
    apart = (work[:, None] - held[None]) % period
    starts = _distinct(apart.reshape(-1), period)
    if len(starts) == 1:
        return None
    found = np.arange(period, dtype=np.int32)
    below = starts[np.searchsorted(starts, found, "right") - 1]  # zero is always one
    return found - below


def _distinct(values: IntArray, bound: int) -> IntArray:
    """Rising; all are below `bound` and none is negative."""
    if bound > max(_BITMAP, 64 * len(values)):
        return np.unique(values)
    seen = np.zeros(bound, np.bool_)
    seen[values] = True
    return np.flatnonzero(seen).astype(np.int32)


@dataclass(frozen=True)
class Split:
    """How one map's rotations are split: baby steps in positions, fold groups, and what it costs."""

    baby: int
    folds: Groups
    seconds: float
    plain_bytes: int


class Counted:
    """One map of placed values to another, counted. `splits` are found when first asked for.

    products  of all tiles; reads, tiles: ciphertexts that are read and given
    steps     sums by rotations at the end, as of `TiledMap`
    floor_s   seconds that every split takes at least

    Raises `ModelError` where `between` would.
    """

    def __init__(
        self, read: Sequence[tuple[Operand, Known]], target: Known, level: int, n: int, every: bool = False
    ) -> None:
        sources = [source for _, source in read]
        if len({source.placed.halved for source in sources}) > 1:
            raise ModelError(f"{target.placed.name}: the sum with the conjugate would count real ones twice")
        period = max(max(source.period for source in sources), int(target.rows.repeats.max()))
        own = np.maximum(target.rows.repeats, max(source.period for source in sources))
        if (own != period).any():
            raise ModelError(f"{target.placed.name}: tiles of its rows repeat with different periods")
        self.steps = sums(target.placed.shape, period, sources[0].placed.halved)
        parts = [operand.part(source, target, period) for operand, source in read]
        self._last = np.max([part.last for part in parts], axis=0)
        if (self._last < 0).any():
            raise ModelError(f"{target.placed.name}: all weights of a tile are zero; prune whole channels")
        first = itertools.accumulate((source.tiles for source in sources), initial=0)
        self._turns = np.concatenate(
            [part.turns + np.asarray([[at], [0]], np.int32) for part, at in zip(parts, first, strict=False)],
            axis=1,
        )
        self.products = sum(part.products for part in parts)
        self.reads, self.tiles = sum(source.tiles for source in sources), target.tiles
        self._level, self._n, self._every = level, n, every
        self._lanes = target.placed.lanes
        self.plain_bytes = (self.products * (level + 2) + self.tiles * level) * n * WORD_BYTES
        one, turned = each(level, n), self._turns[0][self._turns[1] > 0]
        rotated = len(turned) * one.rotation + len(np.unique(turned)) * one.digits
        # Without giant steps all turns are rotations, else there is one giant step at least.
        self.floor_s = self.seconds(()) + min(rotated, one.giant)

    def seconds(self, folds: Groups) -> float:
        """Without baby and giant steps."""
        counts = count(self._level, self.tiles, self.products, 0, 0, 0, folds)
        return cost.seconds(BACKEND, self._n, [counts], request=False)

    @cached_property
    def splits(self) -> Splits:
        found = _splits(self, self._turns, self._last, (self._level, self._n, self._lanes))
        return found if self._every else found.fewer()

    def split(self, row: int) -> Split:
        """Of one row of `splits`."""
        found = self.splits
        folds = found.groupings[found.folds[row]]
        return Split(int(found.baby[row]), folds, float(found.seconds[row]), self.plain_bytes)


# -- splits of rotations, and their costs ----------------------------------------------


@dataclass(frozen=True, eq=False)
class Splits:
    """Every split of baby and giant steps with every way to group the sums, a row each.

    baby, folds  of each; groupings: what `folds` counts
    turns        (turns,) in slots, that some of them needs; high, low: (splits, turns), whether a split needs
                 it at the map's level, and at the next one only
    """

    baby: IntArray
    folds: IntArray
    groupings: tuple[Groups, ...]
    seconds: NDArray[np.float64]
    turns: IntArray
    high: BoolArray
    low: BoolArray

    def fewer(self) -> Splits:
        """Those with fewer keys than all faster ones, and powers of two, whose keys other maps have too."""
        keys = self.high.sum(axis=1) + self.low.sum(axis=1)
        order = np.lexsort((keys, self.seconds))
        least = np.minimum.accumulate(keys[order])
        better = np.append(True, least[1:] < least[:-1])
        kept = np.sort(order[better | ((self.baby[order] & (self.baby[order] - 1)) == 0)])
        used = (self.high[kept] | self.low[kept]).any(axis=0)
        return Splits(
            self.baby[kept],
            self.folds[kept],
            self.groupings,
            self.seconds[kept],
            self.turns[used],
            self.high[np.ix_(kept, used)],
            self.low[np.ix_(kept, used)],
        )


def _babies(most: int) -> list[int]:
    """Powers of two, and those that leave few giant steps."""
    found = {1 << bit for bit in range(most.bit_length() + 1)} | {most + 1}
    return sorted(found | {-(-(most + 1) // giants) for giants in range(1, min(most + 1, 64) + 1)})


def _splits(made: Counted, turns: IntArray, last: IntArray, at: tuple[int, int, int]) -> Splits:
    level, n, lanes = at
    most = int(last.max())
    babies = np.asarray(_babies(most), np.int32)
    together = max(1, _BITMAP // (made.reads * (most + 1)))
    parts = [
        _turned(babies[at : at + together], turns, made.reads, most) for at in range(0, len(babies), together)
    ]
    rotations, turned, needed = (np.concatenate(part) for part in zip(*parts, strict=True))
    giants = (last[None] // babies[:, None]).sum(axis=1)
    needed[np.flatnonzero(giants), babies[giants > 0]] = True
    counts = np.stack([rotations, turned, giants])
    groupings = tuple(_groupings(made.steps))
    of_turns = np.asarray(each(level, n)[:3]) @ counts
    seconds = np.concatenate([of_turns + made.seconds(folds) for folds in groupings])
    own = np.flatnonzero(needed.any(axis=0))
    sums = [[in_slots(f, lanes) for f in itertools.chain.from_iterable(folds)] for folds in groupings]
    named = sorted({*(own * lanes).tolist(), *itertools.chain.from_iterable(sums)})
    column = {turn: i for i, turn in enumerate(named)}
    high, low = (np.zeros((len(groupings), len(babies), len(named)), np.bool_) for _ in range(2))
    high[:, :, [column[turn] for turn in (own * lanes).tolist()]] = needed[:, own]
    for group, folded in enumerate(sums):
        low[group][:, [column[turn] for turn in folded]] = True
    shape = len(seconds), len(named)
    return Splits(
        np.tile(babies, len(groupings)).astype(np.int32),
        np.repeat(np.arange(len(groupings)), len(babies)).astype(np.int32),
        groupings,
        seconds,
        np.asarray(named, np.int32),
        high.reshape(shape),
        (low & ~high).reshape(shape),
    )


def _turned(babies: IntArray, turns: IntArray, reads: int, most: int) -> tuple[IntArray, IntArray, BoolArray]:
    """Of each number of baby steps: rotations, tiles that are rotated, and (babies, most + 2) which turns."""
    seen = np.zeros((len(babies), reads, most + 1), np.bool_)
    seen[np.arange(len(babies))[:, None], turns[0], turns[1] % babies[:, None]] = True
    seen[:, :, 0] = False
    needed = np.zeros((len(babies), most + 2), np.bool_)
    seen.any(axis=1, out=needed[:, : most + 1])
    rotations = np.count_nonzero(seen, axis=(1, 2)).astype(np.int32)
    return rotations, np.count_nonzero(seen.any(axis=2), axis=1).astype(np.int32), needed


def _groupings(steps: Sequence[tuple[int, int]]) -> Iterator[Groups]:
    """Fold groups: each step's doublings by ones and by pairs, and all at once."""
    conjugate = (0, 1) in steps
    for width in (1, 2, 3):
        groups: list[tuple[int, ...]] = []
        for step, bits in steps:
            if step:
                shares = [min(width, bits - at) for at in range(0, bits, width)]
                groups += fold_groups(step, shares)
        if conjugate:
            groups.append((~0,))
        yield tuple(groups)
        if all(bits <= width for _, bits in steps):
            return


class Each(NamedTuple):
    """Seconds of a rotation by a baby step, of a rotated tile's digits, a giant step, a product, a tile."""

    rotation: float
    digits: float
    giant: float
    product: float
    tile: float


@cache
def each(level: int, n: int) -> Each:
    """Of a map at this level; none of sums by rotations."""

    def seconds(
        tiles: int = 0, products: int = 0, rotations: int = 0, turned: int = 0, giants: int = 0
    ) -> float:
        counts = count(level, tiles, products, rotations, turned, giants, ())
        return cost.seconds(BACKEND, n, [counts], request=False)

    return Each(
        seconds(rotations=1), seconds(turned=1), seconds(giants=1), seconds(products=1), seconds(tiles=1)
    )


def count(
    level: int, tiles: int, products: int, rotations: int, turned: int, giants: int, folds: Groups
) -> cost.Counts:
    """On `native`: digits of `turned` tiles and `rotations` of them, once for all tiles of the output."""
    sizes = [len(group) for group in folds]
    one: Any = cost.affine(level, 0, 0, 0, sizes, BACKEND)  # what each output tile costs on top
    k = level + 1
    return cost.Counts(
        rotations + giants + tiles * sum(sizes),
        products,
        tiles * one.transforms + turned * k * (k + 1) + giants * (k + 1) ** 2,
        tiles * one.key_pairs + (rotations + giants) * k * (k + 1),
        products * 2 * (k + 1),
        tiles * one.turns + (rotations + giants) * 2 * (k + 1),
        tiles * one.copies,
    )


__all__ = ["Counted", "Each", "Known", "Operand", "Places", "Split", "Splits", "count", "each"]
