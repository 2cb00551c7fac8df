"""The two kinds of step an encrypted tail is made of: affine maps and quadratics.

Adjacent linear layers fold into one affine map before they get here. A
quadratic a x^2 + b x + c is rewritten as a (x + b/2a)^2 + (c - b^2/4a): the
shift joins the map before it, a and the constant the map after it, so that the
ciphertext only ever sees affine maps and plain squares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blindtail.errors import ModelError

FloatArray = NDArray[np.float64]

#: Largest |b / 2a| that a quadratic may have: beyond it, the square's output is
#: dominated by a constant that the next map must cancel, and precision goes.
MAX_SHIFT = 16.0


@dataclass(frozen=True)
class Affine:
    """y = weight @ x + bias; weight (out, in) and bias (out,), both float64."""

    weight: FloatArray
    bias: FloatArray
    name: str = "affine"

    def __post_init__(self) -> None:
        w, b = np.asarray(self.weight, np.float64), np.asarray(self.bias, np.float64)
        if w.ndim != 2 or b.shape != (w.shape[0],):
            raise ModelError(f"{self.name}: an affine map needs weight (out, in) and bias (out,)")
        if not (np.isfinite(w).all() and np.isfinite(b).all()):
            raise ModelError(f"{self.name}: weights hold NaN or infinity; train or load the model again")
        object.__setattr__(self, "weight", w)
        object.__setattr__(self, "bias", b)

    def __call__(self, x: FloatArray) -> FloatArray:
        """(n, in) -> (n, out)."""
        return x @ self.weight.T + self.bias


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


Layer = Affine | Quadratic


def squares_only(layers: Sequence[Layer]) -> list[Affine]:
    """Rewrite [map, quadratic, map, ...] so that plain squares stand between the maps.

    Returns the affine maps; a square lies between each two. Raises `ModelError`
    when the sequence does not alternate and start and end with a map, when
    shapes do not chain, when a = 0, or when |b / 2a| > `MAX_SHIFT`.
    """
    if not layers or not isinstance(layers[0], Affine) or not isinstance(layers[-1], Affine):
        raise ModelError("a tail must start and end with a linear layer")
    maps: list[Affine] = []
    scale: FloatArray | None = None  # of the square that feeds the next map
    shift: FloatArray | None = None
    width = layers[0].weight.shape[1]
    for position, layer in enumerate(layers):
        if isinstance(layer, Affine) != (position % 2 == 0):
            raise ModelError(f"{layer.name}: maps and activations must alternate; fold linear layers first")
        if isinstance(layer, Affine):
            if layer.weight.shape[1] != width:
                raise ModelError(f"{layer.name}: takes {layer.weight.shape[1]} values but gets {width}")
            weight, bias = layer.weight, layer.bias
            if scale is not None and shift is not None:
                bias = bias + weight @ shift
                weight = weight * scale
            maps.append(Affine(weight, bias, layer.name))
            width = layer.weight.shape[0]
            continue
        if layer.a.shape != (width,):
            raise ModelError(f"{layer.name}: has {layer.a.shape[0]} coefficients but gets {width} values")
        if (layer.a == 0).any():
            raise ModelError(
                f"{layer.name}: the quadratic coefficient is 0 for some element; "
                "keep |a| away from 0 in training, or drop the activation"
            )
        centre = layer.b / (2 * layer.a)
        if np.abs(centre).max() > MAX_SHIFT:
            raise ModelError(
                f"{layer.name}: |b / 2a| reaches {np.abs(centre).max():.1f}, above {MAX_SHIFT:g}; "
                "penalise it in training (blindtail.train does)"
            )
        before = maps[-1]
        maps[-1] = Affine(before.weight, before.bias + centre, before.name)
        scale, shift = layer.a, layer.c - layer.a * centre**2
    return maps


def evaluate_clear(maps: Sequence[Affine], x: FloatArray) -> FloatArray:
    """Maps with squares between them, in float64: (n, in) -> (n, out)."""
    for index, step in enumerate(maps):
        x = step(x)
        if index < len(maps) - 1:
            x = x * x
    return x
