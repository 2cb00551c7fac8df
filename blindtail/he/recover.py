"""The layers that a program computes: back from operations to maps and polynomials."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from blindtail.errors import ModelError
from blindtail.he.elementwise import Elementwise, ProductOp, SquareOp, SumOp
from blindtail.he.layers import Affine, FloatArray, Layer, Polynomial, Quadratic, Skip
from blindtail.he.operations import MapOp
from blindtail.he.program import Program
from blindtail.he.sparse import Sparse, Weight, compact

#: The operations of one map: one, or one for each tile of what it gives.
Tiles = tuple[MapOp, ...]
#: Of each value: the map that it is made from (-1: the input), and the polynomial of that map's result.
Made = Sequence[tuple[int, FloatArray]]


def layers_of(program: Program) -> list[Layer]:
    """[map, activation, map, ...], as `blindtail.he.compiler.compile_tail` takes them.

    Squares come back as such; weights are those of the program, with what activations owed
    to them. Raises `ModelError` for a program that no layers make: one that reads half an activation.
    """
    inputs = program.spec.input_ciphertexts
    maps: list[Tiles] = []
    made: list[tuple[int, FloatArray]] = [(-1, np.zeros((2, 0)))] * inputs
    for index, op in enumerate(program.ops):
        if isinstance(op, MapOp):
            # An activation lies between one map and the next: what follows at once is a tile of the same.
            if index and isinstance(program.ops[index - 1], MapOp):
                maps[-1] = (*maps[-1], op)
            else:
                maps.append((op,))
            size = op.out_layout.size
            made.append((len(maps) - 1, np.stack([np.zeros(size), np.ones(size)])))
        else:
            read = [made[inputs + index - back] for back in op.backs]
            if len({source for source, _ in read}) > 1 or read[0][0] < 0:
                raise ModelError(f"{op.name}: is no polynomial of one layer's result")
            made.append((read[0][0], _polynomial(op, [c for _, c in read])))
    layers: list[Layer] = []
    index = 0
    for place, tiles in enumerate(maps):
        while program.ops[index] is not tiles[0]:
            index += 1
        read_by: dict[int, list[Weight]] = {}
        for at, op in enumerate(tiles, inputs + index):
            for term in op.terms:
                read_by.setdefault(made[at - term.back][0] + 1, []).append(term.weight)
        layers.append(_affine(tiles, place, {value: _whole(read) for value, read in read_by.items()}, maps))
        if place + 1 < len(maps):
            layers.append(_activation(program, place, tiles[0].name, made))
    return layers


def _whole(blocks: Sequence[Weight]) -> Weight:
    """The matrix of which each holds a part; one alone is it."""
    if len(blocks) == 1:
        return blocks[0]
    parts = [block if isinstance(block, Sparse) else Sparse.of(block) for block in blocks]
    rows, columns, values = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("rows", "columns", "values")
    )
    return compact(Sparse.unordered(parts[0].shape, rows, columns, values))


def _affine(tiles: Tiles, newest: int, read: dict[int, Weight], maps: Sequence[Tiles]) -> Affine:
    op = tiles[0]
    weight = read.pop(newest, None)
    if weight is None:
        none = np.zeros(0, np.int32)
        width = maps[newest - 1][0].out_layout.size
        weight = compact(Sparse((len(op.bias), width), none, none, np.zeros(0)))
    skips = tuple(Skip(newest - value, other) for value, other in sorted(read.items()))
    name = op.name.removesuffix(".tile0") if len(tiles) > 1 else op.name
    return Affine(weight, op.bias, name, op.shapes, skips)


def _activation(program: Program, place: int, name: str, made: Made) -> Quadratic | Polynomial:
    """What maps read of map number `place`: the same of each tile."""
    found: list[FloatArray] = []
    for index, reader in enumerate(program.ops, program.spec.input_ciphertexts):
        if isinstance(reader, MapOp):
            for source, read in (made[index - back] for back in reader.backs):
                if source == place and not any(np.array_equal(read, one) for one in found):
                    found.append(read)
    if len(found) != 1:
        raise ModelError(f"{name}: its result is read in {len(found)} forms")
    (coefficients,) = found
    name = f"after {name}"
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
