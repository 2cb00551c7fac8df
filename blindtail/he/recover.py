"""The layers that a program computes: back from operations to maps and polynomials."""

from __future__ import annotations

import numpy as np

from blindtail.errors import ModelError
from blindtail.he.elementwise import Elementwise, ProductOp, SquareOp, SumOp
from blindtail.he.layers import Affine, FloatArray, Layer, Polynomial, Quadratic, Skip
from blindtail.he.operations import MapOp
from blindtail.he.program import Program
from blindtail.he.sparse import Sparse, Weight, compact


def layers_of(program: Program) -> list[Layer]:
    """[map, activation, map, ...], as `blindtail.he.compiler.compile_tail` takes them.

    Squares come back as such; weights are those of the program, with what activations owed
    to them. Raises `ModelError` for a program that no layers make: one that reads half an activation.
    """
    if program.spec.input_ciphertexts > 1 or program.spec.output_ciphertexts > 1:
        raise ModelError("its tensors lie over several ciphertexts: compile it again from its layers")
    maps: list[MapOp] = []
    # By value: the map that it is made from (-1: the input), and the polynomial of that map's result.
    made: list[tuple[int, FloatArray]] = [(-1, np.zeros((2, 0)))]
    for index, op in enumerate(program.ops):
        if isinstance(op, MapOp):
            size = op.out_layout.size
            made.append((len(maps), np.stack([np.zeros(size), np.ones(size)])))
            maps.append(op)
        else:
            read = [made[index + 1 - back] for back in op.backs]
            if len({source for source, _ in read}) > 1 or read[0][0] < 0:
                raise ModelError(f"{op.name}: is no polynomial of one layer's result")
            made.append((read[0][0], _polynomial(op, [c for _, c in read])))
    layers: list[Layer] = []
    for place, op in enumerate(maps):
        at = next(i for i, one in enumerate(program.ops) if one is op)
        read_by = {made[at + 1 - term.back][0] + 1: term.weight for term in op.terms}
        layers.append(_affine(op, place, read_by, maps))
        if place + 1 < len(maps):
            layers.append(_activation(program, place, op, made))
    return layers


def _affine(op: MapOp, newest: int, read: dict[int, Weight], maps: list[MapOp]) -> Affine:
    weight = read.pop(newest, None)
    if weight is None:
        none = np.zeros(0, np.int32)
        width = maps[newest - 1].out_layout.size
        weight = compact(Sparse((len(op.bias), width), none, none, np.zeros(0)))
    skips = tuple(Skip(newest - value, other) for value, other in sorted(read.items()))
    return Affine(weight, op.bias, op.name, op.shapes, skips)


def _activation(
    program: Program, place: int, op: MapOp, made: list[tuple[int, FloatArray]]
) -> Quadratic | Polynomial:
    """What maps read of map number `place`."""
    found: dict[int, FloatArray] = {}
    for index, reader in enumerate(program.ops):
        if isinstance(reader, MapOp):
            for back in reader.backs:
                source, coefficients = made[index + 1 - back]
                if source == place:
                    found[index + 1 - back] = coefficients
    if len(found) != 1:
        raise ModelError(f"{op.name}: its result is read in {len(found)} forms")
    (coefficients,) = found.values()
    name = f"after {op.name}"
    if len(coefficients) == 3 and not coefficients[:2].any() and (coefficients[2] == 1).all():
        return Quadratic(coefficients[2], coefficients[1], coefficients[0], name)
    return Polynomial(coefficients, name)


def _polynomial(op: Elementwise, read: list[FloatArray]) -> FloatArray:
    """Coefficients (degree + 1, n) of what an operation makes of polynomials."""
    if isinstance(op, SquareOp | ProductOp):
        return _times(read[0], read[-1])
    if isinstance(op, SumOp):
        return _plus(read, op.constant)
    return _plus([factor * c for factor, c in zip(op.factors, read, strict=True)], op.constant)


def _times(a: FloatArray, b: FloatArray) -> FloatArray:
    out = np.zeros((len(a) + len(b) - 1, a.shape[1]))
    for i, row in enumerate(a):
        out[i : i + len(b)] += row * b
    return out


def _plus(parts: list[FloatArray], constant: FloatArray | None) -> FloatArray:
    out = np.zeros((max(map(len, parts)), parts[0].shape[1]))
    for part in parts:
        out[: len(part)] += part
    if constant is not None:
        out[0] += constant
    return out


__all__ = ["layers_of"]
