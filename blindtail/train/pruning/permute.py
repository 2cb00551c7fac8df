"""Orders of units in which what is left of the weights fills few groups.

The order of a layer's units is free: the rows of one map and the columns of the next are
reordered together; at the cut and in the reply the slots are laid out anew.

Two searches. *k-means*, for tiles, is HE-PEx's: units that keep weights in the same tiles
come to lie side by side (rows and columns in turns). *Assignment*, for any groups: given which
groups stay, the best place of each unit is a linear assignment problem (Jonker and Volgenant,
Computing 1987); given the places, the best groups are chosen again; this alternation is k-means'
own, with the kept groups in place of its centres.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from blindtail.train.pruning.groups import BoolArray, FloatArray, Groups, IntArray

Orders = list[IntArray]
Matrix = TypeVar("Matrix", BoolArray, FloatArray)


@dataclass(frozen=True)
class Sides:
    """How a layer's matrix hangs between two joints: `block` columns for each unit before it."""

    block: int = 1


def placed(matrix: Matrix, rows: IntArray, columns: IntArray, side: Sides) -> Matrix:
    """(out, in) by weight -> by place: row i is unit `rows[i]`, and so are columns, a block each."""
    found: Matrix = matrix[np.ix_(rows, spread(columns, side.block))]
    return found


def unplaced(by_place: BoolArray, rows: IntArray, columns: IntArray, side: Sides) -> BoolArray:
    """The inverse of `placed`, for masks."""
    found = np.empty_like(by_place)
    found[np.ix_(rows, spread(columns, side.block))] = by_place
    return found


def spread(order: IntArray, block: int) -> IntArray:
    """An order of units -> of their elements, `block` each, which stay together."""
    return np.asarray((order[:, None] * block + np.arange(block)).reshape(-1), np.int64)


def assigned(
    energies: Sequence[FloatArray],
    groups: Sequence[Groups],
    sides: Sequence[Sides],
    start: Orders,
    free: Sequence[bool],
    counts: Sequence[int],
    iterations: int,
) -> tuple[Orders, list[BoolArray], float]:
    """Orders and kept groups that hold much of the layers' energies (each sums to 1); and how much.

    start, free  orders to begin with, and which of them may change
    counts       groups that stay, of each layer
    """
    orders, best = list(start), (list(start), [np.ones(g.count, bool) for g in groups], -1.0)
    for _ in range(iterations):
        here = [placed(e, orders[i + 1], orders[i], sides[i]) for i, e in enumerate(energies)]
        kept = [g.choose(g.sums(e), n) for g, e, n in zip(groups, here, counts, strict=True)]
        held = sum(float(e[g.places(k)].sum()) for g, e, k in zip(groups, here, kept, strict=True))
        if held <= best[2] + 1e-9:
            break
        best = (list(orders), kept, held)
        masks = [g.places(k).astype(np.float64) for g, k in zip(groups, kept, strict=True)]
        for joint in np.flatnonzero(free).tolist():
            orders[joint] = _assign(joint, energies, masks, sides, orders)
    return best


def _assign(
    joint: int,
    energies: Sequence[FloatArray],
    masks: Sequence[FloatArray],
    sides: Sequence[Sides],
    orders: Orders,
) -> IntArray:
    from scipy.optimize import linear_sum_assignment

    gain = np.zeros((len(orders[joint]),) * 2)  # (unit, place)
    if joint > 0:
        before = energies[joint - 1][:, spread(orders[joint - 1], sides[joint - 1].block)]
        gain += before @ masks[joint - 1].T
    if joint < len(energies):
        block = sides[joint].block
        after = energies[joint][orders[joint + 1]]
        for tap in range(block):
            gain += after[:, tap::block].T @ masks[joint][:, tap::block]
    units, places = linear_sum_assignment(-gain)
    order = np.empty(len(units), np.int64)
    order[places] = units
    return order


def clustered(
    masks: Sequence[BoolArray],
    groups: Sequence[Groups],
    sides: Sequence[Sides],
    start: Orders,
    free: Sequence[bool],
    tile: tuple[int, int],
    threshold: float,
    iterations: int,
    rounds: int,
    seed: int,
) -> Orders:
    """Orders with many almost-zero tiles, found by k-means; `start` when none has more.

    masks      weights that are left, (out, in) of each layer
    threshold  most weights of an almost-zero tile, as part of its size
    """

    def zeros(orders: Orders) -> int:
        here = [placed(m, orders[i + 1], orders[i], sides[i]) for i, m in enumerate(masks)]
        return sum(int(almost_zero(m, g, threshold).sum()) for m, g in zip(here, groups, strict=True))

    best, most = list(start), zeros(start)
    orders = list(start)
    for turn in range(rounds):
        for joint in np.flatnonzero(free).tolist():
            features = _features(joint, masks, sides, orders, tile)
            size = max(tile[0] if joint else 1, tile[1] // sides[joint].block if joint < len(masks) else 1, 1)
            orders[joint] = _cluster(features, size, iterations, seed + turn)
        found = zeros(orders)
        if found <= most:
            break
        best, most = list(orders), found
    return best


def almost_zero(kept: BoolArray, groups: Groups, threshold: float) -> BoolArray:
    """Groups of which at most `threshold` of the places, (out, in), are kept: (count,)."""
    return np.asarray(groups.sums(kept) <= threshold * groups.sizes)


def _features(
    joint: int, masks: Sequence[BoolArray], sides: Sequence[Sides], orders: Orders, tile: tuple[int, int]
) -> FloatArray:
    """(units, tiles across): weights that each unit has in each tile of the other side."""
    parts = []
    if joint > 0:
        rows = masks[joint - 1][:, spread(orders[joint - 1], sides[joint - 1].block)]
        parts.append(_counted(rows.astype(np.float64), tile[1]))
    if joint < len(masks):
        columns = masks[joint][orders[joint + 1]].astype(np.float64)
        block = sides[joint].block
        by_unit = columns.reshape(len(columns), -1, block).sum(axis=2).T
        parts.append(_counted(by_unit, tile[0]))
    return np.concatenate(parts, axis=1)


def _counted(values: FloatArray, width: int) -> FloatArray:
    padded = np.pad(values, ((0, 0), (0, -values.shape[1] % width)))
    return np.asarray(padded.reshape(len(values), -1, width).sum(axis=2))


def _cluster(features: FloatArray, size: int, iterations: int, seed: int) -> IntArray:
    """Units in clusters of `size` that lie side by side, those with the fewest weights last.

    k-means makes clusters of any size; each unit then goes to one of the near centres that has
    a place left, so that no tile is shared between two clusters.
    """
    from scipy.optimize import linear_sum_assignment
    from sklearn.cluster import KMeans

    count = -(-len(features) // size)
    distinct = len(np.unique(features, axis=0))
    made = KMeans(min(count, distinct), n_init=1, max_iter=iterations, random_state=seed).fit(features)
    centres = made.cluster_centers_
    centres = centres[np.arange(count) % len(centres)]
    centres = centres[np.argsort(-centres.sum(axis=1), kind="stable")]
    distance = ((features[:, None] - centres[None]) ** 2).sum(axis=2)
    _, seats = linear_sum_assignment(np.repeat(distance, size, axis=1))
    return np.asarray(np.argsort(seats, kind="stable"), np.int64)


__all__ = ["Orders", "Sides", "almost_zero", "assigned", "clustered", "placed", "spread", "unplaced"]
