"""Random dense tails by fixed seed: what benchmarks, evidence and tests compile."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from blindtail.he.layers import Affine, Layer, Quadratic


def random_layers(widths: Sequence[int], seed: int = 0, plain: bool = True) -> list[Layer]:
    """Dense layers scaled by fan-in with an activation after each but the last.

    plain  squares; otherwise a x^2 + b x + c, coefficients random per element
    """
    rng = np.random.default_rng(seed)
    made: list[Layer] = []
    for i, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        weight = rng.normal(size=(outputs, inputs)) / np.sqrt(inputs)
        made.append(Affine(weight, rng.normal(size=outputs) / 8, f"fc{i}"))
        if i == len(widths) - 2:
            break
        a, b, c = np.ones(outputs), np.zeros(outputs), np.zeros(outputs)
        if not plain:
            a = np.where(rng.random(outputs) < 0.5, -1.0, 1.0) * rng.uniform(0.2, 1.0, outputs)
            b, c = rng.normal(size=(2, outputs))
        made.append(Quadratic(a, b, c, f"act{i}"))
    return made
