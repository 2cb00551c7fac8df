"""Slot layouts for matrix-vector products: how rows, copies and folds are arranged.

Two sums alternate through a tail (positions = slots / lanes, period and block
lengths powers of two):

*outer sum*: position s works on row s mod R for all of the ciphertext; folding
by R, 2R, ... gives every position the finished row: the result repeats with
period R, no mask, no level.

*inner sum*, on a periodic input: block b of P positions works on rows
b*rho ... b*rho + rho - 1; folding by rho, 2 rho, ..., P/2 finishes them in the
first rho positions of each block and leaves something undefined in the rest,
which the next map's diagonals skip.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blindtail.errors import ModelError
from blindtail.he.spec import GARBAGE, ZERO, Layout

IntArray = NDArray[np.int32]


@dataclass(frozen=True)
class Arrangement:
    """How one map is laid out: see `blindtail.he.program.MapOp` for the fields."""

    kind: str  # "outer" or "inner"
    period: int  # positions after which finished outputs repeat (all of them for an inner sum)
    rows: IntArray
    offsets: int
    folds: tuple[int, ...]
    out_layout: Layout


def power_of_two(n: int) -> int:
    """The smallest power of two >= n."""
    return 1 << (n - 1).bit_length() if n > 1 else 1


def input_layout(size: int, rows: int, slots: int, lanes: int) -> Layout:
    """The cut's layout for a first map of `rows` outputs by outer sum.

    Blocks of E >= `size` positions hold the activation; block j holds it rotated
    by j * (offsets needed), so that one product does the work of `blocks`
    diagonals. The edge applies any layout for free. Raises `ModelError` when the
    activation does not fit the ciphertext.
    """
    positions = slots // lanes
    element = power_of_two(size)
    block = max(element, power_of_two(rows))
    if block > positions:
        what = "activation" if element > positions else "layer"
        raise ModelError(
            f"the {what} at the cut has {max(size, rows)} elements, a ciphertext holds {positions} a lane: "
            "cut later, add a bottleneck, or use fewer lanes"
        )
    shift = max(1, min(element, power_of_two(rows)) // (positions // block))
    s = np.arange(positions)
    index = (s % block + (s // block) * shift) % element
    return Layout(size, lanes, tuple(np.where(index < size, index, ZERO).tolist()))


def outer(in_layout: Layout, rows: int, period: int | None = None) -> Arrangement:
    """Outer sum of `rows` outputs; `period` >= rows (a power of two) is the result's period."""
    content = in_layout.index
    positions = len(content)
    period = period or power_of_two(rows)
    if period > positions:
        raise ModelError(f"a map of {rows} outputs does not fit {positions} positions")
    own = np.arange(positions) % period
    assigned = np.where(own < rows, own, -1).astype(np.int32)
    repeat = max(period, _content_period(content))
    offsets = _offsets_needed(content[:repeat], period, in_layout.size)
    folds = tuple(period << i for i in range((repeat // period).bit_length() - 1))
    out = Layout(rows, in_layout.lanes, tuple(np.where(own < rows, own, ZERO).tolist()))
    return Arrangement("outer", period, assigned, offsets, folds, out)


def inner(in_layout: Layout, rows: int) -> Arrangement | None:
    """Inner sum, or None where the input is not periodic or has too few copies."""
    content = in_layout.index
    positions = len(content)
    block = _content_period(content)
    blocks = positions // block
    each = power_of_two(-(-rows // blocks))
    if (content[:block] == GARBAGE).any() or each > block or block == positions:
        return None
    s = np.arange(positions)
    row = (s // block) * each + s % each
    assigned = np.where(row < rows, row, -1).astype(np.int32)
    folds = tuple(each << i for i in range((block // each).bit_length() - 1))
    finished = s % block < each
    kept = np.where(row < rows, row, ZERO)
    # Rows beyond the last multiply by zero, so whole blocks of them stay zero.
    empty = (s // block) * each >= rows
    out = np.where(finished, kept, np.where(empty, ZERO, GARBAGE))
    # A block's unfinished positions reach into the next block when folded.
    out = np.where(~finished & empty & (np.roll(empty, -block) == 0), GARBAGE, out)
    return Arrangement(
        "inner", positions, assigned, each, folds, Layout(rows, in_layout.lanes, tuple(out.tolist()))
    )


def _content_period(content: IntArray) -> int:
    period = 1
    while period < len(content):
        if (content.reshape(-1, period) == content[:period]).all():
            return period
        period *= 2
    return len(content)


def _offsets_needed(content: IntArray, period: int, size: int) -> int:
    """Rotations 0 ... n-1 after which each residue mod `period` has seen every element."""
    missing = np.ones((period, size), bool)
    own = np.arange(len(content)) % period
    for k in range(len(content)):
        seen = np.roll(content, -k)
        held = seen >= 0
        missing[own[held], seen[held]] = False
        if not missing.any():
            return k + 1
    raise ModelError("the layout does not hold every element of its vector")


def baby_steps(offsets: int) -> int:
    """Baby steps of a baby-step giant-step split: fewest rotations, then fewest keys."""
    best = min((1 << i for i in range(offsets.bit_length())), key=lambda b: (b + -(-offsets // b), b))
    return min(best, offsets)
