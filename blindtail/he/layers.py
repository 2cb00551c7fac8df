"""What an encrypted tail is made of: affine maps and polynomials.

Adjacent linear layers fold into one affine map before they get here. Values are
numbered: the tail's input is 0, each activation's output the next. A map reads the
newest one and, where connections skip activations, older ones too.
`blindtail.he.normal` brings layers to the form that is compiled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from blindtail.errors import ModelError
from blindtail.he.sparse import Sparse, Weight, applied_to, entries

FloatArray = NDArray[np.float64]
#: Of one image's activation before a map and after it, (C, H, W) or (n,).
Shapes = tuple[tuple[int, ...], tuple[int, ...]]

#: Largest |b / 2a| that a quadratic may have: beyond it, the square's output is
#: dominated by a constant that the next map must cancel, and precision goes.
MAX_SHIFT = 16.0


@dataclass(frozen=True)
class Skip:
    """What a map adds besides: weight @ an older value, weight (out, size of that value).

    back  how many values before the newest; 1 or more
    """

    back: int
    weight: Weight


@dataclass(frozen=True)
class Affine:
    """y = weight @ x + bias; weight (out, in) and bias (out,), both float64.

    shapes  of one image before and after, where they are known: convolutions are laid out by them
    skips   further values that are read; each at most once
    """

    weight: Weight
    bias: FloatArray
    name: str = "affine"
    shapes: Shapes | None = None
    skips: tuple[Skip, ...] = ()

    def __post_init__(self) -> None:
        w = self.weight if isinstance(self.weight, Sparse) else np.asarray(self.weight, np.float64)
        b = np.asarray(self.bias, np.float64)
        if len(w.shape) != 2 or b.shape != (w.shape[0],):
            raise ModelError(f"{self.name}: an affine map needs weight (out, in) and bias (out,)")
        if self.shapes and tuple(map(math.prod, self.shapes)) != w.shape[::-1]:
            raise ModelError(f"{self.name}: a weight {w.shape} is not for activations {self.shapes}")
        if not (np.isfinite(entries(w)).all() and np.isfinite(b).all()):
            raise ModelError(f"{self.name}: weights hold NaN or infinity; train or load the model again")
        for skip in self.skips:
            if skip.back < 1 or len(skip.weight.shape) != 2 or skip.weight.shape[0] != len(b):
                raise ModelError(f"{self.name}: a skip connection needs an older value and weight (out, in)")
            if not np.isfinite(entries(skip.weight)).all():
                raise ModelError(f"{self.name}: weights hold NaN or infinity; train or load the model again")
        if len({skip.back for skip in self.skips}) != len(self.skips):
            raise ModelError(f"{self.name}: reads one value twice; add the weights up")
        object.__setattr__(self, "weight", w)
        object.__setattr__(self, "bias", b)

    def times(self, factor: float) -> Affine:
        """The map with all that it gives multiplied."""
        skips = tuple(Skip(skip.back, skip.weight * factor) for skip in self.skips)
        return replace(self, weight=self.weight * factor, bias=self.bias * factor, skips=skips)

    def __call__(self, x: FloatArray, older: Sequence[FloatArray] = ()) -> FloatArray:
        """(n, in) -> (n, out). older: the values before, oldest first, where there are skips."""
        y = applied_to(self.weight, x) + self.bias
        for skip in self.skips:
            y = y + applied_to(skip.weight, older[len(older) - skip.back])
        return y


@dataclass(frozen=True)
class Quadratic:
    """y = a x^2 + b x + c per element; a, b, c of shape (n,), float64."""

    a: FloatArray
    b: FloatArray
    c: FloatArray
    name: str = "quadratic"

    def __post_init__(self) -> None:
        arrays = [np.asarray(v, np.float64) for v in (self.a, self.b, self.c)]
        if any(v.ndim != 1 or v.shape != arrays[0].shape for v in arrays):
            raise ModelError(f"{self.name}: a quadratic needs coefficients of one shape (n,)")
        if not all(np.isfinite(v).all() for v in arrays):
            raise ModelError(f"{self.name}: coefficients hold NaN or infinity; train or load the model again")
        for key, value in zip(("a", "b", "c"), arrays, strict=True):
            object.__setattr__(self, key, value)

    def __call__(self, x: FloatArray) -> FloatArray:
        """(n, features) -> (n, features)."""
        return self.a * x * x + self.b * x + self.c


@dataclass(frozen=True)
class Polynomial:
    """y = c_0 + c_1 x + ... + c_d x^d per element; coefficients (d + 1, n), float64, d >= 1."""

    coefficients: FloatArray
    name: str = "polynomial"

    def __post_init__(self) -> None:
        c = np.asarray(self.coefficients, np.float64)
        if c.ndim != 2 or len(c) < 2:
            raise ModelError(f"{self.name}: a polynomial needs coefficients (degree + 1, n), degree >= 1")
        if not np.isfinite(c).all():
            raise ModelError(f"{self.name}: coefficients hold NaN or infinity; train or load the model again")
        object.__setattr__(self, "coefficients", c)

    def __call__(self, x: FloatArray) -> FloatArray:
        """(n, features) -> (n, features), by Horner's rule."""
        y = np.broadcast_to(self.coefficients[-1], x.shape)
        for c in self.coefficients[-2::-1]:
            y = y * x + c
        return y


Layer = Affine | Quadratic | Polynomial


def outputs(layers: Sequence[Layer], x: FloatArray) -> list[FloatArray]:
    """What each layer gives, in float64: (n, in) -> (n, ...) each."""
    values, found = [x], list[FloatArray]()
    for layer in layers:
        if isinstance(layer, Affine):
            found.append(layer(values[-1], values[:-1]))
        else:
            found.append(layer(found[-1]))
            values.append(found[-1])
    return found


__all__ = [
    "MAX_SHIFT",
    "Affine",
    "FloatArray",
    "Layer",
    "Polynomial",
    "Quadratic",
    "Shapes",
    "Skip",
    "outputs",
]
