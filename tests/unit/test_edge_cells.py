"""One tail and several cells: which is tried when, and moving without a gap."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blindtail.errors import (
    AccessDenied,
    BlindtailError,
    ConfigError,
    Overloaded,
    ProgramMismatch,
    SessionLost,
    TailUnavailable,
)
from blindtail.records import TailReply, TailTimings
from blindtail.rpc import INSECURE_LOOPBACK
from blindtail.wire import KeyState, KeyStatus, RegisterResult
from edge import session as session_module
from edge.cells import MOST_LEARNED, SHUN_S, Cells, Place, may_dial, split_addresses
from edge.config import EdgeConfig
from edge.keyfiles import KeyFiles
from edge.keys import Report
from edge.session import RemoteTail
from edge.tail import TailState
from tests.edge_fakes import FEATURES, FakeClock, PlainCipher, reply, spec_of

pytestmark = pytest.mark.timeout(30)
A, B, C = "127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"
ACTIVATION = PlainCipher().encrypt(np.zeros(FEATURES))


class World:
    """Cells by address, all with one set of keys unless told otherwise."""

    def __init__(self) -> None:
        self.down: set[str] = set()
        self.faults: dict[str, BlindtailError] = {}
        self.draining: set[str] = set()
        self.keys: dict[str, KeyState] = {}
        self.others: dict[str, tuple[str, ...]] = {}
        self.advertised: dict[str, str] = {}
        self.lost: set[str] = set()  # cells that forgot their sessions
        self.dialled: list[str] = []
        self.registered: list[str] = []
        self.evaluated: list[str] = []
        self.clients: list[FakeClient] = []
        self.hold: threading.Event | None = None  # evaluations wait for it
        self.holding = threading.Semaphore(0)
        self.refuse_evaluations = False

    def dial(self, address: str) -> FakeClient:
        self.dialled.append(address)
        self.clients.append(FakeClient(self, address))
        return self.clients[-1]


class FakeClient:
    def __init__(self, world: World, address: str) -> None:
        self.world, self.given, self.address = world, address, address
        self.closed = False

    def _reach(self) -> None:
        if self.closed or self.address in self.world.down:
            raise TailUnavailable(f"nobody at {self.address}")
        if self.address in self.world.faults:
            raise self.world.faults[self.address]

    def register(self, key_sha256: bytes, timeout_s: float) -> RegisterResult:
        world = self.world
        self._reach()
        self.address = world.advertised.get(self.given, self.address)
        world.registered.append(self.address)
        world.lost.discard(self.address)
        return RegisterResult(
            len(world.registered).to_bytes(16, "big"),
            world.keys.get(self.address, KeyState.READY),
            "",
            600.0,
            self.address in world.draining,
            world.others.get(self.address, ()),
        )

    def key_status(self, key_sha256: bytes, timeout_s: float) -> KeyStatus:
        self._reach()
        return KeyStatus(self.world.keys.get(self.address, KeyState.READY), 0)

    def evaluate(
        self,
        session: bytes,
        request_id: bytes,
        attempt: int,
        container: bytes,
        remaining_s: float,
        program_id: str = "",
    ) -> TailReply:
        world = self.world
        hold = world.hold
        if hold is not None:
            world.holding.release()
            assert hold.wait(10)
        self._reach()
        if self.address in world.lost:
            raise SessionLost("forgotten")
        world.evaluated.append(self.address)
        honest = reply()
        timings = TailTimings(0.0, 0.001, "fake", self.address in world.draining, "1")
        return TailReply(honest.container, timings, 0.001)

    def close(self) -> None:
        self.closed = True


class FakeWorker:
    def __init__(self, files: KeyFiles, world: World) -> None:
        self.files, self.world = files, world
        self.uploads: list[str] = []

    def run(self, address: str | None, report: Report) -> None:
        if self.files.find() is None:
            self.files.secret.write_bytes(b"s" * 8)
            self.files.evaluation.write_bytes(b"e" * 8)
            self.files.complete()
        if address is not None:
            report({"event": "uploading", "sent": 3, "total": 9})
            self.uploads.append(address)
            self.world.keys[address] = KeyState.READY

    def close(self) -> None:
        pass


class Rig:
    def __init__(self, folder: Path) -> None:
        self.world, self.folder = World(), folder
        self.files = KeyFiles(folder, spec_of())
        self.worker = FakeWorker(self.files, self.world)
        self.states: list[TailState] = []
        self.tail: RemoteTail | None = None

    def start(self, *addresses: str, wait: bool = True) -> RemoteTail:
        tail = self.tail = RemoteTail(
            spec_of(),
            Cells(addresses, self.world.dial),
            self.files,
            self.worker,
            seed=1,
            load_cipher=lambda *_: PlainCipher(),
        )
        tail.start()
        if wait:
            assert tail.wait_ready(10.0), tail.status()
        return tail

    def fails(self) -> None:
        """A request with no time for another cell meets the trouble."""
        assert self.tail is not None
        self.tail._typical_s = 5.0
        with pytest.raises(BlindtailError):
            self.tail.evaluate(ACTIVATION, 1.0)

    def at(self, address: str) -> None:
        """Waits until requests go there."""
        until(lambda: self.tail is not None and self.tail.ready and self.tail.status().cell == address)


def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "it never happened"
        time.sleep(0.005)


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    monkeypatch.setattr(session_module, "REJOIN_S", 0.02)
    monkeypatch.setattr(session_module, "BACK_OFF_S", (0.02, 0.05))
    monkeypatch.setattr(session_module, "MOVE_S", 0.05)
    monkeypatch.setattr(session_module, "_SETTLED_S", 0.0)
    made = Rig(tmp_path)
    yield made
    if made.tail is not None:
        made.tail.close()
        until(lambda: all(client.closed for client in made.world.clients))


# -- candidates ------------------------------------------------------------------------


def cells(addresses: Sequence[str], clock: Callable[[], float] = time.monotonic, **settings: Any) -> Cells:
    return Cells(addresses, lambda address: FakeClient(World(), address), clock=clock, **settings)


def test_the_order_turns_round_and_ends_with_the_one_that_failed() -> None:
    found = cells([A, B, C])
    assert found.order() == [A, B, C]
    assert found.order(A) == [B, C, A]
    assert found.order(C) == [A, B, C]
    assert found.order("unknown:1") == [A, B, C]


def test_named_cells_come_after_given_ones_and_are_bounded() -> None:
    found = cells([A], may_learn=lambda address: not address.startswith("far"))
    found.learn([B, A, B, "far:1"])
    assert found.order() == [A, B]
    found.learn([C])
    assert found.order() == [A, C, B]  # the latest word first
    found.learn([f"127.0.0.1:{port}" for port in range(100, 200)])
    assert len(found) == 1 + MOST_LEARNED


def test_a_cell_that_said_no_is_passed_over_for_a_while() -> None:
    clock = FakeClock()
    found = cells([A, B], clock)
    found.shun(A)
    assert found.order() == [B]
    found.shun(B)
    assert found.order() == [A, B]  # nothing else remains
    clock.advance(SHUN_S + 1)
    assert found.order() == [A, B]


def test_addresses_are_split_and_checked() -> None:
    assert split_addresses(" a:1, b:2 ,a:1,") == ("a:1", "b:2")
    assert split_addresses(["a:1"]) == ("a:1",)
    for wrong in ("", ",", "a:1,b", "a"):
        with pytest.raises(ConfigError, match="host:port"):
            split_addresses(wrong)


def test_plaintext_never_leaves_this_host_whoever_names_the_cell() -> None:
    assert may_dial(INSECURE_LOOPBACK, A)
    assert not may_dial(INSECURE_LOOPBACK, "cloud.example:1")
    assert not may_dial(None, "no address")
    assert may_dial(None, "cloud.example:1")


def test_settings_take_several_addresses(tmp_path: Path) -> None:
    for cloud in ("a:1,b:2", ("a:1", "b:2")):
        config = EdgeConfig(tmp_path, cloud=cloud)
        assert config.runtime_settings()["address"] == cloud
    with pytest.raises(ConfigError, match="host:port"):
        EdgeConfig(tmp_path, cloud=("a:1", "b"))


def test_a_place_is_closed_by_the_last_who_uses_it() -> None:
    client = FakeClient(World(), A)
    place = Place(A, client)
    place.hold()
    place.hold()
    place.leave()
    place.release()
    assert not client.closed
    place.release()
    assert client.closed
    idle = Place(B, FakeClient(World(), B))
    idle.leave()
    assert isinstance(idle.client, FakeClient)
    assert idle.client.closed


# -- a cell that dies ---------------------------------------------------------------------


def test_the_first_address_is_preferred_and_the_others_are_not_dialled(rig: Rig) -> None:
    rig.start(A, B)
    rig.at(A)
    assert rig.world.dialled == [A]
    assert rig.worker.uploads == []


def test_the_next_cell_is_tried_at_once_and_kept(rig: Rig) -> None:
    tail = rig.start(A, B, C)
    rig.world.down = {A, B}
    rig.fails()
    rig.at(C)
    assert rig.world.dialled == [A, B, C]
    assert rig.worker.uploads == []
    rig.world.down = set()
    tail.evaluate(ACTIVATION, 1.0)
    time.sleep(0.1)
    assert rig.world.dialled == [A, B, C]  # no way back by itself
    rig.world.down = {C}
    rig.fails()
    rig.at(A)


def test_a_request_whose_cell_dies_under_it_is_answered_by_the_next(rig: Rig) -> None:
    tail = rig.start(A, B)
    rig.world.hold = hold = threading.Event()
    replies: list[TailReply] = []
    requests = [
        threading.Thread(target=lambda: replies.append(tail.evaluate(ACTIVATION, 10.0))) for _ in range(3)
    ]
    for request in requests:
        request.start()
        assert rig.world.holding.acquire(timeout=5)
    rig.world.hold, rig.world.down = None, {A}
    rig.world.evaluated.clear()
    hold.set()
    for request in requests:
        request.join(10)
    assert len(replies) == 3
    assert set(rig.world.evaluated) == {B}


def test_without_another_cell_a_request_does_not_wait(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "ELSEWHERE_S", 0.6)
    tail = rig.start(A)
    rig.world.down = {A}
    start_s = time.monotonic()
    with pytest.raises(TailUnavailable):
        tail.evaluate(ACTIVATION, 10.0)
    assert time.monotonic() - start_s < 0.4


def test_a_request_waits_for_another_cell_only_so_long(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "ELSEWHERE_S", 0.2)
    tail = rig.start(A, B)
    rig.world.down = {A, B}
    start_s = time.monotonic()
    with pytest.raises(TailUnavailable):
        tail.evaluate(ACTIVATION, 10.0)
    assert 0.15 < time.monotonic() - start_s < 2


def test_nobody_waits_before_every_cell_was_tried_once(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "BACK_OFF_S", (60.0, 60.0))
    rig.start(A, B, C)
    rig.world.down = {A, B}
    rig.fails()
    rig.at(C)
    rig.world.down = {A, B, C}
    rig.fails()
    until(lambda: rig.world.dialled == [A, B, C, A, B, C])
    time.sleep(0.1)
    assert len(rig.world.dialled) == 6  # positive control: now it waits


def test_keys_are_uploaded_where_no_peer_has_them(rig: Rig) -> None:
    rig.world.keys[B] = KeyState.MISSING
    rig.start(A, B)
    rig.world.down = {A}
    rig.fails()
    rig.at(B)
    assert rig.worker.uploads == [B]


def test_while_a_cell_asks_its_peers_nothing_is_uploaded_and_no_session_opened(rig: Rig) -> None:
    rig.world.keys[A] = KeyState.CHECKING
    tail = rig.start(A, wait=False)
    until(lambda: tail.status().state is TailState.CHECKING)
    time.sleep(0.3)
    assert rig.world.registered == [A]
    rig.world.keys[A] = KeyState.READY
    rig.at(A)
    assert (rig.world.registered, rig.worker.uploads) == ([A, A], [])


def test_a_lost_session_is_asked_for_where_it_was(rig: Rig) -> None:
    rig.start(A, B)
    rig.world.lost = {A}
    rig.fails()
    until(lambda: rig.world.registered == [A, A])
    rig.at(A)
    assert rig.world.dialled == [A]


def test_a_lost_session_of_a_cell_that_then_dies_is_had_elsewhere(rig: Rig) -> None:
    rig.start(A, B)
    rig.world.lost, rig.world.faults = {A}, {A: TailUnavailable("it is gone now")}
    rig.fails()
    rig.at(B)


@pytest.mark.parametrize(
    "fault", [ProgramMismatch("version 2"), AccessDenied("not for you"), Overloaded("full", 30.0)]
)
def test_a_cell_that_says_no_is_not_the_last_word(rig: Rig, fault: BlindtailError) -> None:
    rig.world.faults = {A: fault}
    rig.start(A, B)
    rig.at(B)


def test_hopeless_everywhere_is_told_and_not_hammered(rig: Rig) -> None:
    rig.world.faults = {A: ProgramMismatch("version 2"), B: ProgramMismatch("version 3")}
    tail = rig.start(A, B, wait=False)
    assert not tail.wait_ready(10)
    assert tail.status().state is TailState.MISMATCH
    time.sleep(0.2)
    assert rig.world.dialled == [A, B]


def test_a_cell_that_is_away_is_waited_for_although_another_one_is_hopeless(rig: Rig) -> None:
    rig.world.faults, rig.world.down = {A: ProgramMismatch("version 2")}, {B}
    rig.start(A, B, wait=False)
    until(lambda: rig.world.dialled.count(B) > 3)
    assert rig.world.dialled.count(A) == 1
    rig.world.down = set()
    rig.at(B)


def test_cells_that_a_cell_names_are_candidates(rig: Rig) -> None:
    rig.world.others[A] = (B,)
    rig.start(A)
    rig.world.down = {A}
    rig.fails()
    rig.at(B)


# -- a cell that drains ----------------------------------------------------------------------


def test_it_moves_before_it_leaves(rig: Rig) -> None:
    tail = rig.start(A, B)
    rig.world.draining = {A}
    rig.world.evaluated.clear()
    for _ in range(200):
        tail.evaluate(ACTIVATION, 1.0)  # none fails
        assert tail.ready
        if rig.world.evaluated[-1] == B:
            break
        time.sleep(0.005)
    rig.at(B)
    assert rig.world.evaluated[0] == A
    assert tail.status().registrations == 2
    until(lambda: rig.world.clients[0].closed)


def test_what_runs_at_the_old_cell_is_finished_there(rig: Rig) -> None:
    tail = rig.start(A, B)
    rig.world.hold = hold = threading.Event()
    replies: list[TailReply] = []
    running = threading.Thread(target=lambda: replies.append(tail.evaluate(ACTIVATION, 10.0)))
    running.start()
    assert rig.world.holding.acquire(timeout=5)
    rig.world.hold = None
    rig.world.draining = {A}
    tail.evaluate(ACTIVATION, 1.0)
    rig.at(B)
    time.sleep(0.05)
    assert not rig.world.clients[0].closed
    hold.set()
    running.join(5)
    assert len(replies) == 1
    until(lambda: rig.world.clients[0].closed)


def test_keys_are_uploaded_to_the_new_cell_while_the_old_one_answers(rig: Rig) -> None:
    rig.world.keys[B] = KeyState.MISSING
    tail = rig.start(A, B)
    rig.world.draining = {A}
    tail.evaluate(ACTIVATION, 1.0)
    rig.at(B)
    assert rig.worker.uploads == [B]
    assert tail.status().registrations == 2


def test_with_nowhere_to_go_it_stays_and_asks_now_and_then(rig: Rig) -> None:
    tail = rig.start(A, B)
    rig.world.draining, rig.world.down = {A}, {B}
    end_s = time.monotonic() + 0.4
    while time.monotonic() < end_s:
        tail.evaluate(ACTIVATION, 1.0)
        assert tail.ready
        time.sleep(0.002)
    assert 2 <= rig.world.dialled.count(B) <= 15  # every MOVE_S, not with every reply
    rig.world.down = set()
    rig.at(B)  # also without a request in between


def test_all_cells_drain_and_a_new_edge_is_served_all_the_same(rig: Rig) -> None:
    rig.world.draining = {A, B}
    tail = rig.start(A, B)
    assert tail.evaluate(ACTIVATION, 1.0).container == reply().container
    assert rig.world.registered[:2] == [A, B]
    assert tail.status().cell == A


def test_a_new_edge_prefers_a_cell_that_does_not_drain(rig: Rig) -> None:
    rig.world.draining = {A}
    rig.start(A, B)
    rig.at(B)


def test_the_old_cell_dies_while_a_new_one_is_joined(rig: Rig) -> None:
    rig.world.keys[B] = KeyState.CHECKING
    tail = rig.start(A, B)
    rig.world.draining = {A}
    tail.evaluate(ACTIVATION, 1.0)
    until(lambda: B in rig.world.registered)
    rig.world.down = {A}
    rig.fails()
    assert tail.status().state is TailState.AWAY
    rig.world.keys[B] = KeyState.READY
    rig.at(B)
    assert tail.status().registrations == 2


def test_behind_a_balancer_the_same_address_leads_elsewhere(rig: Rig) -> None:
    balancer = "127.0.0.1:9"
    rig.world.advertised[balancer] = A
    tail = rig.start(balancer)
    rig.at(A)
    rig.world.draining = {A}
    rig.world.advertised[balancer] = B
    tail.evaluate(ACTIVATION, 1.0)
    rig.at(B)
