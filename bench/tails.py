"""Random dense tails by fixed seed, and a client of one: what benchmarks, evidence and tests use."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from blindtail.he.backends import Evaluator, Keys, open_evaluator
from blindtail.he.layers import Affine, Layer, Quadratic
from blindtail.he.program import Program
from blindtail.he.secret import Decryptor, Encryptor, SecretKey


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


@dataclass(frozen=True)
class Client:
    """One program on the `seal` backend with one client's fresh keys, loaded."""

    evaluator: Evaluator
    keys: Keys
    encryptor: Encryptor
    decryptor: Decryptor

    @classmethod
    def of(cls, program: Program) -> Client:
        evaluator = open_evaluator("seal", program)
        with tempfile.TemporaryDirectory() as folder:
            sent, prepared = Path(folder) / "keys", Path(folder) / "prepared"
            secret = SecretKey.generate(program.spec, sent)
            evaluator.prepare_keys(sent, prepared)
            keys = evaluator.load_keys(prepared)
        return cls(evaluator, keys, Encryptor(program.spec, secret), Decryptor(program.spec, secret))
