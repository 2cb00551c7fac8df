"""One tail and several cells: which is tried when, and what a request meets whose cell dies."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from blindtail.errors import (
    AccessDenied,
    BlindtailError,
    ConfigError,
    Overloaded,
    ProgramMismatch,
    TailUnavailable,
)
from blindtail.records import TailReply
from blindtail.rpc import INSECURE_LOOPBACK
from blindtail.wire import KeyState
from edge import backoff
from edge import session as session_module
from edge.cells import MOST_LEARNED, SHUN_S, Cells, Place, may_dial, split_addresses
from edge.config import EdgeConfig
from edge.tail import TailState
from tests.cells_cases import (
    A,
    B,
    C,
    FakeClient,
    Rig,
    World,
    rig_of_one_test,  # noqa: F401
)
from tests.clock import FakeClock, until
from tests.session_cases import ACTIVATION

pytestmark = pytest.mark.timeout(30)


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
    monkeypatch.setattr(backoff, "BACK_OFF_S", (60.0, 60.0))
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
