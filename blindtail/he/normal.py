"""Layers in the form that is compiled: affine maps with squares or polynomials between them.

A quadratic a x^2 + b x + c is rewritten as a (x + b/2a)^2 + (c - b^2/4a): the shift joins
the map before it, a and the constant the maps that read it, so that the ciphertext sees a
plain square. The leading coefficient of a polynomial whose degree is a power of two goes the
same way: x^4 + ... then takes two levels, not three.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from blindtail.errors import ModelError
from blindtail.he.layers import MAX_SHIFT, Affine, FloatArray, Layer, Polynomial, Quadratic, Skip
from blindtail.he.sparse import Weight, entries

#: Largest ratio to the leading coefficient that others may have where that is taken out.
MAX_RATIO = 256.0


@dataclass(frozen=True)
class Activation:
    """A square, or a polynomial of higher degree: coefficients (d + 1, n), rising."""

    name: str
    coefficients: FloatArray | None = None

    @property
    def degree(self) -> int:
        return 2 if self.coefficients is None else len(self.coefficients) - 1

    @property
    def monic(self) -> bool:
        """A square, or with a leading coefficient that is taken out."""
        return self.coefficients is None or bool((self.coefficients[-1] == 1).all())

    @property
    def levels(self) -> int:
        """Consumed: ceil(log2 d), or ceil(log2(d + 1)) where a coefficient leads."""
        return levels(self.degree, self.monic)

    def __call__(self, x: FloatArray) -> FloatArray:
        return x * x if self.coefficients is None else Polynomial(self.coefficients, self.name)(x)


def levels(degree: int, monic: bool) -> int:
    """Levels that a polynomial's evaluation consumes: the least there is."""
    return (degree if not monic else degree - 1).bit_length()


@dataclass(frozen=True)
class Normal:
    """A tail as maps and the activations between them; value i + 1 is activation i's.

    Maps read values that are levels deep: each runs as early as its operands allow.
    """

    maps: tuple[Affine, ...]
    activations: tuple[Activation, ...]

    def sources(self, index: int) -> list[tuple[int, Weight]]:
        """(value, weight) of what a map reads; values with nothing but zeros are left out."""
        step = self.maps[index]
        read = [(index, step.weight), *((index - skip.back, skip.weight) for skip in step.skips)]
        used = [(value, weight) for value, weight in read if entries(weight).any()]
        return used or read[:1]

    @property
    def depths(self) -> tuple[list[int], list[int]]:
        """Levels consumed before each map, and before each value."""
        maps, values = list[int](), [0]
        for index, _ in enumerate(self.maps):
            maps.append(max(values[value] for value, _ in self.sources(index)))
            if index < len(self.activations):
                values.append(maps[-1] + 1 + self.activations[index].levels)
        return maps, values

    @property
    def depth(self) -> int:
        """Levels consumed in all."""
        return self.depths[0][-1] + 1

    @property
    def is_chain(self) -> bool:
        """Maps and plain squares in turns."""
        return all(a.coefficients is None for a in self.activations) and not any(m.skips for m in self.maps)

    def values(self, x: FloatArray) -> tuple[list[FloatArray], list[FloatArray]]:
        """What each map gives, and every value, in float64: (n, in) -> (n, ...) each."""
        maps, values = list[FloatArray](), [x]
        for index, step in enumerate(self.maps):
            maps.append(step(values[-1], values[:-1]))
            if index < len(self.activations):
                values.append(self.activations[index](maps[-1]))
        return maps, values

    def __call__(self, x: FloatArray) -> FloatArray:
        """(n, in) -> (n, out)."""
        return self.values(x)[0][-1]


