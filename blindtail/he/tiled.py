"""Maps over several ciphertexts: how each value is cut into tiles, and what that costs.

A value lies over tiles as a tile tensor says (`blindtail.he.tiles`). A map between two such
values is one `MapOp` for each tile of its output, which reads all tiles of its input: of a
convolution whose rows and columns are interleaved, most of them at the same place, so that
rotations are for the tiles' borders alone; of a dense layer at every offset, split into baby
and giant steps. All of them read the same values, so a rotated tile is computed once
(`operations.grouped`). What is summed along an axis that the output does not have is summed
by rotations at the end: everywhere along the first axis, once along others.

Which offsets are used is not derived from kernels but from the weights that are not zero, as
everywhere (`blindtail.he.diagonals`): padding, strides, dilation, groups and pruned weights
come for free. `blindtail.he.tiling` chooses tile shapes for
every value and the split of rotations.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from blindtail.errors import ModelError
from blindtail.he import cost
from blindtail.he.diagonals import Met, meet, repeat_length
from blindtail.he.operations import Groups, in_slots
from blindtail.he.schedule import BACKEND, WORD_BYTES
from blindtail.he.slotmaps import fold_groups
from blindtail.he.sparse import FloatArray, Sparse, Weight
from blindtail.he.spec import Layout
from blindtail.he.tiles import IntArray, TileShape


@dataclass(frozen=True, eq=False)
class Placed:
    """A value over tiles. `layout`: all tiles one after the other; `halved`: half of it imaginary."""

    shape: TileShape
    lanes: int
    halved: bool = False

    @cached_property
    def layout(self) -> Layout:
        return self.shape.halved(self.lanes) if self.halved else self.shape.layout(self.lanes)

    @cached_property
    def tiles(self) -> tuple[Layout, ...]:
        return self.layout.tiles(self.shape.positions * self.lanes)

    @property
    def name(self) -> str:
        return f"{self.shape}{' complex' if self.halved else ''}"


@dataclass(frozen=True, eq=False)
class TiledMap:
    """One map between two placed values.

    rows     (tiles, positions) of the output, before sums
    blocks   by tile of the output, then by tile of the input: the weights between them
    met      the same: where these weights are met; offsets: rotations that are used, in positions, rising
    steps    (step, doublings) of sums by rotations at the end
    """

    source: Placed
    target: Placed
    rows: IntArray
    blocks: tuple[tuple[Weight, ...], ...]
    met: tuple[tuple[Met, ...], ...]
    offsets: tuple[tuple[tuple[int, ...], ...], ...]
    steps: tuple[tuple[int, int], ...]

    @property
    def products(self) -> int:
        return sum(len(one) for row in self.offsets for one in row)

    def rotations(self, baby: int) -> set[tuple[int, int]]:
        """(input tile, positions) of distinct rotations by baby steps."""
        return {(i, k % baby) for row in self.offsets for i, one in enumerate(row) for k in one if k % baby}

    def giants(self, baby: int) -> int:
        """Rotations by giant steps, of all output tiles."""
        return sum(max((one[-1] // baby for one in row if one), default=0) for row in self.offsets)


def between(weight: Weight, source: Placed, target: Placed) -> TiledMap:
    """Which weights are between which tiles, and at which offsets.

    Raises `ModelError` where sums do not leave the target's shape, or a tile of it is nothing but bias.
    """
    rows = target.shape.rows()
    contents = [tile.index for tile in source.tiles]
    period = repeat_length(*rows, *contents)
    blocks, mets = [], []
    cut = _cut(weight, rows, [_held(tile) for tile in source.tiles])
    for own, found in zip(rows, cut, strict=True):
        met = tuple(
            meet(one, own, tile, len(own), 1, period) for one, tile in zip(found, source.tiles, strict=True)
        )
        if any(one.unused for one in met) or repeat_length(own, *contents) != period:
            raise ModelError(f"{target.name} from {source.name}: some weight meets no element")
        if not any(one.offsets for one in met):
            raise ModelError(f"{target.name}: all weights of a tile are zero; prune whole channels")
        blocks.append(tuple(found))
        mets.append(met)
    offsets = tuple(tuple(one.offsets for one in met) for met in mets)
    steps = _sums(target.shape, period, source.halved)
    return TiledMap(source, target, rows, tuple(blocks), tuple(mets), offsets, steps)


def _sums(shape: TileShape, period: int, halved: bool) -> tuple[tuple[int, int], ...]:
    """Sums by rotations that leave `shape`, where what is multiplied repeats with `period` positions.

    (0, 1) is the sum with the conjugate. Raises `ModelError` where some would be counted twice.
    """
    found = []
    for step, bits in shape.folds():
        if step << bits == shape.positions:  # the first axis: places that repeat are whole already
            bits = max(0, (period // step).bit_length() - 1)
        elif period < step << bits:
            raise ModelError(f"{shape}: what is summed repeats with {period} positions")
        if bits:
            found.append((step, bits))
    return (*found, *([(0, 1)] if halved else []))


def _held(tile: Layout) -> IntArray:
    """Elements of a tile, rising."""
    parts = [tile.index]
    if tile.imaginary is not None:
        parts.append(np.asarray(tile.imaginary, np.int32))
    found = np.unique(np.concatenate(parts))
    return found[found >= 0].astype(np.int32)


def _cut(weight: Weight, rows: IntArray, columns: Sequence[IntArray]) -> list[list[Sparse]]:
    """By rows of a tile of the output, then by columns of one of the input: weights between them.

    Each of the whole matrix's shape, all others zero. An element is in one tile only.

    rows     (tiles, positions), -1 where there is none
    columns  of each tile
    """
    if not isinstance(weight, Sparse):
        owns = [np.unique(own[own >= 0]) for own in rows]
        return [[_dense_block(weight, own, other) for other in columns] for own in owns]
    of_row, of_column = (np.full(n, -1, np.int32) for n in weight.shape)
    for tile, own in enumerate(rows):
        of_row[own[own >= 0]] = tile
    for tile, column in enumerate(columns):
        of_column[column] = tile
    r, c = of_row[weight.rows], of_column[weight.columns]
    label = np.where((r >= 0) & (c >= 0), r * len(columns) + c, -1)
    # Sixteen bits are sorted in one pass; entries of a block stay in order.
    order = np.argsort(label.astype(np.int16), kind="stable")
    ends = np.searchsorted(label[order], np.arange(len(rows) * len(columns) + 1))
    found = [
        Sparse(weight.shape, weight.rows[part], weight.columns[part], weight.values[part])
        for part in (order[a:b] for a, b in itertools.pairwise(ends.tolist()))
    ]
    return [found[at : at + len(columns)] for at in range(0, len(found), len(columns))]


def _dense_block(weight: FloatArray, rows: IntArray, columns: IntArray) -> Sparse:
    part = weight[np.ix_(rows, columns)]
    r, c = np.nonzero(part)
    return Sparse.unordered((weight.shape[0], weight.shape[1]), rows[r], columns[c], part[r, c])


# -- splits of rotations, and their costs ----------------------------------------------


@dataclass(frozen=True)
class Split:
    """How one map's rotations are split: baby steps in positions, fold groups, and what it costs."""

    baby: int
    folds: Groups
    seconds: float
    plain_bytes: int
    needs: tuple[tuple[int, int], ...]  # turn in slots, level


