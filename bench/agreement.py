"""Encrypted labels against clear ones on Fashion-MNIST's test images, with the bundled model.

1,000 images through real ciphertexts on the backend that a cell takes by itself, all
10,000 with simulated noise. `--quick`: a tenth. The same for the cheapest parameters that are
predicted to keep the label of all but one image in a thousand, from the margins of the recipe's
validation images (those of training images promise too much: the network knows them).
"""

from __future__ import annotations

import argparse

import numpy as np
from numpy.typing import NDArray

from bench.rows import Row, row
from blindtail.he.backends import settle
from blindtail.he.clear import ClearEvaluator
from blindtail.he.compiler import compile_tail
from blindtail.he.margins import disagreement
from blindtail.he.objective import Objective
from blindtail.he.program import Program
from blindtail.he.recover import layers_of
from blindtail.models.zoo import bundle_paths
from blindtail.train.run import CALIBRATION_IMAGES, Splits
from edge.pair import ModelPair
from edge.verify import evaluate_encrypted, read_images

SOURCES = (
    "bench/agreement.py",
    "blindtail/he/*.py",
    "native/src/*",
    "blindtail/models/zoo/fashion/*.bt",
)
#: Share of labels that may change, and the seed by which the bundled model's training set was split.
SHARE, SEED = 1e-3, 0

Floats = NDArray[np.float64]


def rows(args: argparse.Namespace) -> list[Row]:
    scale = 10 if args.quick else 1
    pair = ModelPair.open(*bundle_paths("fashion"))
    pixels, _ = read_images(pair, "fashion", "test", 10_000 // scale)
    activations = pair.run_head(pixels).activations
    encrypted = activations[np.linspace(0, len(activations) - 1, 1000 // scale).round().astype(np.int64)]
    made = _agreement(pair, pair.program, encrypted, activations, "", 0.999)
    # Of a share of a thousandth, a thousand images tell next to nothing.
    return made + _cheapest(pair, encrypted, activations, None if args.quick else 1 - SHARE)


def _agreement(
    pair: ModelPair, program: Program, encrypted: Floats, simulated: Floats, of: str, target: float | None
) -> list[Row]:
    """encrypted, simulated: activations (n, features); of: what the names of the rows begin with;
    target: of the share of labels that agree
    """
    backend = settle("auto")
    made: list[Row] = []
    for what, activations in (("real ciphertexts", encrypted), ("simulated noise", simulated)):
        clear = pair.clear_tail(activations)
        name = f"backend {backend}" if what == "real ciphertexts" else "backend clear"
        if what == "real ciphertexts":
            got, _ = evaluate_encrypted(program, activations, backend, lambda *_: None)
        else:
            got = ClearEvaluator(program, noise_seed=0).logits(activations)
        same = got.argmax(axis=1) == clear.argmax(axis=1)
        top = np.sort(clear, axis=1)
        others = (top[:, -1] - top[:, -2])[~same]
        error = np.abs(got - clear)
        listed = ", ".join(f"{m:.2g}" for m in others)
        made += [
            row(
                f"{of}{what}: labels that agree",
                float(same.mean()),
                "1",
                target=target,
                at_most=False,
                n=len(activations),
                note=f"{name}; clear margins of the others: {listed or 'none'}",
            ),
            row(
                f"{of}{what}: largest error of a logit over its bound",
                float((error / program.error_bounds()).max()),
                "1",
                target=1.0,
                n=len(activations),
            ),
            row(
                f"{of}{what}: error of the logits over their standard deviation",
                float(error.std() / clear.std()),
                "1",
                n=len(activations),
                note=f"largest error {error.max():.2g}, largest |logit| {np.abs(clear).max():.3g}",
            ),
        ]
    return made


def _cheapest(pair: ModelPair, encrypted: Floats, simulated: Floats, target: float | None) -> list[Row]:
    """Compiled again with a bound on how many labels noise may change."""
    sets = Splits.load("fashion", seed=SEED)
    x, margins = (
        pair.run_head(images.pixels[:CALIBRATION_IMAGES]).activations
        for images in (sets.train, sets.validation)
    )
    usual, of = pair.program, f"disagreement <= {SHARE:g}: "
    objective = Objective(at_most={"disagreement": SHARE})
    program = compile_tail(layers_of(usual), x, objective=objective, margins=margins)
    bits = [made.spec.parameters.primes[-1].bit_length() for made in (program, usual)]
    made = [
        row(
            f"{of}{what} over the bundled program's",
            getattr(program.spec, field) / getattr(usual.spec, field),
            "1",
            target=1.0,
            note=f"{getattr(program.spec, field):,} of {getattr(usual.spec, field):,}; "
            f"primes of {bits[0]} bits, not {bits[1]}",
        )
        for what, field in (("uplink", "uplink_bytes"), ("keys", "key_bytes"))
    ]
    told = disagreement(pair.clear_tail(simulated), program.spec.predicted_noise)
    made.append(
        row(
            f"{of}predicted for the test images",
            told,
            "1",
            target=None if target is None else SHARE,
            n=len(simulated),
            note="at most",
        )
    )
    return made + _agreement(pair, program, encrypted, simulated, of, target)


__all__ = ["SEED", "SHARE", "SOURCES", "rows"]
