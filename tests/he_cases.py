"""Small tails that the tests of the encrypted path share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from bench.tails import random_layers
from blindtail.he.compiler import compile_tail
from blindtail.he.layers import Layer
from blindtail.he.normal import normalised
from blindtail.he.program import Program

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    """Layer widths, lanes and whether quadratics are plain squares."""

    widths: tuple[int, ...]
    lanes: int = 1
    plain: bool = True

    def __str__(self) -> str:
        return "-".join(map(str, self.widths)) + f"x{self.lanes}" + ("" if self.plain else "q")


#: Chosen to cover: one map; outer sums with and without copies; wide output;
#: inner sums; lanes; a quadratic with all coefficients.
CASES = (
    Case((100, 10)),
    Case((64, 32, 10)),
    Case((512, 128, 10)),
    Case((40, 96, 5), plain=False),
    Case((64, 32, 10), lanes=16),
    Case((96, 64, 32, 7)),
)


def layers(case: Case, seed: int = 0) -> list[Layer]:
    return random_layers(case.widths, seed, case.plain)


def activations(case: Case, count: int, seed: int = 1) -> FloatArray:
    return np.abs(np.random.default_rng(seed).normal(size=(count, case.widths[0])))


@lru_cache(maxsize=32)
def program(case: Case) -> Program:
    return compile_tail(layers(case), activations(case, 200), lanes=case.lanes)


def clear_logits(case: Case, x: FloatArray) -> FloatArray:
    """The tail in float64, quadratics as written."""
    for layer in layers(case):
        x = layer(x)
    return x


def rewritten_logits(case: Case, x: FloatArray) -> FloatArray:
    return normalised(layers(case))(x)