def splits(made: TiledMap, level: int, n: int) -> list[Split]:
    """Every split of baby and giant steps with every way to group the sums."""
    lanes, used = made.source.lanes, [k for row in made.offsets for one in row for k in one]
    most = max(used, default=0)
    babies = {1 << bit for bit in range(most.bit_length() + 1)} | {most + 1}
    babies |= {-(-(most + 1) // giants) for giants in range(1, min(most + 1, 64) + 1)}
    groupings = list(_groupings(made.steps))
    found = []
    for baby in sorted(babies):
        turned, giants = made.rotations(baby), made.giants(baby)
        needs = {b * lanes for _, b in turned} | ({baby * lanes} if giants else set())
        for folds in groupings:
            counts = count(made, level, len(turned), len({i for i, _ in turned}), giants, folds)
            turns = dict.fromkeys(sorted(needs), level)
            for f in itertools.chain.from_iterable(folds):
                turns.setdefault(in_slots(f, lanes), level - 1)
            tiles = len(made.rows)
            plain = (made.products * (level + 2) + tiles * level) * n * WORD_BYTES
            seconds = cost.seconds(BACKEND, n, [counts], request=False)
            found.append(Split(baby, folds, seconds, plain, tuple(sorted(turns.items()))))
    return found


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


def count(made: TiledMap, level: int, rotations: int, turned: int, giants: int, folds: Groups) -> cost.Counts:
    """On `native`: digits of `turned` tiles and `rotations` of them, once for all tiles of the output."""
    sizes = [len(group) for group in folds]
    tiles = len(made.rows)
    one = cost.affine(level, 0, 0, 0, sizes, BACKEND)  # what each output tile costs on top
    k = level + 1
    return cost.Counts(
        rotations + giants + tiles * sum(sizes),
        made.products,
        tiles * one.transforms + turned * k * (k + 1) + giants * (k + 1) ** 2,
        tiles * one.key_pairs + (rotations + giants) * k * (k + 1),
        made.products * 2 * (k + 1),
        tiles * one.turns + (rotations + giants) * 2 * (k + 1),
        tiles * one.copies + (len(made.source.tiles) - 1) * 3 * k,
    )


__all__ = ["Placed", "Split", "TiledMap", "between", "count", "splits"]
