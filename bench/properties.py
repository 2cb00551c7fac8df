"""Random tails at full size: the compiled program is exact, and real ciphertexts keep their bound.

A slice of the same runs in the tests. `--quick` takes a tenth.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np

from bench.rows import Row, row
from bench.tails import Client, random_layers
from blindtail.he.clear import ClearEvaluator
from blindtail.he.compiler import compile_tail
from blindtail.he.layers import FloatArray
from blindtail.he.normal import normalised
from blindtail.he.program import Program

SOURCES = ("blindtail/he/*.py", "native/src/*", "bench/properties.py", "bench/tails.py")
_EXACT, _ENCRYPTED = 500, 60


def rows(args: argparse.Namespace) -> list[Row]:
    scale = 10 if args.quick else 1
    exact, encrypted = _EXACT // scale, _ENCRYPTED // scale
    wrong = 0
    for seed in range(exact):
        program, x, want = _case(seed)
        got = ClearEvaluator(program).logits(x)
        again = Program.from_parts(*program.to_parts())
        good = np.allclose(got, want, rtol=1e-9, atol=1e-9 * max(1.0, float(np.abs(want).max())))
        wrong += not (good and again.spec == program.spec)
        _progress("exact", seed + 1, exact)
    ratios: dict[str, list[FloatArray]] = {}
    for seed in range(encrypted):
        for backend, found in _encrypted(*_case(seed)).items():
            ratios.setdefault(backend, []).append(found)
        _progress("encrypted", seed + 1, encrypted)
    made = [row("random tails that differ from their layers", wrong, "tails", target=0, n=exact)]
    for backend, parts in ratios.items():
        of_bound = np.concatenate(parts)
        made += [
            row(
                f"{backend}: largest error over its bound",
                float(of_bound.max()),
                "1",
                target=1,
                n=len(of_bound),
                note="same keys and requests on every backend",
            ),
            row(
                f"{backend}: median of bound over error",
                float(1 / np.median(of_bound)),
                "1",
                target=32,
                n=len(of_bound),
                note=f"{encrypted} random tails on real ciphertexts",
            ),
        ]
    return made


def _case(seed: int) -> tuple[Program, FloatArray, FloatArray]:
    """A program, inputs (a few ciphertexts' worth) and the logits its layers give."""
    rng = np.random.default_rng(seed)
    widths = rng.integers(1, 257, int(rng.integers(2, 5))).tolist()
    lanes = int(rng.choice([1, 1, 1, 2, 8]))
    layers = random_layers(widths, seed, plain=bool(rng.random() < 0.5))
    calibration = np.abs(rng.normal(size=(100, widths[0])))
    x = np.abs(rng.normal(size=(3 * lanes, widths[0])))
    return compile_tail(layers, calibration, lanes=lanes), x, normalised(layers)(x)


def _encrypted(program: Program, x: FloatArray, want: FloatArray) -> dict[str, FloatArray]:
    """|error| / bound of every logit, by backend; `seal`, and `native` where it was built."""
    spec = program.spec
    client = Client.of(program, "seal", "auto")
    found: dict[str, list[FloatArray]] = {backend: [] for backend in client.loaded}
    for start in range(0, len(x), spec.lanes):
        part = slice(start, start + spec.lanes)
        request = client.encryptor.encrypt(x[part])
        for backend, ratios in found.items():
            got = client.decryptor.decrypt(client.evaluate(backend, request))
            ratios.append((np.abs(np.atleast_2d(got) - want[part]) / program.error_bounds()).ravel())
    return {backend: np.concatenate(ratios) for backend, ratios in found.items()}


def _progress(what: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{what} {done}/{total} ", end="" if done < total else "\n", file=sys.stderr, flush=True)
