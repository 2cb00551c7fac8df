"""A cell that drains: moving to another one without a gap."""

from __future__ import annotations

import threading
import time

import pytest

from blindtail.records import TailReply
from blindtail.wire import KeyState
from edge.tail import TailState
from tests.cells_cases import (
    A,
    B,
    Rig,
    rig_of_one_test,  # noqa: F401
)
from tests.clock import until
from tests.edge_fakes import reply
from tests.session_cases import ACTIVATION

pytestmark = pytest.mark.timeout(30)


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
