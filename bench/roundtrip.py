"""Warm round trip on loopback, no shaping: image in, answer from the encrypted tail out, step by step.

A real `blindtail cloud` process (its own Ray cluster, one evaluator) and an
`EdgeRuntime` in this process that offloads everything, over plaintext gRPC on
loopback. Steps are those of `blindtail.records.Timings`; `network` is the round trip
less queue and evaluation, so it holds serialisation and both processes' gRPC.

Twice: without tickets, image after image; and with a ticket for each image, made,
announced and worked on in the pause before it, which is not counted.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.rows import Row, row
from blindtail.bundle import EdgeBundle
from blindtail.models.zoo import bundle_paths
from blindtail.records import Answer
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
_TICKETS = 2
#: For the cloud to make a ticket, and at most for the edge to announce one.
_PAUSE_S = (0.03, 0.5)


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
        plain = _answers(pair.edge, address, folder, cloud, pixels, tickets=0)
        paced = _answers(pair.edge, address, folder, cloud, pixels, tickets=_TICKETS)
    by_ticket = [a for a in paced if "ticket" in a.extra]
    made = _breakdown("round trip", plain, "one evaluator, one request at a time, no tickets")
    if by_ticket:
        made += _breakdown("by ticket", by_ticket, "the cloud had worked ahead; pauses between images")
    made.append(row("by ticket, share of paced images", len(by_ticket) / count, "1", n=count))
    made.append(row("uplink", plain[0].uplink_bytes, "bytes", target=125_000, n=count))
    made.append(row("reply", plain[0].reply_bytes, "bytes", target=30_000, n=count))
    return made


def _answers(
    bundle: EdgeBundle, address: str, folder: Path, cloud: Child, pixels: NDArray[Any], *, tickets: int
) -> list[Answer]:
    """One answer of the tail for each image, after ten to warm up; a pause before each where tickets are."""
    with EdgeRuntime.open(
        bundle,
        address,
        credentials="insecure-loopback",
        policy="cloud-only",
        state_dir=folder / "edge",
        tickets=tickets,
    ) as edge:
        if not edge.wait_ready(_START_S):
            raise RuntimeError(f"the tail was not ready: {edge.status().tails}; {cloud.hint()}")
        for image in pixels[:10]:
            edge.infer(image)
        answers = []
        for image in pixels:
            if tickets:
                _pause(edge, tickets)
            answers.append(edge.infer(image))
    late = sum(a.route != "tail" for a in answers)
    if late:
        raise RuntimeError(f"{late} of {len(answers)} answers did not come from the tail")
    return answers


def _pause(edge: EdgeRuntime, tickets: int) -> None:
    """Until every ticket has been announced, and for the cloud to make the last one; a cloud without
    tickets is not waited for."""
    end_s = time.monotonic() + _PAUSE_S[1]
    while time.monotonic() < end_s and any(t.tickets < tickets for t in edge.status().tails.values()):
        time.sleep(0.001)
    time.sleep(_PAUSE_S[0])


def _breakdown(name: str, answers: Sequence[Answer], note: str) -> list[Row]:
    made = [_row(f"{name}, total", [a.timings.total_s for a in answers], note)]
    for step in STEPS:
        made.append(_row(f"{name}, {step}", [getattr(a.timings, f"{step}_s") for a in answers], ""))
    named = [sum(getattr(a.timings, f"{step}_s") for step in STEPS) for a in answers]
    rest = [a.timings.total_s - n for a, n in zip(answers, named, strict=True)]
    return [*made, _row(f"{name}, the rest", rest, "Python between the steps")]


def _row(name: str, seconds: list[float], note: str) -> Row:
    low, p50, p95 = np.percentile(seconds, [5, 50, 95])
    return row(f"{name}, p50", float(p50), "s", n=len(seconds), spread=float(p95 - low), note=note)
