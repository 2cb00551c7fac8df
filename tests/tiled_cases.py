"""Small tails whose tensors lie over several ciphertexts, and a client: what tests of them share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from blindtail.he.layers import Affine, Layer, Polynomial, Quadratic
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
    """

    name: str
    widths: tuple[int, ...]
    between: tuple[str, ...]
    shapes: tuple[str, ...]
    ring_degree: int = 8192
    lanes: int = 1

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
)
_DEGREES = {"square": 2, "quadratic": 2, "cubic": 3, "quartic": 4}


@lru_cache
def layers(case: Tiled) -> tuple[Layer, ...]:
    """Dense, scaled by fan-in; what is between them differs from element to element."""
    rng = np.random.default_rng(len(case.name))
    made: list[Layer] = []
    for index, (inputs, outputs) in enumerate(zip(case.widths, case.widths[1:], strict=False)):
        weight = rng.normal(size=(outputs, inputs)) / np.sqrt(inputs)
        made.append(Affine(weight, rng.normal(size=outputs) / 8, f"fc{index}"))
        if index == len(case.between):
            continue
        kind = case.between[index]
        found = rng.uniform(0.2, 0.6, (_DEGREES[kind] + 1, outputs))
        if kind == "square":
            made.append(Quadratic(np.ones(outputs), np.zeros(outputs), np.zeros(outputs)))
        elif kind == "quadratic":
            made.append(Quadratic(*found[::-1]))
        else:
            made.append(Polynomial(found))
    return tuple(made)


def activations(case: Tiled, count: int, seed: int = 1) -> FloatArray:
    return np.random.default_rng(seed).uniform(-1, 1, (count, case.widths[0]))


def logits(case: Tiled, x: FloatArray) -> FloatArray:
    """In float64, (n, features) -> (n, outputs)."""
    for layer in layers(case):
        x = layer(x)
    return x


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
