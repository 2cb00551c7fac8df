"""The background session: keys, registration, and every way in which a cloud can go missing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
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
from blindtail.records import TailReply
from blindtail.wire import KeyState, KeyStatus, RegisterResult, TicketsTaken
from edge import session as session_module
from edge.activity import Activity
from edge.cells import Cells
from edge.keyfiles import KeyFiles
from edge.keys import Report
from edge.session import RemoteTail
from edge.tail import TailState
from edge.tails import open_tails
from tests.edge_fakes import FEATURES, PlainCipher, bundle_of, reply, spec_of

pytestmark = pytest.mark.timeout(30)


class FakeCell:
    """A `CellClient`: sessions are numbered; `faults` are raised by the next evaluations, in order."""

    address = "127.0.0.1:1"

    def __init__(self) -> None:
        self.keys = KeyState.MISSING
        self.registered: list[bytes] = []
        self.evaluated: list[tuple[bytes, bytes, int]] = []
        self.faults: list[BlindtailError] = []
        self.refuse: BlindtailError | None = None
        self.closed = False
        self.pings = 0
        self.silent = False
        self.capacity = 16
        self.offers: list[tuple[bytes, tuple[bytes, ...]]] = []
        self.offer_fault: BlindtailError | None = None
        self.containers: list[bytes] = []

    def register(self, key_sha256: bytes, timeout_s: float) -> RegisterResult:
        self.registered.append(key_sha256)
        if self.silent:
            raise DeadlineExceeded("no reply")
        if self.refuse is not None:
            raise self.refuse
        return RegisterResult(len(self.registered).to_bytes(16, "big"), self.keys, "", 600.0)

    def key_status(self, key_sha256: bytes, timeout_s: float) -> KeyStatus:
        self.pings += 1
        if self.silent:
            raise DeadlineExceeded("no reply")
        return KeyStatus(self.keys, 0)

    def tickets(self, session: bytes, seeds: tuple[bytes, ...], timeout_s: float) -> TicketsTaken:
        self.offers.append((session, seeds))
        if self.offer_fault is not None:
            raise self.offer_fault
        return TicketsTaken(len(seeds) if self.capacity else 0, self.capacity)

    def evaluate(
        self,
        session: bytes,
        request_id: bytes,
        attempt: int,
        container: bytes,
        remaining_s: float,
        program_id: str = "",
    ) -> TailReply:
        self.evaluated.append((session, request_id, attempt))
        self.containers.append(container)
        if self.faults:
            raise self.faults.pop(0)
        return reply()

    def close(self) -> None:
        self.closed = True


class FakeWorker:
    """A `KeyWorker` that writes two small files and flips the cell's key state."""

    def __init__(self, files: KeyFiles, cell: FakeCell) -> None:
        self.files, self.cell = files, cell
        self.orders: list[str | None] = []
        self.fault: BlindtailError | None = None

    def run(self, address: str | None, report: Report) -> None:
        self.orders.append(address)
        if self.fault is not None:
            raise self.fault
        try:
            found = self.files.find()
        except ContainerError:
            self.files.set_aside()
            found = None
        if found is None:
            report({"event": "making"})
            self.files.secret.write_bytes(b"s" * 8 + bytes([len(self.orders)]))
            self.files.evaluation.write_bytes(b"e" * 8 + bytes([len(self.orders)]))
            self.files.complete()
        if address is not None:
            report({"event": "uploading", "sent": 3, "total": 9})
            self.cell.keys = KeyState.READY

    def close(self) -> None:
        pass


class Rig:
    def __init__(self, folder: Path) -> None:
        self.cell = FakeCell()
        self.files = KeyFiles(folder, spec_of())
        self.worker = FakeWorker(self.files, self.cell)
        self.probes: list[float] = []
        self.loads = self.dialled = 0
        self.activity = Activity()
        self.tail = self.make()

    def make(self, tickets: int = 0) -> RemoteTail:
        def load(*_: Any) -> PlainCipher:
            self.loads += 1
            self.cipher = PlainCipher()
            return self.cipher

        def dial(address: str) -> FakeCell:
            assert address == self.cell.address
            self.dialled += 1
            return self.cell

        return RemoteTail(
            spec_of(),
            Cells([self.cell.address], dial),
            self.files,
            self.worker,
            seed=1,
            load_cipher=load,
            on_probe=lambda seconds, timings: self.probes.append(seconds),
            tickets=tickets,
            activity=self.activity,
        )

    def start(self) -> RemoteTail:
        self.tail.start()
        assert self.tail.wait_ready(10.0), self.tail.status()
        return self.tail

    def again(self, count: int) -> None:
        """Waits until the tail is READY for the `count`-th time."""
        until(lambda: self.tail.status().registrations >= count and self.tail.ready)


def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "it never happened"
        time.sleep(0.005)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "REJOIN_S", 0.02)
    monkeypatch.setattr(session_module, "BACK_OFF_S", (0.02, 0.05))


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    yield made
    made.tail.close()


