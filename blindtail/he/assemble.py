"""From maps with their layouts to a draft of a program: operations at their levels, and statistics.

Activations become squares, products, multiples and sums here. A polynomial is split at
a power of two, p = q x^h + r with deg q, deg r < h, again and again (Paterson and
Stockmeyer, SIAM J. Comput. 1973, with h = 2^(m-1)): q x^h takes m levels, and so does r,
whose coefficients are multiplied in while q is computed. That is ceil(log2(d + 1)) levels
in all, or ceil(log2 d) where the leading coefficient is one: the least there is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from blindtail.he.elementwise import Op, ProductOp, ScaleOp, SquareOp, SumOp
from blindtail.he.followed import Sums, placed, statistics
from blindtail.he.layers import FloatArray
from blindtail.he.layout import Layout
from blindtail.he.normal import Activation, Normal
from blindtail.he.operations import MapOp
from blindtail.he.scales import Draft
from blindtail.he.slotmaps import Arrangement, alike
from blindtail.progress import Span

#: Rows of calibration data that are followed slot by slot.
_SAMPLES = 64
_UNSET = 2.0  # a scale without meaning


class Builder:
    """Operations so far. Values are numbered: those of the inputs first, then one an operation."""

    def __init__(self, level: int, inputs: int = 1) -> None:
        self.ops: list[Op] = []
        self.ties: dict[int, int] = {}
        self.inputs = inputs
        self.levels = [level] * inputs

    def add(self, op: Op) -> int:
        self.ops.append(op)
        self.levels.append(op.out_level)
        return len(self.levels) - 1

    def back(self, value: int) -> int:
        return len(self.levels) - value


class _Polynomial:
    """Evaluates one activation's polynomial on one value."""

    def __init__(self, builder: Builder, name: str, layout: Layout, x: int) -> None:
        self._to, self._name, self._layout = builder, name, layout
        self._powers = [x]  # x^(2^j)

    def _power(self, h: int) -> int:
        """Value of x^h, h a power of two."""
        while 1 << (len(self._powers) - 1) < h:
            last = self._powers[-1]
            self._powers.append(self._square(last, 1 << len(self._powers)))
        return self._powers[h.bit_length() - 1]

    def _square(self, value: int, power: int) -> int:
        level, name = self._to.levels[value], f"{self._name}.power{power}"
        return self._to.add(SquareOp(name, level, self._layout, _UNSET, _UNSET, self._to.back(value)))

    def evaluate(self, coefficients: FloatArray) -> int:
        """Value of the polynomial with these coefficients, (d + 1, n), d >= 1."""
        degree = len(coefficients) - 1
        monic = bool((coefficients[-1] == 1).all())
        if degree == 1:
            x, constant = self._powers[0], coefficients[0]
            if not monic:
                return self._multiples([(x, coefficients[1])], constant)
            return self._sum([x], constant) if constant.any() else x
        m = (degree - 1 if monic else degree).bit_length()
        h = 1 << (m - 1)
        high, low = coefficients[h:], coefficients[:h]
        terms: list[tuple[int, FloatArray]] = []
        main: int | None = None
        if len(high) > 1:
            main = self._product(self.evaluate(high), self._power(h))
        elif monic:
            main = self._power(h)
        else:
            terms.append((self._power(h), high[0]))
        single = [k for k in range(1, h) if low[k].any()]
        if all(not k & (k - 1) for k in single):
            terms += [(self._power(k), low[k]) for k in single]
        else:
            while not low[-1].any():
                low = low[:-1]
            terms.append((self.evaluate(np.concatenate([0 * low[:1], low[1:]])), np.ones_like(low[0])))
        constant = low[0]
        if main is None:
            return self._multiples(terms, constant)
        if terms:
            return self._sum([main, self._multiples(terms, constant, main)], None)
        return self._sum([main], constant) if constant.any() else main

    def _product(self, a: int, b: int) -> int:
        to = self._to
        level = min(to.levels[a], to.levels[b])
        backs = to.back(a), to.back(b)
        name = f"{self._name}.product{len(to.ops)}"
        return to.add(ProductOp(name, level, self._layout, (_UNSET, _UNSET), _UNSET, backs))

    def _multiples(
        self, terms: Sequence[tuple[int, FloatArray]], constant: FloatArray, like: int | None = None
    ) -> int:
        """Sum of multiples by element; at the scale of value `like`, where it is given."""
        to = self._to
        if like is not None:
            to.ties[len(to.ops)] = like
        level = min(to.levels[value] for value, _ in terms)
        backs = tuple(to.back(value) for value, _ in terms)
        factors = np.stack([factor for _, factor in terms])
        name = f"{self._name}.multiples{len(to.ops)}"
        unset = (_UNSET,) * len(terms)
        return to.add(ScaleOp(name, level, self._layout, unset, _UNSET, backs, factors, constant))

    def _sum(self, values: Sequence[int], constant: FloatArray | None) -> int:
        to = self._to
        level = min(to.levels[value] for value in values)
        backs = tuple(to.back(value) for value in values)
        name = f"{self._name}.sum{len(to.ops)}"
        return to.add(SumOp(name, level, self._layout, _UNSET, backs, constant))


