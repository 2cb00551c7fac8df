"""A cell loses power, another drains: how long until the tail answers a device again, and what it notices.

Two `blindtail cloud` processes, each with a Ray cluster of its own, hand each other
evaluation keys. A device offloads image after image, encrypted, to the first; that
one and everything below it gets SIGKILL. It is started again, and the second,
which has taken over, is drained by SIGTERM while the device goes on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
import urllib.request
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.rows import Row, row
from blindtail.bundle import EdgeBundle
from blindtail.models.zoo import bundle_paths
from blindtail.ports import free_port
from blindtail.records import Answer
from edge.images import read_set
from edge.processes import Child
from edge.runtime import EdgeRuntime

#: Three processes share the machine.
PIN_CPU = False
SOURCES = ("bench/failover.py", "blindtail/**/*.py", "cloud/*.py", "edge/*.py")
_START_S, _COPIED_S, _STREAM_S = 120.0, 60.0, 3.0


@dataclass
class _Cell:
    child: Child
    address: str
    announce: Path

    def described(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.announce.read_text())
        return found


class _Stream:
    """Offloads image after image on a thread; every answer with the time at which it began."""

    def __init__(self, device: EdgeRuntime, images: Any) -> None:
        self.answers: list[tuple[float, float, Answer]] = []
        self._device, self._images = device, images
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> _Stream:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        number = 0
        while not self._stop.is_set():
            began_s = time.monotonic()
            answer = self._device.infer(self._images[number % len(self._images)], deadline_s=5.0)
            self.answers.append((began_s, time.monotonic(), answer))
            number += 1

    def since(self, moment_s: float) -> tuple[float, float, int, int]:
        """(seconds to the first encrypted answer that began later, longest answer, encrypted, fallbacks)."""
        later = [(began, ended, a) for began, ended, a in self.answers if ended >= moment_s]
        first = next(ended - moment_s for began, ended, a in later if a.offloaded and began >= moment_s)
        longest = max(ended - began for began, ended, _ in later)
        return first, longest, sum(a.offloaded for *_, a in later), sum(not a.offloaded for *_, a in later)


def rows(args: argparse.Namespace) -> list[Row]:
    """`args.quick` changes nothing: it takes a minute."""
    edge_bt, cloud_bt = bundle_paths("fashion")
    ports, metrics = (free_port(), free_port()), (free_port(), free_port())
    images, _ = read_set(EdgeBundle.open(edge_bt), "fashion")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="btbench-")))

        def start(index: int, run: int) -> _Cell:
            announce = folder / f"cell-{index}.json"
            command = ["blindtail", "cloud", str(cloud_bt), "--port", str(ports[index]), "--evaluators", "1"]
            command += ["--peer", f"127.0.0.1:{ports[1 - index]}", "--announce", str(announce)]
            command += ["--state-dir", str(folder / f"cell-{index}")]
            command += ["--metrics-port", str(metrics[index])]
            child = stack.enter_context(Child("cloud", command, folder / f"cell-{index}-{run}.log"))
            return _Cell(child, f"127.0.0.1:{ports[index]}", announce)

        first, second = start(0, 0), start(1, 0)
        for cell in (first, second):
            cell.child.announcement(cell.announce, _START_S)
        device = stack.enter_context(
            EdgeRuntime.open(
                edge_bt,
                f"{first.address},{second.address}",
                credentials="insecure-loopback",
                policy="cloud-only",
                state_dir=folder / "device",
            )
        )
        if not device.wait_ready(_START_S):
            raise RuntimeError(f"the tail was not ready: {device.status().tails}")
        _until(lambda: first.described()["keys"]["given"] >= 1, "the keys were not copied")
        if _uploads(metrics[0]) != 1:
            raise RuntimeError("the first cell has not counted the device's upload")
        with _Stream(device, images) as stream:
            time.sleep(_STREAM_S)
            killed_s = time.monotonic()
            first.child.kill()
            time.sleep(_STREAM_S)
        lost = stream.since(killed_s)
        uploads = _uploads(metrics[1])
        first.announce.unlink(missing_ok=True)
        first = start(0, 1)
        first.child.announcement(first.announce, _START_S)
        with _Stream(device, images) as stream:
            time.sleep(_STREAM_S)
            drained_s = time.monotonic()
            second.child.stop()
            ended_s = time.monotonic() - drained_s
            time.sleep(_STREAM_S)
        drained = stream.since(drained_s)
        code = second.child.code
    return [
        row("cell killed: first encrypted answer from the other", lost[0], "s"),
        row("cell killed: longest answer", lost[1], "s"),
        row("cell killed: keys uploaded to the other", uploads, "1", target=0),
        row("cell killed: fallbacks", lost[3], "1", target=0, n=lost[2] + lost[3]),
        row("cell drained by SIGTERM: longest answer", drained[1], "s"),
        row("cell drained by SIGTERM: fallbacks", drained[3], "1", target=0, n=drained[2] + drained[3]),
        row("cell drained by SIGTERM: ended after", ended_s, "s", note=f"exit code {code}"),
    ]


def _uploads(port: int) -> float:
    """Uploads by devices that a cell has taken."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as page:
        lines = page.read().decode().splitlines()
    found = [line for line in lines if line.startswith("blindtail_cloud_key_uploads_total")]
    return sum(float(line.rpartition(" ")[2]) for line in found)


def _until(holds: Any, what: str) -> None:
    end_s = time.monotonic() + _COPIED_S
    while not holds():
        if time.monotonic() > end_s:
            raise RuntimeError(what)
        time.sleep(0.1)
