"""Layouts for convolutions: rows and columns on one grid (`blindtail.he.grid_shapes`), or gathered.

Which offsets are used is not derived from kernels: it is what the weights other than
zero need, so that padding, dilation, groups and pruned weights come for free.

*Gathered* (im2col), at the cut: a copy of what each output pixel reads, next to it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from blindtail.he import slotmaps
from blindtail.he.diagonals import meet, repeat_length
from blindtail.he.grid_shapes import Grid, flat, grids
from blindtail.he.layers import Affine
from blindtail.he.layout import GARBAGE, ZERO, Layout
from blindtail.he.normal import Normal
from blindtail.he.slotmaps import Arrangement, power_of_two
from blindtail.he.sparse import Sparse, Weight, has_zeros, unions

#: An inner sum's copies that may be left unused, as for dense maps: fewer folds, more offsets.
SHARES = (1, 2)


def firsts(
    maps: Sequence[Affine], slots: int, lanes: int, last_period: int
) -> list[tuple[Layout, Arrangement]]:
    """Ways to lay out the activation at the cut together with the first map.

    What `slotmaps.first_maps` offers for any map; for one with zeros, gathered and grid
    layouts as well. Raises `slotmaps.TooWide` when the activation does not fit the ciphertext.
    """
    positions, step = slots // lanes, maps[0]
    only = last_period if len(maps) == 1 else None
    found: list[tuple[Layout, Arrangement]] = []
    most = max(step.weight.shape)
    problem = slotmaps.TooWide(
        f"the layer at the cut has {most} elements, a ciphertext holds {positions} a lane: "
        "cut later, add a bottleneck, or use fewer lanes"
    )
    if not isinstance(step.weight, Sparse):
        try:
            found = slotmaps.first_maps(step.weight, slots, lanes, only)
        except slotmaps.TooWide as error:
            problem = error
    if has_zeros(step.weight):
        every = grids(maps, positions)
        before = every[0] or [flat(step.weight.shape[1])] * isinstance(step.weight, Sparse)
        after = every[1] or [flat(step.weight.shape[0])] * isinstance(step.weight, Sparse)
        after = after if only is None else [flat(step.weight.shape[0])] * bool(every[0] or before)
        for outs in after:
            period = only or outs.period
            if period > positions:
                continue
            if only is None:
                found += _gathered(step.weight, outs, positions, lanes)
            for grid, halved in itertools.product(before, (False, True)):
                made = _on_grids(grid, halved, outs, period, positions, lanes)
                found += [] if made is None else [made]
    if not found:
        raise problem
    return _unlike([(layout, used(made, layout, step.weight)) for layout, made in found])


def ways(layout: Layout, step: Affine, outs: Sequence[Grid], last_period: int | None) -> list[Arrangement]:
    """Arrangements of a later map on what the map before it left; the last one has the reply's period.

    outs  grids for its output (`grids`)
    """
    weight, rows = step.weight, step.weight.shape[0]
    positions = len(layout.content)
    found: list[Arrangement] = []
    if last_period is not None:
        if isinstance(weight, Sparse):
            found = [placed(layout, flat(rows), last_period)]
        else:
            found = [slotmaps.outer(layout, rows, last_period)]
    else:
        if not isinstance(weight, Sparse):
            inner = (slotmaps.inner(layout, rows, share) for share in SHARES)
            found = [slotmaps.outer(layout, rows), *(made for made in inner if made is not None)]
        elif not outs:
            outs = [flat(rows)]
        for grid in outs if has_zeros(weight) else ():
            if grid.period <= positions:
                found.append(placed(layout, grid, grid.period))
                blocks = (in_blocks(layout, grid, share) for share in SHARES)
                found += [made for made in blocks if made is not None]
    if not found:
        raise slotmaps.TooWide(f"{step.name}: {rows} outputs do not fit {positions} positions")
    return [used(made, layout, weight) for made in found]


def joined(
    read: Sequence[tuple[Layout, Weight]], name: str, outs: Sequence[Grid], last_period: int | None
) -> list[Arrangement]:
    """Arrangements of a map of several operands: outer sums, folded as far as any of them repeats.

    read  layout and weight of each, the main one first; else as for `ways`
    """
    layout, rows = read[0][0], read[0][1].shape[0]
    positions = len(layout.content)
    lines = [] if outs and last_period is None else [flat(rows)]
    made = []
    for grid in (*lines, *(outs if last_period is None else ())):
        period = last_period or grid.period
        if period > positions:
            continue
        plain = placed(layout, grid, period)
        repeat = max(period, repeat_length(*(one.index for one, _ in read)))
        met = [meet(weight, plain.rows, one, period, 1, repeat).offsets or (0,) for one, weight in read]
        bits = (repeat // period).bit_length() - 1
        kept = replace(plain, fold_bits=bits, used=met[0], offsets=met[0][-1] + 1, more=tuple(met[1:]))
        made.append(kept)
    if not made:
        raise slotmaps.TooWide(f"{name}: {rows} outputs do not fit {positions} positions")
    return made


def used(arrangement: Arrangement, layout: Layout, weight: Weight) -> Arrangement:
    """With the offsets that have something to multiply, where there are zeros."""
    if arrangement.used is not None or not has_zeros(weight):
        return arrangement
    met = meet(weight, arrangement.rows, layout, arrangement.offsets, arrangement.stride)
    offsets = met.offsets or (0,)
    bound = arrangement.offsets
    if arrangement.kind == "grid":
        bound = offsets[-1] + arrangement.stride
    return replace(arrangement, used=offsets, offsets=bound)


def placed(layout: Layout, grid: Grid, period: int, complex_input: bool = False) -> Arrangement:
    """An outer sum whose rows are on a grid, with a period of at least the grid's."""
    positions = len(layout.content)
    if period > positions:
        raise slotmaps.TooWide(f"a map of {len(grid.places)} outputs does not fit {positions} positions")
    rows = np.full(period, -1, np.int32)
    rows[grid.places] = np.arange(len(grid.places))
    rows = np.tile(rows, positions // period)
    parts = [layout.index]
    if layout.imaginary is not None:
        parts.append(np.asarray(layout.imaginary, np.int32))
    bits = (max(period, repeat_length(*parts)) // period).bit_length() - 1
    out = Layout(len(grid.places), layout.lanes, tuple(np.where(rows >= 0, rows, ZERO).tolist()))
    return Arrangement("grid", period, rows, period, 1, period, bits, out, complex_input=complex_input)


def in_blocks(layout: Layout, grid: Grid, share: int = 1) -> Arrangement | None:
    """An inner sum whose rows are on a grid; None where the input is not periodic or has too few copies.

    Each copy of the input works on some of the output's blocks.
    """
    content = layout.index
    copy = repeat_length(content)
    copies = len(content) // copy
    many = power_of_two(-(-grid.blocks // copies)) * share
    each = many * grid.block
    if copies == 1 or each >= copy or (content[:copy] == GARBAGE).any():
        return None
    block, site = np.divmod(grid.places, grid.block)
    own = np.full((copies, each), -1, np.int32)
    own[block // many, block % many * grid.block + site] = np.arange(len(grid.places))
    rows = np.tile(own[:, None, :], (1, copy // each, 1)).reshape(-1)
    finished = np.tile(np.arange(copy) < each, copies)
    # Copies without rows multiply by zero; but what is unfinished reaches into the next one when folded.
    empty = np.repeat((own < 0).all(axis=1), copy)
    reached = empty & ~np.roll(empty, -copy)
    out = np.where(finished, rows, np.where(empty & ~reached, ZERO, GARBAGE))
    bits = (copy // each).bit_length() - 1
    layout_out = Layout(len(grid.places), layout.lanes, tuple(out.tolist()))
    return Arrangement("grid", len(content), rows, each, 1, each, bits, layout_out)


class Ways:
    """The arrangements of each map of a tail in one ring: made when first asked for, then kept."""

    def __init__(self, tail: Normal, slots: int, lanes: int) -> None:
        self._tail, self._slots, self._lanes = tail, slots, lanes
        self._grids = grids(tail.maps, slots // lanes)
        self._firsts: dict[int, list[tuple[Layout, Arrangement]]] = {}
        self._later: dict[tuple[int, tuple[Layout, ...], int | None], list[Arrangement]] = {}

    def firsts(self, last_period: int) -> list[tuple[Layout, Arrangement]]:
        """As `firsts`; raises what it raises."""
        maps = self._tail.maps
        key = last_period if len(maps) == 1 else 0
        if key not in self._firsts:
            found = firsts(maps, self._slots, self._lanes, last_period)
            if any(value == 0 for index in range(1, len(maps)) for value, _ in self._tail.sources(index)):
                # Imaginary parts are for one map to bring down, and what it does not read others may.
                found = [way for way in found if way[0].imaginary is None and _whole(way[0])]
            if not found:
                raise slotmaps.TooWide(
                    f"{maps[0].name}: the activation at the cut is read by several layers and does not fit "
                    "the slots' real parts: cut later, or add a bottleneck"
                )
            self._firsts[key] = found
        return self._firsts[key]

    def later(self, index: int, layouts: tuple[Layout, ...], last_period: int) -> list[Arrangement]:
        """As `ways` or `joined`, of map `index`; raises what it raises.

        layouts  of what the map reads, in the order of `Normal.sources`
        """
        step = self._tail.maps[index]
        only = last_period if index == len(self._tail.maps) - 1 else None
        key = index, layouts, only
        if key not in self._later:
            outs, weights = self._grids[index + 1], [weight for _, weight in self._tail.sources(index)]
            if len(layouts) > 1:
                made = joined(list(zip(layouts, weights, strict=True)), step.name, outs, only)
            else:
                alone = replace(step, weight=weights[0], skips=(), shapes=None) if step.skips else step
                made = ways(layouts[0], alone, outs, only)
            self._later[key] = made
        return self._later[key]


def _whole(layout: Layout) -> bool:
    """Whether it holds every element."""
    return len(set(layout.content) - {ZERO}) == layout.size


def repeats(arrangement: Arrangement) -> bool:
    """Whether finished outputs are periodic, so that an outer sum may follow without folds."""
    index = arrangement.out_layout.index
    return repeat_length(index) < len(index)


def _on_grids(
    grid: Grid, halved: bool, outs: Grid, period: int, positions: int, lanes: int
) -> tuple[Layout, Arrangement] | None:
    """The activation at the cut on a grid, its copies rotated so that rows share the work; None if too wide.

    halved  the second half of the channels as imaginary parts
    """
    channels, height, width = grid.shape
    held = -(-channels // 2) if halved else channels
    tile = replace(grid, shape=(held, height, width))
    if tile.period > positions or (halved and channels == 1):
        return None
    index = slotmaps.spread(tile.period, period, positions)
    content = tile.content()[index]
    size, half = channels * height * width, held * height * width
    imaginary = None
    if halved:
        other = np.where((content >= 0) & (content + half < size), content + half, ZERO)
        imaginary = tuple(other.tolist())
    layout = Layout(size, lanes, tuple(content.tolist()), imaginary)
    return layout, placed(layout, outs, period, complex_input=halved)


def _gathered(weight: Weight, grid: Grid, positions: int, lanes: int) -> list[tuple[Layout, Arrangement]]:
    """Copies of what each pixel of the output reads, with real and with complex slots, where they fit."""
    groups = grid.down * grid.across * grid.block
    channel, site = np.divmod(grid.places, groups)
    each = power_of_two(grid.shape[0])
    own = np.full((each, groups), ZERO, np.int32)
    own[channel, site] = np.arange(len(grid.places))
    reads = unions(weight, [column[column >= 0] for column in own.T])
    widest = max(map(len, reads))
    found: list[tuple[Layout, Arrangement]] = []
    if widest in (0, weight.shape[1]) or groups * each > positions or groups & (groups - 1):
        return found
    for parts in (1, 2):
        room = -(-widest // parts)
        if (parts == 2 and widest < 2) or groups * max(power_of_two(room), each) > positions:
            continue
        within = slotmaps.spread(room, each, positions // groups)
        table = np.full((groups, 2 * widest + 2), ZERO, np.int32)  # the last stands for index -1
        for g, elements in enumerate(reads):
            table[g, : len(elements)] = elements
        content = table[:, within].T.reshape(-1)
        other = table[:, np.where(within >= 0, within + room, ZERO)].T.reshape(-1)
        imaginary = tuple(other.tolist()) if parts == 2 else None
        layout = Layout(weight.shape[1], lanes, tuple(content.tolist()), imaginary)
        made = placed(layout, grid, each * groups, complex_input=parts == 2)
        small = slotmaps.outer(Layout(room, 1, tuple(within.tolist())), each)
        made = replace(made, offsets=small.offsets * groups, stride=groups)
        found.append((layout, replace(made, fold_bits=small.fold_bits)))
    return found


def _unlike(found: Sequence[tuple[Layout, Arrangement]]) -> list[tuple[Layout, Arrangement]]:
    """Without those that come to the same offsets, rows and layout as one before."""
    kept: dict[object, tuple[Layout, Arrangement]] = {}
    for layout, made in found:
        key = layout, made.rows.tobytes(), made.fold_step, made.fold_bits, made.used
        kept.setdefault(key, (layout, made))
    return list(kept.values())


__all__ = [
    "SHARES",
    "Ways",
    "firsts",
    "in_blocks",
    "joined",
    "placed",
    "repeats",
    "used",
    "ways",
]
