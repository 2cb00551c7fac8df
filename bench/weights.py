"""A tail of a thousand by a thousand weights: compiled, encoded, and shared by evaluators through a file.

An evaluator keeps encoded weights in memory of its own, or maps the file that the first one
of its node wrote. Both are opened in turns, and then evaluate in turns; replies are the same
bytes. Everything runs on one thread.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bench.interleave import clocked, interleaved, median_ratio, summary
from bench.rows import Row, row
from bench.tails import Client, random_layers
from blindtail.he.backends import settle
from blindtail.he.compiler import compile_tail
from blindtail.he.layers import FloatArray
from blindtail.he.native_backend import NativeEvaluator
from blindtail.he.program import Program

SOURCES = (
    "native/src/*",
    "blindtail/he/*.py",
    "bench/interleave.py",
    "bench/tails.py",
    "bench/weights.py",
)

WIDTHS = (1024, 1024, 10)
NET = "1024-1024-x^2-10"
COMPILE_S, ENCODE_S, ENCODED_BYTES = 5.0, 2.0, 64e6
_COMPILED = 3


def rows(args: argparse.Namespace) -> list[Row]:
    settle("native")  # says what to do where it was not built
    quick = bool(args.quick)
    calibration = np.random.default_rng(1).uniform(0, 1, (200, WIDTHS[0]))
    layers = random_layers(WIDTHS)
    compiled_s = []
    for _ in range(1 if quick else _COMPILED):
        start = time.perf_counter()
        program = compile_tail(layers, calibration)
        compiled_s.append(time.perf_counter() - start)
    made = [
        row(
            f"{NET}: compiled",
            statistics.median(compiled_s),
            "s",
            target=COMPILE_S,
            **summary(compiled_s),
        )
    ]
    with tempfile.TemporaryDirectory() as folder:
        made += _opened(program, Path(folder), quick)
        made += _evaluated(program, Path(folder), calibration[0], quick)
    return made


def _opened(program: Program, folder: Path, quick: bool) -> Iterator[Row]:
    empty = (folder / f"empty-{i}" for i in itertools.count())
    shared = folder / "shared"
    first = NativeEvaluator(program, weights=shared)
    if not first.shares_weights:
        raise RuntimeError("the temporary folder takes no file")
    more = [first]
    for name, place in (("in the file", shared), ("of its own", None)):
        before = _private_bytes()
        more.append(NativeEvaluator(program, weights=place))
        grown = _private_bytes() - before
        yield row(f"{NET}: private memory of one evaluator more, weights {name}", grown, "bytes")

    def fresh() -> Program:
        return Program(program.spec, program.ops)  # its weights have not been hashed yet

    def write(_: int) -> None:
        at = next(empty)
        NativeEvaluator(fresh(), weights=at)
        for path in at.iterdir():
            path.unlink()  # or the folder fills up while this is measured

    seconds = interleaved(
        {
            "own": clocked(lambda _: NativeEvaluator(fresh())),
            "first": clocked(write),
            "again": clocked(lambda _: NativeEvaluator(fresh(), weights=shared)),
        },
        quick,
    )
    for name, what, target in (
        ("own", "all diagonals and biases encoded, an evaluator opened", ENCODE_S),
        ("first", "the same, written to a file, checked and mapped", None),
        ("again", "an evaluator opened that finds the file", None),
    ):
        median = statistics.median(seconds[name])
        yield row(f"{NET}: {what}", median, "s", target=target, **summary(seconds[name]))
    size, bits = first.plain_bytes, first.word_bits
    yield row(f"{NET}: encoded weights", size, "bytes", target=ENCODED_BYTES, note=f"{bits}-bit words")


def _evaluated(program: Program, folder: Path, x: FloatArray, quick: bool) -> Iterator[Row]:
    client = Client.of(program, "native")
    request = client.encryptor.encrypt(x)
    mapped = NativeEvaluator(program, weights=folder / "shared")
    if mapped.evaluate(client.keys, request) != client.evaluate("native", request):
        raise RuntimeError("weights in a file changed a reply")
    own = clocked(lambda _: client.evaluate("native", request))
    seconds = interleaved(
        {"own": own, "mapped": clocked(lambda _: mapped.evaluate(client.keys, request)), "again": own}, quick
    )
    yield row(f"{NET}: evaluation", statistics.median(seconds["own"]), "s", **summary(seconds["own"]))
    yield row(
        f"{NET}: evaluation with weights in the file, over weights of its own",
        median_ratio(seconds["mapped"], seconds["own"]),
        "1",
        n=len(seconds["mapped"]),
        note=f"the same twice: {median_ratio(seconds['again'], seconds['own']):.3f}",
    )


def _private_bytes() -> int:
    """Memory of this process that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0
