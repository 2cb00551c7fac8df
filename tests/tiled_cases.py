"""Small tails whose tensors lie over several ciphertexts, and a client: what tests of them share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from blindtail.he.frontend import fold_tail
from blindtail.he.layers import Affine, Layer, Polynomial, Quadratic, Skip, outputs
from blindtail.he.program import Program
from blindtail.he.tiled_compiler import compile_tiled
from blindtail.he.tiles import TileShape

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Tiled:
    """A tail by name.

    widths   of the maps
    between  what follows each map but the last: "square", "quadratic", "cubic" or "quartic"
    shapes   of the input and of each map's output, one each
    skips    of each map: the older values that it reads too, by how many values they are back
    """

    name: str
    widths: tuple[int, ...]
    between: tuple[str, ...]
    shapes: tuple[str, ...]
    ring_degree: int = 8192
    lanes: int = 1
    skips: tuple[tuple[int, ...], ...] = ()

    def __str__(self) -> str:
        return self.name


TILED = (
    Tiled("two in", (6, 10), (), ("[*/512, 6/4]", "[*/128, 10/16]"), 4096),
    Tiled("three out", (8, 10), (), ("[*/256, 8/8]", "[*/512, 10~/4]"), 4096),
    Tiled("complex", (12, 10), (), ("[*/512, 6/4]", "[*/128, 10/16]"), 4096),
    Tiled("square", (9, 8, 5), ("square",), ("[9~/8, ?/512]", "[*/1024, 8/4]", "[*/2048, 5/2]")),
    Tiled("sums", (8, 6, 7), ("quadratic",), ("[*/1024, 8~/4]", "[*/512, 6~/2, ?/4]", "[*/512, 7/8]")),
    Tiled("cubic", (8, 6, 5), ("cubic",), ("[*/1024, 8/4]", "[*/1024, 6/4]", "[*/512, 5/8]")),
    Tiled("quartic", (5, 6, 6), ("quartic",), ("[*/512, 5/8]", "[*/1024, 6~/4]", "[*/1024, 6/4]")),
    Tiled("lanes", (8, 6, 5), ("square",), ("[*/512, 8/4]", "[*/128, 6/4, ?/4]", "[*/512, 5~/4]"), lanes=2),
    Tiled(
        "residual",
        (8, 6, 6, 5),
        ("square", "square"),
        ("[*/1024, 8/4]", "[*/512, 6~/4, ?/2]", "[*/1024, 6/4]", "[*/1024, 5/4]"),
        skips=((), (1,), (1, 2)),
    ),
)
_DEGREES = {"square": 2, "quadratic": 2, "cubic": 3, "quartic": 4}


@lru_cache
def layers(case: Tiled) -> tuple[Layer, ...]:
    """Dense, scaled by fan-in; what is between them differs from element to element."""
    rng = np.random.default_rng(len(case.name))
    made: list[Layer] = []
    for index, (width, size) in enumerate(zip(case.widths, case.widths[1:], strict=False)):
        weight = rng.normal(size=(size, width)) / np.sqrt(width)
        older = case.skips[index] if index < len(case.skips) else ()
        skips = tuple(Skip(back, _older(rng, size, case.widths[index - back])) for back in older)
        made.append(Affine(weight, rng.normal(size=size) / 8, f"fc{index}", skips=skips))
        if index == len(case.between):
            continue
        kind = case.between[index]
        found = rng.uniform(0.2, 0.6, (_DEGREES[kind] + 1, size))
        if kind == "square":
            made.append(Quadratic(np.ones(size), np.zeros(size), np.zeros(size)))
        elif kind == "quadratic":
            made.append(Quadratic(*found[::-1]))
        else:
            made.append(Polynomial(found))
    return tuple(made)


def _older(rng: np.random.Generator, outputs: int, inputs: int) -> FloatArray:
    found: FloatArray = rng.normal(size=(outputs, inputs)) / np.sqrt(inputs)
    return found


def activations(case: Tiled, count: int, seed: int = 1) -> FloatArray:
    return np.random.default_rng(seed).uniform(-1, 1, (count, case.widths[0]))


def logits(case: Tiled, x: FloatArray) -> FloatArray:
    """In float64, (n, features) -> (n, outputs)."""
    return outputs(layers(case), x)[-1]


@lru_cache(maxsize=32)
def program(case: Tiled) -> Program:
    return compile_tiled(
        layers(case),
        activations(case, 64),
        lanes=case.lanes,
        ring_degree=case.ring_degree,
        only=[[TileShape.parse(text)] for text in case.shapes],
    )


__all__ = ["TILED", "Tiled", "activations", "layers", "logits", "program"]


def random_affine(rng: np.random.Generator) -> Affine:
    """Dense, with zeros now and then."""
    n, m = (int(k) for k in rng.integers(2, 20, 2))
    kept = rng.random((m, n)) < rng.choice([0.5, 1.0])
    return Affine(rng.normal(size=(m, n)) * kept, rng.normal(size=m), shapes=((n,), (m,)))


def random_convolution(rng: np.random.Generator, seed: int) -> Affine:
    """Any stride, padding, dilation and groups."""
    torch.manual_seed(seed)
    groups, size = int(rng.integers(1, 3)), int(rng.integers(1, 4))
    inputs, outputs = (groups * int(k) for k in rng.integers(1, 3, 2))
    layer = nn.Conv2d(
        inputs,
        outputs,
        size,
        stride=tuple(rng.integers(1, 3, 2).tolist()),
        padding=int(rng.integers(0, size)),
        dilation=int(rng.integers(1, 3)),
        groups=groups,
        dtype=torch.float64,
    )
    height, width = (int(k) for k in rng.integers(5, 8, 2))
    (made,) = fold_tail(nn.Sequential(layer, nn.Flatten()), (inputs, height, width))
    assert isinstance(made, Affine)
    return made
