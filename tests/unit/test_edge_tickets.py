"""The book of tickets, one step at a time: when it makes, announces, hands out and throws away."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from blindtail.errors import (
    AccessDenied,
    BlindtailError,
    ContainerError,
    DeadlineExceeded,
    KeysMissing,
    Overloaded,
    SessionLost,
    TailUnavailable,
)
from blindtail.wire import TicketsTaken
from edge.activity import Activity
from edge.cells import Place
from edge.tail import Ticket
from edge.tickets import QUIET_S, RETRY_S, TicketBook
from tests.clock import FakeClock
from tests.edge_fakes import PlainCipher

pytestmark = pytest.mark.timeout(30)


class Cell:
    """Takes `room` seeds more, up to `capacity` in all; `fault` is raised instead."""

    address = "127.0.0.1:1"

    def __init__(self, capacity: int = 16, room: int = 100) -> None:
        self.capacity, self.room = capacity, room
        self.offers: list[tuple[bytes, tuple[bytes, ...]]] = []
        self.fault: BlindtailError | None = None

    def tickets(self, session: bytes, seeds: tuple[bytes, ...], timeout_s: float) -> TicketsTaken:
        self.offers.append((session, seeds))
        if self.fault is not None:
            raise self.fault
        taken = min(len(seeds), self.room, self.capacity)
        self.room -= taken
        return TicketsTaken(taken, self.capacity)

    def close(self) -> None:
        pass

    @property
    def seeds(self) -> list[int]:
        return [int.from_bytes(seed, "big") for _, seeds in self.offers for seed in seeds]


class Rig:
    def __init__(self, want: int = 4) -> None:
        self.clock = FakeClock()
        self.activity = Activity(self.clock)
        self.cell, self.cipher = Cell(), PlainCipher()
        self.trouble: list[tuple[Place, Exception]] = []
        self.book = TicketBook(
            want, self.activity, clock=self.clock, on_trouble=lambda *met: self.trouble.append(met), seed=1
        )
        self.place = self.at(b"1" * 16)

    def at(self, session: bytes) -> Place:
        place = Place("a:1", self.cell)  # type: ignore[arg-type]
        place.session = session
        return place

    def begin(self) -> Rig:
        self.book.begin(self.place, self.cipher)
        return self

    def settle(self) -> float | None:
        """Steps until there is nothing to do now; what the last one said."""
        for _ in range(100):
            if wait_s := self.book.step():
                return wait_s
            if wait_s is None:
                return None
        raise AssertionError("the book never rests")

    def take(self) -> int | None:
        ticket = self.book.take(self.cipher)
        return None if ticket is None else int.from_bytes(ticket.seed, "big")


def _busy(wait_s: float | None = None) -> Ticket:
    raise DeadlineExceeded("busy")


@pytest.fixture
def rig() -> Rig:
    return Rig().begin()


def test_it_asks_then_makes_then_announces_all_at_once(rig: Rig) -> None:
    assert rig.settle() is None
    assert [len(seeds) for _, seeds in rig.cell.offers] == [0, 4]
    assert {session for session, _ in rig.cell.offers} == {b"1" * 16}
    assert rig.book.at_hand == rig.cipher.made == 4


def test_the_oldest_goes_first_and_each_once(rig: Rig) -> None:
    rig.settle()
    assert [rig.take() for _ in range(5)] == [1, 2, 3, 4, None]
    rig.settle()
    assert rig.take() == 5


def test_only_announced_ones_are_handed_out(rig: Rig) -> None:
    for _ in range(5):  # the question and four tickets
        assert rig.take() is None
        rig.book.step()
    assert rig.cipher.made == 4
    assert rig.take() is None
    rig.book.step()
    assert rig.take() == 1


def test_nothing_is_made_while_a_request_is_answered_or_just_was(rig: Rig) -> None:
    with rig.activity.request():
        rig.clock.advance(100)
        assert rig.book.step() == QUIET_S
        with rig.activity.request():
            pass
        rig.clock.advance(100)
        assert rig.book.step() == QUIET_S
    assert rig.book.step() == QUIET_S
    assert (rig.cipher.made, rig.cell.offers) == (0, [])
    rig.clock.advance(2 * QUIET_S)
    rig.settle()
    assert rig.book.at_hand == 4
    rig.take()
    with rig.activity.request():
        assert rig.book.step() == QUIET_S
    assert rig.cipher.made == 4


def test_a_busy_cipher_is_left_alone(rig: Rig) -> None:
    rig.book.step()
    rig.cipher.ticket = _busy  # type: ignore[method-assign]
    assert rig.book.step() == QUIET_S
    del rig.cipher.ticket
    rig.settle()
    assert rig.book.at_hand == 4


def test_zero_means_none() -> None:
    rig = Rig(0).begin()
    rig.book.start()
    assert rig.book.step() is None
    assert (rig.take(), rig.cell.offers) == (None, [])
    rig.book.close()


def test_a_cell_without_tickets_costs_one_question(rig: Rig) -> None:
    rig.cell.capacity = 0
    assert rig.settle() is None
    rig.clock.advance(1000)
    assert rig.settle() is None
    assert (len(rig.cell.offers), rig.cipher.made) == (1, 0)
    # Another session may be with another cell.
    rig.cell.capacity = 2
    rig.begin().settle()
    assert rig.book.at_hand == 2


def test_a_cipher_without_tickets_is_asked_once(rig: Rig) -> None:
    rig.cipher.has_tickets = False
    assert rig.settle() is None
    rig.clock.advance(1000)
    assert rig.settle() is None
    assert rig.take() is None


def test_what_the_cell_has_no_room_for_waits_its_turn(rig: Rig) -> None:
    rig.cell.room = 2
    wait_s = rig.settle()
    assert wait_s is not None
    assert RETRY_S <= wait_s <= 2 * RETRY_S
    assert [rig.take(), rig.take(), rig.take()] == [1, 2, None]
    assert rig.book.step() is not None
    rig.cell.room = 100
    rig.clock.advance(wait_s)
    assert rig.settle() is None
    # The one that it refused is not offered again.
    assert rig.cell.seeds.count(3) == 1
    assert [rig.take() for _ in range(4)] == [4, 5, 6, 7]


def test_never_more_than_the_cell_holds(rig: Rig) -> None:
    rig.cell.capacity = 3
    rig.settle()
    assert rig.book.at_hand == rig.cipher.made == 3


@pytest.mark.parametrize("fault", [SessionLost("who"), KeysMissing("gone")])
def test_a_session_that_is_gone_empties_the_book(rig: Rig, fault: BlindtailError) -> None:
    rig.settle()
    rig.take()
    rig.cell.fault = fault
    assert rig.settle() is None
    assert rig.trouble == [(rig.place, fault)]
    assert (rig.book.at_hand, rig.take(), rig.book.step()) == (0, None, None)


@pytest.mark.parametrize("fault", [TailUnavailable("no"), DeadlineExceeded("late"), Overloaded("full", 20.0)])
def test_an_announcement_that_fails_is_made_later(rig: Rig, fault: BlindtailError) -> None:
    rig.cell.fault = fault
    wait_s = rig.settle()
    assert wait_s is not None
    assert wait_s >= (20.0 if isinstance(fault, Overloaded) else RETRY_S)
    rig.clock.advance(wait_s)
    rig.cell.fault = None
    rig.settle()
    assert rig.book.at_hand == 4
    # One that fails with tickets made: they are announced, the same ones, when it works again.
    rig.take()
    rig.cell.fault = fault
    rig.clock.advance(rig.settle() or 0.0)
    rig.cell.fault = None
    rig.settle()
    assert (rig.cipher.made, rig.cell.seeds) == (5, [1, 2, 3, 4, 5, 5])
    assert not rig.trouble


@pytest.mark.parametrize("fault", [AccessDenied("no"), ContainerError("broken"), ValueError("secret")])
def test_anything_else_ends_tickets_on_this_session(
    rig: Rig, fault: BlindtailError, caplog: pytest.LogCaptureFixture
) -> None:
    rig.settle()
    rig.take()
    rig.cell.fault = fault
    assert rig.settle() is None
    asked = len(rig.cell.offers)
    rig.clock.advance(1000)
    assert rig.settle() is None
    assert len(rig.cell.offers) == asked
    assert [rig.take() for _ in range(4)] == [2, 3, 4, None]  # the cell knows them
    assert "secret" not in caplog.text


def test_a_new_session_new_keys_and_the_end_throw_everything_away(rig: Rig) -> None:
    rig.settle()
    other = rig.at(b"2" * 16)
    rig.book.begin(other, rig.cipher)
    assert rig.take() is None
    rig.settle()
    assert rig.cell.offers[-1][0] == b"2" * 16
    assert rig.take() == 5
    # Another key's cipher gets nothing from this one's tickets.
    assert rig.book.take(PlainCipher()) is None
    rig.book.end()
    assert (rig.take(), rig.book.step()) == (None, None)


def test_what_arrives_for_an_old_session_is_dropped(rig: Rig) -> None:
    honest = rig.cell.tickets

    def moved(session: bytes, seeds: tuple[bytes, ...], timeout_s: float) -> TicketsTaken:
        taken = honest(session, seeds, timeout_s)
        if seeds and session == b"1" * 16:
            rig.book.begin(rig.at(b"2" * 16), rig.cipher)
        return taken

    rig.cell.tickets = moved  # type: ignore[method-assign]
    rig.settle()
    assert [rig.take() for _ in range(5)] == [5, 6, 7, 8, None]


@pytest.fixture
def running() -> Iterator[tuple[TicketBook, PlainCipher, Cell]]:
    cell, cipher = Cell(capacity=64, room=10_000), PlainCipher()
    book = TicketBook(8, Activity())
    place = Place("a:1", cell)  # type: ignore[arg-type]
    place.session = b"1" * 16
    book.start()
    book.begin(place, cipher)
    yield book, cipher, cell
    book.close()


def test_threads_never_get_the_same_ticket(running: tuple[TicketBook, PlainCipher, Cell]) -> None:
    book, cipher, _ = running
    got: list[bytes] = []

    def take() -> None:
        mine: list[Ticket] = []
        end_s = time.monotonic() + 10
        while len(mine) < 25 and time.monotonic() < end_s:
            ticket = book.take(cipher)
            if ticket is None:
                time.sleep(0.001)
            else:
                mine.append(ticket)
        got.extend(ticket.seed for ticket in mine)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(got) == len(set(got)) == 100


def test_closing_ends_the_thread_and_leaves_nothing(running: tuple[TicketBook, PlainCipher, Cell]) -> None:
    book, cipher, cell = running
    book.close()
    asked = len(cell.offers)
    place = Place("a:1", cell)  # type: ignore[arg-type]
    place.session = b"3" * 16
    book.begin(place, cipher)
    time.sleep(0.05)
    assert (book.at_hand, book.take(cipher), len(cell.offers)) == (0, None, asked)
