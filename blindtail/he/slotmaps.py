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

*Complex slots*, of the activation at the cut: its second half rides as the
imaginary parts of the first. There is room for twice the copies, so half the
offsets, for one fold more: that of the conjugate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from blindtail.errors import ModelError
from blindtail.he.diagonals import repeat_length
from blindtail.he.layers import FloatArray
from blindtail.he.layout import GARBAGE, ZERO, Layout
from blindtail.he.operations import Groups

IntArray = NDArray[np.int32]

#: Smallest period of a reply, in slots: 2 * 16 coefficients of c0 travel.
LEAST_PERIOD = 16


class TooWide(ModelError):
    """More elements than a ciphertext of this ring holds: a larger ring may."""


@dataclass(frozen=True, eq=False)
class Arrangement:
    """How one map is laid out: see `blindtail.he.operations.MapOp` for the fields.

    Folding by `fold_step`, 2 `fold_step`, ... finishes the sums, `fold_bits` times; and
    adding the conjugate, once, where the input is `complex_input`.
    """

    kind: str  # "outer", "inner" or "grid"
    period: int  # positions after which finished outputs repeat (all of them for an inner sum)
    rows: IntArray
    offsets: int
    stride: int
    fold_step: int
    fold_bits: int
    out_layout: Layout
    complex_input: bool = False
    used: tuple[int, ...] | None = None  # offsets with something to multiply; None: all of them
    more: tuple[tuple[int, ...], ...] = ()  # the same of further operands

    @property
    def copies(self) -> int:
        """Of each finished output, as far as outputs repeat."""
        return len(self.rows) // self.period

    @property
    def scattered(self) -> bool:
        """Whether rows leave many positions empty, so that a mean over all says little of theirs."""
        least = max(power_of_two(self.out_layout.size), LEAST_PERIOD // self.out_layout.lanes)
        return self.kind == "grid" or (self.kind == "outer" and self.period // self.stride > least)


def alike(arranged: Sequence[Arrangement], index: int) -> int:
    """Copies of the last map's input with the same noise, where folds merged it: not averaged.

    Where that map's rows are scattered; of others it counts as 1.
    """
    if not 0 < index == len(arranged) - 1 or not arranged[index].scattered:
        return 1
    before = arranged[index - 1]
    # Windows of so many of the copies that there are: sums of all but the same ones.
    return min(1 << before.fold_bits, before.copies)


def power_of_two(n: int) -> int:
    """The smallest power of two >= n."""
    return 1 << (n - 1).bit_length() if n > 1 else 1


def first_maps(
    weight: FloatArray, slots: int, lanes: int, period: int | None = None
) -> list[tuple[Layout, Arrangement]]:
    """Ways to lay out the activation at the cut together with the first map, an outer sum.

    weight  (out, in); `period` as for `outer`

    The edge applies any layout for free; with real slots, and with complex ones where there is more
    than one element. Raises `ModelError` when the activation does not fit the ciphertext.
    """
    rows, size = weight.shape
    positions = slots // lanes
    each = period or power_of_two(rows)
    if each > positions or power_of_two(-(-size // 2)) > positions:
        what, holds = ("layer", positions) if each > positions else ("activation", 2 * positions)
        raise TooWide(
            f"the {what} at the cut has {max(size, rows)} elements, a ciphertext holds {holds} a lane: "
            "cut later, add a bottleneck, or use fewer lanes"
        )
    found = []
    for held in _halves(size):
        if power_of_two(held) <= positions:
            content = spread(held, each, positions)
            arrangement = outer(Layout(held, lanes, tuple(content.tolist())), rows, period)
            found.append(_at_the_cut(size, lanes, content, arrangement, held))
        gathered = _gathered(weight, positions, lanes, held < size) if period is None else None
        found += [] if gathered is None else [gathered]
    return found


def _halves(size: int) -> tuple[int, ...]:
    """Elements that real parts hold, of `size`: all of them, or the first half."""
    return (size,) if size < 2 else (size, -(-size // 2))


def _at_the_cut(
    size: int, lanes: int, content: IntArray, arrangement: Arrangement, held: int
) -> tuple[Layout, Arrangement]:
    """With element e + `held` as the imaginary part of element e < `held`, where there is one."""
    real = tuple(content.tolist())
    if held == size:
        return Layout(size, lanes, real), arrangement
    other = np.where((content >= 0) & (content + held < size), content + held, ZERO)
    layout = Layout(size, lanes, real, tuple(other.tolist()))
    return layout, replace(arrangement, complex_input=True)


def spread(size: int, period: int, positions: int) -> IntArray:
    """A content in which row groups (runs of `period` positions) start at evenly spread elements.

    With t copies, group j starts at j `period` / t on a circle of `positions` / t, so
    that each row sees every element within ceil(`period` / t) offsets: where a
    rotation leaves its run, the next run goes on as the run t groups on does.
    """
    copies = positions // size
    s = np.arange(positions)
    start = s // period * period + s % period * copies  # in units of 1 / copies of an element: exact
    index = start % positions // copies
    return np.where(index < size, index, ZERO).astype(np.int32)


def _gathered(
    weight: FloatArray, positions: int, lanes: int, halved: bool
) -> tuple[Layout, Arrangement] | None:
    """Rows that read the same few elements, as channels of a convolution do, gather them.

    One copy of those elements ("im2col") for each of `groups` sets of rows; within
    them it is `outer`, with a stride of the groups' number. None where all rows
    read the same elements, or where the copies do not fit.
    halved  the second half of each copy's elements as imaginary parts
    """
    widest = int(np.count_nonzero(weight, axis=1).max())
    reads = _halves(widest)[-1] if halved else widest
    if weight.all() or 2 * power_of_two(reads) > positions:  # two sets of rows at least
        return None
    # Eight to a byte: rows of thousands of elements are compared whole.
    sets, belongs = np.unique(np.packbits(weight != 0, axis=1), axis=0, return_inverse=True)
    belongs = belongs.reshape(-1)
    if len(sets) < 2:
        return None
    groups = power_of_two(len(sets))
    members: list[IntArray] = [np.flatnonzero(belongs == i).astype(np.int32) for i in range(len(sets))]
    members.sort(key=lambda rows: int(rows[0]))
    each = power_of_two(max(len(rows) for rows in members))
    if groups * max(power_of_two(reads), each) > positions:
        return None
    within = spread(reads, each, positions // groups)
    small = outer(Layout(reads, lanes, tuple(within.tolist())), each)
    content = np.full((positions // groups, groups), ZERO, np.int32)
    imaginary = content.copy()
    own = np.full((each, groups), ZERO, np.int32)
    for g, rows in enumerate(members):
        elements = np.flatnonzero(weight[rows[0]])
        padded = np.full(2 * widest + 2, ZERO, np.int32)  # the last stands for index -1
        padded[: len(elements)] = elements
        content[:, g] = padded[within]
        imaginary[:, g] = padded[np.where(within >= 0, within + reads, ZERO)]
        own[: len(rows), g] = rows
    repeated = np.tile(own.reshape(-1), positions // (each * groups))
    other = tuple(imaginary.reshape(-1).tolist()) if reads < widest else None
    return Layout(weight.shape[1], lanes, tuple(content.reshape(-1).tolist()), other), Arrangement(
        "outer",
        each * groups,
        repeated,
        small.offsets * groups,
        groups,
        each * groups,
        small.fold_bits,
        Layout(weight.shape[0], lanes, tuple(repeated.tolist())),
        complex_input=other is not None,
    )


def outer(in_layout: Layout, rows: int, period: int | None = None) -> Arrangement:
    """Outer sum of `rows` outputs; `period` >= rows (a power of two) is the result's period."""
    content = in_layout.index
    positions = len(content)
    period = period or power_of_two(rows)
    if period > positions:
        raise TooWide(f"a map of {rows} outputs does not fit {positions} positions")
    own = np.arange(positions) % period
    assigned = np.where(own < rows, own, -1).astype(np.int32)
    repeat = max(period, repeat_length(content))
    offsets = _offsets_needed(content[:repeat], period, in_layout.size)
    bits = (repeat // period).bit_length() - 1
    out = Layout(rows, in_layout.lanes, tuple(np.where(own < rows, own, ZERO).tolist()))
    return Arrangement("outer", period, assigned, offsets, 1, period, bits, out)


def inner(in_layout: Layout, rows: int, share: int = 1) -> Arrangement | None:
    """Inner sum, or None where the input is not periodic or has too few copies.

    share  leaves all but one in `share` copies unused: more offsets, fewer folds
    """
    content = in_layout.index
    positions = len(content)
    block = repeat_length(content)
    blocks = positions // block
    each = power_of_two(-(-rows // blocks)) * share
    if (content[:block] == GARBAGE).any() or each > block or block == positions:
        return None
    s = np.arange(positions)
    row = (s // block) * each + s % each
    assigned = np.where(row < rows, row, -1).astype(np.int32)
    bits = (block // each).bit_length() - 1
    finished = s % block < each
    kept = np.where(row < rows, row, ZERO)
    # Rows beyond the last multiply by zero, so whole blocks of them stay zero.
    empty = (s // block) * each >= rows
    out = np.where(finished, kept, np.where(empty, ZERO, GARBAGE))
    # A block's unfinished positions reach into the next block when folded.
    out = np.where(~finished & empty & (np.roll(empty, -block) == 0), GARBAGE, out)
    return Arrangement(
        "inner", positions, assigned, each, 1, each, bits, Layout(rows, in_layout.lanes, tuple(out.tolist()))
    )


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


def fold_groups(step: int, bits: Sequence[int], conjugating: int | None = None) -> Groups:
    """Groups that do the work of doubling steps `step`, 2 `step`, ...: bits[i] of them in group i.

    conjugating  the group that adds the conjugate too, as one of its steps
    """
    groups = []
    for i, b in enumerate(bits):
        rotations = b - (i == conjugating)
        group = [step * j for j in range(1, 1 << rotations)]
        if i == conjugating:
            group += [~(step * j) for j in range(1 << rotations)]
        groups.append(tuple(group))
        step <<= rotations
    return tuple(groups)
