"""Bases: what a traced tail is run on, so that its linear layers show their matrices.

A value is an affine combination of the tail's input and of its activations' outputs. It is
held as images, for each of these sources: row 0 of what the zero vector gives, row i + 1 of
what the i-th unit vector does. A wide basis runs in parts, whose columns go into a sparse
matrix where most of them are zero, as a convolution's are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blindtail.errors import ModelError
from blindtail.he.layers import Affine, FloatArray, Layer, Polynomial, Quadratic, Skip
from blindtail.he.sparse import Sparse, Weight, compact, entries, worthwhile
from blindtail.models.rulings import Live

#: Most values an activation may have: folding runs one image for each, in float64.
MAX_WIDTH = 16384
#: Values of all images of a part of a basis, and the fewest images of one.
_PART_VALUES, _PART_IMAGES = 1 << 23, 256


class Value(Live):
    """A traced tensor, by source: images of a part of that source's basis, zero first, (1 + part, ...).

    The constant is the sum of all first rows. image: the shape of one of them; (C, H, W) also where
    they have been flattened since.
    """

    def __init__(self, parts: dict[int, Tensor], flattened: tuple[int, ...] | None = None) -> None:
        self.parts = parts
        super().__init__(tuple(self.data.shape))
        self.image = flattened if flattened and self.data.dim() == 2 else tuple(self.data.shape[1:])

    @property
    def data(self) -> Tensor:
        """Of the newest source."""
        return self.parts[max(self.parts)]

    def of(self, source: int, images: int) -> Tensor:
        """Images for a source, zeros where nothing comes from there."""
        found = self.parts.get(source)
        return self.data.new_zeros((images, *self.data.shape[1:])) if found is None else found


class Batch(int):
    """The number of images in a basis, times `each`: another one for the next source."""

    each: int = 1

    def __mul__(self, other: Any) -> Any:
        product = Batch(int(self) * int(other))
        product.each = self.each * int(other)
        return product

    __rmul__ = __mul__


def bare(value: Any, images: int = 0, source: int | None = None) -> Any:
    """Arguments with tensors in the place of traced values, and `images` as the number of images.

    source  take values' images for this one; -1: a single zero image. Without it, for the newest
    """
    if isinstance(value, Value):
        if source is None:
            return value.data
        return value.data.new_zeros((1, *value.data.shape[1:])) if source < 0 else value.of(source, images)
    if isinstance(value, Batch) and images:
        return images * value.each
    if isinstance(value, tuple | list):
        return type(value)(bare(v, images, source) for v in value)
    if isinstance(value, dict):
        return {k: bare(v, images, source) for k, v in value.items()}
    return value


def applied(run: Callable[[Any, Any], Any], args: Any, kwargs: Any, operands: Sequence[Value]) -> Any:
    """A linear operation on values: run on the images of each source in turn.

    Returns {source: result} with as many constants in the first rows as there are, together.
    """
    images = {source: len(part) for value in operands for source, part in value.parts.items()}
    found = {s: run(bare(args, many, s), bare(kwargs, many, s)) for s, many in images.items()}
    if len(found) > 1:
        # What it adds of its own, a bias say, it has added for every source: once is right.
        alone = run(bare(args, 1, -1), bare(kwargs, 1, -1))
        first = min(found)
        found = {s: made if s == first else _less(made, alone) for s, made in found.items()}
    return found


def _less(made: Any, alone: Any) -> Any:
    if isinstance(made, tuple | list):
        return type(made)(_less(m, a) for m, a in zip(made, alone, strict=True))
    return made - alone


def valued(found: dict[int, Any], operands: Sequence[Value], where: str, flat: bool = False) -> Any:
    """`applied`'s results as a value, or as a tuple of them. Raises `ModelError` naming the layer.

    flat  it has only changed shapes
    """
    one = next(iter(found.values()))
    if isinstance(one, tuple | list):
        return tuple(
            valued({s: made[i] for s, made in found.items()}, operands, where) for i in range(len(one))
        )
    images = {source: len(part) for value in operands for source, part in value.parts.items()}
    if any(made.dim() < 1 or made.shape[0] != images[source] for source, made in found.items()):
        raise ModelError(f"tail layer {where}: must keep the batch as dimension 0 (use flatten(1))")
    made = Value(found)
    source = operands[0].image
    kept = flat and len(operands) == 1 and math.prod(source) == math.prod(made.image)
    return Value(found, source) if kept else made


@dataclass
class Columns:
    """What a part of a basis gave of one map: its columns first ... first + count - 1."""

    first: int
    columns: Weight  # (out, count)


@dataclass
class Map:
    """A map as far as one pass knows it, by source, with the shapes of images that went in."""

    name: str
    columns: dict[int, Columns]
    bias: FloatArray
    out: tuple[int, ...]


@dataclass
class Folder:
    """Collects what one pass over a traced tail finds: part number `part` of each basis."""

    part: int = 0
    parts: int = 1
    maps: list[Map] = field(default_factory=list)
    activations: list[Quadratic | Polynomial] = field(default_factory=list)
    names: list[str] = field(default_factory=list)  # of linear layers since the last activation
    images: int = 0  # of the newest basis
    shapes: list[tuple[int, ...]] = field(default_factory=list)  # of each source's images
    firsts: list[int] = field(default_factory=list)  # unit vector that each part begins with

    def basis(self, shape: tuple[int, ...], where: str, image: tuple[int, ...] | None = None) -> Value:
        """The next source. Raises `ModelError` when it is too wide."""
        width = math.prod(shape)
        if not 1 <= width <= MAX_WIDTH:
            raise ModelError(
                f"tail layer {where}: takes {width} values, a tail may hold 1 to {MAX_WIDTH}: "
                "cut the network later, or pool before the cut"
            )
        each = max(_PART_IMAGES, _PART_VALUES // width)
        self.parts = max(self.parts, -(-width // each))
        first = min(self.part * each, width)
        count = min(each, width - first)
        rows = torch.zeros(count + 1, width, dtype=torch.float64)
        rows[torch.arange(count) + 1, torch.arange(count) + first] = 1.0
        self.images = count + 1
        self.shapes.append(image or shape)
        self.firsts.append(first)
        return Value({len(self.shapes) - 1: rows.view(count + 1, *shape)}, image)

    def close(self, value: Value, where: str) -> None:
        """Everything linear up to `value` becomes columns of one affine map."""
        bias, columns = np.zeros(0), dict[int, Columns]()
        for source, data in sorted(value.parts.items()):
            flat = data.reshape(len(data), -1)
            own = (flat[1:] - flat[0]).T.numpy()
            full = own.shape[0] * math.prod(self.shapes[source])
            sparse = worthwhile(full, round(np.count_nonzero(own) * full / max(1, own.size)))
            columns[source] = Columns(self.firsts[source], Sparse.of(own) if sparse else own.copy())
            constant = flat[0].numpy()
            bias = constant.copy() if not len(bias) else bias + constant
        self.maps.append(Map("+".join(self.names) or where, columns, bias, value.image))
        self.names = []

    def activate(self, value: Value, activation: Quadratic | Polynomial) -> Value:
        """End the map at `value`."""
        self.close(value, f"before {activation.name}")
        self.activations.append(activation)
        return self.basis(tuple(value.data.shape[1:]), activation.name, value.image)


def layers_of(passes: Sequence[Folder]) -> list[Layer]:
    """Maps of all their columns, with the activations between them; what nobody reads is left out."""
    one = passes[0]
    widths = [math.prod(shape) for shape in one.shapes]
    whole: list[dict[int, Weight]] = []
    for pieces in zip(*(folder.maps for folder in passes), strict=True):
        rows = len(pieces[0].bias)
        whole.append(
            {s: _side_by_side([p.columns[s] for p in pieces], (rows, widths[s])) for s in pieces[0].columns}
        )
    layers: list[Layer] = []
    values = [0]  # sources, oldest first: activation i makes i + 1
    for index in _needed(whole):
        piece, newest = one.maps[index], values[-1]
        read = {source: weight for source, weight in whole[index].items() if entries(weight).any()}
        weight = read.pop(newest, None)
        if weight is None:
            none = np.zeros(0, np.int32)
            weight = compact(Sparse((len(piece.bias), widths[newest]), none, none, np.zeros(0)))
        skips = tuple(Skip(len(values) - 1 - values.index(s), w) for s, w in sorted(read.items()))
        layers.append(Affine(weight, piece.bias, piece.name, (one.shapes[newest], piece.out), skips))
        if index < len(one.activations):
            layers.append(one.activations[index])
            values.append(index + 1)
    return layers


def _needed(maps: Sequence[dict[int, Weight]]) -> list[int]:
    """Maps whose values reach the last one, and that itself, rising."""
    found, waiting = set[int](), [len(maps) - 1]
    while waiting:
        index = waiting.pop()
        if index not in found:
            found.add(index)
            read = [source for source, weight in maps[index].items() if entries(weight).any()]
            waiting += [source - 1 for source in read if source]
    return sorted(found)


def _side_by_side(pieces: Sequence[Columns], shape: tuple[int, int]) -> Weight:
    pieces = [piece for piece in pieces if piece.columns.shape[1]]
    if not any(isinstance(piece.columns, Sparse) for piece in pieces):
        return np.concatenate([np.asarray(piece.columns) for piece in pieces], axis=1)
    each = [p.columns if isinstance(p.columns, Sparse) else Sparse.of(p.columns) for p in pieces]
    rows = np.concatenate([one.rows for one in each])
    columns = np.concatenate([one.columns + np.int64(p.first) for one, p in zip(each, pieces, strict=True)])
    values = np.concatenate([one.values for one in each])
    return compact(Sparse.unordered(shape, rows, columns, values))


__all__ = ["MAX_WIDTH", "Batch", "Folder", "Value", "applied", "bare", "layers_of", "valued"]
