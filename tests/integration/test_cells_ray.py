"""Two cells with a raylet each, and an edge that outlives the first one without a second upload of keys."""

from __future__ import annotations

import os
import signal
import threading
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest

from blindtail.bundle import CloudBundle
from blindtail.link import ShapedLink
from blindtail.ports import free_port
from blindtail.records import Answer
from blindtail.rpc import INSECURE_LOOPBACK
from edge.runtime import EdgeRuntime
from orchestrator.policy import ExitThreshold
from tests.cell_process import Running, alive, descendants, launch, until_ready, wait_for
from tests.edge_fakes import bundle_of, image, program

pytest.importorskip("ray")
pytestmark = pytest.mark.timeout(180)
UNSURE = image(1, 60)


def metric(running: Running, name: str) -> float:
    """Sum over a metric's series."""
    with urllib.request.urlopen(f"http://127.0.0.1:{running.metrics_port}/metrics", timeout=10) as reply:
        lines = reply.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


class Site:
    """Cells "a" and "b" on fixed ports, each the other's peer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports = {name: free_port() for name in ("a", "b", "metrics a", "metrics b")}

    def launch(self, name: str) -> Running:
        other = f"127.0.0.1:{self.ports['b' if name == 'a' else 'a']}"
        metrics_port = self.ports[f"metrics {name}"]
        running = launch(
            self.folder / name,
            *("--port", str(self.ports[name]), "--metrics-port", str(metrics_port), "--evaluators", "1"),
            *("--peer", other, "--other", other),
            model=CloudBundle("toy", "1", {2: program()}),
        )
        running.metrics_port = metrics_port
        return running


def kill_group(running: Running) -> None:
    """SIGKILL to the command and to everything below it, as when a host dies."""
    below = descendants(running.process.pid)
    for pid in (running.process.pid, *below):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    running.process.wait(10)
    wait_for(lambda: not any(alive(pid) for pid in below), "processes of the killed cell stayed", 10)


class Stream:
    """A thread that asks without a pause; `answers` has them in order."""

    def __init__(self, edge: EdgeRuntime) -> None:
        self.answers: list[Answer] = []
        self._edge, self._end = edge, threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._end.wait(0.02):
            self.answers.append(self._edge.infer(UNSURE, deadline_s=20.0))

    def more(self, count: int) -> list[Answer]:
        """The next so many."""
        start = len(self.answers)
        wait_for(lambda: len(self.answers) >= start + count, "no answers come", 30)
        return self.answers[start:]

    def __enter__(self) -> Stream:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join(10)


def all_encrypted(answers: list[Answer]) -> bool:
    return all((x.route, x.fallback) == ("tail", None) for x in answers)


def test_an_edge_outlives_a_killed_cell_and_then_a_drained_one(tmp_path: Path) -> None:
    site = Site(tmp_path)
    a, b = site.launch("a"), site.launch("b")
    key_bytes = program().spec.key_bytes
    try:
        first, second = until_ready(a), until_ready(b)
        assert first["cluster_id"] != second["cluster_id"]
        # All of the edge's traffic with the second cell passes through here and is counted.
        with (
            ShapedLink(second["address"]) as link,
            EdgeRuntime.open(
                bundle_of(spec=program().spec),
                f"{first['address']},{link.address}",
                credentials=INSECURE_LOOPBACK,
                policy=ExitThreshold((0.9, 0.9)),
                state_dir=tmp_path / "edge",
                backend="clear",
            ) as edge,
        ):
            assert edge.wait_ready(60), edge.status()
            assert edge.status().tails[2].cell == first["address"]
            assert edge.infer(UNSURE, 20.0).route == "tail"
            assert metric(a, "blindtail_cloud_key_uploads_total") == 1
            wait_for(lambda: a.read()["keys"]["given"] == 1, "the keys were not given to the peer")
            assert link.counts().up_bytes == 0

            kill_group(a)
            wait_for(lambda: edge.infer(UNSURE, 20.0).route == "tail", "the edge did not move", 60)
            joined_bytes = link.counts().up_bytes
            assert edge.status().tails[2].cell == link.address
            with Stream(edge) as stream:
                stream.more(10)
            assert all_encrypted(stream.answers)
            # No second upload: neither counted there nor seen on the wire.
            assert metric(b, "blindtail_cloud_key_uploads_total") == 0
            sent = sum(x.uplink_bytes for x in stream.answers)
            assert 0 < joined_bytes < key_bytes / 2
            assert sent <= link.counts().up_bytes - joined_bytes < sent + key_bytes / 4

            # The first one is back, with the keys that it had; the second one is told to end.
            a = site.launch("a")
            until_ready(a)
            with Stream(edge) as stream:
                stream.more(10)
                b.process.send_signal(signal.SIGTERM)
                code, out, err = b.ended()
                stream.more(10)
            assert all_encrypted(stream.answers)
            assert edge.status().tails[2].cell == first["address"]
            assert (code, len(out.splitlines())) == (0, 1), err
            assert metric(a, "blindtail_cloud_key_uploads_total") == 0

            # Nowhere else to go: it is answered until its cell has ended.
            a.process.send_signal(signal.SIGTERM)
            assert edge.infer(UNSURE, 20.0).route == "tail"
            assert a.ended()[0] == 0
            assert edge.infer(UNSURE, 20.0).fallback == "unavailable"
    finally:
        a.stop()
        b.stop()
