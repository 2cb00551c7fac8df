"""Encrypted labels against clear ones on Fashion-MNIST's test images, with the bundled model.

1,000 images through real ciphertexts on the backend that a cell takes by itself, all
10,000 with simulated noise. `--quick`: a tenth.
"""

from __future__ import annotations

import argparse

import numpy as np

from bench.rows import Row, row
from blindtail.he.backends import settle
from blindtail.he.clear import ClearEvaluator
from blindtail.models.zoo import bundle_paths
from edge.pair import ModelPair
from edge.verify import evaluate_encrypted, read_images

SOURCES = (
    "bench/agreement.py",
    "blindtail/he/*.py",
    "native/src/*",
    "blindtail/models/zoo/fashion/*.bt",
)


def rows(args: argparse.Namespace) -> list[Row]:
    scale = 10 if args.quick else 1
    backend = settle("auto")
    pair = ModelPair.open(*bundle_paths("fashion"))
    made: list[Row] = []
    for what, count in (("real ciphertexts", 1000 // scale), ("simulated noise", 10_000 // scale)):
        pixels, _ = read_images(pair, "fashion", "test", count)
        activations = pair.run_head(pixels).activations
        clear = pair.clear_tail(activations)
        name = f"backend {backend}" if what == "real ciphertexts" else "backend clear"
        if what == "real ciphertexts":
            got, _ = evaluate_encrypted(pair.program, activations, backend, lambda *_: None)
        else:
            got = ClearEvaluator(pair.program, noise_seed=0).logits(activations)
        same = got.argmax(axis=1) == clear.argmax(axis=1)
        top = np.sort(clear, axis=1)
        margins = (top[:, -1] - top[:, -2])[~same]
        error = np.abs(got - clear)
        listed = ", ".join(f"{m:.2g}" for m in margins)
        made += [
            row(
                f"{what}: labels that agree",
                float(same.mean()),
                "1",
                target=0.999,
                at_most=False,
                n=count,
                note=f"{name}; clear margins of the others: {listed or 'none'}",
            ),
            row(
                f"{what}: largest error of a logit over its bound",
                float((error / pair.program.error_bounds()).max()),
                "1",
                target=1.0,
                n=count,
            ),
            row(
                f"{what}: error of the logits over their standard deviation",
                float(error.std() / clear.std()),
                "1",
                n=count,
                note=f"largest error {error.max():.2g}, largest |logit| {np.abs(clear).max():.3g}",
            ),
        ]
    return made
