"""`blindtail cloud` as a process of its own, on a Ray cluster of its own: crashes, restarts, clean ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blindtail.errors import BlindtailError, EvaluationFailed, SessionLost, TailError, TailUnavailable
from blindtail.he.native_backend import available
from blindtail.ports import free_port
from blindtail.wire import EvaluateResult, KeyState, TicketsTaken
from tests.cell_process import Running, alive, all_gone, descendants, launch, until_ready, wait_for
from tests.cloud_cases import Client, activation, expected, program
from tests.ticket_cases import Device, offer

pytest.importorskip("ray")
pytestmark = pytest.mark.timeout(180)


def persistent(call: Callable[[], Any], limit_s: float = 40) -> Any:
    """As an edge would: again while the cell is away."""
    deadline_s = time.monotonic() + limit_s
    while True:
        try:
            return call()
        except (TailUnavailable, SessionLost, EvaluationFailed):
            assert time.monotonic() < deadline_s, "the cell did not come back"
            time.sleep(0.1)


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    port = free_port()
    running = launch(tmp_path_factory.mktemp("cell"), "--evaluators", "2", "--metrics-port", str(port))
    running.metrics_port = port
    try:
        until_ready(running)
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def edge(cell: Running) -> Client:
    client = cell.client()
    assert client.upload_and_wait() is KeyState.READY
    return client


def two_evaluators(cell: Running) -> list[int]:
    """Pids, once both are up."""

    def both() -> list[int] | None:
        pids = [e["pid"] for e in cell.read()["evaluators"]]
        return pids if len(pids) == 2 and all(alive(p) for p in pids) else None

    pids: list[int] = wait_for(both, "two evaluators are not up")
    return pids


def test_it_announces_and_answers(cell: Running, edge: Client) -> None:
    content = cell.read()
    assert content["serving"]
    assert content["backend"] == "clear"
    assert content["models"] == [{"model": "toy", "version": "1"}]
    assert content["pid"] == cell.process.pid
    pids = {content["gateway_pid"], content["pid"], *two_evaluators(cell)}
    assert len(pids) == 4
    assert all(alive(p) for p in pids)
    assert content["ray_address"].startswith("127.0.0.1:")
    assert edge.stub.serving(5)
    session = edge.register().session
    used = set()
    with ThreadPoolExecutor(4) as pool:
        for seed, reply in enumerate(pool.map(lambda i: edge.evaluate(session, i), range(40))):
            assert np.allclose(edge.logits(reply), expected(activation(seed)), atol=1e-9)
            used.add(reply.evaluator)
    assert len(used) == 2


def test_metrics_tell_counts_and_nothing_of_clients(cell: Running, edge: Client) -> None:
    session = edge.register().session
    edge.evaluate(session)
    with urllib.request.urlopen(f"http://127.0.0.1:{cell.metrics_port}/metrics", timeout=10) as reply:
        text = reply.read().decode()
    assert 'blindtail_cloud_requests_total{model="toy",outcome="ok",version="1"}' in text
    assert 'blindtail_cloud_evaluator_evaluations_total{evaluator="0"}' in text
    assert "blindtail_cloud_evaluators 2.0" in text
    assert session.hex() not in text
    assert "loopback" not in text


def test_the_log_names_events_and_nothing_of_clients(cell: Running, edge: Client) -> None:
    text = (cell.folder / "state" / "cell.log").read_text()
    assert "listening on 127.0.0.1" in text
    for secret in (edge.sha256.hex(), edge.register().session.hex()):
        assert secret not in text


def test_ray_listens_on_loopback_only(cell: Running) -> None:
    below = descendants(cell.process.pid)
    owned = set()
    for pid in (cell.process.pid, *below):
        try:
            owned |= {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
        except OSError:
            continue
    listening = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in owned:
                listening.append(fields[1].split(":")[0])
    assert len(listening) >= 4
    loopback = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
    assert set(listening) <= loopback


def test_an_evaluator_killed_while_it_works(cell: Running, edge: Client) -> None:
    session = edge.register().session
    first, second = two_evaluators(cell)
    for pid in (first, second):
        os.kill(pid, signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(2) as pool:
            replies = [pool.submit(edge.evaluate, session, i, remaining_s=20) for i in range(2)]
            time.sleep(0.5)
            assert not any(r.done() for r in replies)
            os.kill(first, signal.SIGKILL)
            os.kill(second, signal.SIGCONT)
            for seed, reply in enumerate(replies):
                assert np.allclose(edge.logits(reply.result(20)), expected(activation(seed)), atol=1e-9)
    finally:
        if alive(second):
            os.kill(second, signal.SIGCONT)
    assert first not in two_evaluators(cell)
    assert cell.read()["restarts"] >= 1
    assert edge.stub.serving(5)


def test_the_gateway_killed_comes_back_at_the_same_address_with_the_keys(cell: Running, edge: Client) -> None:
    before = cell.read()
    os.kill(before["gateway_pid"], signal.SIGKILL)

    def again() -> EvaluateResult:
        registered = edge.register()
        assert registered.keys is KeyState.READY
        return edge.evaluate(registered.session)

    reply = persistent(again)
    assert np.allclose(edge.logits(reply), expected(activation(0)), atol=1e-9)
    wait_for(lambda: cell.read()["gateway_pid"] != before["gateway_pid"], "the announcement is old")
    assert cell.read()["address"] == before["address"]
    for old in before["evaluators"]:
        wait_for(lambda pid=old["pid"]: not alive(pid), "an evaluator of the old gateway stayed")


JOIN = """
import os, sys
os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=sys.argv[2], RAY_USAGE_STATS_ENABLED="0",
                  RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0")
