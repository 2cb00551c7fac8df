"""The edge against a cell over real gRPC that dies, lies, stalls and forgets, with real key processes."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blindtail.errors import EvaluationFailed, Overloaded, TailUnavailable
from blindtail.link import ShapedLink
from blindtail.rpc import INSECURE_LOOPBACK
from blindtail.wire import EvaluateCall
from edge.keyfiles import KeyFiles
from edge.runtime import EdgeRuntime
from edge.session import RemoteTail
from edge.tail import TailState
from orchestrator.policy import ExitThreshold
from tests.clock import until
from tests.edge_fakes import bundle_of, image, program
from tests.scripted_cell import ScriptedCell

pytestmark = pytest.mark.timeout(120)
UNSURE = image(1, 60)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state directory with a key set, made once by a key process."""
    folder = tmp_path_factory.mktemp("state")
    with (
        ScriptedCell(program(), tmp_path_factory.mktemp("cell")) as cell,
        edge_at(cell.address, folder) as edge,
    ):
        assert edge.wait_ready(60), edge.status()
    return folder


@pytest.fixture
def cell(tmp_path: Path) -> Iterator[ScriptedCell]:
    with ScriptedCell(program(), tmp_path) as made:
        yield made


@pytest.fixture
def edge(cell: ScriptedCell, keys: Path) -> Iterator[EdgeRuntime]:
    with edge_at(cell.address, keys) as made:
        assert made.wait_ready(60), made.status()
        yield made


def edge_at(address: str, state_dir: Path, **settings: Any) -> EdgeRuntime:
    bundle = settings.pop("bundle", None) or bundle_of(spec=program().spec)
    return EdgeRuntime.open(
        bundle,
        address,
        credentials=INSECURE_LOOPBACK,
        policy=ExitThreshold((0.9, 0.9)),
        state_dir=state_dir,
        backend="clear",
        **settings,
    )


def tail_of(edge: EdgeRuntime) -> RemoteTail:
    tail = edge._tails[2]
    assert isinstance(tail, RemoteTail)
    return tail


def recovers(edge: EdgeRuntime) -> None:
    """Soon the tail answers again."""
    until(lambda: edge.infer(UNSURE, 20.0).route == "tail", limit_s=30.0)


def test_the_tail_answers(edge: EdgeRuntime) -> None:
    answer = edge.infer(UNSURE, deadline_s=20.0)
    assert (answer.route, answer.fallback) == ("tail", None)
    assert answer.label != 1  # the tail prefers dark pixels, the exits bright ones
    assert answer.uplink_bytes > 0
    assert answer.timings.eval_s > 0


def test_keys_and_secret_are_private_files(edge: EdgeRuntime, keys: Path) -> None:
    folder = KeyFiles(keys, program().spec, "clear").directory
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "secret.key").stat().st_mode & 0o777 == 0o600


def drop_tail(_: int, __: EvaluateCall, reply: bytes) -> bytes:
    return reply[:-1]


def flip_bit(_: int, __: EvaluateCall, reply: bytes) -> bytes:
    return reply[:200] + bytes([reply[200] ^ 1]) + reply[201:]


def oversized(_: int, __: EvaluateCall, reply: bytes) -> bytes:
    return reply + bytes(100_000)


def garbage(_: int, __: EvaluateCall, reply: bytes) -> bytes:
    return bytes(range(256)) * 4


def empty(_: int, __: EvaluateCall, reply: bytes) -> bytes:
    return b""


def echo(_: int, call: EvaluateCall, reply: bytes) -> bytes:
    return call.container


@pytest.mark.parametrize("lie", [drop_tail, flip_bit, oversized, garbage, empty, echo])
def test_a_bad_reply_is_refused_and_the_next_good_one_answers(
    edge: EdgeRuntime, cell: ScriptedCell, lie: Any
) -> None:
    before = cell.evaluated
    cell.behaviour = lie
    answer = edge.infer(UNSURE, deadline_s=20.0)
    assert (answer.label, answer.route, answer.fallback) == (1, "exit2", "refused")
    assert cell.evaluated == before + 1
    cell.behaviour = None
    assert edge.infer(UNSURE, deadline_s=20.0).route == "tail"


