"""Tile tensors: how a tensor of several axes is cut into tiles, each of which fills a ciphertext.

A tile tensor's shape is written as in Aharoni et al., HeLayers (arXiv 2011.01805), one entry an
axis, [n/t, ...]: n elements, t of them in a tile.

    n/t    element i is in tile i // t, at i mod t (a tensor's end is filled up with zeros)
    n~/t   interleaved: with e = ceil(n / t) tiles, element i is in tile i mod e, at i // e, so that
           a tile holds every e-th element and neighbours are in other tiles at the same place
    */t    not an axis of the tensor: all that is there is held t times
    ?/t    not an axis of the tensor: what is there is held once, and the t - 1 places after it
           hold something undefined, as sums by rotations leave it

All t are powers of two; their product is the number of positions of a ciphertext. Tiles and
positions are counted with the last axis fastest. Axes with an n are the tensor's, in its order.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from blindtail.errors import ModelError
from blindtail.he.layout import GARBAGE, MOST_CIPHERTEXTS, ZERO, Layout

IntArray = NDArray[np.int32]
Kind = Literal["", "~", "*", "?"]
_KINDS: dict[str, Kind] = {"": "", "~": "~", "*": "*", "?": "?"}

_ENTRY = re.compile(r"\s*(?:([0-9]{1,9})(~?)|([*?]))(?:/([0-9]{1,9}))?\s*")


@dataclass(frozen=True, slots=True)
class Axis:
    """One entry of a shape; see the module. `size`: n, and 1 where there is none."""

    size: int
    tile: int
    kind: Kind = ""

    def __post_init__(self) -> None:
        if self.tile < 1 or self.tile & (self.tile - 1):
            raise ModelError(f"a tile has a power of two of places along each axis, not {self.tile}")
        if self.size < 1 or (self.kind in ("*", "?") and self.size != 1):
            raise ModelError(
                "an axis has 1 element at least, and one that is no axis of the tensor exactly 1"
            )

    @property
    def tiles(self) -> int:
        return -(-self.size // self.tile)

    @property
    def table(self) -> IntArray:
        """(tiles, tile): the coordinate that each place has, ZERO beyond the end, GARBAGE where undefined."""
        if self.kind == "*":
            return np.zeros((1, self.tile), np.int32)
        if self.kind == "?":
            return np.asarray([[0] + [GARBAGE] * (self.tile - 1)], np.int32)
        found = np.arange(self.tiles * self.tile, dtype=np.int32)
        found = np.where(found < self.size, found, ZERO)
        if self.kind == "~":
            return found.reshape(self.tile, self.tiles).T
        return found.reshape(self.tiles, self.tile)

    def __str__(self) -> str:
        name = f"{self.size}{self.kind}" if self.kind in ("", "~") else self.kind
        return name if self.tile == 1 else f"{name}/{self.tile}"


@dataclass(frozen=True, slots=True)
class TileShape:
    """The shape of a tile tensor. Raises `ModelError` for more tiles than a request may have."""

    axes: tuple[Axis, ...]

    def __post_init__(self) -> None:
        if not self.axes or self.tiles > MOST_CIPHERTEXTS:
            raise ModelError(f"{self}: {self.tiles} tiles; a tensor lies over 1 to {MOST_CIPHERTEXTS}")

    @classmethod
    def parse(cls, text: str) -> TileShape:
        """From "[16/4, 32~/16, */2, ?/8]". Raises `ModelError` naming the entry."""
        inner = text.strip()
        if not (inner.startswith("[") and inner.endswith("]")):
            raise ModelError(f"a tile tensor's shape is written [n/t, ...], not {text[:80]!r}")
        axes = []
        for entry in inner[1:-1].split(","):
            found = _ENTRY.fullmatch(entry)
            if found is None:
                raise ModelError(f"{entry.strip()[:40]!r} is no axis: write n/t, n~/t, */t or ?/t")
            size, interleaved, other, tile = found.groups()
            try:
                axes.append(Axis(int(size or 1), int(tile or 1), _KINDS[other or interleaved or ""]))
            except ModelError as error:
                raise ModelError(f"{entry.strip()}: {error}") from None
        return cls(tuple(axes))

    def __str__(self) -> str:
        return f"[{', '.join(map(str, self.axes))}]"

    @property
    def positions(self) -> int:
        """Of a tile."""
        return math.prod(axis.tile for axis in self.axes)

    @property
    def tiles(self) -> int:
        """Ciphertexts."""
        return math.prod(axis.tiles for axis in self.axes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor itself."""
        return tuple(axis.size for axis in self.axes if axis.kind in ("", "~"))

    @property
    def size(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)

    @property
    def defined(self) -> bool:
        """Nothing in it is undefined."""
        return all(axis.kind != "?" or axis.tile == 1 for axis in self.axes)

    def stride(self, index: int) -> int:
        """Positions between neighbours along axis `index`."""
        return math.prod(axis.tile for axis in self.axes[index + 1 :])

    def content(self) -> IntArray:
        """(tiles, positions): element of the flat tensor, ZERO or GARBAGE."""
        found = np.zeros((1, 1), np.int64)
        for axis in self.axes:
            table = axis.table.astype(np.int64)
            grown = axis.size if axis.kind in ("", "~") else 1
            outer, inner = found[:, None, :, None], table[None, :, None, :]
            # Undefined wins over zero: sums reach there from the next element.
            made = np.where((outer < 0) | (inner < 0), np.minimum(outer, inner), outer * grown + inner)
            tiles, places = found.shape[0] * table.shape[0], found.shape[1] * table.shape[1]
            found = made.reshape(tiles, places)
        return found.astype(np.int32)

    def rows(self) -> IntArray:
        """(tiles, positions): the element that each position works on before sums by rotations, or -1.

        Along */t and ?/t all t places work on the same element.
        """
        summed = TileShape(
            tuple(Axis(1, axis.tile, "*") if axis.kind == "?" else axis for axis in self.axes)
        ).content()
        return np.where(summed >= 0, summed, -1).astype(np.int32)

    def folds(self) -> tuple[tuple[int, int], ...]:
        """(step in positions, doubling steps) of the sums that leave this shape.

        Raises `ModelError` for */t with t > 1 other than along the first axis: only there are
        rotations cyclic, so that all places end with the sum.
        """
        found = []
        for index, axis in enumerate(self.axes):
            if axis.kind not in ("*", "?") or axis.tile == 1:
                continue
            if axis.kind == "*" and any(before.tile > 1 for before in self.axes[:index]):
                raise ModelError(f"{self}: sums are held everywhere along the first axis alone; write ?")
            found.append((self.stride(index), axis.tile.bit_length() - 1))
        return tuple(found)

    def layout(self, lanes: int = 1) -> Layout:
        """Of the flat tensor over all tiles, one after the other."""
        return Layout(self.size, lanes, tuple(self.content().reshape(-1).tolist()))

    def halved(self, lanes: int = 1) -> Layout:
        """Of a tensor twice as long along its first axis, whose second half are imaginary parts.

        For an activation at the cut: half the ciphertexts. Of `defined` shapes alone.
        """
        content, size = self.content().reshape(-1), self.size
        other = np.where(content >= 0, content + size, ZERO)
        return Layout(2 * size, lanes, tuple(content.tolist()), tuple(other.tolist()))


__all__ = ["Axis", "TileShape"]
