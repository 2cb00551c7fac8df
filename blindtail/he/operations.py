"""The main operation of an encrypted tail as data: an affine map of one value or of several.

Values are ciphertexts in the order they are made: the input first, then one from each
operation. An operation names what it reads by how many values back it is (1: the one
before), and takes an operand that is above its own level at that level: primes are
dropped, the scale stays. `blindtail.he.elementwise` has the other operations.

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
group (f,); (f, 2f, 3f) does the work of (f,) and (2f,). Consumes one level. A map of
several values (a skip connection, say) has a matrix for each; their products are added
up before rescaling, so that it rescales, folds and steps once. Each value's plaintexts
have a scale of their own, which brings all products to one scale.

Complex slots halve the products of the first map: a slot x + i x' times
w - i w' has the real part x w + x' w'. Multipliers are half of that, and one
fold adds the conjugate: a fold ~f (= -1 - f) is a rotation by f, conjugated, so
that (~0,) is the conjugation alone and (f, ~0, ~f) both of a doubling step's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from blindtail.errors import ModelError
from blindtail.he.diagonals import Met, meet, repeat_length
from blindtail.he.layers import FloatArray, Shapes
from blindtail.he.layout import Layout, SlotArray
from blindtail.he.params import Parameters
from blindtail.he.sparse import Sparse, Weight, entries, many_in_rows

#: Most fold groups of a map, and most rotations of a group.
MAX_GROUPS, MAX_GROUP = 16, 63

#: Most bits of the numbers by which a map is checked, and of whole numbers and their halves in a float.
_PROBE_BITS, _EXACT_BITS = 20, 52

Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class Term:
    """One value that a map reads, and its matrix."""

    back: int  # how many values before the map's own
    weight: Weight  # (out, in)
    in_layout: Layout
    offsets: int
    stride: int
    in_scale: float

    shapes: Shapes | None = None  # of one image, in and out, where they are known


@dataclass(frozen=True, eq=False)
class MapOp:
    """One affine map; input at `level`, output at `level` - 1.

    Offsets, baby steps and folds count positions; offsets and baby steps are
    multiples of `stride`. A negative fold ~f conjugates as well. The result is real.
    The fields from `back` on are of the first operand; `others` has the rest, all for
    the same rows and steps.
    """

    name: str
    level: int
    weight: Weight  # (out, in)
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
    back: int = 1
    others: tuple[Term, ...] = ()
    shapes: Shapes | None = None  # of one image, in and out, where they are known

    @cached_property
    def terms(self) -> tuple[Term, ...]:
        """All operands, the first one's fields included."""
        own = Term(
            self.back, self.weight, self.in_layout, self.offsets, self.stride, self.in_scale, self.shapes
        )
        return own, *self.others

    @property
    def backs(self) -> tuple[int, ...]:
        return tuple(term.back for term in self.terms)

    @property
    def out_level(self) -> int:
        return self.level - 1

    @property
    def giant(self) -> int:
        """Number of giant steps, the first included."""
        return -(-max(term.offsets for term in self.terms) // self.baby)

    def plain_scale(self, parameters: Parameters, term: int = 0) -> float:
        """target * q_level / current: the product, rescaled, lands on `out_scale` to the last bit.

        So do products with all operands before that, which are added up. SEAL refuses to add
        operands whose scales differ in one bit. Raises `ModelError` when no such scale exists;
        `landing_scale` makes one that does.
        """
        read = [one.in_scale for one in self.terms]
        found = term_scale(read, term, self.out_scale, parameters.primes[self.level])
        if found is None:
            raise ModelError(f"{self.name}: no plaintext scale leads to its output scale")
        return found

    def at(
        self, level: int, in_scale: float, out_scale: float, others: tuple[Term, ...] | None = None
    ) -> MapOp:
        """The same map at another level and with other scales; what was found out of it is kept."""
        made = replace(self, level=level, in_scale=in_scale, out_scale=out_scale)
        made = made if others is None else replace(made, others=others)
        for name in ("met", "all_diagonals"):
            if name in self.__dict__:
                made.__dict__[name] = self.__dict__[name]
        return made

    @cached_property
    def met(self) -> tuple[Met, ...]:
        """By operand, where its weights are multiplied; all repeat as often: they are folded together."""
        period = 0
        if self.others:
            period = repeat_length(self.rows, *(term.in_layout.index for term in self.terms))
        return tuple(
            meet(term.weight, self.rows, term.in_layout, term.offsets, term.stride, period)
            for term in self.terms
        )

    @cached_property
    def all_diagonals(self) -> tuple[dict[int, SlotArray], ...]:
        """By operand: offset k -> multipliers by position; offsets with nothing to multiply are absent.

        Complex where the input is: (w - i w') / 2 at a position that sees x + i x'.
        Raises `ModelError` when some matrix entry other than zero is met by no offset.
        """
        return tuple(self._diagonals(i, entries(term.weight)) for i, term in enumerate(self.terms))

    def _diagonals(self, operand: int, values: FloatArray) -> dict[int, SlotArray]:
        """With `values` in the place of the weight's entries."""
        return dict(self._multipliers(operand, values))

    def _multipliers(self, operand: int, values: FloatArray) -> Iterator[tuple[int, SlotArray]]:
        met = self.met[operand]
        if met.unused:
            raise ModelError(f"{self.name}: its layout leaves {met.unused} weights unused")
        return met.multipliers(values, len(self.rows))

    @property
    def diagonals(self) -> dict[int, SlotArray]:
        """Those of the first operand."""
        return self.all_diagonals[0]

    @property
    def used(self) -> list[tuple[int, int, int]]:
        """(operand, giant, baby) of every product."""
        found = enumerate(self.all_diagonals)
        return [(i, *divmod(k, self.baby)) for i, diagonals in found for k in diagonals]

    def steps(self) -> Iterator[tuple[int, int, int, SlotArray]]:
        """(operand, giant, baby, multipliers) with multipliers rotated back by the giant step.

        `giant` counts giant steps, `baby` positions.
        """
        for i, diagonals in enumerate(self.all_diagonals):
            for k, values in diagonals.items():
                giant, baby = divmod(k, self.baby)
                yield i, giant, baby, np.roll(values, giant * self.baby)

    def bias_slots(self) -> FloatArray:
        """The bias at every position that holds an element, zero elsewhere; by position."""
        index = self.out_layout.index
        return np.where(index >= 0, self.bias[np.maximum(index, 0)], 0.0)

    def rotations(self) -> dict[int, int]:
        """Turn (in slots; ~t conjugates as well) -> highest level it is used at."""
        lanes, need = self.in_layout.lanes, {}
        used = self.used
        for _, _, b in used:
            if b:
                need[b * lanes] = self.level
        if any(g for _, g, _ in used):
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
        out = self.weight.shape[0]
        if (
            any(not self._sound(term, positions) for term in self.terms)
            or self.out_layout.size != out
            or self.bias.shape != (out,)
            or self.rows.shape != (positions,)
            or self.rows.min() < -1
            or self.rows.max() >= out
            or self.baby < 1
            or len(self.out_layout.content) != positions
            or self.out_layout.lanes != self.in_layout.lanes
            or len(self.folds) > MAX_GROUPS
            or any(not 1 <= len(group) <= MAX_GROUP for group in self.folds)
            or any(f == 0 or not -positions <= f < positions for group in self.folds for f in group)
            or self.out_layout.imaginary is not None
            or not (self.out_scale > 1 and np.isfinite(self.in_scale * self.out_scale))
        ):
            raise ModelError(f"{self.name}: shapes, offsets or scales contradict each other")
        own = [entries(term.weight) for term in self.terms]
        if not all(np.isfinite(values).all() for values in (*own, self.bias)):
            raise ModelError(f"{self.name}: weights hold NaN or infinity")
        # A random probe in place of the weights: an exact integer identity but for
        # coincidences of probability 2^-40 (2^-32 for rows of 2^18 products), without a
        # loop over all entries. Zeros stay: a layout may leave out what multiplies by zero.
        rng, below = np.random.default_rng(20260101), 1 << self._probe_bits()
        total: SlotArray = np.zeros(positions)
        want = np.zeros(out)
        for operand, (term, weights) in enumerate(zip(self.terms, own, strict=True)):
            probe = rng.integers(1, below, weights.shape, np.int32).astype(np.float64)
            probe *= weights != 0
            x = np.asarray(rng.integers(1, below, (term.weight.shape[1],)), np.float64)
            held = term.in_layout.index
            slots: SlotArray = np.where(held >= 0, x[np.maximum(held, 0)], 0.0)
            empty = held < 0
            if term.in_layout.imaginary is not None:
                slots, empty = replace(term.in_layout, lanes=1).place(x), np.zeros(positions, bool)
                total = total + 0j
            total = self._summed(operand, probe, slots, empty, total)
            w = term.weight
            held_by = w.filled(probe) if isinstance(w, Sparse) else probe.reshape(w.shape)
            want += held_by @ x
        total = fold(total, self.folds)
        claimed = self.out_layout.index
        good = np.where(claimed >= 0, total == want[np.maximum(claimed, 0)], (claimed != -1) | (total == 0))
        if not good.all():
            raise ModelError(f"{self.name}: its layout does not compute the map")

    def _probe_bits(self) -> int:
        """Of a probe's numbers, so that floats hold the sum of all products of a row exactly, halves too."""
        products = sum(many_in_rows(term.weight) for term in self.terms)
        return min(_PROBE_BITS, (_EXACT_BITS - int(np.max(products)).bit_length()) // 2)

    def _summed(
        self, operand: int, probe: FloatArray, slots: SlotArray, empty: NDArray[np.bool_], total: SlotArray
    ) -> SlotArray:
        """`total` and an operand's products, with `probe` in the place of its weights; NaN where one is
        of an empty slot."""
        positions, wrong = len(slots), np.zeros(len(slots), bool)
        twice, no_slot = np.concatenate([slots, slots]), np.concatenate([empty, empty])
        none_empty = not empty.any()
        for k, values in self._multipliers(operand, probe):
            total += values * twice[k : k + positions]
            if not none_empty:
                wrong |= (values != 0) & no_slot[k : k + positions]
        total[wrong] = np.nan
        return total

    def _sound(self, term: Term, positions: int) -> bool:
        """Shapes and numbers of an operand fit the map's."""
        out, inner = term.weight.shape
        return (
            (out, inner) == (self.out_layout.size, term.in_layout.size)
            and (len(term.in_layout.content), term.in_layout.lanes) == (positions, self.in_layout.lanes)
            and term.back >= 1
            and term.stride >= 1
            and 1 <= term.offsets <= positions
            and self.baby <= max(other.offsets for other in self.terms)
            and self.baby % term.stride == 0
            and term.offsets % term.stride == 0
            and bool(term.in_scale > 1 and np.isfinite(term.in_scale))
        )


def grouped(ops: Sequence[object], inputs: int = 1) -> list[int]:
    """Number of each operation's group: maps that follow one another and read the very same values.

    They are the tiles of one map over several ciphertexts. What an operand's digits and
    rotations by baby steps cost is paid once a group.
    """
    found: list[int] = []
    before: object = None
    for index, op in enumerate(ops):
        key: object = index
        if isinstance(op, MapOp):
            key = op.level, tuple(inputs + index - back for back in op.backs)
        found.append(found[-1] if found and key == before else (found[-1] + 1 if found else 0))
        before = key
    return found


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


def leading_scale(in_scale: float, out_scale: float, q: int) -> float | None:
    """The plaintext scale whose product with `in_scale`, rescaled by q, is `out_scale` to the last bit."""
    return next(_leading(in_scale, out_scale, q), None)


def _leading(in_scale: float, out_scale: float, q: int) -> Iterator[float]:
    """All such scales, the nearest first."""
    below = above = out_scale * q / in_scale
    for _ in range(8):
        for candidate in dict.fromkeys((below, above)):
            if in_scale * candidate / q == out_scale:
                yield candidate
        below, above = math.nextafter(below, 0.0), math.nextafter(above, math.inf)


def leading_scales(in_scales: Sequence[float], out_scale: float, q: int) -> tuple[float, ...] | None:
    """`leading_scale` for each operand, with one product for all of them, to the last bit."""
    each = [list(_leading(scale, out_scale, q)) for scale in in_scales]
    for first in each[0]:
        product = in_scales[0] * first
        found = [
            next((c for c in candidates if scale * c == product), None)
            for scale, candidates in zip(in_scales, each, strict=True)
        ]
        scales = tuple(c for c in found if c is not None)
        if len(scales) == len(each):
            return scales
    return None


def term_scale(in_scales: Sequence[float], term: int, out_scale: float, q: int) -> float | None:
    """Of one operand's plaintexts; of a program that no `leading_scales` fit, the operand's own."""
    together = leading_scales(in_scales, out_scale, q) if len(in_scales) > 1 else None
    return leading_scale(in_scales[term], out_scale, q) if together is None else together[term]


def landing_scale(in_scale: float, target: float, q: int) -> float:
    """The scale next to `target` that a product with a plaintext, rescaled by q, can land on."""
    return in_scale * (target * q / in_scale) / q


__all__ = [
    "Groups",
    "MapOp",
    "Term",
    "fold",
    "grouped",
    "in_slots",
    "landing_scale",
    "leading_scale",
    "leading_scales",
    "term_scale",
    "turned",
]
