"""What an operation costs: counts first, seconds from counts.

Everything a CKKS server does is transforms (NTT and inverse, one prime each),
products with keys and passes over memory. A *key pair* is one (digit, prime)
pair of a key product, both outputs. At level l a ciphertext has k = l + 1 data
primes; there is one special prime P, and k digits.

`seal` (and `clear`, which is given the same counts) has no hoisting, so every
rotation is a key switch of its own:

    key switch                  k inverse, k^2 forward (own prime skipped), 2 (1 + k)
                                for dividing by P; k (k + 1) pairs
    rescale                     2 (1 + l) transforms
    product with a diagonal     4k passes, the addition included

`native` decomposes once for rotations of one ciphertext and divides by P late:

    baby steps of a map         k (k + 1) transforms for all (c1's k inverse and k^2 forward; or,
                                where c1 is left in coefficient form, its own k forward instead
                                of the inverse), then k (k + 1) pairs each
    giant step                  (k + 1) inverse, k (k + 1) forward, k (k + 1) pairs
    product with a diagonal     2 (k + 1) passes, modulo Q P
    dividing by P and q_l       2 inverse + l forward for c0, l + 2 inverse for c1
    fold group of m turns       (l + 1) inverse, l (l + 1) forward, m l (l + 1) pairs: l primes are left
    dividing by P after folds   2 (1 + l) transforms
    square                      k inverse, k^2 forward, k (k + 1) pairs, and the division by P and q_l
    a rotation of any kind      2 (k + 1) turns: limbs permuted, reduced and written
    joining c0, and the bias    3 k copies, l more; 2 (l + 1) a fold group

A ticket holds what a request's first map and square owe to its seed alone: "ticket" counts making
one, "online" what is left.

Seconds come from `REFERENCE` or, on a machine that was calibrated, from what was measured there
(`blindtail.he.calibration`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from blindtail.errors import ModelError

if TYPE_CHECKING:
    from blindtail.he.elementwise import Op
    from blindtail.he.operations import MapOp

#: A whole evaluation; with a ticket; making one.
Part = Literal["total", "online", "ticket"]


@dataclass(frozen=True, slots=True)
class Counts:
    """Operation counts of one step, rescale included."""

    rotations: int
    products: int  # with diagonals, or of a ciphertext with itself
    transforms: int  # NTTs and inverses of one limb
    key_pairs: int
    limb_passes: int
    turns: int = 0  # limbs permuted by rotations
    copies: int = 0  # limbs copied, scaled or added besides


@dataclass(frozen=True, slots=True)
class Reference:
    """Seconds on one core at N = 8192; of the reference core where nothing was measured."""

    transform_s: float
    key_pair_s: float
    limb_pass_s: float
    request_s: float  # what a request costs besides: container, the input's seed, packing
    expand_s: float = 0.0  # of these, the seed
    turn_s: float = 0.0  # zero, like the next: key pairs and passes have their shares of it
    copy_s: float = 0.0


#: `seal` and `clear` measured by `bench he` on the reference core; `native` by its kernels' benchmarks.
#: The compiler chooses by them on every machine, so that one model compiles to one program everywhere;
#: cells predict by what they measure at their start, and correct that online.
REFERENCE: dict[str, Reference] = {
    "seal": Reference(85e-6, 28e-6, 14e-6, 6e-3),
    "clear": Reference(0.4e-6, 8e-6, 4e-6, 0.5e-3),
    "native": Reference(5.25e-6, 2.6e-6, 1.5e-6, 0.2e-3, expand_s=0.1e-3),
}


#: `native` where there are no key pairs that would have a turn's and a copy's share.
BARE = replace(REFERENCE["native"], turn_s=0.6e-6, copy_s=0.4e-6)


def count(op: Op, backend: str = "seal") -> Counts:
    """Counts of one operation on a backend."""
    from blindtail.he.elementwise import ScaleOp, SumOp
    from blindtail.he.operations import MapOp

    if isinstance(op, MapOp):
        counts = affine(op.level, *_shape(op), backend)
        # Each operand that is rotated has digits of its own; the first of them is counted already.
        rotated = {term for term, _, b in op.used if b}
        more = max(0, len(rotated) - 1) if backend == "native" else 0
        return replace(counts, transforms=counts.transforms + more * (op.level + 1) * (op.level + 2))
    if isinstance(op, ScaleOp):
        return affine(op.level, 0, 0, len(op.backs), (), backend)
    if isinstance(op, SumOp):
        return Counts(0, 0, 0, 0, 0, 0, 2 * (op.level + 1))
    return square(op.level, backend)


def counted(ops: Sequence[Op], inputs: int = 1, backend: str = "seal") -> list[Counts]:
    """`count` of each operation, where maps of one group share rotations (`operations.grouped`).

    The first of a group that needs a rotation has it.
    """
    from blindtail.he.operations import MapOp, grouped

    found, groups = list[Counts](), grouped(ops, inputs)
    turned: set[tuple[int, int]] = set()
    for index, op in enumerate(ops):
        counts = count(op, backend)
        if not index or groups[index] != groups[index - 1]:
            turned = set()
        if isinstance(op, MapOp):
            own = {(term, b) for term, _, b in op.used if b}
            if turned and own:
                counts = _shared(counts, own, turned, op.level, backend)
            turned |= own
        found.append(counts)
    return found


def _shared(
    counts: Counts, own: set[tuple[int, int]], turned: set[tuple[int, int]], level: int, backend: str
) -> Counts:
    """A map's counts without the rotations (operand, baby step) that are there."""
    k, again = level + 1, len(own & turned)
    spared = again * _keyswitch(k)
    if backend == "native":
        operands = {term for term, _ in own} & {term for term, _ in turned}
        spared = len(operands) * k * (k + 1)
    return replace(
        counts,
        rotations=counts.rotations - again,
        transforms=counts.transforms - spared,
        key_pairs=counts.key_pairs - again * k * (k + 1),
        turns=counts.turns - again * 2 * (k + 1),
    )


