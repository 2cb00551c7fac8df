"""What an operation costs: counts first, seconds from counts.

Everything a CKKS server does is transforms (NTT and inverse, one prime each)
and passes over memory. Counts follow SEAL's algorithms with k = level + 1 data
primes and one special prime:

    rotation, relinearisation   k inverse, k^2 forward (own prime skipped), and
                                2 (1 + k) for dividing by the special prime
    rescale                     2 (1 + (k - 1))
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blindtail.errors import ModelError
from blindtail.he.spec import TailSpec

if TYPE_CHECKING:
    from blindtail.he.program import Op


@dataclass(frozen=True, slots=True)
class Counts:
    """Operation counts of one step: key switches by what they are, transforms and limb passes."""

    rotations: int
    products: int
    transforms: int
    limb_passes: int


def keyswitch_transforms(level: int) -> int:
    k = level + 1
    return k + k * k + 2 * (1 + k)


def rescale_transforms(level: int) -> int:
    return 2 * (level + 1)


def count(op: Op) -> Counts:
    """Counts of one map or square, rescale included."""
    from blindtail.he.program import MapOp

    k = op.level + 1
    if not isinstance(op, MapOp):
        transforms = keyswitch_transforms(op.level) + rescale_transforms(op.level)
        return Counts(0, 1, transforms, 3 * k + 2 * k * (k + 1))
    steps = {divmod(offset, op.baby) for offset in op.diagonals}
    babies = len({b for _, b in steps if b})
    top = max((g for g, _ in steps), default=0)
    before, after = babies + top, len(op.folds)
    transforms = (
        before * keyswitch_transforms(op.level)
        + rescale_transforms(op.level)
        + after * keyswitch_transforms(op.level - 1)
    )
    passes = len(steps) * 4 * k + before * 2 * k * (k + 1) + after * 2 * (k - 1) * k
    return Counts(before + after, len(steps), transforms, passes)


#: Seconds of one transform of N = 8192 and of one pass over a limb, by backend,
#: and of everything else a request costs (container, keys' seeds, packing).
#: Measured by `bench he` on the reference core; deployments correct them online.
REFERENCE: dict[str, tuple[float, float, float]] = {
    "seal": (85e-6, 14e-6, 6e-3),
    "clear": (0.4e-6, 4e-6, 0.5e-3),
}


def seconds(backend: str, spec: TailSpec, steps: Sequence[Counts], request: bool = True) -> float:
    """Predicted server seconds of `steps`, with what every request costs on top if `request`.

    Raises `ModelError` for an unknown backend.
    """
    if backend not in REFERENCE:
        raise ModelError(f"no cost model for backend {backend!r}; known: {', '.join(sorted(REFERENCE))}")
    transform, limb, fixed = REFERENCE[backend]
    n = spec.parameters.ring_degree
    growth = n * math.log2(n) / (8192 * 13)
    total = sum(c.transforms * transform * growth + c.limb_passes * limb * (n / 8192) for c in steps)
    return total + (fixed * (n / 8192) if request else 0.0)
