"""The encrypted tail beside TenSEAL's own matrix product: seconds, bytes and error, one thread.

`eval_s` runs from container in to container out. TenSEAL's `CKKSVector.mm` is
given the parameters its tutorial uses for the same net, its ciphertext already
parsed, and only its evaluation is timed. Rounds of both interleave in one run;
weights and inputs come from fixed seeds. Three timed rounds where one takes
over a second, else twenty, after one warm-up.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.rows import Row, row
from bench.tails import Client, random_layers
from blindtail.bundle import CloudBundle
from blindtail.he.clear import ClearEvaluator
from blindtail.he.compiler import compile_tail
from blindtail.he.layers import FloatArray
from blindtail.he.program import MapOp, Program

SOURCES = ("blindtail/he/*.py", "bench/he.py", "bench/tails.py")

#: Fully connected tails with a square after each layer but the last.
NETS = {"B": (512, 128, 10), "C": (784, 128, 128, 10)}
#: TenSEAL's parameters for them, as its users run it.
TENSEAL = {"B": (8192, [40, 30, 30, 30, 40]), "C": (8192, [31, 26, 26, 26, 26, 26, 26, 31])}
_TARGET_S = {"B": 0.15}
_SLOW_S = 1.0


def rows(args: argparse.Namespace) -> list[Row]:
    quick = bool(getattr(args, "quick", False))
    found: list[Row] = []
    nets: dict[str, Program] = {}
    inputs: dict[str, FloatArray] = {}
    for name, widths in NETS.items():
        calibration = np.random.default_rng(1).uniform(0, 1, (200, widths[0]))
        nets[name] = compile_tail(random_layers(widths), calibration)
        inputs[name] = calibration[:20]
    demo = Path(__file__).parents[1] / "blindtail/models/zoo/fashion/cloud.bt"
    if demo.exists():
        for cut, program in CloudBundle.open(demo).programs.items():
            name = f"demo (cut {cut})"
            nets[name] = program
            bound = program.spec.input_bound / 4
            inputs[name] = np.random.default_rng(2).uniform(0, bound, (20, program.spec.features))
    for name, program in nets.items():
        found += _net(name, program, inputs[name], quick)
    return found


def _net(name: str, program: Program, x: FloatArray, quick: bool) -> list[Row]:
    spec = program.spec
    client = Client.of(program)
    evaluator, keys = client.evaluator, client.keys
    encryptor, decryptor = client.encryptor, client.decryptor
    want = ClearEvaluator(program).logits(x)
    requests = [encryptor.encrypt(values) for values in x]
    timed: dict[str, Callable[[int], Any]] = {
        "blindtail": lambda i: evaluator.evaluate(keys, requests[i % len(x)]),
        "encrypt": lambda i: encryptor.encrypt(x[i % len(x)]),
    }
    rival = None if quick or name not in TENSEAL else _tenseal(program, *TENSEAL[name], x)
    if rival is not None:
        timed["tenseal"] = rival
    reply = evaluator.evaluate(keys, requests[0])
    timed["decrypt"] = lambda _: decryptor.decrypt(reply)
    seconds = _interleaved(timed)
    error = max(
        float(np.abs(decryptor.decrypt(evaluator.evaluate(keys, request)) - logits).max())
        for request, logits in zip(requests, want, strict=True)
    )
    net: dict[str, Any] = {
        "net": name,
        "threads": 1,
        "uplink_bytes": spec.uplink_bytes,
        "key_bytes": spec.key_bytes,
        "reply_bytes": spec.reply_bytes,
    }
    ours = seconds["blindtail"]
    made = [
        _row(
            f"{name}: server evaluation, seal backend",
            ours,
            target=_TARGET_S.get(name),
            note=f"predicted {program.predicted_s('seal'):.3g} s; max |logit| {np.abs(want).max():.3g}",
            **net,
            backend="seal",
            eval_s=statistics.median(ours),
            max_abs_err=error,
        ),
        _row(f"{name}: encrypt and pack at the edge", seconds["encrypt"]),
        _row(f"{name}: unpack, decrypt and decode at the edge", seconds["decrypt"]),
    ]
    if "tenseal" in seconds:
        theirs = statistics.median(seconds["tenseal"])
        made.append(_row(f"{name}: server evaluation, TenSEAL 0.3.18 mm", seconds["tenseal"]))
        made.append(
            row(
                f"{name}: TenSEAL's time over ours",
                theirs / statistics.median(ours),
                "x",
                target=1.0,
                at_most=False,
                n=len(seconds["tenseal"]),
                note="same run, same core",
            )
        )
    halves = statistics.median(ours[::2]) / statistics.median(ours[1::2])
    made.append(row(f"{name}: machine noise, ours over ours", halves, "x", n=len(ours)))
    return made


def _row(name: str, seconds: list[float], **more: Any) -> Row:
    spread = float(np.percentile(seconds, 95) - np.percentile(seconds, 5))
    return row(name, statistics.median(seconds), "s", n=len(seconds), spread=spread, **more)


def _interleaved(timed: dict[str, Callable[[int], Any]]) -> dict[str, list[float]]:
    """Seconds of each; one warm-up round decides how many rounds each gets."""
    seconds: dict[str, list[float]] = {}
    rounds: dict[str, int] = {}
    for name, call in timed.items():
        start = time.perf_counter()
        call(0)
        rounds[name] = 3 if time.perf_counter() - start > _SLOW_S else 20
        seconds[name] = []
    for i in range(max(rounds.values())):
        for name, call in timed.items():
            if i < rounds[name]:
                start = time.perf_counter()
                call(i)
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _tenseal(program: Program, degree: int, bits: list[int], x: FloatArray) -> Callable[[int], Any]:
    import tenseal as ts

    context = ts.context(ts.SCHEME_TYPE.CKKS, degree, coeff_mod_bit_sizes=bits, n_threads=1)
    context.global_scale = 2 ** bits[1]
    context.generate_galois_keys()
    maps = [op for op in program.ops if isinstance(op, MapOp)]
    matrices = [(op.weight.T.tolist(), op.bias.tolist()) for op in maps]
    vectors = [ts.ckks_vector(context, values.tolist()) for values in x]

    def evaluate(i: int) -> Any:
        out = vectors[i % len(vectors)]
        for index, (matrix, bias) in enumerate(matrices):
            out = out.mm(matrix) + bias
            if index < len(matrices) - 1:
                out = out.square()
        return out

    return evaluate
