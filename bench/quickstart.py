"""A new edge in a fresh directory: from its certificate to its first encrypted answer, command by command.

A cell with mutual TLS runs already, as it would somewhere else. The device needs
edge.bt and the authority's folder; every command is a process of its own, as typed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from bench.rows import Row, row
from blindtail.models.zoo import bundle_paths
from edge.processes import Child

PIN_CPU = False
SOURCES = ("bench/quickstart.py", "blindtail/**/*.py", "cloud/*.py", "edge/*.py")
_START_S = 120.0


def rows(args: argparse.Namespace) -> list[Row]:
    """`args.quick`: once instead of five times."""
    edge_bt, cloud_bt = bundle_paths("fashion")
    taken: list[list[float]] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="btbench-")))
        authority = folder / "authority"
        _blindtail(folder, "certs", "init", str(authority))
        _blindtail(
            folder,
            "certs",
            "issue",
            str(authority),
            "cell-1",
            "--role",
            "cell",
            "--out",
            str(folder / "cell"),
        )
        settings = folder / "cell.toml"
        settings.write_text(
            'tls = { certificate = "cell/cell-1.pem", key = "cell/cell-1.key", client_ca = "cell/ca.pem" }\n'
        )
        announce = folder / "cell.json"
        command = ["blindtail", "cloud", str(cloud_bt), "--config", str(settings), "--evaluators", "1"]
        command += ["--state-dir", str(folder / "state"), "--announce", str(announce)]
        cell = stack.enter_context(Child("cloud", command, folder / "cell.log"))
        address = cell.announcement(announce, _START_S)["address"]
        for number in range(1 if args.quick else 5):
            device = folder / f"device-{number}"
            device.mkdir()
            taken.append(_join(device, authority, edge_bt, address, f"camera-{number}"))
    steps = ("certificate", "keys, upload and first encrypted answer")
    made = [row("commands", len(steps), "1", target=5)]
    for step, seconds in zip(steps, zip(*taken, strict=True), strict=True):
        made.append(_row(step, list(seconds)))
    made.append(_row("from certificate to first encrypted answer", [sum(t) for t in taken]))
    return made


def _join(device: Path, authority: Path, edge_bt: Path, address: str, name: str) -> list[float]:
    """Seconds of each command. Raises `RuntimeError` when the answer is not the tail's."""
    start_s = time.monotonic()
    _blindtail(device, "certs", "issue", str(authority), name, "--role", "edge", "--out", "me")
    issued_s = time.monotonic()
    tls = ["--ca", "me/ca.pem", "--certificate", f"me/{name}.pem", "--key", f"me/{name}.key"]
    where = ["--cloud", address, "--state-dir", "state", "--policy", "cloud-only", "--json"]
    answer = json.loads(_blindtail(device, "infer", str(edge_bt), "fashion:7", *where, *tls))
    if answer["route"] != "tail":
        raise RuntimeError(f"the answer came from {answer['route']}: {answer['problems']}")
    return [issued_s - start_s, time.monotonic() - issued_s]


def _blindtail(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "blindtail", *arguments]
    env = {**os.environ, "HOME": str(folder)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=_START_S)
    if done.returncode:
        raise RuntimeError(f"blindtail {' '.join(arguments[:2])}: {done.stderr.strip()}")
    return done.stdout


def _row(name: str, seconds: list[float]) -> Row:
    spread = float(np.percentile(seconds, 95) - np.percentile(seconds, 5)) if len(seconds) > 1 else None
    return row(name, float(np.median(seconds)), "s", n=len(seconds), spread=spread)