def count_part(ops: Sequence[Op], part: Part) -> list[Counts]:
    """Counts on `native`, of a ticket or with one; the same results as `count` for "total"."""
    from blindtail.he.operations import MapOp

    if part == "total":
        return [count(op, "native") for op in ops]
    first = ops[0]
    assert isinstance(first, MapOp)
    level, squares = first.level, ops[1:2]
    babies, giants, products, groups = _shape(first)
    c0 = (2 + level) + (1 + level if groups else 0)  # transforms that divide c0
    if part == "ticket":
        whole = [count(op, "native") for op in ops[:2]]
        spared = [c0, _divide(level - 1)]
        return [replace(c, transforms=c.transforms - less) for c, less in zip(whole, spared, strict=False)]
    found = [affine_online(level, babies, giants, products, groups)]
    found += [square_online(op.level) for op in squares]
    return found + [count(op, "native") for op in ops[2:]]


def _shape(op: MapOp) -> tuple[int, int, int, list[int]]:
    """Baby steps and giant steps that are rotations, products, sizes of fold groups."""
    used = op.used
    babies = len({(term, b) for term, _, b in used if b})
    giants = max((g for _, g, _ in used), default=0)
    return babies, giants, len(used), [len(group) for group in op.folds]


def affine(
    level: int, babies: int, giants: int, products: int, groups: Sequence[int], backend: str = "seal"
) -> Counts:
    """Counts of a map: rotations by baby steps, giant steps, products, rotations in each fold group."""
    k, left = level + 1, level
    rotations = babies + giants + sum(groups)
    pairs = (babies + giants) * k * (k + 1) + sum(groups) * left * (left + 1)
    turns = (babies + giants) * 2 * (k + 1) + sum(groups) * 2 * (left + 1)
    copies = 3 * k + left + len(groups) * 2 * (left + 1)
    if backend != "native":
        transforms = (babies + giants) * _keyswitch(k) + 2 * k + sum(groups) * _keyswitch(left)
        return Counts(rotations, products, transforms, pairs, products * 4 * k, turns, copies)
    transforms = (k * (k + 1) if babies else 0) + giants * (k + 1) ** 2 + _divide(level)
    transforms += len(groups) * (left + 1) ** 2 + (2 * (1 + left) if groups else 0)
    return Counts(rotations, products, transforms, pairs, products * 2 * (k + 1), turns, copies)


def affine_online(level: int, babies: int, giants: int, products: int, groups: Sequence[int]) -> Counts:
    """What is left of the first map on `native` with a ticket: turns and products of c0, no key switch."""
    k = level + 1
    transforms = (2 + level) + (1 + level if groups else 0)
    turns = (babies + giants) * k + sum(groups) * level
    copies = (3 + giants) * k + 1 + level + ((len(groups) + 2) * level + 1 if groups else 0)
    return Counts(babies + giants + sum(groups), products, transforms, 0, products * k, turns, copies)


def square_online(level: int) -> Counts:
    """The first square with a ticket: c0^2 and 2 c0 c1, and the division of both halves."""
    return Counts(0, 1, _divide(level), 0, 3 * (level + 1), 0, 4 * level + 6)


def square(level: int, backend: str = "seal") -> Counts:
    """Counts of a square, relinearised."""
    k = level + 1
    transforms = k + k * k + _divide(level) if backend == "native" else _keyswitch(k) + 2 * k
    return Counts(0, 1, transforms, k * (k + 1), 3 * k)


def _keyswitch(k: int) -> int:
    return k + k * k + 2 * (1 + k)


def _divide(level: int) -> int:
    """By P and q_level at once; c1 stays in coefficient form."""
    return (2 + level) + (level + 2)


def reference(backend: str) -> Reference:
    """Raises `ModelError` for an unknown backend."""
    if backend not in REFERENCE:
        raise ModelError(f"no cost model for backend {backend!r}; known: {', '.join(sorted(REFERENCE))}")
    return REFERENCE[backend]


def seconds(
    backend: str,
    ring_degree: int,
    steps: Iterable[Counts],
    request: bool = True,
    one: Reference | None = None,
    part: Part = "total",
) -> float:
    """Predicted server seconds of `steps`, with what every request costs on top if `request`.

    `one`: seconds of single operations, in place of the reference. Raises `ModelError` for an
    unknown backend.
    """
    one, width = one or reference(backend), ring_degree / 8192
    growth = width * math.log2(ring_degree) / 13
    each = {"total": one.request_s, "online": one.request_s - one.expand_s, "ticket": one.expand_s}[part]
    total = each * width if request else 0.0
    for c in steps:
        total += c.transforms * one.transform_s * growth
        total += (c.key_pairs * one.key_pair_s + c.limb_passes * one.limb_pass_s) * width
        total += (c.turns * one.turn_s + c.copies * one.copy_s) * width
    return total
