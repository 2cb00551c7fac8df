"""One evaluation at the cell of a session: sent, sent once more, and what replies tell of the cloud."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence

from blindtail.errors import EvaluationFailed, Overloaded, TailError, TailUnavailable
from blindtail.records import TailReply
from blindtail.wire import REQUEST_ID_BYTES
from edge.cells import Place

#: This many replies in a row that came too late, and the cloud is asked whether it is there;
#: its reply is waited for this long, and it is asked no more often than that.
LATE_IN_A_ROW = 3
PING_S = 2.0
#: A cloud that is full is not kept away from for longer, but for the random part.
_HELD_S = 30.0


class Attempts:
    """Evaluations from any thread, at the place that each is given.

    programs    ids by segment; "" is the session's own
    on_trouble  called with (place, error) when an evaluation has failed for good
    on_reply    called with (place, reply)
    """

    def __init__(
        self,
        programs: Sequence[str],
        clock: Callable[[], float],
        draw: random.Random,
        on_trouble: Callable[[Place, TailError], None],
        on_reply: Callable[[Place, TailReply], None],
    ) -> None:
        self._programs, self._clock, self._random = programs, clock, draw
        self._on_trouble, self._on_reply = on_trouble, on_reply
        self._held_until_s = 0.0  # after Overloaded
        self._late = 0
        self._next_ping_s = 0.0
        self.typical_s = 0.0  # smoothed round trip

    @property
    def welcome(self) -> bool:
        """False for as long as a full cloud has asked to be left alone."""
        return self._clock() >= self._held_until_s

    def evaluate(self, place: Place, container: bytes, end_s: float, segment: int = 0) -> TailReply:
        """The very same bytes are sent once more after a broken connection or a failed evaluation,
        if the time left covers a typical round trip. Raises `TailError`."""
        session, request_id = place.session, os.urandom(REQUEST_ID_BYTES)
        assert session is not None
        for attempt in (0, 1):
            try:
                left_s = end_s - self._clock()
                program = self._programs[segment]
                reply = place.client.evaluate(session, request_id, attempt, container, left_s, program)
            except (TailUnavailable, EvaluationFailed) as error:
                if attempt or end_s - self._clock() <= self.typical_s:
                    self._on_trouble(place, error)
                    raise
            except TailError as error:
                self._on_trouble(place, error)
                raise
            else:
                self._late = 0
                self.typical_s += 0.2 * (reply.round_trip_s - self.typical_s)
                self._on_reply(place, reply)
                return reply
        raise AssertionError("unreachable")

    def hold(self, error: Overloaded) -> None:
        """The cloud is full: nothing is sent for as long as it asks, and somewhat longer."""
        wait_s = min(error.retry_after_s, _HELD_S) * self._random.uniform(1.0, 1.5)
        self._held_until_s = self._clock() + wait_s

    def late(self) -> bool:
        """A reply came too late; True when so many have in a row that the cloud should be asked."""
        self._late += 1
        return self._late >= LATE_IN_A_ROW

    def punctual(self) -> None:
        """The cloud is there: earlier late replies count no more."""
        self._late = 0

    def ask(self) -> bool:
        """Whether to ask the cloud now if it is there, after replies that came too late."""
        now_s = self._clock()
        if self._late < LATE_IN_A_ROW or now_s < self._next_ping_s:
            return False
        self._next_ping_s = now_s + PING_S
        return True


__all__ = ["LATE_IN_A_ROW", "PING_S", "Attempts"]
