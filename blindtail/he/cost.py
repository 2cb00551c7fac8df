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
    fold group of m rotations   (l + 1) inverse, l (l + 1) forward, m l (l + 1) pairs: l primes are left
    dividing by P after folds   2 (1 + l) transforms
    square                      k inverse, k^2 forward, k (k + 1) pairs, and the division by P and q_l
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blindtail.errors import ModelError

if TYPE_CHECKING:
    from blindtail.he.operations import Op


@dataclass(frozen=True, slots=True)
class Counts:
    """Operation counts of one step, rescale included."""

    rotations: int
    products: int  # with diagonals, or of a ciphertext with itself
    transforms: int  # NTTs and inverses of one limb
    key_pairs: int
    limb_passes: int


@dataclass(frozen=True, slots=True)
class Reference:
    """Seconds on the reference core at N = 8192."""

    transform_s: float
    key_pair_s: float
    limb_pass_s: float
    request_s: float  # what a request costs besides: container, the input's seed, packing


#: `seal` and `clear` measured by `bench he` on the reference core; `native` by its kernels' benchmarks.
#: Deployments correct them online.
REFERENCE: dict[str, Reference] = {
    "seal": Reference(85e-6, 28e-6, 14e-6, 6e-3),
    "clear": Reference(0.4e-6, 8e-6, 4e-6, 0.5e-3),
    "native": Reference(5.25e-6, 2.6e-6, 1.5e-6, 0.2e-3),
}


def count(op: Op, backend: str = "seal") -> Counts:
    """Counts of one map or square on a backend."""
    from blindtail.he.operations import MapOp

    if not isinstance(op, MapOp):
        return square(op.level, backend)
    steps = {divmod(offset, op.baby) for offset in op.diagonals}
    babies = len({b for _, b in steps if b})
    giants = max((g for g, _ in steps), default=0)
    return affine(op.level, babies, giants, len(steps), [len(group) for group in op.folds], backend)


def affine(
    level: int, babies: int, giants: int, products: int, groups: Sequence[int], backend: str = "seal"
) -> Counts:
    """Counts of a map: rotations by baby steps, giant steps, products, rotations in each fold group."""
    k, left = level + 1, level
    rotations = babies + giants + sum(groups)
    pairs = (babies + giants) * k * (k + 1) + sum(groups) * left * (left + 1)
    if backend != "native":
        transforms = (babies + giants) * _keyswitch(k) + 2 * k + sum(groups) * _keyswitch(left)
        return Counts(rotations, products, transforms, pairs, products * 4 * k)
    transforms = (k * (k + 1) if babies else 0) + giants * (k + 1) ** 2 + _divide(level)
    transforms += len(groups) * (left + 1) ** 2 + (2 * (1 + left) if groups else 0)
    return Counts(rotations, products, transforms, pairs, products * 2 * (k + 1))


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


def seconds(backend: str, ring_degree: int, steps: Iterable[Counts], request: bool = True) -> float:
    """Predicted server seconds of `steps`, with what every request costs on top if `request`.

    Raises `ModelError` for an unknown backend.
    """
    if backend not in REFERENCE:
        raise ModelError(f"no cost model for backend {backend!r}; known: {', '.join(sorted(REFERENCE))}")
    one, width = REFERENCE[backend], ring_degree / 8192
    growth = width * math.log2(ring_degree) / 13
    total = one.request_s * width if request else 0.0
    for c in steps:
        total += c.transforms * one.transform_s * growth
        total += (c.key_pairs * one.key_pair_s + c.limb_passes * one.limb_pass_s) * width
    return total