ACTIVATION = PlainCipher().encrypt(np.zeros(FEATURES))


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
    tail._typical_s = 10.0
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
    be_late(rig, session_module.LATE_IN_A_ROW - 1)
    assert rig.cell.pings == 0
    be_late(rig, 1)
    until(lambda: rig.cell.pings == 1)
    be_late(rig, session_module.LATE_IN_A_ROW)
    time.sleep(0.1)
    assert rig.cell.pings == 1  # not more often than every PING_S
    assert tail.ready  # it was there, only slow
    assert tail.status().registrations == 1


def test_a_silent_cloud_ends_offloads_until_it_answers_again(rig: Rig) -> None:
    tail = rig.start()
    rig.cell.silent = True
    be_late(rig, session_module.LATE_IN_A_ROW)
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
    until(lambda: tail.ready, 2.0)
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


# -- tickets --------------------------------------------------------------------


def ticketed(folder: Path, tickets: int = 3) -> Rig:
    rig = Rig(folder)
    rig.tail = rig.make(tickets)
    rig.start()
    return rig


def number(seed: bytes) -> int:
    return int.from_bytes(seed, "big")


def test_tickets_are_announced_and_used_oldest_first(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.tail = rig.make(3)
    with rig.activity.request():  # nothing is made meanwhile
        rig.start()
        time.sleep(0.1)
        assert (rig.cipher.made, rig.tail.status().tickets) == (0, 0)
    until(lambda: rig.tail.tickets == 3)
    assert rig.tail.status().tickets == 3
    assert {session for session, _ in rig.cell.offers} == {len(rig.cell.registered).to_bytes(16, "big")}
    ticket = rig.tail.take_ticket(rig.cipher)
    assert ticket is not None
    assert number(ticket.seed) == 1
    container = rig.cipher.encrypt(np.zeros(FEATURES), None, ticket)
    rig.tail.evaluate(container, 1.0)
    until(lambda: rig.tail.tickets == 3 and rig.cipher.made == 4)
    assert rig.tail.take_ticket(PlainCipher()) is None
    rig.tail.close()
    assert rig.tail.take_ticket(rig.cipher) is None


@pytest.mark.parametrize("tickets", [0, 3])
def test_a_cell_without_tickets_or_an_edge_without(tmp_path: Path, tickets: int) -> None:
    rig = Rig(tmp_path)
    rig.cell.capacity = 0
    rig.tail = rig.make(tickets)
    rig.start()
    time.sleep(0.1)
    assert (rig.cipher.made, len(rig.cell.offers)) == (0, min(tickets, 1))
    assert rig.tail.take_ticket(rig.cipher) is None
    rig.tail.evaluate(rig.cipher.encrypt(np.zeros(FEATURES)), 1.0)
    rig.tail.close()


def test_a_retry_sends_the_very_same_bytes(tmp_path: Path) -> None:
    rig = ticketed(tmp_path)
    until(lambda: rig.tail.tickets == 3)
    container = rig.cipher.encrypt(np.ones(FEATURES), None, rig.tail.take_ticket(rig.cipher))
    rig.cell.faults = [TailUnavailable("the connection broke")]
    before, encrypted = len(rig.cell.containers), rig.cipher.encrypted
    rig.tail.evaluate(container, 5.0)
    assert rig.cell.containers[before:] == [container, container]
    assert (rig.cipher.encrypted, len(rig.cipher.used)) == (encrypted, 1)
    rig.tail.close()


@pytest.mark.parametrize("fault", [SessionLost("who are you"), KeysMissing("evicted")])
def test_a_lost_session_throws_the_tickets_away(tmp_path: Path, fault: BlindtailError) -> None:
    rig = ticketed(tmp_path)
    until(lambda: rig.tail.tickets == 3)
    ticket = rig.tail.take_ticket(rig.cipher)
    assert ticket is not None
    rig.cell.faults = [fault]
    with pytest.raises(type(fault)):
        rig.tail.evaluate(rig.cipher.encrypt(np.zeros(FEATURES), None, ticket), 1.0)
    assert rig.tail.take_ticket(rig.cipher) is None
    rig.again(2)
    until(lambda: rig.tail.tickets == 3)
    again = rig.tail.take_ticket(rig.cipher)
    assert again is not None
    assert number(again.seed) > 3
    assert rig.cell.offers[-1][0] == len(rig.cell.registered).to_bytes(16, "big")
    rig.tail.close()


def test_an_announcement_that_finds_the_session_gone_registers_again(tmp_path: Path) -> None:
    rig = ticketed(tmp_path)
    until(lambda: rig.tail.tickets == 3)
    rig.cell.offer_fault = SessionLost("who are you")
    rig.tail.take_ticket(rig.cipher)
    until(lambda: rig.tail.status().registrations == 2 or not rig.tail.ready)
    rig.cell.offer_fault = None
    rig.again(2)
    until(lambda: rig.tail.tickets == 3)
    rig.tail.close()


def test_a_silent_announcement_leaves_the_session_alone(tmp_path: Path) -> None:
    rig = ticketed(tmp_path)
    until(lambda: rig.tail.tickets == 3)
    rig.cell.offer_fault = TailUnavailable("no answer")
    rig.tail.take_ticket(rig.cipher)
    until(lambda: len(rig.cell.offers) >= 3)
    assert rig.tail.ready
    assert (rig.tail.tickets, rig.tail.status().registrations) == (2, 1)
    rig.tail.close()
