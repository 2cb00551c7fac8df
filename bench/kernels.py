"""The engine's parts beside SEAL's, on the same core, for rings of 4096, 8192 and 16384.

Every prime lies just below 2^30, for both; the levels are those that tails use. SEAL
(through TenSEAL) has no hoisting: what stands beside its rotation is ours alone and ours
among others of one ciphertext, each with its own key. Its transform is timed on a whole
ciphertext, per limb. Both take turns, in an order that rotates.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from typing import Any

import numpy as np

from bench.interleave import Run, clocked, interleaved, median_ratio, summary
from bench.rows import Row, row
from blindtail.he import sealio
from blindtail.he.backends import settle
from blindtail.he.params import Parameters

SOURCES = ("native/src/*", "blindtail/he/params.py", "bench/kernels.py", "bench/interleave.py")

#: Ring degree -> levels: one map; a tail with two squares, and with three.
LEVELS = {4096: 1, 8192: 5, 16384: 7}
ROTATION, HOISTED = 8.0, 25.0
#: Rotations of one ciphertext that share its digits.
SHARING = 8


def rows(args: argparse.Namespace) -> list[Row]:
    settle("native")  # says what to do where it was not built
    made: list[Row] = []
    for degree, levels in LEVELS.items():
        made += _ring(Parameters.create(levels, degree), bool(args.quick))
    return made


def _ring(parameters: Parameters, quick: bool) -> list[Row]:
    native: Any = importlib.import_module("blindtail.he._native")
    n, primes = parameters.ring_degree, len(parameters.primes)
    timer = native.Timer(n.bit_length() - 1, list(parameters.key_primes), rotations=SHARING)
    runs = {
        part: _part(timer, part) for part in ("ntt", "inverse", "rotation", "hoisted", "shared", "square")
    }
    seal = _seal(parameters)
    seconds = interleaved(runs | {"rotation again": runs["rotation"]} | seal, quick)
    limbs = 2 * primes
    for name in ("seal ntt", "seal inverse"):
        seconds[name] = [s / limbs for s in seconds[name]]
    of = f"N = {n}, {primes} primes"
    made = []
    for part, what, beside, target in (
        ("rotation", "rotation", "seal rotation", ROTATION),
        ("hoisted", "hoisted rotation, mod-down deferred", "seal rotation", HOISTED),
        ("shared", f"one of {SHARING} rotations, decomposition and mod-down included", "seal rotation", None),
        ("square", "square, relinearise, rescale", "seal square", None),
        ("ntt", "transform of a limb", "seal ntt", None),
        ("inverse", "inverse transform of a limb", "seal inverse", None),
    ):
        ours, theirs = statistics.median(seconds[part]), statistics.median(seconds[beside])
        made.append(
            row(
                f"{of}: {what}, SEAL's time over ours",
                theirs / ours,
                "x",
                target=target,
                at_most=False,
                n=len(seconds[part]),
                note=f"ours {ours * 1e6:.4g} us, SEAL's {theirs * 1e6:.4g} us",
            )
        )
        made.append(row(f"{of}: {what}", ours, "s", **summary(seconds[part])))
    noise = abs(median_ratio(seconds["rotation again"], seconds["rotation"]) - 1)
    made.append(
        row(f"{of}: machine noise, our rotation measured twice", noise, "1", n=len(seconds["rotation"]))
    )
    return made


def _part(timer: Any, part: str) -> Run:
    return lambda _, times: [float(s) for s in timer.run(part, times)]


def _seal(parameters: Parameters) -> dict[str, Run]:
    """SEAL's rotation, square with relinearisation and rescaling, and transforms of a ciphertext."""
    api, seal = sealio.api(), sealio.SealContext.of(parameters)
    generator = api.KeyGenerator(seal.context)
    public, relinearisation, galois = api.PublicKey(), api.RelinKeys(), api.GaloisKeys()
    generator.create_public_key(public)
    generator.create_relin_keys(relinearisation)
    generator.create_galois_keys([parameters.galois_element(1)], galois)
    evaluator = api.Evaluator(seal.context)
    plain, fresh = api.Plaintext(), api.Ciphertext()
    values = np.random.default_rng(0).normal(size=parameters.slots).tolist()
    # The square's scale must fit the modulus that is left.
    seal.encoder.encode(values, seal.parms_ids[-1], 2.0**12, plain)
    api.Encryptor(seal.context, public).encrypt(plain, fresh)
    out, turned = api.Ciphertext(), api.Ciphertext()
    evaluator.transform_from_ntt(fresh, turned)  # coefficient form before and after every run

    def square(_: int) -> None:
        evaluator.square(fresh, out)
        evaluator.relinearize_inplace(out, relinearisation)
        evaluator.rescale_to_next_inplace(out)

    def transform(inverse: bool) -> Run:
        there, back = evaluator.transform_to_ntt_inplace, evaluator.transform_from_ntt_inplace

        def run(_: int, times: int) -> list[float]:
            found = []
            for _ in range(times):
                start = time.perf_counter()
                there(turned)
                middle = time.perf_counter()
                back(turned)
                found.append(time.perf_counter() - middle if inverse else middle - start)
            return found

        return run

    return {
        "seal rotation": clocked(lambda _: evaluator.rotate_vector(fresh, 1, galois, out)),
        "seal square": clocked(square),
        "seal ntt": transform(inverse=False),
        "seal inverse": transform(inverse=True),
    }
