"""The two operations of an encrypted tail as data: an affine map and a square.

Matrix-vector product (`MapOp`). Position s of the output, before folding,
belongs to row `rows[s]` (or to none, -1). With the input rotated by k, position
s sees element content[s + k]; the first (k, s), in that order, at which a row
sees a column carries that matrix entry, so that rows that appear at several
positions share the work between them ("hybrid diagonals": Juvekar et al.,
Gazelle, USENIX Security 2018; positions holding rotated copies of the input
turn diagonals into lanes). Rotations 0, stride, 2 stride ... below `offsets` are
split into baby steps, all of the same input and so hoisted, and giant steps,
which run Horner-style and so need one key (Halevi and Shoup, CRYPTO 2014,
section 4.3; CRYPTO 2018, section 4). Then rescale, then fold, group by group:
acc += rotate(acc, f1) + ... + rotate(acc, fm) for the group (f1, ..., fm), whose
rotations are all of one ciphertext and so hoisted too. A doubling step is the
group (f,); (f, 2f, 3f) does the work of (f,) and (2f,). Consumes one level; so
does a square.

Complex slots halve the products of the first map: a slot x + i x' times
w - i w' has the real part x w + x' w'. Multipliers are half of that, and one
fold adds the conjugate: a fold ~f (= -1 - f) is a rotation by f, conjugated, so
that (~0,) is the conjugation alone and (f, ~0, ~f) both of a doubling step's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from blindtail.errors import ModelError
from blindtail.he.layers import FloatArray
from blindtail.he.params import Parameters
from blindtail.he.spec import Layout, SlotArray

#: Most fold groups of a map, and most rotations of a group.
MAX_GROUPS, MAX_GROUP = 16, 63

Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class MapOp:
    """One affine map; input at `level`, output at `level` - 1.

    Offsets, baby steps and folds count positions; offsets and baby steps are
    multiples of `stride`. A negative fold ~f conjugates as well. The result is real.
    """

    name: str
    level: int
    weight: FloatArray  # (out, in)
    bias: FloatArray  # (out,)
    in_layout: Layout
    out_layout: Layout
    rows: NDArray[np.int32]  # (positions,)
    offsets: int
    stride: int
    baby: int
    folds: Groups
    in_scale: float
    out_scale: float

    @property
    def giant(self) -> int:
        """Number of giant steps, the first included."""
        return -(-self.offsets // self.baby)

    def plain_scale(self, parameters: Parameters) -> float:
        """target * q_level / current: the product, rescaled, lands on `out_scale` to the last bit.

        SEAL refuses to add operands whose scales differ in one. Raises `ModelError`
        when no such scale exists; `landing_scale` makes one that does.
        """
        found = leading_scale(self.in_scale, self.out_scale, parameters.primes[self.level])
        if found is None:
            raise ModelError(f"{self.name}: no plaintext scale leads to its output scale")
        return found

    @cached_property
    def diagonals(self) -> dict[int, SlotArray]:
        """Offset k -> multipliers by position; offsets with nothing to multiply are absent.

        Complex where the input is: (w - i w') / 2 at a position that sees x + i x'.
        Raises `ModelError` when some matrix entry other than zero is met by no offset.
        """
        missing = (self.weight != 0).reshape(-1)
        found: dict[int, SlotArray] = {**self._met(self.in_layout.index, missing)}
        if self.in_layout.imaginary is not None:
            found = {k: values / 2 for k, values in found.items()}
            other = self._met(np.asarray(self.in_layout.imaginary, np.int32), missing)
            for k, values in other.items():
                found[k] = found.get(k, 0.0) - 0.5j * values
            found = {k: found[k] + 0j for k in sorted(found)}
        if missing.any():
            raise ModelError(f"{self.name}: its layout leaves {int(missing.sum())} weights unused")
        return found

    def _met(self, content: NDArray[np.int32], missing: NDArray[np.bool_]) -> dict[int, FloatArray]:
        """Offset -> the weights met there, by position; takes them off `missing` (out * in,)."""
        positions = len(content)
        period = _period(content, self.rows, positions)
        rows = self.rows[:period]
        inner = self.weight.shape[1]
        entries = self.weight.reshape(-1)
        found: dict[int, FloatArray] = {}
        for k in range(0, self.offsets, self.stride):
            seen = np.roll(content, -k)[:period]
            usable = np.flatnonzero((rows >= 0) & (seen >= 0))
            entry = rows[usable].astype(np.int64) * inner + seen[usable]
            fresh = missing[entry]
            entry, first = np.unique(entry[fresh], return_index=True)
            if len(entry):
                missing[entry] = False
                values = np.zeros(period)
                values[usable[fresh][first]] = entries[entry]
                found[k] = np.tile(values, positions // period)
        return found

    def steps(self) -> Iterator[tuple[int, int, SlotArray]]:
        """(giant, baby, multipliers) with multipliers rotated back by the giant step.

        `giant` counts giant steps, `baby` positions.
        """
        for k, values in self.diagonals.items():
            giant, baby = divmod(k, self.baby)
            yield giant, baby, np.roll(values, giant * self.baby)

    def bias_slots(self) -> FloatArray:
        """The bias at every position that holds an element, zero elsewhere; by position."""
        index = self.out_layout.index
        return np.where(index >= 0, self.bias[np.maximum(index, 0)], 0.0)

    def rotations(self) -> dict[int, int]:
        """Turn (in slots; ~t conjugates as well) -> highest level it is used at."""
        lanes, need = self.in_layout.lanes, {}
        used = {divmod(k, self.baby) for k in self.diagonals}
        for _, b in used:
            if b:
                need[b * lanes] = self.level
        if any(g for g, _ in used):
            need[self.baby * lanes] = self.level
        for group in self.folds:
            for f in group:
                need.setdefault(in_slots(f, lanes), self.level - 1)
        return need

    def check(self) -> None:
        """Every output position that claims an element really sums that row, each column once.

        Raises `ModelError` naming the map.
        """
        positions = len(self.in_layout.content)
        out, inner = self.weight.shape
        if (
            self.in_layout.size != inner
            or self.out_layout.size != out
            or self.bias.shape != (out,)
            or self.rows.shape != (positions,)
            or self.rows.min() < -1
            or self.rows.max() >= out
            or self.stride < 1
            or not 1 <= self.baby <= self.offsets <= positions
            or self.baby % self.stride
            or self.offsets % self.stride
            or len(self.out_layout.content) != positions
            or self.out_layout.lanes != self.in_layout.lanes
            or len(self.folds) > MAX_GROUPS
            or any(not 1 <= len(group) <= MAX_GROUP for group in self.folds)
            or any(f == 0 or not -positions <= f < positions for group in self.folds for f in group)
            or self.out_layout.imaginary is not None
            or not (self.in_scale > 1 and self.out_scale > 1 and np.isfinite(self.in_scale * self.out_scale))
        ):
            raise ModelError(f"{self.name}: shapes, offsets or scales contradict each other")
        if not (np.isfinite(self.weight).all() and np.isfinite(self.bias).all()):
            raise ModelError(f"{self.name}: weights hold NaN or infinity")
        # A random probe in place of the weights: an exact integer identity but for
        # coincidences of probability 2^-40, without a loop over all entries. Zeros
        # stay: a layout may leave out what multiplies by zero.
        rng = np.random.default_rng(20260101)
        weight = np.where(self.weight != 0, rng.integers(1, 1 << 20, self.weight.shape), 0).astype(np.float64)
        x = np.asarray(rng.integers(1, 1 << 20, (inner,)), np.float64)
        held = self.in_layout.index
        slots: SlotArray = np.where(held >= 0, x[np.maximum(held, 0)], np.nan)
        if self.in_layout.imaginary is not None:
            slots = replace(self.in_layout, lanes=1).place(x)
        total: SlotArray = np.zeros(positions, slots.dtype)
        for k, values in replace(self, weight=weight).diagonals.items():
            seen: SlotArray = np.roll(slots, -k)
            used = values != 0
            total[used] += values[used] * seen[used]
        total = fold(total, self.folds)
        claimed = self.out_layout.index
        want = weight @ x
        good = np.where(claimed >= 0, total == want[np.maximum(claimed, 0)], (claimed != -1) | (total == 0))
        if not good.all():
            raise ModelError(f"{self.name}: its layout does not compute the map")


def in_slots(turn: int, lanes: int) -> int:
    """A turn in positions -> the same in slots."""
    return turn * lanes if turn >= 0 else ~(~turn * lanes)


def turned(values: SlotArray, turn: int) -> SlotArray:
    """Values by position, the last axis, rotated left by `turn`; for ~t by t, and conjugated."""
    if turn >= 0:
        return np.roll(values, -turn, axis=-1)
    return np.conj(np.roll(values, turn + 1, axis=-1))


def fold(values: SlotArray, groups: Groups) -> SlotArray:
    """What `MapOp.folds` does to values by position, the last axis."""
    for group in groups:
        held = values
        for f in group:
            values = values + turned(held, f)
    return values


@dataclass(frozen=True, eq=False)
class SquareOp:
    """x^2, relinearised and rescaled: `level` -> `level` - 1."""

    name: str
    level: int
    layout: Layout
    in_scale: float
    out_scale: float


Op = MapOp | SquareOp


def leading_scale(in_scale: float, out_scale: float, q: int) -> float | None:
    """The plaintext scale whose product with `in_scale`, rescaled by q, is `out_scale` to the last bit."""
    below = above = out_scale * q / in_scale
    for _ in range(8):
        for candidate in (below, above):
            if in_scale * candidate / q == out_scale:
                return candidate
        below, above = math.nextafter(below, 0.0), math.nextafter(above, math.inf)
    return None


def landing_scale(in_scale: float, target: float, q: int) -> float:
    """The scale next to `target` that a product with a plaintext, rescaled by q, can land on."""
    return in_scale * (target * q / in_scale) / q


def _period(content: NDArray[np.int32], rows: NDArray[np.int32], positions: int) -> int:
    """The smallest power of two with which both repeat."""
    period = 1
    while period < positions:
        if all((a.reshape(-1, period) == a[:period]).all() for a in (content, rows)):
            return period
        period *= 2
    return positions


__all__ = [
    "Groups",
    "MapOp",
    "Op",
    "SquareOp",
    "fold",
    "in_slots",
    "landing_scale",
    "leading_scale",
    "turned",
]
