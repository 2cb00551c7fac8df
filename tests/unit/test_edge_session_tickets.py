"""Tickets of a session: announced, used oldest first, and gone with it."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from blindtail.errors import BlindtailError, KeysMissing, SessionLost, TailUnavailable
from tests.clock import until
from tests.edge_fakes import FEATURES, PlainCipher
from tests.session_cases import (
    Rig,
    rig_of_one_test,  # noqa: F401
    short_waits,  # noqa: F401
)

pytestmark = pytest.mark.timeout(30)


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