def activated_value(
    builder: Builder, activation: Activation, layout: Layout, value: int, name: str = "square"
) -> int:
    """Value of an activation of a value. name: of a plain square"""
    if activation.coefficients is None:
        back = builder.back(value)
        return builder.add(SquareOp(name, builder.levels[value], layout, _UNSET, _UNSET, back))
    return _Polynomial(builder, activation.name, layout, value).evaluate(activation.coefficients)


def activation_ops(activation: Activation, level: int) -> tuple[Op, ...]:
    """What an activation becomes at `level`, for counting."""
    assert activation.coefficients is not None
    size = activation.coefficients.shape[1]
    layout = Layout(size, 1, tuple(range(size)))
    builder = Builder(level)
    _Polynomial(builder, activation.name, layout, 0).evaluate(activation.coefficients)
    return tuple(builder.ops)


def assembled(normal: Normal, maps: Sequence[MapOp], level: int) -> tuple[tuple[Op, ...], dict[int, int]]:
    """Operations at their levels, without scales; and ties as `Draft` has them.

    maps   one for each of `normal`'s, with its operands' layouts in the order of
           `Normal.sources`, without levels and scales
    level  of the input
    """
    builder = Builder(level)
    values = [0]
    for index, op in enumerate(maps):
        read = [values[value] for value, _ in normal.sources(index)]
        at = min(builder.levels[value] for value in read)
        backs = [builder.back(value) for value in read]
        others = tuple(replace(term, back=back) for term, back in zip(op.others, backs[1:], strict=True))
        placed = replace(op.at(at, op.in_scale, op.out_scale, others), back=backs[0])
        placed.__dict__.update({k: v for k, v in op.__dict__.items() if k in ("met", "all_diagonals")})
        made = builder.add(placed)
        if index == len(normal.activations):
            break
        values.append(
            activated_value(builder, normal.activations[index], op.out_layout, made, f"square{index}")
        )
    return tuple(builder.ops), builder.ties


def drafted(
    normal: Normal,
    maps: Sequence[MapOp],
    arranged: Sequence[Arrangement],
    first: Layout,
    level: int,
    x: FloatArray,
    span: Span | None = None,
) -> Draft:
    """The draft of a program, with statistics of calibration data x, (n, features)."""
    ops, ties = assembled(normal, maps, level)
    exact, _ = normal.values(x)
    sums = [
        Sums(made.scattered, made.copies, alike(arranged, index), float(np.abs(v).max()))
        for index, (made, v) in enumerate(zip(arranged, exact, strict=True))
    ]
    return Draft(ops, statistics(ops, placed(first, x, _SAMPLES), sums, span), ties)


__all__ = ["Builder", "activated_value", "activation_ops", "assembled", "drafted"]