import ray
try:
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level="CRITICAL", namespace="blindtail-cell")
    print("JOINED", len(ray.util.list_named_actors(all_namespaces=True)))
except BaseException as error:
    print("REFUSED", type(error).__name__)
os._exit(0)
"""


def join(address: str, token: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", JOIN, address, str(token)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.stdout


def token_of(running: Running) -> Path:
    """The cluster's own token file, by the environment that its processes were given."""
    environ = Path(f"/proc/{running.read()['gateway_pid']}/environ").read_bytes().split(b"\0")
    (value,) = (e.split(b"=", 1)[1] for e in environ if e.startswith(b"RAY_AUTH_TOKEN_PATH="))
    return Path(value.decode())


def test_two_cells_at_once_share_nothing_and_the_second_ends_cleanly(cell: Running, tmp_path: Path) -> None:
    other = launch(tmp_path / "other", "--evaluators", "1")
    try:
        mine, theirs = cell.read(), until_ready(other)
        for name in ("cluster_id", "ray_address", "address", "gateway_pid"):
            assert mine[name] != theirs[name]
        client = other.client()
        assert client.register().keys is KeyState.MISSING
        # With its own token one gets in (positive control), with the other's not.
        own, foreign = token_of(other), token_of(cell)
        assert own.stat().st_mode & 0o077 == 0
        assert "JOINED" in join(theirs["ray_address"], own)
        assert "JOINED" not in join(theirs["ray_address"], foreign)
        below = descendants(other.process.pid)
        assert len(below) >= 5
        other.process.send_signal(signal.SIGTERM)
        code, out, err = other.ended()
        assert code == 0, err
        assert json.loads(out)["address"] == theirs["address"]  # one line of JSON and nothing of Ray's
        assert not other.announce.exists()
        assert not own.parent.exists()  # Ray's folder is gone
        all_gone(below)
        persistent(lambda: cell.client().register())  # and the first goes on
    finally:
        other.stop()


def test_nothing_outlives_the_command(tmp_path: Path) -> None:
    running = launch(tmp_path / "cell", "--evaluators", "1")
    try:
        until_ready(running)
        below = descendants(running.process.pid)
        running.process.kill()
        running.process.wait(10)
        # Ray's own agents, which hold nothing of ours, may take a minute now that nobody ends them.
        ours = {p: c for p, c in below.items() if "Agent" not in c.split(" ", 1)[0]}
        try:
            all_gone(ours)
        finally:
            for pid in set(below) - set(ours):
                if alive(pid):
                    os.kill(pid, signal.SIGKILL)
    finally:
        running.stop()


