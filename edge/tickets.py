"""Tickets of one tail: made while nobody waits, announced to the cell, handed out once each.

A ticket is an encryption of zero that covers one later message. Its seed, announced
ahead, lets the cell do in idle time what depends on the seed alone; a request
encrypted with it is then answered sooner, by the same bytes. Tickets are for one
session and one key: a new session, new keys or another cell begin with none. They
live in memory, leave the book before anything is encrypted, and never come back.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from blindtail.errors import (
    DeadlineExceeded,
    KeysMissing,
    Overloaded,
    SessionLost,
    TailError,
    TailUnavailable,
)
from blindtail.wire import MOST_SEEDS
from edge.activity import Activity
from edge.cells import Place
from edge.tail import Cipher, Ticket

_log = logging.getLogger(__name__)

#: Most tickets of one tail.
MOST_TICKETS = MOST_SEEDS
#: No request may have been answered for this long before a ticket is made: making one holds the
#: interpreter for some milliseconds.
QUIET_S = 0.01
#: How long to wait after an announcement that was not taken, or did not arrive.
RETRY_S = 5.0
_CALL_S = 5.0


@dataclass(frozen=True, eq=False)
class _Session:
    """Where tickets are announced, and what makes them."""

    place: Place
    session: bytes
    cipher: Cipher


class TicketBook:
    """Thread-safe. `want` tickets at most, 0 = none ever.

    activity    tells when nobody waits
    on_trouble  hears of a session that is gone, as an announcement met it

    `start` begins making them in a thread; without it, `step` does one thing at a time.
    """

    def __init__(
        self,
        want: int,
        activity: Activity,
        *,
        clock: Callable[[], float] = time.monotonic,
        on_trouble: Callable[[Place, TailError], None] = lambda place, error: None,
        seed: int | None = None,
    ) -> None:
        self._most, self._activity, self._clock = want, activity, clock
        self._on_trouble = on_trouble
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._session: _Session | None = None
        self._capacity: int | None = None  # of the cell; None = not asked yet
        self._made: deque[Ticket] = deque()  # and not yet taken by the cell
        self._announced: deque[Ticket] = deque()
        self._not_before_s = 0.0
        self._wake = threading.Event()
        self._closed = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        if self._most:
            self._thread = threading.Thread(target=self._run, name="tail-tickets", daemon=True)
            self._thread.start()

    # -- for requests ------------------------------------------------------------

    def take(self, cipher: Cipher) -> Ticket | None:
        """The oldest ticket that the cell knows and this cipher made, or None. It is the caller's alone."""
        with self._lock:
            if self._session is None or self._session.cipher is not cipher or not self._announced:
                return None
            ticket = self._announced.popleft()
        self._wake.set()
        return ticket

    @property
    def at_hand(self) -> int:
        """How many could be taken now."""
        return len(self._announced)

    # -- for the session -----------------------------------------------------------

    def begin(self, place: Place, cipher: Cipher) -> None:
        """A new session at the place: tickets for it from now on. All others are thrown away."""
        assert place.session is not None
        self._change(_Session(place, place.session, cipher))

    def end(self) -> None:
        """No session: every ticket is thrown away, and none is made."""
        self._change(None)

    def _change(self, session: _Session | None) -> None:
        with self._lock:
            self._session = None if self._closed else session
            self._made.clear()
            self._announced.clear()
            self._capacity, self._not_before_s = None, 0.0
        self._wake.set()

    def close(self) -> None:
        with self._lock:
            self._closed = True
        self.end()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=5)

    # -- in the background ---------------------------------------------------------

    def _run(self) -> None:
        while not self._closed:
            self._wake.clear()
            wait_s = self.step()
            if not self._closed:
                self._wake.wait(wait_s)

    def step(self) -> float | None:
        """Makes or announces, at a quiet moment. Seconds until there may be more to do; None = until
        something changes."""
        with self._lock:
            session, most = self._session, self._limit()
            held = len(self._made) + len(self._announced)
            if session is None or len(self._announced) >= most:
                return None
            wait_s = self._not_before_s - self._clock()
            ask = self._capacity is None
        if wait_s > 0:
            return wait_s
        if not self._activity.quiet(QUIET_S):
            return QUIET_S
        try:
            if held < most and not ask:
                self._make(session)
            else:
                self._announce(session)
        except DeadlineExceeded:
            return QUIET_S  # a request has the cipher
        except Exception as error:
            # The type alone: a foreign exception's text may carry anything.
            _log.warning("no tickets on this session: unexpected %s", type(error).__name__)
            self._give_up(session)
        return 0.0

    def _limit(self) -> int:
        return self._most if self._capacity is None else min(self._most, self._capacity)

    def _make(self, session: _Session) -> None:
        ticket = session.cipher.ticket(0.0)
        if ticket is None:
            self._give_up(session)
            return
        with self._lock:
            if session is self._session:
                self._made.append(ticket)

    def _announce(self, session: _Session) -> None:
        """Tells the cell the seeds that it does not know; without any, asks how many it would take."""
        with self._lock:
            seeds = tuple(ticket.seed for ticket in self._made) if session is self._session else ()
        try:
            taken = session.place.client.tickets(session.session, seeds, _CALL_S)
        except (SessionLost, KeysMissing) as error:
            with self._lock:
                gone = session is self._session
            if gone:
                self.end()
                self._on_trouble(session.place, error)
            return
        except (TailUnavailable, DeadlineExceeded, Overloaded) as error:
            least_s = error.retry_after_s if isinstance(error, Overloaded) else 0.0
            self._pause(session, max(RETRY_S, least_s))
            return
        except TailError as error:
            _log.info("no tickets on this session: %s", error)
            self._give_up(session)
            return
        with self._lock:
            if session is not self._session:
                return
            self._capacity = taken.capacity
            for _ in range(min(taken.accepted, len(seeds))):
                self._announced.append(self._made.popleft())
            refused = taken.accepted < len(seeds)
            if refused:
                self._made.popleft()  # whatever is wrong with it is not asked twice
            while self._made and len(self._made) + len(self._announced) > self._limit():
                self._made.pop()
        if refused:
            self._pause(session, RETRY_S)

    def _pause(self, session: _Session, seconds: float) -> None:
        with self._lock:
            if session is self._session:
                self._not_before_s = self._clock() + seconds * self._random.uniform(1.0, 1.5)

    def _give_up(self, session: _Session) -> None:
        """None on this session any more; those that the cell knows may still be taken."""
        with self._lock:
            if session is self._session:
                self._capacity = 0
                self._made.clear()


__all__ = ["MOST_TICKETS", "QUIET_S", "RETRY_S", "TicketBook"]
