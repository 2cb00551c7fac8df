"""Edges between two cells: drained without a gap, moved after a death, told of others, commands for it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from blindtail.bundle import CloudBundle
from blindtail.errors import BlindtailError
from blindtail.records import Answer
from blindtail.rpc import INSECURE_LOOPBACK, TailStub, secure_channel
from cloud import drain_cli
from cloud.config import CloudConfig
from cloud.drain import QUIET_S
from cloud.local import LocalCell
from edge.runtime import EdgeRuntime
from edge.tail import TailState
from orchestrator.policy import ExitThreshold
from tests.cell_pair import cell_pair, transfers, uploads
from tests.clock import until
from tests.edge_fakes import bundle_of, image, program

pytestmark = pytest.mark.timeout(120)
UNSURE = image(1, 60)
MODEL = CloudBundle("toy", "1", {2: program()})


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A device's state directory with its key set, made once."""
    folder = tmp_path_factory.mktemp("device")
    cell = LocalCell([MODEL], backend="clear", state_dir=folder / "cell")
    with cell, edge_at(cell.address, folder) as edge:
        assert edge.wait_ready(30), edge.status()
    return folder


def edge_at(address: str, state_dir: Path) -> EdgeRuntime:
    return EdgeRuntime.open(
        bundle_of(spec=program().spec),
        address,
        credentials=INSECURE_LOOPBACK,
        policy=ExitThreshold((0.9, 0.9)),
        state_dir=state_dir,
        backend="clear",
    )


def cell_of(edge: EdgeRuntime) -> str:
    return edge.status().tails[2].cell


class Stream:
    """Two threads that ask without a pause; `answers` has (when, answer)."""

    def __init__(self, edge: EdgeRuntime) -> None:
        self.edge = edge
        self.answers: list[tuple[float, Answer]] = []
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(2)]

    def _run(self) -> None:
        while not self._end.wait(0.005):
            answer = self.edge.infer(UNSURE, deadline_s=20.0)
            self.answers.append((time.monotonic(), answer))

    def count(self, number: int) -> None:
        """Waits for so many more answers."""
        wanted = len(self.answers) + number
        until(lambda: len(self.answers) >= wanted)

    def __enter__(self) -> Stream:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(10)


@contextmanager
def ready_edge(a: LocalCell, addresses: str, keys: Path) -> Iterator[EdgeRuntime]:
    """At cell a, whose keys have been copied to the peer."""
    with edge_at(addresses, keys) as edge:
        assert edge.wait_ready(30), edge.status()
        assert cell_of(edge) == a.address
        until(lambda: transfers(a, "given") == 1)
        yield edge


def test_a_drain_causes_no_fallback_and_there_is_no_way_back(tmp_path: Path, keys: Path) -> None:
    with cell_pair(tmp_path, MODEL) as (a, b), ready_edge(a, f"{a.address},{b.address}", keys) as edge:
        with Stream(edge) as stream:
            stream.count(20)
            drained_s = time.monotonic()
            status = a.drain(40.0)
            assert time.monotonic() - drained_s < 30  # not the whole grace: everybody has gone
            assert (status.draining, status.sessions, status.waiting) == (True, 0, 0)
            assert cell_of(edge) == b.address
            a.stop()
            stream.count(20)
        before = [x for at, x in stream.answers if at < drained_s]
        after = [x for at, x in stream.answers if at >= drained_s]
        assert min(len(before), len(after)) >= 20
        assert {(x.route, x.fallback) for _, x in stream.answers} == {("tail", None)}
        tail = edge.status().tails[2]
        assert (tail.state, tail.registrations) == (TailState.READY, 2)
        assert (uploads(a), uploads(b)) == (1, 0)
        a.start()
        time.sleep(0.3)
        assert edge.infer(UNSURE, 20.0).route == "tail"
        assert cell_of(edge) == b.address


def test_a_dead_cell_is_left_at_once_without_an_upload(tmp_path: Path, keys: Path) -> None:
    with cell_pair(tmp_path, MODEL) as (a, b), ready_edge(a, f"{a.address},{b.address}", keys) as edge:
        a.stop()
        start_s = time.monotonic()
        until(lambda: edge.infer(UNSURE, 20.0).route == "tail")
        assert time.monotonic() - start_s < 15
        assert cell_of(edge) == b.address
        assert uploads(b) == 0


def test_a_cell_names_others_and_an_edge_that_knew_one_address_survives(tmp_path: Path, keys: Path) -> None:
    with cell_pair(tmp_path, MODEL, start_b=False) as (a, b):
        a.stop()
        a.config = replace(a.config, others=(b.address, "elsewhere.example:1"))
        with a, b, ready_edge(a, a.address, keys) as edge:
            a.stop()
            until(lambda: edge.infer(UNSURE, 20.0).route == "tail")
            assert cell_of(edge) == b.address
            assert uploads(b) == 0


def test_with_nowhere_to_go_an_edge_is_answered_to_the_end(tmp_path: Path, keys: Path) -> None:
    config = CloudConfig(drain_grace_s=0.6)
    with LocalCell([MODEL], backend="clear", state_dir=tmp_path, config=config) as cell:
        with edge_at(cell.address, keys) as edge, Stream(edge) as stream:
            assert edge.wait_ready(30), edge.status()
            time.sleep(QUIET_S)  # the session from before its keys came is forgotten by then
            stream.count(5)
            start_s = time.monotonic()
            from_here = len(stream.answers)
            assert cell.drain().sessions == 1
            assert 0.5 < time.monotonic() - start_s < 20
            stream.count(5)
            assert {x.fallback for _, x in stream.answers[from_here:]} == {None}
            assert edge.status().tails[2].registrations == 1
        with secure_channel(cell.address, INSECURE_LOOPBACK) as channel:
            stub = TailStub(channel)
            until(lambda: not stub.serving(5))
            # An edge that starts now has no other cell either.
            with edge_at(cell.address, keys) as late:
                assert late.wait_ready(30), late.status()
                assert late.infer(UNSURE, 20.0).route == "tail"
            assert not cell.resume().draining
            until(lambda: stub.serving(5))


def test_a_new_edge_prefers_a_cell_that_does_not_drain(tmp_path: Path, keys: Path) -> None:
    with cell_pair(tmp_path, MODEL) as (a, b):
        a.drain(0.01)
        with edge_at(f"{a.address},{b.address}", keys) as edge:
            assert edge.wait_ready(30), edge.status()
            assert cell_of(edge) == b.address


def test_operators_drain_a_cell_by_command(tmp_path: Path) -> None:
    app = typer.Typer()
    drain_cli.register(app)

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["cell", *arguments, "--plaintext"])
        if result.exception is not None:
            raise result.exception
        return result.stdout

    with LocalCell([MODEL], backend="clear", state_dir=tmp_path) as cell:
        assert "serves: 0 sessions" in run("status", cell.address)
        assert "drains" in run("drain", cell.address, "--grace", "0.1")
        assert json.loads(run("status", cell.address, "--json")) == {
            "cell": cell.address,
            "draining": True,
            "sessions": 0,
            "waiting": 0,
        }
        assert "serves" in run("resume", cell.address)
        with pytest.raises(BlindtailError, match="--grace"):
            run("drain", cell.address, "--grace", "0")
    with pytest.raises(BlindtailError, match="does not answer"):
        run("status", cell.address)
