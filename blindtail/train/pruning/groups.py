"""What is pruned together: tiles of a weight matrix, or what one diagonal of a compiled map covers.

`Groups` is a partition of the places of a matrix (out, in). A place is not a weight: the
orders of units (`blindtail.train.pruning.permute`) decide which weight stands where.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blindtail.errors import ConfigError, ModelError
from blindtail.he import cost
from blindtail.he.operations import MapOp
from blindtail.he.schedule import BACKEND

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Groups:
    """A partition of the places of a matrix.

    index    (out, in): number of the group of each place, 0 to `count` - 1
    offsets  of diagonals: the rotation offsets, in positions, that each group alone needs;
             empty for tiles
    baby     of diagonals: positions of a giant step
    seconds  of diagonals: what a product, a baby step and a giant step take
    """

    index: IntArray
    count: int
    offsets: tuple[tuple[int, ...], ...] = ()
    baby: int = 1
    seconds: tuple[float, float, float] = (1.0, 0.0, 0.0)
    sizes: IntArray = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", np.bincount(self.index.reshape(-1), minlength=self.count))

    @property
    def diagonal(self) -> bool:
        return bool(self.offsets)

    def sums(self, values: NDArray[Any]) -> FloatArray:
        """Of values by place (out, in), in each group: (count,)."""
        flat = np.asarray(values, np.float64).reshape(-1)
        return np.asarray(np.bincount(self.index.reshape(-1), flat, self.count), np.float64)

    def largest(self, values: FloatArray) -> FloatArray:
        """Of values by place (out, in), in each group: (count,)."""
        found = np.full(self.count, -np.inf)
        np.maximum.at(found, self.index.reshape(-1), values.reshape(-1))
        return found

    def places(self, kept: BoolArray) -> BoolArray:
        """Groups (count,) -> places (out, in)."""
        return np.asarray(kept[self.index])

    def price(self, kept: BoolArray) -> float:
        """Seconds of the products and rotations that these groups need; for tiles their number."""
        if not self.diagonal:
            return float(kept.sum())
        used = [divmod(k, self.baby) for g in np.flatnonzero(kept) for k in self.offsets[g]]
        product, baby, giant = self.seconds
        babies, giants = len({b for _, b in used if b}), max((g for g, _ in used), default=0)
        return len(used) * product + babies * baby + giants * giant

    def choose(self, scores: FloatArray, count: int) -> BoolArray:
        """`count` groups to keep, as (count of groups,).

        Those with the highest scores; of diagonals, one after another, the one with the highest
        score for each second that it adds: a rotation that others need already costs nothing.
        """
        kept = np.zeros(self.count, bool)
        if not self.diagonal:
            kept[np.argsort(-scores, kind="stable")[:count]] = True
            return kept
        product, baby, giant = self.seconds
        steps = [[divmod(k, self.baby) for k in group] for group in self.offsets]
        babies, giants, left = {0}, 0, list(range(self.count))
        for _ in range(min(count, self.count)):

            def rate(g: int, babies: set[int] = babies, giants: int = giants) -> float:
                new = len({b for _, b in steps[g]} - babies)
                further = max(0, max(j for j, _ in steps[g]) - giants)
                return float(scores[g]) / (len(steps[g]) * product + new * baby + further * giant)

            best = max(left, key=rate)
            left.remove(best)
            kept[best] = True
            babies = babies | {b for _, b in steps[best]}
            giants = max(giants, *(j for j, _ in steps[best]))
        return kept


def tiles(shape: tuple[int, int], tile: tuple[int, int]) -> Groups:
    """Rectangles of `tile` = (rows, columns) places; those at the far edges may be smaller.

    Raises `ConfigError` for a tile without places.
    """
    (rows, columns), (height, width) = shape, tile
    if height < 1 or width < 1:
        raise ConfigError(f"a tile has at least one row and one column, not {height} x {width}")
    across = -(-columns // width)
    index = (np.arange(rows) // height)[:, None] * across + np.arange(columns) // width
    return Groups(index.astype(np.int64), int(index.max()) + 1)


def diagonals(op: MapOp, probe: FloatArray, first: int, shape: tuple[int, int]) -> Groups:
    """What each diagonal of a compiled map covers of the weights of one layer.

    probe  (op's out, in): which weight each entry of the map is, `first` + its place in the layer's
           matrix (`shape`), counted row by row; 0 where the map has no weight

    A weight of a convolution is met by several entries; diagonals that share one are one group.
    Raises `ModelError` when a weight is met by no diagonal.
    """
    met: dict[int, IntArray] = {}
    for k, values in replace(op, weight=probe).diagonals.items():
        halves = [2 * values.real, -2 * values.imag] if np.iscomplexobj(values) else [values]
        found = np.concatenate([np.rint(half).astype(np.int64) for half in halves])
        met[k] = np.unique(found[found > 0]) - first
    offsets = sorted(met)
    one = np.full(shape[0] * shape[1], -1, np.int64)
    root = np.arange(len(offsets))
    for at, k in enumerate(offsets):
        for earlier in np.unique(one[met[k]]):
            if earlier >= 0:
                root[root == root[earlier]] = root[at]
        one[met[k]] = at
    if (one < 0).any():
        raise ModelError(f"{op.name}: its diagonals leave out {int((one < 0).sum())} weights; prune by tiles")
    names, group = np.unique(root, return_inverse=True)
    members: list[list[int]] = [[] for _ in names]
    for at, k in enumerate(offsets):
        members[group[at]].append(k)
    return Groups(
        group[one].reshape(shape).astype(np.int64),
        len(names),
        tuple(tuple(m) for m in members),
        op.baby,
        _seconds(op),
    )


def _seconds(op: MapOp) -> tuple[float, float, float]:
    """Of a product, a baby step and a giant step of this map: differences of the compiler's own prices."""
    n = 2 * op.in_layout.slots

    def taken(babies: int, giants: int, products: int) -> float:
        return cost.seconds(BACKEND, n, [cost.affine(op.level, babies, giants, products, (), BACKEND)], False)

    least = taken(1, 0, 1)
    return taken(1, 0, 2) - least, taken(2, 0, 1) - least, taken(1, 1, 1) - least


def kept_counts(groups: Sequence[Groups], shares: Sequence[float]) -> list[int]:
    """How many groups stay when `shares` of them become zero: at least one of each layer."""
    return [max(1, round((1.0 - s) * g.count)) for g, s in zip(groups, shares, strict=True)]


__all__ = ["BoolArray", "FloatArray", "Groups", "IntArray", "diagonals", "kept_counts", "tiles"]
