"""Where a grid has the elements of an image: rows and columns apart, so that few rotations serve all of it.

*Grid.* Element (c, y, x) with y = Y `down` + a and x = X `across` + b has the position
(c * phases + a * across + b) * block + Y * pitch + X: each channel is split into
`phases` = down * across pictures of every so-manieth pixel, which follow one another
("polyphase"; interleaved tiles in Aharoni et al., HeLayers, arXiv 2011.01805; multiplexed
packing in Lee et al., ICML 2022). A convolution with a stride that takes those phases to
one reads each of them at a few offsets dY * pitch + dX, and the blocks of all
channels and phases at differences of blocks: baby steps and giant steps. All
activations of a run of convolutions share pitch and block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from blindtail.he.layers import Affine
from blindtail.he.layout import ZERO
from blindtail.he.slotmaps import IntArray, power_of_two
from blindtail.he.sparse import has_zeros


@dataclass(frozen=True)
class Grid:
    """Where the elements of an activation (channels, height, width) are; in positions."""

    shape: tuple[int, int, int]
    down: int  # phases of rows
    across: int  # phases of columns
    pitch: int
    block: int  # a power of two

    @property
    def blocks(self) -> int:
        return self.shape[0] * self.down * self.across

    @property
    def period(self) -> int:
        """The smallest power of two that holds it."""
        return power_of_two(self.blocks) * self.block

    @property
    def places(self) -> IntArray:
        """Position of each element, in the order (c, y, x)."""
        c, y, x = np.indices(self.shape).reshape(3, -1)
        phase = (y % self.down) * self.across + x % self.across
        block = c * self.down * self.across + phase
        return (block * self.block + y // self.down * self.pitch + x // self.across).astype(np.int32)

    def content(self) -> IntArray:
        """Element of each position below `period`, or ZERO."""
        found = np.full(self.period, ZERO, np.int32)
        found[self.places] = np.arange(len(self.places))
        return found


def grids(maps: Sequence[Affine], positions: int) -> list[list[Grid]]:
    """For the input and for each map's output, grids worth a try that fit; without a known image, none.

    In a run of images, those that bring all before it to the resolution of each later one.
    """
    shapes = _images(maps)
    found: list[list[Grid]] = [[] for _ in shapes]
    start = 0
    while start < len(shapes):
        end = start
        while end < len(shapes) and shapes[end] is not None:
            end += 1
        for last in range(start, end):
            run = [shape for shape in shapes[start : last + 1] if shape is not None]
            for index, grid in enumerate(_run(run), start=start):
                if grid.period <= 2 * positions and grid not in found[index]:
                    found[index].append(grid)
        start = end + 1
    return found


def _images(maps: Sequence[Affine]) -> list[tuple[int, int, int] | None]:
    """(channels, height, width) of each activation that is an image before or after a sparse map."""
    known = [maps[0].shapes and maps[0].shapes[0], *(step.shapes and step.shapes[1] for step in maps)]
    near = [has_zeros(step.weight) for step in maps]
    found: list[tuple[int, int, int] | None] = []
    for index, shape in enumerate(known):
        wanted = any(near[max(0, index - 1) : index + 1])
        if shape is None or len(shape) not in (2, 3) or not wanted or shape[-2:] == (1, 1):
            found.append(None)
        else:
            found.append((shape[0], shape[1] if len(shape) == 3 else 1, shape[-1]))
    return found


def _run(shapes: Sequence[tuple[int, int, int]]) -> list[Grid]:
    """All at the resolution of the last."""
    _, height, width = shapes[-1]
    phases = [(max(1, round(h / height)), max(1, round(w / width))) for _, h, w in shapes]
    rows = max(-(-h // down) for (_, h, _), (down, _) in zip(shapes, phases, strict=True))
    pitch = max(-(-w // across) for (_, _, w), (_, across) in zip(shapes, phases, strict=True))
    block = power_of_two(rows * pitch)
    return [Grid(shape, *each, pitch, block) for shape, each in zip(shapes, phases, strict=True)]


def flat(size: int) -> Grid:
    """One element after the other."""
    return Grid((size, 1, 1), 1, 1, 1, 1)


__all__ = ["Grid", "flat", "grids"]
