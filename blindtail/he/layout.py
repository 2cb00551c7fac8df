"""Which element of a vector each slot of its ciphertexts holds.

Layouts are part of a tail's description, in `edge.bt` and in the program: their short
JSON form is made here as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blindtail.errors import ModelError
from blindtail.he.params import MAX_LOG2_Q_128

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int32]
#: Values of slots: float64, or complex128 where a layout has imaginary parts.
SlotArray = NDArray[Any]

#: Content of a slot that holds zero, and of one that holds something undefined.
ZERO, GARBAGE = -1, -2

#: Ciphertexts that one tensor may lie over.
MOST_CIPHERTEXTS = 64

_MAX_POSITIONS = MOST_CIPHERTEXTS * max(MAX_LOG2_Q_128) // 2


@dataclass(frozen=True, slots=True)
class Layout:
    """Which element of a vector each slot holds.

    slot = position * lanes + lane: `lanes` independent images share a
    ciphertext (throughput; 1 = latency). `content[position]` is the element's
    index, ZERO or GARBAGE, the same in every lane. Slots are complex numbers:
    with `imaginary`, a slot holds the element named there times i on top, so
    that a ciphertext carries twice as many; nothing is GARBAGE then.

    A tensor may lie over several ciphertexts: `content` has their positions one after the
    other. `tiles` has the layout of each, which names elements of the whole tensor.
    """

    size: int  # number of elements
    lanes: int
    content: tuple[int, ...]
    imaginary: tuple[int, ...] | None = None
    #: `content` as an array, shape (positions,), read-only.
    index: IntArray = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        c = np.asarray(self.content, dtype=np.int64)
        if self.lanes < 1 or self.lanes & (self.lanes - 1) or c.ndim != 1 or len(c) < 1:
            raise ModelError("a layout needs a power-of-two number of lanes and a flat content")
        if not 0 < self.size <= 2 * MOST_CIPHERTEXTS * len(c):
            # A tile names elements of a tensor that may lie over so many.
            raise ModelError(f"a layout of {len(c)} positions cannot hold {self.size} elements")
        if c.min() < GARBAGE or c.max() >= self.size:
            raise ModelError(f"a layout of {self.size} elements names an element outside it")
        if self.imaginary is not None:
            other = np.asarray(self.imaginary, dtype=np.int64)
            if other.shape != c.shape or min(c.min(), other.min()) < ZERO or other.max() >= self.size:
                raise ModelError("a layout's imaginary parts must be elements or zero, one for each position")
        index = c.astype(np.int32)
        index.setflags(write=False)
        object.__setattr__(self, "index", index)

    @property
    def slots(self) -> int:
        return len(self.content) * self.lanes

    def tiles(self, slots: int) -> tuple[Layout, ...]:
        """The layout of each ciphertext of so many slots. Raises `ModelError` unless they add up."""
        if slots == self.slots:
            return (self,)
        each, left = divmod(slots, self.lanes)
        if left or not each or len(self.content) % each or len(self.content) > MOST_CIPHERTEXTS * each:
            raise ModelError(f"a layout of {self.slots} slots fills no 1 to {MOST_CIPHERTEXTS} ciphertexts")
        starts = range(0, len(self.content), each)
        return tuple(
            Layout(
                self.size,
                self.lanes,
                self.content[at : at + each],
                None if self.imaginary is None else self.imaginary[at : at + each],
            )
            for at in starts
        )

    def place(self, x: FloatArray) -> SlotArray:
        """(lanes, size) or (size,) -> slots (positions * lanes,); undefined slots get 0.

        Complex where the layout has imaginary parts, else float64.
        """
        x = np.atleast_2d(np.asarray(x, dtype=np.float64))
        if x.shape != (self.lanes, self.size):
            raise ModelError(f"expected {(self.lanes, self.size)} values, got {x.shape}")
        real = _placed(self.index, x)
        if self.imaginary is None:
            return real
        return real + 1j * _placed(np.asarray(self.imaginary, np.int32), x)

    def read(self, slots: FloatArray) -> FloatArray:
        """Slots -> (lanes, size); copies of an element are averaged. Real layouts alone."""
        if self.imaginary is not None:
            raise ModelError("a layout with imaginary parts is for what goes in")
        grid = np.asarray(slots, dtype=np.float64).reshape(len(self.content), self.lanes)
        index = self.index
        held = index >= 0
        total = np.zeros((self.size, self.lanes))
        np.add.at(total, index[held], grid[held])
        count = np.bincount(index[held], minlength=self.size)
        if not count.all():
            raise ModelError("this layout does not hold every element")
        return (total / count[:, None]).T

    def to_json(self) -> dict[str, Any]:
        found = {"size": self.size, "lanes": self.lanes, "runs": runs(self.content)}
        return found if self.imaginary is None else {**found, "imaginary": runs(self.imaginary)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Layout:
        imaginary = expand_runs(data["imaginary"]) if "imaginary" in data else None
        return cls(int(data["size"]), int(data["lanes"]), expand_runs(data["runs"]), imaginary)


def _placed(index: IntArray, x: FloatArray) -> FloatArray:
    """x (lanes, size) by position and lane, flat; 0 where `index` names no element."""
    out = np.zeros((len(index), len(x)))
    held = index >= 0
    out[held] = x.T[index[held]]
    return out.reshape(-1)


def runs(values: tuple[int, ...]) -> list[list[int]]:
    """Runs [start, step, count] with step >= 0: short JSON for regular layouts."""
    found: list[list[int]] = []
    for value in values:
        if found:
            start, step, count = found[-1]
            if count == 1 and value > start >= 0:
                found[-1] = [start, value - start, 2]
                continue
            if value == start + step * count:
                found[-1][2] += 1
                continue
        found.append([value, 0, 1])
    return found


def expand_runs(listed: Any) -> tuple[int, ...]:
    """Inverse of `runs`. Raises `ModelError` beyond the largest ring's slots."""
    values: list[int] = []
    for start, step, count in listed:
        if not 0 <= step <= _MAX_POSITIONS or not 0 < count <= _MAX_POSITIONS - len(values):
            raise ModelError("a run of a layout is malformed")
        values.extend(range(start, start + step * count, step) if step else [start] * count)
    return tuple(values)
