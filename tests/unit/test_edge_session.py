"""The background session: keys, registration, and every way in which a cloud can go missing."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from blindtail.errors import (
    AccessDenied,
    BlindtailError,
    ConfigError,
    ContainerError,
    DeadlineExceeded,
    EvaluationFailed,
    KeysMissing,
    Overloaded,
    ProgramMismatch,
    SessionLost,
    TailUnavailable,
)
from blindtail.wire import KeyState
from edge.attempts import LATE_IN_A_ROW
from edge.tail import TailState
from edge.tails import open_tails
from tests.clock import until
from tests.edge_fakes import bundle_of, reply
from tests.session_cases import (
    ACTIVATION,
    Rig,
    rig_of_one_test,  # noqa: F401
    short_waits,  # noqa: F401
)

pytestmark = pytest.mark.timeout(30)


def test_it_makes_keys_uploads_them_registers_and_probes(rig: Rig) -> None:
    tail = rig.start()
    assert rig.worker.orders == [None, rig.cell.address]
    assert (len(rig.cell.registered), rig.loads) == (2, 1)
    assert len(rig.probes) == 1  # the second probe only: the first one warms
    assert tail.status().sent_bytes == tail.spec.key_bytes
    assert tail.evaluate(ACTIVATION, 1.0).container == reply().container


def test_keys_are_used_again_after_a_restart(rig: Rig) -> None:
    rig.start().close()
    first = rig.cell.registered[-1]
    rig.tail = rig.make()
    rig.start()
    assert len(rig.worker.orders) == 2
    assert rig.cell.registered[-1] == first


@pytest.mark.parametrize("name", ["secret.key", "evaluation.keys", "keys.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_damaged_keys_are_moved_aside_and_made_again(rig: Rig, name: str, harm: str) -> None:
    rig.start().close()
    first = rig.cell.registered[-1]
    path = rig.files.directory / name
    data = path.read_bytes()
    if harm == "remove":
        path.unlink()
    else:
        path.write_bytes(data[:-1] if harm == "cut" else bytes([data[0] ^ 1]) + data[1:])
    rig.cell.keys = KeyState.MISSING
    rig.tail = rig.make()
    rig.start()
    assert rig.cell.registered[-1] != first
    rig.files.find()


def test_a_lost_session_is_registered_again_with_the_same_keys(rig: Rig) -> None:
    tail = rig.start()
    before = tail.status().registrations
    rig.cell.faults = [SessionLost("restarted")]
    with pytest.raises(SessionLost):
        tail.evaluate(ACTIVATION, 1.0)
    assert not tail.ready
    rig.again(before + 1)
    assert len(rig.worker.orders) == 2
    session = rig.cell.evaluated[-1][0]
    tail.evaluate(ACTIVATION, 1.0)
    assert rig.cell.evaluated[-1][0] == session != rig.cell.evaluated[0][0]


def test_evicted_keys_are_uploaded_again(rig: Rig) -> None:
    tail = rig.start()
    rig.cell.keys = KeyState.MISSING
    rig.cell.faults = [KeysMissing("evicted")]
    with pytest.raises(KeysMissing):
        tail.evaluate(ACTIVATION, 1.0)
    rig.again(2)
    assert rig.worker.orders == [None, rig.cell.address, rig.cell.address]


@pytest.mark.parametrize("fault", [TailUnavailable("reset"), EvaluationFailed("crashed")])
def test_a_broken_request_is_sent_once_more_with_the_same_id(rig: Rig, fault: BlindtailError) -> None:
    tail = rig.start()
    rig.cell.faults = [fault]
    rig.cell.evaluated.clear()
    assert tail.evaluate(ACTIVATION, 5.0).container == reply().container
    (_, first, a), (_, second, b) = rig.cell.evaluated
    assert (first, a, b) == (second, 0, 1)


def test_it_is_sent_twice_at_most(rig: Rig) -> None:
    tail = rig.start()
    rig.cell.faults = [EvaluationFailed("crashed"), EvaluationFailed("crashed")]
    rig.cell.evaluated.clear()
    with pytest.raises(EvaluationFailed):
        tail.evaluate(ACTIVATION, 5.0)
    assert len(rig.cell.evaluated) == 2
    assert tail.ready  # a request that kills evaluators says nothing about the session


def test_nothing_is_sent_again_without_time_for_it(rig: Rig) -> None:
    tail = rig.start()
    tail._attempts.typical_s = 10.0
    rig.cell.faults = [EvaluationFailed("crashed")]
    rig.cell.evaluated.clear()
    with pytest.raises(EvaluationFailed):
        tail.evaluate(ACTIVATION, 1.0)
    assert len(rig.cell.evaluated) == 1


def test_other_faults_are_not_retried(rig: Rig) -> None:
    tail = rig.start()
    rig.cell.evaluated.clear()
    rig.cell.faults = [ContainerError("refused")]
    with pytest.raises(ContainerError):
        tail.evaluate(ACTIVATION, 1.0)
    assert len(rig.cell.evaluated) == 1


def test_a_cloud_that_is_away_is_tried_until_it_is_back(rig: Rig) -> None:
    tail = rig.start()
    rig.cell.refuse = TailUnavailable("nobody")
    rig.cell.faults = [TailUnavailable("gone"), TailUnavailable("gone")]
    with pytest.raises(TailUnavailable):
        tail.evaluate(ACTIVATION, 1.0)
    until(lambda: len(rig.cell.registered) > 4)
    assert tail.status().state is TailState.AWAY
    assert rig.dialled > 2  # anew for every try
    with pytest.raises(TailUnavailable):
        tail.evaluate(ACTIVATION, 1.0)
    rig.cell.refuse = None
    rig.again(2)


def be_late(rig: Rig, times: int) -> None:
    for _ in range(times):
        rig.cell.faults = [DeadlineExceeded("late")]
        with pytest.raises(DeadlineExceeded):
            rig.tail.evaluate(ACTIVATION, 1.0)


def test_late_replies_in_a_row_make_it_ask_whether_the_cloud_is_there(rig: Rig) -> None:
    tail = rig.start()
    be_late(rig, LATE_IN_A_ROW - 1)
    assert rig.cell.pings == 0
    be_late(rig, 1)
    until(lambda: rig.cell.pings == 1)
    be_late(rig, LATE_IN_A_ROW)
    time.sleep(0.1)
    assert rig.cell.pings == 1  # not more often than every PING_S
    assert tail.ready  # it was there, only slow
    assert tail.status().registrations == 1


def test_a_silent_cloud_ends_offloads_until_it_answers_again(rig: Rig) -> None:
    tail = rig.start()
    rig.cell.silent = True
    be_late(rig, LATE_IN_A_ROW)
    until(lambda: tail.status().state is TailState.AWAY)
    rig.cell.silent = False
    rig.again(2)


def test_one_good_reply_clears_the_late_ones(rig: Rig) -> None:
    tail = rig.start()
    for _ in range(5):
        be_late(rig, 1)
        tail.evaluate(ACTIVATION, 1.0)
    assert tail.ready
    assert rig.cell.pings == 0
    assert tail.status().registrations == 1


def test_an_overloaded_cloud_is_left_alone_for_as_long_as_it_asks(rig: Rig) -> None:
    tail = rig.start()
    rig.cell.faults = [Overloaded("full", 0.2)]
    with pytest.raises(Overloaded):
        tail.evaluate(ACTIVATION, 1.0)
    assert not tail.ready
    until(lambda: tail.ready, limit_s=2.0)
    assert tail.status().registrations == 1


@pytest.mark.parametrize(
    ("fault", "state"),
    [
        (ProgramMismatch("the cloud has version 2"), TailState.MISMATCH),
        (AccessDenied("unknown certificate"), TailState.DENIED),
    ],
)
def test_a_hopeless_cloud_is_not_hammered(rig: Rig, fault: BlindtailError, state: TailState) -> None:
    rig.cell.refuse = fault
    rig.tail.start()
    assert not rig.tail.wait_ready(10.0)
    time.sleep(0.2)
    assert rig.tail.status().state is state
    assert str(fault) in rig.tail.status().problem
    assert len(rig.cell.registered) == 1


def test_a_mismatch_found_by_an_evaluation_ends_offloads(rig: Rig) -> None:
    tail = rig.start()
    rig.cell.refuse = ProgramMismatch("rolled back")
    rig.cell.faults = [ProgramMismatch("rolled back")]
    with pytest.raises(ProgramMismatch):
        tail.evaluate(ACTIVATION, 1.0)
    until(lambda: tail.status().state is TailState.MISMATCH)


def test_a_key_process_that_fails_is_told_in_the_status(rig: Rig) -> None:
    rig.worker.fault = EvaluationFailed("the key process ended before its time")
    rig.tail.start()
    until(lambda: rig.tail.status().state is TailState.FAILED)
    assert "key process" in rig.tail.status().problem


def test_closing_while_waiting_ends_the_thread(rig: Rig) -> None:
    rig.cell.refuse = TailUnavailable("nobody")
    rig.tail.start()
    until(lambda: len(rig.cell.registered) > 1)
    rig.tail.close()
    assert not rig.tail._thread.is_alive()
    assert rig.tail.status().state is TailState.CLOSED
    assert rig.cell.closed
    assert not rig.tail.wait_ready(0.1)


def test_a_bad_probe_does_not_keep_the_tail_from_being_ready(rig: Rig) -> None:
    rig.cell.faults = [EvaluationFailed("a"), EvaluationFailed("b")]
    rig.start()
    assert rig.probes == []


def test_the_key_directory_is_private(rig: Rig) -> None:
    rig.start()
    assert rig.files.directory.stat().st_mode & 0o777 == 0o700


def test_the_lock_is_exclusive(rig: Rig) -> None:
    rig.files.prepare()
    order: list[str] = []

    def second() -> None:
        with rig.files.lock():
            order.append("second")

    with rig.files.lock():
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.1)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"backend": "sael"}, "seal"),
        ({"uplink_bps": 0.0}, "uplink_bps"),
        ({"credentials": "insecure-loopback", "address": "cloud.example:50051"}, "loopback"),
        ({"address": "nowhere"}, "host:port"),
        ({"state_dir": "/dev/null/x"}, "state_dir"),
    ],
)
def test_wrong_settings_are_refused_at_the_door(
    settings: Mapping[str, Any], words: str, tmp_path: Path
) -> None:
    given: dict[str, Any] = {
        "address": "127.0.0.1:1",
        "credentials": "insecure-loopback",
        "backend": "clear",
        "state_dir": tmp_path,
        **settings,
    }
    with pytest.raises(ConfigError, match=words):
        open_tails(bundle_of(), given.pop("address"), **given)