def normalised(layers: Sequence[Layer]) -> Normal:
    """[map, activation, map, ...] in the form that is compiled.

    Raises `ModelError` when the sequence does not alternate and start and end with a map, when
    shapes do not chain, when all weights of a map are zero, or when a quadratic's coefficient a = 0 or
    |b / 2a| > `MAX_SHIFT`.
    """
    if not layers or not isinstance(layers[0], Affine) or not isinstance(layers[-1], Affine):
        raise ModelError("a tail must start and end with a linear layer")
    maps: list[Affine] = []
    activations: list[Activation] = []
    # What is still to be done to each value: y = scale z + shift; None: nothing.
    owed: list[tuple[FloatArray, FloatArray] | None] = [None]
    widths = [layers[0].weight.shape[1]]
    for position, layer in enumerate(layers):
        if isinstance(layer, Affine) != (position % 2 == 0):
            raise ModelError(f"{layer.name}: maps and activations must alternate; fold linear layers first")
        if isinstance(layer, Affine):
            maps.append(_paid(layer, owed, widths))
            continue
        size = layer.a.shape[0] if isinstance(layer, Quadratic) else layer.coefficients.shape[1]
        if size != len(maps[-1].bias):
            raise ModelError(f"{layer.name}: has {size} coefficients but gets {len(maps[-1].bias)} values")
        activation, left, centre = _taken_out(layer)
        if centre is not None:
            maps[-1] = replace(maps[-1], bias=maps[-1].bias + centre)
        activations.append(activation)
        owed.append(left)
        widths.append(size)
    made = Normal(tuple(maps), tuple(activations))
    for index, step in enumerate(maps):
        if not any(entries(weight).any() for _, weight in made.sources(index)):
            raise ModelError(
                f"{step.name}: every weight is zero, so that nothing of the input comes through; load "
                "trained weights, or leave the layer out"
            )
    return made


def _paid(
    layer: Affine, owed: Sequence[tuple[FloatArray, FloatArray] | None], widths: Sequence[int]
) -> Affine:
    """The map with what its operands are owed folded in."""
    bias, found = layer.bias, list[Weight]()
    for back, weight in [(0, layer.weight), *((skip.back, skip.weight) for skip in layer.skips)]:
        if back >= len(widths):
            raise ModelError(f"{layer.name}: skips back beyond the tail's input")
        value = len(widths) - 1 - back
        if weight.shape[1] != widths[value]:
            raise ModelError(f"{layer.name}: takes {weight.shape[1]} values but gets {widths[value]}")
        left = owed[value]
        if left is not None:
            bias = bias + weight @ left[1]
            weight = weight * left[0]
        found.append(weight)
    skips = tuple(Skip(s.back, w) for s, w in zip(layer.skips, found[1:], strict=True))
    return replace(layer, weight=found[0], bias=bias, skips=skips)


def _taken_out(
    layer: Quadratic | Polynomial,
) -> tuple[Activation, tuple[FloatArray, FloatArray] | None, FloatArray | None]:
    """What is evaluated, what its readers do (scale, shift), and what joins the map before."""
    if isinstance(layer, Quadratic):
        return _square(layer.a, layer.b, layer.c, layer.name)
    c = layer.coefficients
    while len(c) > 2 and not c[-1].any():
        c = c[:-1]
    degree, lead = len(c) - 1, c[-1]
    if degree == 2 and lead.all() and (np.abs(c[1] / (2 * lead)) <= MAX_SHIFT).all():
        return _square(c[2], c[1], c[0], layer.name)
    one = np.ones_like(lead)
    power = degree >= 2 and not degree & (degree - 1)
    if power and lead.all() and (np.abs(c[1:-1] / lead) <= MAX_RATIO).all():
        # The constant is the readers' as well: it costs nothing there.
        rest = np.concatenate([np.zeros_like(c[:1]), c[1:-1] / lead, one[None]])
        return Activation(layer.name, rest), (lead, c[0]), None
    rest = np.concatenate([np.zeros_like(c[:1]), c[1:]])
    return Activation(layer.name, rest), (one, c[0]), None


def _square(
    a: FloatArray, b: FloatArray, c: FloatArray, name: str
) -> tuple[Activation, tuple[FloatArray, FloatArray] | None, FloatArray | None]:
    if (a == 0).any():
        raise ModelError(
            f"{name}: the quadratic coefficient is 0 for some element; "
            "keep |a| away from 0 in training, or drop the activation"
        )
    centre = b / (2 * a)
    if np.abs(centre).max() > MAX_SHIFT:
        raise ModelError(
            f"{name}: |b / 2a| reaches {np.abs(centre).max():.1f}, above {MAX_SHIFT:g}; "
            "penalise it in training (blindtail.train does)"
        )
    return Activation(name), (a, c - a * centre**2), centre


__all__ = ["Activation", "Normal", "levels", "normalised"]
