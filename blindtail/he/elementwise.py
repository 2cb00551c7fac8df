"""Operations that take slot by slot: squares, products, sums, and multiples by element.

All operands have one layout, and so has the result. How operands are named and
brought to a level: `blindtail.he.operations`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from blindtail.errors import ModelError
from blindtail.he.layers import FloatArray
from blindtail.he.layout import Layout
from blindtail.he.operations import MapOp, term_scale
from blindtail.he.params import Parameters


@dataclass(frozen=True, eq=False)
class SquareOp:
    """x^2, relinearised and rescaled: `level` -> `level` - 1."""

    name: str
    level: int
    layout: Layout
    in_scale: float
    out_scale: float
    back: int = 1

    @property
    def backs(self) -> tuple[int, ...]:
        return (self.back,)

    @property
    def in_scales(self) -> tuple[float, ...]:
        return (self.in_scale,)

    @property
    def out_level(self) -> int:
        return self.level - 1

    def check(self, parameters: Parameters) -> None:
        """Raises `ModelError` for a scale that does not follow from the operand's."""
        if self.out_scale != self.in_scale * self.in_scale / parameters.primes[self.level]:
            raise ModelError(f"{self.name}: a square's scale is the input's, squared and rescaled")


@dataclass(frozen=True, eq=False)
class ProductOp:
    """x y, relinearised and rescaled: `level` -> `level` - 1."""

    name: str
    level: int
    layout: Layout
    in_scales: tuple[float, float]
    out_scale: float
    backs: tuple[int, int]

    @property
    def out_level(self) -> int:
        return self.level - 1

    def check(self, parameters: Parameters) -> None:
        """Raises `ModelError` for a scale that does not follow from the operands'."""
        if self.out_scale != self.in_scales[0] * self.in_scales[1] / parameters.primes[self.level]:
            raise ModelError(f"{self.name}: a product's scale is its operands' product, rescaled")


@dataclass(frozen=True, eq=False)
class SumOp:
    """x + constant, or x + y + constant: stays at `level` and at the operands' one scale.

    constant  (elements,), or None
    """

    name: str
    level: int
    layout: Layout
    scale: float
    backs: tuple[int, ...]
    constant: FloatArray | None

    @property
    def in_scales(self) -> tuple[float, ...]:
        return (self.scale,) * len(self.backs)

    @property
    def out_scale(self) -> float:
        return self.scale

    @property
    def out_level(self) -> int:
        return self.level

    def bias_slots(self) -> FloatArray:
        """The constant by position, zero where there is no element. Of a sum that has one."""
        assert self.constant is not None
        return _spread(self.layout, self.constant)

    def check(self, parameters: Parameters) -> None:
        """Raises `ModelError` for a sum of nothing, or a constant that does not fit."""
        c = self.constant
        if len(self.backs) not in (1, 2) or (len(self.backs) == 1 and c is None):
            raise ModelError(f"{self.name}: a sum has two operands, or one and a constant")
        if c is not None and (c.shape != (self.layout.size,) or not np.isfinite(c).all()):
            raise ModelError(f"{self.name}: its constant does not fit, or holds NaN or infinity")


@dataclass(frozen=True, eq=False)
class ScaleOp:
    """factor_1 x_1 + ... + factor_m x_m + constant, by element, rescaled: `level` -> `level` - 1.

    factors   (operands, elements); a row that is zero throughout has no place here
    constant  (elements,)
    """

    name: str
    level: int
    layout: Layout
    in_scales: tuple[float, ...]
    out_scale: float
    backs: tuple[int, ...]
    factors: FloatArray
    constant: FloatArray

    @property
    def out_level(self) -> int:
        return self.level - 1

    def plain_scale(self, parameters: Parameters, term: int = 0) -> float:
        """As `MapOp.plain_scale`."""
        found = term_scale(self.in_scales, term, self.out_scale, parameters.primes[self.level])
        if found is None:
            raise ModelError(f"{self.name}: no plaintext scale leads to its output scale")
        return found

    def steps(self) -> Iterator[tuple[int, int, int, FloatArray]]:
        """(operand, 0, 0, multipliers), as `MapOp.steps`."""
        for i, factor in enumerate(self.factors):
            yield i, 0, 0, _spread(self.layout, factor)

    def bias_slots(self) -> FloatArray:
        return _spread(self.layout, self.constant)

    def check(self, parameters: Parameters) -> None:
        """Raises `ModelError` for shapes or scales that contradict each other."""
        shape = len(self.backs), self.layout.size
        if self.factors.shape != shape or self.constant.shape != shape[1:] or not self.backs:
            raise ModelError(f"{self.name}: its factors do not fit its operands")
        if not (np.isfinite(self.factors).all() and np.isfinite(self.constant).all()):
            raise ModelError(f"{self.name}: factors hold NaN or infinity")
        for term in range(len(self.backs)):
            self.plain_scale(parameters, term)


def _spread(layout: Layout, values: FloatArray) -> FloatArray:
    """(elements,) by position; zero where there is none."""
    index = layout.index
    return np.where(index >= 0, values[np.maximum(index, 0)], 0.0)


Elementwise = SquareOp | ProductOp | SumOp | ScaleOp
Op = MapOp | Elementwise
#: Operations with plaintexts that are multiplied with: their products share one shape.
Linear = MapOp | ScaleOp

__all__ = ["Elementwise", "Linear", "Op", "ProductOp", "ScaleOp", "SquareOp", "SumOp"]
