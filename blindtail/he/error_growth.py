"""How large the error of a program's noisiest output is, from the program itself.

`blindtail.he.scales` chooses scales by what noise does on average over slots. In
a network with few weights in a row, correlated inputs or one loud output that
average is several times too small. Here every primitive that a program runs is
recorded with the variance it adds to each slot, and derivatives of the outputs
go back through the record (reverse-mode differentiation): an output's variance
is the sum over all slots of all primitives of variance times derivative
squared. Copies of a value that share their noise are thereby counted as shared.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blindtail.errors import ModelError
from blindtail.he import noise
from blindtail.he.elementwise import Linear, SumOp
from blindtail.he.layers import FloatArray, outputs
from blindtail.he.layout import SlotArray
from blindtail.he.operations import MapOp, turned
from blindtail.he.program import Program
from blindtail.he.recover import layers_of
from blindtail.he.sparse import Sparse, Weight

#: Outputs looked at, those with the largest weights first, and rows of calibration data, fewer where
#: products times positions times outputs would go beyond `_WORK`.
_OUTPUTS, _ROWS, _WORK = 16, 8, 5e8

Gradient = NDArray[Any]


@dataclass(eq=False)
class _Step:
    """One primitive that was run.

    added  variance of the noise that it adds to every position, in units of the values
    by     what that is to be multiplied with, squared: positions (rows, n) of an operand, or None
    back   for each operand, what takes a gradient (rows, outputs, n) to that operand's
    """

    added: float
    by: SlotArray | None
    back: list[tuple[_Step, Callable[[Gradient], Gradient]]]


@dataclass(eq=False)
class _Value:
    """Positions of one lane, (rows, n), with level and scale; gone once no step needs them."""

    slots: SlotArray
    level: int
    scale: float
    step: _Step


class _Tape:
    """`Operations` that keep what they did, in order."""

    def __init__(self, program: Program) -> None:
        self._program, self._parameters = program, program.spec.parameters
        self._lanes = program.spec.lanes
        self.steps: list[_Step] = []
        self.plain = {
            (index, term, giant, baby): values
            for index, op in enumerate(program.ops)
            if isinstance(op, Linear)
            for term, giant, baby, values in op.steps()
        }

    def keep(
        self,
        slots: SlotArray,
        level: int,
        scale: float,
        variance: float,
        *back: tuple[_Value, Callable[[Gradient], Gradient]],
        by: SlotArray | None = None,
    ) -> _Value:
        """variance: as `blindtail.he.noise` has it, in units of the scaled plaintext."""
        step = _Step(variance / scale**2, by, [(value.step, passed) for value, passed in back])
        self.steps.append(step)
        return _Value(slots, level, scale, step)

    def turn(self, ct: _Value, turn: int) -> _Value:
        by = turn // self._lanes if turn >= 0 else ~(~turn // self._lanes)
        variance = noise.keyswitch(self._parameters, ct.level)
        return self.keep(turned(ct.slots, by), ct.level, ct.scale, variance, (ct, lambda g: _unturned(g, by)))

    def multiply_diagonal(self, ct: _Value, op: int, term: int, giant: int, baby: int) -> _Value:
        step = self._program.ops[op]
        assert isinstance(step, Linear)
        values = self.plain[op, term, giant, baby]
        scale = ct.scale * step.plain_scale(self._parameters, term)
        variance = (
            noise.encoding(self._parameters) * ct.scale**2
        )  # rounding of the plaintext meets the values
        return self.keep(
            ct.slots * values, ct.level, scale, variance, (ct, lambda g: g * np.conj(values)), by=ct.slots
        )

    def add(self, a: _Value, b: _Value) -> _Value:
        return self.keep(a.slots + b.slots, a.level, a.scale, 0.0, (a, _same), (b, _same))

    def add_bias(self, ct: _Value, op: int) -> _Value:
        step = self._program.ops[op]
        assert isinstance(step, Linear | SumOp)
        variance = noise.encoding(self._parameters)
        return self.keep(ct.slots + step.bias_slots(), ct.level, ct.scale, variance, (ct, _same))

    def rescale(self, ct: _Value) -> _Value:
        scale = ct.scale / self._parameters.primes[ct.level]
        return self.keep(ct.slots, ct.level - 1, scale, noise.rounding(self._parameters), (ct, _same))

    def square(self, ct: _Value) -> _Value:
        slots, variance = ct.slots, noise.keyswitch(self._parameters, ct.level)
        back = (ct, lambda g: 2 * g * np.conj(slots)[:, None])
        return self.keep(slots**2, ct.level, ct.scale**2, variance, back)

    def product(self, a: _Value, b: _Value) -> _Value:
        left, right, variance = a.slots, b.slots, noise.keyswitch(self._parameters, a.level)
        return self.keep(
            left * right,
            a.level,
            a.scale * b.scale,
            variance,
            (a, lambda g: g * right[:, None]),
            (b, lambda g: g * left[:, None]),
        )

    def lower(self, ct: _Value, level: int) -> _Value:
        return replace(ct, level=level)


def _telling_rows(program: Program, calibration: FloatArray, most: int) -> list[int]:
    """Rows of calibration data (n, features) that derivatives are taken at, `most` or fewer.

    Errors grow with derivatives, and those of a high power follow the largest value that it is
    taken of, which need not be one of a large input: rows where some value inside is largest,
    beside what is usual there, and rows of the largest norm, in turn.
    """
    by_norm = np.argsort(np.square(calibration).sum(axis=1))[::-1][:most]
    try:
        layers = layers_of(program)
    except ModelError:  # no layers make it
        return [int(row) for row in by_norm]
    steep = np.zeros(len(calibration))
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        for value in outputs(layers, calibration):
            largest = np.abs(value).max(axis=1, initial=0.0)
            steep = np.fmax(steep, largest / np.median(largest))
    by_steepness = np.argsort(steep)[::-1][:most]
    turns = np.stack([by_steepness, by_norm], axis=1).ravel()
    return [int(row) for row in dict.fromkeys(turns.tolist())][:most]


def _same(gradient: Gradient) -> Gradient:
    return gradient


def _unturned(gradient: Gradient, by: int) -> Gradient:
    return np.roll(gradient, by, axis=-1) if by >= 0 else np.conj(np.roll(gradient, ~by, axis=-1))


def largest_error(program: Program, calibration: FloatArray) -> float:
    """Standard deviation of the noisiest logit's error, in logits; the reply's lost bits not counted.

    calibration  activations, (n, features): of those that errors grow most for

    First order: products of two errors, smaller by as much as an error is smaller
    than its value, are left out.
    """
    spec, tape, reading = program.spec, _Tape(program), _reading(program)
    rows = int(_WORK / max(1, len(tape.plain) * reading.size))
    loud = _telling_rows(program, calibration, min(max(rows, 1), _ROWS))
    # One lane stands for all of them: a position holds the same in each.
    alone = replace(spec.input_layout, lanes=1)
    slots = np.stack([alone.place(calibration[chosen]) for chosen in loud])
    variance = noise.fresh(spec.parameters)
    fresh = [
        tape.keep(tile, spec.input_level, spec.input_scale, variance)
        for tile in np.split(slots, spec.input_ciphertexts, axis=1)
    ]
    results = program.run(tape, fresh)
    parts = np.split(reading, len(results), axis=2)
    gradients: dict[_Step, Gradient] = {
        result.step: part for result, part in zip(results, parts, strict=True)
    }
    total: Any = 0.0
    while tape.steps:
        step = tape.steps.pop()
        gradient = gradients.pop(step, None)
        if gradient is None:
            continue
        if step.added:
            total = total + step.added * _power(gradient, step.by)
        for operand, back in step.back:
            passed = back(gradient)
            held = gradients.get(operand)
            gradients[operand] = passed if held is None else held + passed
    return math.sqrt(float(np.max(total)))


def _power(gradient: Gradient, by: SlotArray | None) -> Gradient:
    """Sum over positions of the gradient squared, times `by` squared: (rows, outputs)."""
    square = gradient.real**2 + gradient.imag**2 if np.iscomplexobj(gradient) else gradient**2
    if by is None:
        summed: Gradient = square.sum(axis=-1)
        return summed
    weighted: Gradient = np.einsum(
        "rop,rp->ro", np.broadcast_to(square, (len(by), *square.shape[1:])), np.abs(by) ** 2
    )
    return weighted


def _row_powers(weight: Weight) -> FloatArray:
    """Sum of squares of each row."""
    if isinstance(weight, Sparse):
        return np.bincount(weight.rows, weight.values**2, weight.shape[0]).astype(np.float64)
    powers: FloatArray = np.square(weight).sum(axis=1)
    return powers


def _reading(program: Program) -> Gradient:
    """Derivatives of outputs by position of the results, (1, outputs, positions): copies are averaged."""
    index, power = program.spec.output_layout.index, np.zeros(program.spec.outputs)
    for number in program.results:
        last = program.ops[number]
        assert isinstance(last, MapOp)
        power += sum(_row_powers(term.weight) for term in last.terms)
    loud = np.argsort(power)[::-1][:_OUTPUTS]
    taken = (index[None] == loud[:, None]).astype(np.float64)
    shared: Gradient = (taken / taken.sum(axis=1, keepdims=True))[None]
    return shared


__all__ = ["largest_error"]
