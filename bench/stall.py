"""Longest stall of `infer` while keys are generated and uploaded, above its normal p99.

The runtime answers from its exits in a loop, first alone, then while a key process
makes the keys and uploads them to a cell in another process; the loop alone is
measured once more afterwards, which shows the machine's own noise. The claim is
about an upload paced to the uplink, as in the field; an unpaced one is shown too.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.rows import Row, row, text
from blindtail.models.zoo import bundle_paths
from blindtail.rpc import INSECURE_LOOPBACK
from edge.runtime import EdgeRuntime

Floats = NDArray[np.float64]

#: The processes must be free to use both cores, as on a device.
PIN_CPU = False
SOURCES = ("bench/stall.py", "edge/*.py", "blindtail/he/secret.py", "blindtail/he/sealio.py")

TARGET_S = 0.020
#: Between two images: a camera, not a flood.
PERIOD_S = 0.002
UPLINK_BPS = 40e6
NET = "fashion"


def rows(args: argparse.Namespace) -> list[Row]:
    """`args.quick`: one run of each kind instead of three."""
    runs = 1 if args.quick else 3
    alone_s = 3.0 if args.quick else 10.0
    edge_bt, cloud_bt = bundle_paths(NET)
    made: list[Row] = []
    with _cell(cloud_bt) as address:
        for name, uplink_bps in (("paced", UPLINK_BPS), ("unpaced", None)):
            before: list[Floats] = []
            during: list[Floats] = []
            after: list[Floats] = []
            seconds: list[float] = []
            for _ in range(runs):
                parts = _one(edge_bt, address, uplink_bps, alone_s)
                for kept, part in zip((before, during, after), parts[:3], strict=True):
                    kept.append(part)
                seconds.append(parts[3])
            normal = np.concatenate([*before, *after])
            loaded = np.concatenate(during)
            p99_s = float(np.quantile(normal[:, 0], 0.99))
            own_s = float((loaded[:, 0] - loaded[:, 1]).max())
            count = len(loaded)
            made += [
                row(f"infer p99, alone ({name})", p99_s, "s", n=len(normal)),
                row(
                    f"longest stall above p99 while keys are made and uploaded ({name})",
                    float(loaded[:, 0].max()) - p99_s,
                    "s",
                    target=TARGET_S if uplink_bps is not None else None,
                    n=count,
                    note=f"{runs} runs, each {np.mean(seconds):.1f} s from start to ready",
                ),
                row(
                    f"longest stall above p99, alone ({name})",
                    float(normal[:, 0].max()) - p99_s,
                    "s",
                    n=len(normal),
                    note="the machine's noise",
                ),
                row(
                    f"longest answer less its wait for a processor, keys on the way ({name})",
                    own_s,
                    "s",
                    n=count,
                    note="what this process itself may hold up",
                ),
                row(
                    f"infer p99 while keys are made and uploaded ({name})",
                    float(np.quantile(loaded[:, 0], 0.99)),
                    "s",
                    n=count,
                ),
            ]
    return made


def _one(
    edge_bt: Path, address: str, uplink_bps: float | None, alone_s: float
) -> tuple[Floats, Floats, Floats, float]:
    """Seconds of each `infer` alone, during keys, and alone again; and how long keys took."""
    with EdgeRuntime.open(edge_bt, policy="edge-only") as edge:
        before = _loop(edge, _for(alone_s))
    with (
        tempfile.TemporaryDirectory() as state,
        EdgeRuntime.open(
            edge_bt,
            address,
            credentials=INSECURE_LOOPBACK,
            policy="edge-only",
            state_dir=state,
            uplink_bps=uplink_bps,
        ) as edge,
    ):
        start_s = time.monotonic()
        during = _loop(edge, lambda: not edge.wait_ready(0.0) and time.monotonic() < start_s + 120)
        took_s = time.monotonic() - start_s
        if not edge.wait_ready(0.0):
            raise RuntimeError(f"keys were not ready after {took_s:.0f} s: {edge.status().tails}")
        after = _loop(edge, _for(alone_s))
    return before, during, after, took_s


def _for(seconds: float) -> Callable[[], bool]:
    end_s = time.monotonic() + seconds
    return lambda: time.monotonic() < end_s


def _loop(edge: EdgeRuntime, goes_on: Callable[[], bool]) -> Floats:
    """Shape (images, 2): seconds from an image's due time to its answer, so that a stall between two
    calls counts too; and how much of it this thread was ready but had no processor."""
    shape = edge.bundle.preprocessing.input_shape
    image = np.random.default_rng(0).integers(0, 256, shape).astype(edge.bundle.preprocessing.dtype)
    seconds: list[tuple[float, float]] = []
    waited_s = _waited_s()
    due_s = time.perf_counter()
    while goes_on():
        due_s += PERIOD_S
        time.sleep(max(0.0, due_s - time.perf_counter()))
        edge.infer(image)
        done_s = time.perf_counter()
        waited_s, before_s = _waited_s(), waited_s
        seconds.append((done_s - due_s, waited_s - before_s))
        due_s = max(due_s, done_s - PERIOD_S)  # images missed meanwhile are dropped
    return np.asarray(seconds).reshape(-1, 2)


def _waited_s() -> float:
    """Time that this thread was ready to run and had no processor; 0 where the system does not tell."""
    try:
        fields = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat").read_text().split()
    except OSError:
        return 0.0
    return int(fields[1]) / 1e9


@contextmanager
def _cell(cloud_bt: Path) -> Iterator[str]:
    """A cell in a process of its own, as in the field; yields its address."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(there, str(cloud_bt)), daemon=False)
    process.start()
    there.close()
    try:
        if not here.poll(60):
            raise RuntimeError("the cell did not start")
        yield here.recv()
    finally:
        here.close()
        process.join(15)
        if process.is_alive():
            process.kill()
            process.join()


def _serve(pipe: Connection, cloud_bt: str) -> None:
    from cloud.local import LocalCell

    os.nice(19)  # it stands for another machine, so it must not take the edge's time here
    with LocalCell([cloud_bt], backend="seal") as cell:
        pipe.send(cell.address)
        try:
            pipe.recv()
        except EOFError:  # the parent closed its end, or is gone
            return


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.stall", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--quick", action="store_true", help="one run of each kind")
    args: Any = parser.parse_args(arguments)
    made = rows(args)
    print(json.dumps(made, indent=1) if args.json else text(made))
    return 0 if all(r["holds"] is not False for r in made) else 1


if __name__ == "__main__":
    sys.exit(main())