def test_a_late_reply_is_answered_by_an_exit_in_time(edge: EdgeRuntime, cell: ScriptedCell) -> None:
    over = threading.Event()

    def late(_: int, __: EvaluateCall, reply: bytes) -> bytes:
        over.wait(30)
        return reply

    cell.behaviour = late
    try:
        answer = edge.infer(UNSURE, deadline_s=0.4)
        assert not over.is_set()  # the reply had not come: an exit answered without it
    finally:
        over.set()
    assert answer.fallback == "deadline"
    assert answer.timings.total_s < 15  # the bound of 50 ms is for a machine that is not running tests


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (EvaluationFailed("crashed"), "evaluation"),
        (Overloaded("full", 0.1), "overloaded"),
        (TailUnavailable("x"), "unavailable"),
    ],
    ids=["evaluation", "overloaded", "unavailable"],
)
def test_faults_that_the_cloud_names(
    edge: EdgeRuntime, cell: ScriptedCell, fault: Exception, reason: str
) -> None:
    def fail(_: int, __: EvaluateCall, reply: bytes) -> bytes:
        raise fault

    cell.behaviour = fail
    assert edge.infer(UNSURE, deadline_s=20.0).fallback == reason
    cell.behaviour = None
    recovers(edge)


def test_one_crash_is_repaired_by_sending_the_same_bytes_again(edge: EdgeRuntime, cell: ScriptedCell) -> None:
    first = cell.evaluated

    def once(count: int, _: EvaluateCall, reply: bytes) -> bytes:
        if count == first:
            raise EvaluationFailed("crashed")
        return reply

    cell.behaviour = once
    assert edge.infer(UNSURE, deadline_s=20.0).route == "tail"
    (a, zero), (b, one) = cell.attempts[-2:]
    assert (a, zero, one) == (b, 0, 1)


def test_the_cloud_dies_before_an_evaluation(edge: EdgeRuntime, cell: ScriptedCell) -> None:
    cell.stop()
    assert edge.infer(UNSURE, deadline_s=20.0).fallback == "unavailable"
    until(lambda: edge.status().tails[2].state is TailState.AWAY)
    assert edge.infer(UNSURE, deadline_s=20.0).fallback == "unavailable"
    cell.forget()
    cell.start()
    recovers(edge)


def test_the_cloud_dies_during_an_evaluation(edge: EdgeRuntime, cell: ScriptedCell) -> None:
    began, over = threading.Event(), threading.Event()

    def hang(_: int, __: EvaluateCall, reply: bytes) -> bytes:
        began.set()
        over.wait(30)
        return reply

    cell.behaviour = hang
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(edge.infer(UNSURE, deadline_s=20.0)))
    thread.start()
    try:
        assert began.wait(15)
        cell.stop()
        thread.join(15)
        assert not thread.is_alive()
    finally:
        over.set()
    assert answers[0].fallback == "unavailable"
    cell.behaviour = None
    cell.start()
    recovers(edge)


def test_the_cloud_dies_after_an_evaluation(edge: EdgeRuntime, cell: ScriptedCell) -> None:
    assert edge.infer(UNSURE, deadline_s=20.0).route == "tail"
    cell.stop()
    cell.forget(keys=True)
    cell.start()
    recovers(edge)  # a new session, and the keys are uploaded again
    assert edge.status().tails[2].registrations >= 2


def test_keys_evicted_between_two_requests_are_uploaded_again(edge: EdgeRuntime, cell: ScriptedCell) -> None:
    assert edge.infer(UNSURE, deadline_s=20.0).route == "tail"
    cell.forget(keys=True, sessions=False)
    received = cell.received
    assert edge.infer(UNSURE, deadline_s=20.0).fallback == "keys"
    recovers(edge)
    assert cell.received == received + program().spec.key_bytes


def test_a_forgotten_session_is_registered_again(edge: EdgeRuntime, cell: ScriptedCell) -> None:
    cell.forget()
    assert edge.infer(UNSURE, deadline_s=20.0).fallback == "session"
    received = cell.received
    recovers(edge)
    assert cell.received == received


def test_a_broken_upload_goes_on_where_it_was(cell: ScriptedCell, tmp_path: Path) -> None:
    cell.break_upload_after = program().spec.key_bytes // 2
    with edge_at(cell.address, tmp_path / "state") as edge:
        assert edge.wait_ready(60), edge.status()
    assert cell.received == program().spec.key_bytes


def test_infer_answers_while_keys_are_made_and_uploaded(cell: ScriptedCell, tmp_path: Path) -> None:
    states: set[TailState] = set()
    rate_bps = program().spec.key_bytes * 8 / 0.45 / 1.5  # the upload takes 1.5 s
    with edge_at(cell.address, tmp_path / "state", uplink_bps=rate_bps) as edge:
        start_s = time.monotonic()
        while not tail_of(edge).ready:
            assert time.monotonic() < start_s + 60
            answer = edge.infer(UNSURE, deadline_s=1.0)
            assert answer.label == 1 or answer.route == "tail"
            states.add(edge.status().tails[2].state)
        assert edge.infer(UNSURE, deadline_s=20.0).route == "tail"
    assert TailState.UPLOADING in states