def test_a_lost_cluster_comes_back_at_the_same_address_with_the_keys(tmp_path: Path) -> None:
    """The raylet, then the process that holds the cluster: each time nothing is left of the old one."""
    running = launch(tmp_path / "cell", "--evaluators", "1")
    try:
        before = until_ready(running)
        client = running.client()
        assert client.upload_and_wait() is KeyState.READY
        for restarts, victim in enumerate(("raylet", "cloud.app"), 1):
            below = descendants(running.process.pid)
            (pid,) = [p for p, c in below.items() if victim in c.split(" -", 1)[0] or f"-m {victim}" in c]
            os.kill(pid, signal.SIGKILL)
            wait_for(lambda: not running.announce.exists(), "the loss was not noticed", 20)
            after = until_ready(running)
            assert after["cluster_restarts"] == restarts
            assert (after["pid"], after["address"]) == (running.process.pid, before["address"])
            assert after["cluster_id"] != before["cluster_id"]
            all_gone(below, 1)

            def again() -> EvaluateResult:
                registered = client.register()
                assert registered.keys is KeyState.READY
                return client.evaluate(registered.session)

            assert np.allclose(client.logits(persistent(again)), expected(activation(0)), atol=1e-9)
        below = descendants(running.process.pid)
        running.process.send_signal(signal.SIGTERM)
        code, out, err = running.ended()
        assert code == 0
        assert len(out.splitlines()) == 1  # announced once
        assert "starting again" in err
        assert not running.announce.exists()
        all_gone(below, 1)
    finally:
        running.stop()


def test_what_is_wrong_is_told_before_ray_starts(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        running = launch(tmp_path / "port", "--port", str(port))
        code, _, err = running.ended()
        assert code != 0
        assert "ConfigError" in err
        assert f":{port}" in err
        assert "--port" in err
        assert "Ray" not in err
    damaged = launch(tmp_path / "damaged", str(tmp_path / "no.bt"))
    _, _, err = damaged.ended()
    assert "BundleError" in err
    assert "no.bt" in err


def test_errors_cross_the_actors_as_what_they_are() -> None:
    from cloud.evaluator import error_outcome, raise_outcome

    with pytest.raises(SessionLost, match="gone"):
        raise_outcome(error_outcome(SessionLost("gone")))
    with pytest.raises(EvaluationFailed, match="ValueError"):
        raise_outcome(error_outcome(ValueError("internals")))
    raise_outcome(("ok", 1))
    assert issubclass(TailError, BlindtailError)


def tickets_made(running: Running) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{running.metrics_port}/metrics", timeout=10) as reply:
        lines = reply.read().decode().splitlines()
    mark = 'blindtail_cloud_tickets_total{event="made"'
    return sum(int(float(line.rsplit(" ", 1)[1])) for line in lines if line.startswith(mark))


@pytest.mark.skipif(not available(), reason="tickets are the native backend's, and it was not built")
def test_tickets_across_processes_and_a_crash(tmp_path: Path) -> None:
    device = Device.of(program(), tmp_path)
    port = free_port()
    flags = ("--evaluators", "1", "--backend", "native", "--metrics-port", str(port))
    running = launch(tmp_path / "cell", *flags)
    running.metrics_port = port
    try:
        assert until_ready(running)["backend"] == "native"
        client = device.client(running.read()["address"])
        assert client.upload_and_wait() is KeyState.READY
        session = client.register().session
        containers = device.containers(6)
        want = [client.evaluate(session, container=c).container for c in containers]

        assert offer(client, session, containers[:2]) == TicketsTaken(2, 16)
        wait_for(lambda: tickets_made(running) == 2, "no tickets were made")
        got = [client.evaluate(session, container=c) for c in containers[:3]]
        assert [reply.container for reply in got] == want[:3]
        assert [reply.ticket for reply in got] == [True, True, False]
        again = client.evaluate(session, container=containers[0])
        assert (again.container, again.ticket) == (want[0], False)

        assert offer(client, session, containers[3:]).accepted == 3
        wait_for(lambda: tickets_made(running) == 5, "no more tickets were made")
        os.kill(running.read()["evaluators"][0]["pid"], signal.SIGKILL)
        got = [persistent(partial(client.evaluate, session, container=c)) for c in containers[3:5]]
        assert [reply.container for reply in got] == want[3:5]
        assert not any(reply.ticket for reply in got)
        (fresh,) = device.containers(1)
        assert offer(client, session, [fresh]).accepted == 1
        wait_for(lambda: tickets_made(running) == 6, "no ticket was made after the crash")
        assert client.evaluate(session, container=fresh).ticket
    finally:
        running.stop()
