"""Orchestrator, gateway, raylet and evaluator killed in turn in a running demo: how long until each is back.

`blindtail demo --chaos`: four processes and this one, images at a fixed pace through a
link of 20 Mbit/s and 20 ms. "back" is counted from SIGKILL until the system is whole
again; "first encrypted answer" until the tail has answered an image that came after the kill.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from bench.rows import Row, row
from edge.demo import DemoConfig, run_demo

#: The demo's processes share the machine.
PIN_CPU = False
SOURCES = ("bench/recovery.py", "blindtail/*.py", "cloud/*.py", "edge/*.py", "orchestrator/*.py")
PACE, IMAGES = 25.0, 2500


def rows(args: argparse.Namespace) -> list[Row]:
    """`args.quick`: half as many images."""
    images = IMAGES // 2 if args.quick else IMAGES
    with tempfile.TemporaryDirectory(prefix="btbench-") as folder:
        report = run_demo(DemoConfig(out=Path(folder), images=images, chaos=True, images_per_s=PACE))
    late = sum(o["late"] for o in report["objectives"])
    made = [
        row("images not answered", images - report["answered"], "1", target=0, n=images),
        row("answers later than deadline + 50 ms", late, "1", target=0, n=images),
    ]
    for found in report["recoveries"]:
        what = found["recovered_when"]
        made.append(row(f"{found['victim']} killed: back after", found["recovered_s"], "s", note=what))
        first = found["first_encrypted_answer_s"]
        if first is not None:
            note = f"{found['fallbacks_meanwhile']} fallbacks until then"
            made.append(row(f"{found['victim']} killed: first encrypted answer", first, "s", note=note))
    tail = report["routes"].get("tail", {"count": 0})
    made.append(row("encrypted answers in all", tail["count"], "1", target=100, at_most=False, n=images))
    return made
