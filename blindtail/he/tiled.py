"""Maps over several ciphertexts: how each value is cut into tiles, and what that costs.

A value lies over tiles as a tile tensor says (`blindtail.he.tiles`). A map of one such value or
of several is one `MapOp` for each tile of its output, which reads all tiles of its inputs: of a
convolution whose rows and columns are interleaved, most of them at the same place, so that
rotations are for the tiles' borders alone; of a dense layer at every offset, split into baby
and giant steps. All of them read the same values, so a rotated tile is computed once
(`operations.grouped`). What is summed along an axis that the output does not have is summed
by rotations at the end: everywhere along the first axis, once along others.

Which offsets are used is not derived from kernels but from the weights that are not zero, as
everywhere (`blindtail.he.diagonals`): padding, strides, dilation, groups and pruned weights
come for free. `blindtail.he.tile_counts` counts the same without making the map, and
`blindtail.he.tiling` chooses tile shapes for every value and the split of rotations.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from blindtail.errors import ModelError
from blindtail.he.diagonals import Met, meet, repeat_length
from blindtail.he.layout import Layout
from blindtail.he.sparse import FloatArray, Sparse, Weight
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
    """One map of one placed value or of several.

    rows     (tiles, positions) of the output, before sums
    blocks   by tile of the output, then by tile that is read (`reads`): the weights between them
    met      the same: where these weights are met; offsets: rotations that are used, in positions, rising
    steps    (step, doublings) of sums by rotations at the end
    """

    sources: tuple[Placed, ...]
    target: Placed
    rows: IntArray
    blocks: tuple[tuple[Weight, ...], ...]
    met: tuple[tuple[Met, ...], ...]
    offsets: tuple[tuple[tuple[int, ...], ...], ...]
    steps: tuple[tuple[int, int], ...]

    @cached_property
    def reads(self) -> tuple[Layout, ...]:
        """Tiles of all values that are read, in order."""
        return tuple(tile for source in self.sources for tile in source.tiles)

    @property
    def products(self) -> int:
        return sum(len(one) for row in self.offsets for one in row)

    def rotations(self, baby: int) -> set[tuple[int, int]]:
        """(tile that is read, positions) of distinct rotations by baby steps."""
        return {(i, k % baby) for row in self.offsets for i, one in enumerate(row) for k in one if k % baby}

    def giants(self, baby: int) -> int:
        """Rotations by giant steps, of all output tiles."""
        return sum(max((one[-1] // baby for one in row if one), default=0) for row in self.offsets)


def between(read: Sequence[tuple[Weight, Placed]], target: Placed) -> TiledMap:
    """Which weights are between which tiles, and at which offsets.

    read  each value that the map reads, with its weights; products of all are summed before sums by rotations

    Raises `ModelError` where sums do not leave the target's shape, a tile of it is nothing but bias, or
    some values have imaginary parts and others none.
    """
    rows, sources = target.shape.rows(), tuple(source for _, source in read)
    name = f"{target.name} from {' and '.join(source.name for source in sources)}"
    if len({source.halved for source in sources}) > 1:
        raise ModelError(f"{name}: the sum with the conjugate would count the real ones twice")
    contents = [tile.index for source in sources for tile in source.tiles]
    period = repeat_length(*rows, *contents)
    blocks: list[list[Weight]] = [[] for _ in rows]
    mets: list[list[Met]] = [[] for _ in rows]
    for weight, source in read:
        cut = _cut(weight, rows, [_held(tile) for tile in source.tiles])
        for own, found, block, met in zip(rows, cut, blocks, mets, strict=True):
            block += found
            met += [
                meet(one, own, tile, len(own), 1, period)
                for one, tile in zip(found, source.tiles, strict=True)
            ]
    for own, met in zip(rows, mets, strict=True):
        if any(one.unused for one in met) or repeat_length(own, *contents) != period:
            raise ModelError(f"{name}: some weight meets no element")
        if not any(one.offsets for one in met):
            raise ModelError(f"{target.name}: all weights of a tile are zero; prune whole channels")
    offsets = tuple(tuple(one.offsets for one in met) for met in mets)
    steps = sums(target.shape, period, sources[0].halved)
    return TiledMap(sources, target, rows, tuple(map(tuple, blocks)), tuple(map(tuple, mets)), offsets, steps)


def sums(shape: TileShape, period: int, halved: bool) -> tuple[tuple[int, int], ...]:
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
    found = [weight.part(part) for part in (order[a:b] for a, b in itertools.pairwise(ends.tolist()))]
    return [found[at : at + len(columns)] for at in range(0, len(found), len(columns))]


def _dense_block(weight: FloatArray, rows: IntArray, columns: IntArray) -> Sparse:
    return Sparse.block((weight.shape[0], weight.shape[1]), rows, columns, weight[np.ix_(rows, columns)])


__all__ = ["Placed", "TiledMap", "between", "sums"]
