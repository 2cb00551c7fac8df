"""Warm round trip on loopback, no shaping: image in, answer from the encrypted tail out, step by step.

A real `blindtail cloud` process (its own Ray cluster, one evaluator) and an
`EdgeRuntime` in this process that offloads everything, over plaintext gRPC on
loopback. Steps are those of `blindtail.records.Timings`; `network` is the round trip
less queue and evaluation, so it holds serialisation and both processes' gRPC.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from bench.rows import Row, row
from blindtail.models.zoo import bundle_paths
from edge.processes import Child
from edge.runtime import EdgeRuntime
from edge.verify import read_images

#: Two processes share the machine: pinning them to one core would measure that.
PIN_CPU = False
SOURCES = (
    "bench/roundtrip.py",
    "blindtail/**/*.py",
    "edge/*.py",
    "cloud/*.py",
    "blindtail/models/zoo/fashion/*.bt",
)
STEPS = ("head", "exits", "decide", "encrypt", "network", "queue", "eval", "decrypt")
_START_S = 120.0


def rows(args: argparse.Namespace) -> list[Row]:
    from edge.pair import ModelPair

    count = 30 if args.quick else 300
    edge_bt, cloud_bt = bundle_paths("fashion")
    pair = ModelPair.open(edge_bt, cloud_bt)
    pixels, _ = read_images(pair, "fashion", "test", count)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="btbench-")))
        announce = folder / "cloud.json"
        command = [
            "blindtail",
            "cloud",
            str(cloud_bt),
            "--evaluators",
            "1",
            "--port",
            "0",
        ]
        command += ["--state-dir", str(folder / "cloud"), "--announce", str(announce)]
        cloud = stack.enter_context(Child("cloud", command, folder / "cloud.log"))
        address = cloud.announcement(announce, _START_S)["address"]
        edge = stack.enter_context(
            EdgeRuntime.open(
                pair.edge,
                address,
                credentials="insecure-loopback",
                policy="cloud-only",
                state_dir=folder / "edge",
            )
        )
        if not edge.wait_ready(_START_S):
            raise RuntimeError(f"the tail was not ready: {edge.status().tails}; {cloud.hint()}")
        for image in pixels[:10]:
            edge.infer(image)
        answers = [edge.infer(image) for image in pixels]
    late = sum(a.route != "tail" for a in answers)
    if late:
        raise RuntimeError(f"{late} of {count} answers did not come from the tail")
    note = "seal, one evaluator, one request at a time"
    made = [_row("round trip, total", [a.timings.total_s for a in answers], note)]
    for step in STEPS:
        made.append(_row(f"round trip, {step}", [getattr(a.timings, f"{step}_s") for a in answers], ""))
    named = [sum(getattr(a.timings, f"{step}_s") for step in STEPS) for a in answers]
    rest = [a.timings.total_s - n for a, n in zip(answers, named, strict=True)]
    made.append(_row("round trip, the rest", rest, "Python between the steps"))
    made.append(row("uplink", answers[0].uplink_bytes, "bytes", target=125_000, n=count))
    made.append(row("reply", answers[0].reply_bytes, "bytes", target=30_000, n=count))
    return made


def _row(name: str, seconds: list[float], note: str) -> Row:
    low, p50, p95 = np.percentile(seconds, [5, 50, 95])
    return row(f"{name}, p50", float(p50), "s", n=len(seconds), spread=float(p95 - low), note=note)