def test_an_upload_stays_below_half_of_the_uplink(cell: ScriptedCell, keys: Path) -> None:
    seconds = 2.0
    rate_bps = program().spec.key_bytes * 8 / seconds  # at the full rate it would take this long
    with edge_at(cell.address, keys, uplink_bps=rate_bps) as edge:
        start_s = time.monotonic()
        assert edge.wait_ready(60), edge.status()
        assert time.monotonic() - start_s > 2 * seconds


def test_another_version_is_a_lasting_status_and_exits_answer(tmp_path: Path, keys: Path) -> None:
    with ScriptedCell(program(), tmp_path, version="2") as cell, edge_at(cell.address, keys) as edge:
        assert not edge.wait_ready(30)
        status = edge.status().tails[2]
        assert status.state is TailState.MISMATCH
        assert "version 2" in status.problem
        assert edge.infer(UNSURE, deadline_s=1.0).fallback == "unavailable"
        time.sleep(0.5)
        assert cell.registered == 0


def test_nobody_listens(tmp_path: Path, keys: Path) -> None:
    with edge_at("127.0.0.1:9", keys) as edge:
        assert not edge.wait_ready(1.0)
        assert edge.infer(UNSURE, deadline_s=1.0).fallback == "unavailable"
        assert edge.status().tails[2].state is TailState.AWAY


def test_a_link_that_goes_silent_is_noticed_and_comes_back(cell: ScriptedCell, keys: Path) -> None:
    with ShapedLink(cell.address, delay_s=0.002) as link, edge_at(link.address, keys) as edge:
        assert edge.wait_ready(60), edge.status()
        link.stall()
        for _ in range(3):
            assert edge.infer(UNSURE, deadline_s=0.3).fallback == "deadline"
        until(lambda: edge.infer(UNSURE, deadline_s=0.3).fallback == "unavailable", limit_s=30.0)
        link.resume()
        recovers(edge)


def test_two_runtimes_of_one_device_share_a_key_set(cell: ScriptedCell, tmp_path: Path) -> None:
    state = tmp_path / "state"
    with edge_at(cell.address, state) as a, edge_at(cell.address, state) as b:
        assert a.wait_ready(60), a.status()
        assert b.wait_ready(60), b.status()
        assert a.infer(UNSURE).route == b.infer(UNSURE).route == "tail"
    assert cell.received == program().spec.key_bytes


def test_several_threads_through_a_dying_cloud_all_get_answers(edge: EdgeRuntime, cell: ScriptedCell) -> None:
    answers: list[Any] = []

    def work() -> None:
        for _ in range(40):
            answers.append(edge.infer(UNSURE, deadline_s=1.0))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    cell.stop()
    time.sleep(0.2)
    cell.start()
    for thread in threads:
        thread.join(60)
    assert len(answers) == 160
    assert all(a.route == "tail" or a.label == 1 for a in answers)


def test_the_key_process_tells_what_it_does_and_ends_with_its_parent(tmp_path: Path) -> None:
    order = json.dumps({"spec": program().spec.to_json(), "state_dir": str(tmp_path), "backend": "clear"})
    command = [sys.executable, "-m", "edge.keys_child"]
    done = subprocess.run(
        command, input=order + "\n", capture_output=True, text=True, timeout=60, check=False
    )
    # Standard input closed right behind the order: it may have ended early, but never in error.
    assert done.returncode in (0, 2)
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(order + "\n")
    process.stdin.flush()
    events = [json.loads(line)["event"] for line in process.stdout]
    process.stdin.close()
    process.stdout.close()
    assert process.wait(30) == 0
    assert events[-2:] == ["keys", "done"]


def test_a_key_process_without_its_parent_ends(tmp_path: Path) -> None:
    order = {
        "spec": program().spec.to_json(),
        "state_dir": str(tmp_path),
        "backend": "clear",
        "address": "127.0.0.1:9",
        "credentials": INSECURE_LOOPBACK,
    }
    command = [sys.executable, "-m", "edge.keys_child"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(order) + "\n")
    process.stdin.flush()
    for line in process.stdout:
        if json.loads(line)["event"] == "keys":
            break  # now it tries to upload, for a minute
    process.stdin.close()
    process.stdout.close()
    assert process.wait(60) == 2
