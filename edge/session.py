"""The session of one tail, kept alive in the background while `infer` goes on.

One thread per tail walks a loop: a session at the first cell that gives one
(`edge.joining` says how), then READY, until an evaluation meets trouble. A lost
session is registered anew at the same cell after a random wait, evicted keys are
seen to again, a cell that is away is left for the next one at once. When every
cell has been tried, the round starts again after 0.2 to 1 s; a model of another
version is asked for twice a minute. Until READY again, `ready` is False and
policies answer from exits.

A cell that drains is left without a gap: a session at another cell is made first,
then the two are swapped, and requests that run finish where they began. Whoever
has moved stays there: there is no way back but by trouble.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from blindtail.errors import (
    BlindtailError,
    ConfigError,
    ContainerError,
    DeadlineExceeded,
    EvaluationFailed,
    KeysMissing,
    Overloaded,
    SessionLost,
    TailError,
    TailUnavailable,
)
from blindtail.he.spec import TailSpec
from blindtail.records import TailReply, TailTimings
from edge.activity import Activity
from edge.attempts import PING_S, Attempts
from edge.backoff import BackOff
from edge.board import Board
from edge.cells import Cells, Place
from edge.cipher import open_cipher
from edge.joining import FINAL, Draining, Joiner, Tell, finality
from edge.keyfiles import KeyFiles
from edge.keys import KeyWorker
from edge.tail import STATE_AFTER, TAIL_TIMEOUT_S, Cipher, TailState, TailStatus, Ticket
from edge.tickets import TicketBook

_log = logging.getLogger(__name__)

#: Random wait before a lost session is registered again: a restarted cell meets its edges one by one.
REJOIN_S = 0.5
#: How often an edge that a draining cell sends away looks for another one.
MOVE_S = 2.0
#: A cell lost sooner than this after it was reached is not replaced without a wait.
_SETTLED_S = 1.0
#: How long a request whose cell died under it waits for the session to be somewhere else.
ELSEWHERE_S = 0.5


class RemoteTail:
    """A `Tail` in the cloud. `start` begins; `evaluate` is safe from any thread."""

    def __init__(
        self,
        spec: TailSpec,
        cells: Cells,
        files: KeyFiles,
        worker: KeyWorker,
        *,
        backend: str = "seal",
        clock: Callable[[], float] = time.monotonic,
        seed: int | None = None,
        load_cipher: Callable[[TailSpec, Path, str], Cipher] = open_cipher,
        on_probe: Callable[[float, TailTimings], None] | None = None,
        on_upload: Callable[[float], None] | None = None,
        tickets: int = 0,
        activity: Activity | None = None,
        following: Sequence[TailSpec] = (),
    ) -> None:
        """tickets: most to hold, made while `activity` is quiet. following: later segments of a refreshed
        tail, for the same session and keys."""
        self._spec, self._cells, self._clock = spec, cells, clock
        self._joiner = Joiner(
            spec,
            files,
            worker,
            backend=backend,
            clock=clock,
            load_cipher=load_cipher,
            evaluate=lambda place, container, s, segment: self._attempts.evaluate(
                place, container, clock() + s, segment
            ),
            following=following,
            on_probe=on_probe,
            on_upload=on_upload,
            on_others=cells.learn,
        )
        self._random = random.Random(seed)
        self._back_off = BackOff(self._random)
        programs = ("", *(later.program_id for later in following))
        self._attempts = Attempts(programs, clock, self._random, self._note, self._replied)
        self._book = TicketBook(tickets, activity or Activity(clock), clock=clock, on_trouble=self._note)
        self._board = Board(spec, clock)
        self._changed = self._board.changed  # also the lock under which places are changed
        self._place: Place | None = None
        self._candidate: str | None = None  # the last one that was READY
        self._settled_s = 0.0
        self._trouble: TailError | None = None
        self._next_move_s = 0.0
        self._wake = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="tail-session", daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._book.start()

    # -- what the runtime sees ---------------------------------------------------

    @property
    def spec(self) -> TailSpec:
        return self._spec

    @property
    def cipher(self) -> Cipher | None:
        return self._joiner.cipher

    @property
    def ready(self) -> bool:
        return self._board.is_ready and self._attempts.welcome

    @property
    def tickets(self) -> int:
        return self._book.at_hand

    def take_ticket(self, cipher: Cipher) -> Ticket | None:
        return self._book.take(cipher)

    def status(self) -> TailStatus:
        return replace(self._board.status, tickets=self._book.at_hand)

    def wait_ready(self, timeout_s: float) -> bool:
        return self._board.wait_ready(timeout_s)

    def evaluate(self, container: bytes, remaining_s: float | None, segment: int = 0) -> TailReply:
        """One evaluation; the very same bytes are sent once more after a broken connection or a failed
        evaluation, if the time left covers a typical round trip, and once to another cell when this
        one has gone and another is reached in time. Raises `TailError`."""
        end_s = self._clock() + (TAIL_TIMEOUT_S if remaining_s is None else remaining_s)
        with self._changed:
            place = self._place
            if place is None or not self._board.is_ready:
                raise TailUnavailable("the tail is not ready")
            place.hold()
        try:
            return self._attempts.evaluate(place, container, end_s, segment)
        except TailUnavailable:
            moved = self._elsewhere(place, end_s)
            if moved is None:
                raise
        finally:
            place.release()
        try:
            return self._attempts.evaluate(moved, container, end_s, segment)
        finally:
            moved.release()

    def _elsewhere(self, gone: Place, end_s: float) -> Place | None:
        """Where requests go now, held; None when there is no other cell, or no time for it."""
        wait_s = min(ELSEWHERE_S, end_s - self._clock() - self._attempts.typical_s)
        if len(self._cells) < 2 or wait_s <= 0:
            return None
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._moved_from(gone), wait_s)
            place = self._place
            if place is None or not self._moved_from(gone):
                return None
            place.hold()
            return place

    def _moved_from(self, gone: Place) -> bool:
        return self._place not in (None, gone) and self._board.is_ready

    def _replied(self, place: Place, reply: TailReply) -> None:
        place.draining = reply.timings.draining
        if place.draining and self._clock() >= self._next_move_s:
            self._wake.set()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            place = self._place
            self._board.close()
        self._wake.set()
        self._joiner.close()
        if place is not None:
            place.client.close()
        self._book.close()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout=5)

    # -- what an evaluation met --------------------------------------------------

    def _note(self, place: Place, error: TailError) -> None:
        """Tells the thread what happened; stops offloads at once where they would fail again."""
        if isinstance(error, ContainerError | EvaluationFailed):
            return  # about this request, not about the session
        if place is not self._place:
            return  # about a session that has been left, or is not in use yet
        if isinstance(error, Overloaded):
            self._attempts.hold(error)
            return
        if isinstance(error, DeadlineExceeded):
            # Too little time, a slow cloud, or a silent link? The thread asks; offloads go on.
            if self._attempts.late():
                self._wake.set()
            return
        with self._changed:
            if self._closed or place is not self._place or self._trouble is not None:
                return
            self._trouble = error
            self._book.end()
            states = (state for kind, state in STATE_AFTER.items() if isinstance(error, kind))
            self._board.set(next(states, TailState.AWAY), str(error))
        self._wake.set()

    # -- the thread ----------------------------------------------------------------

    def _run(self) -> None:
        self._back_off.reset()
        while not self._closed:
            wait_s = 0.0
            try:
                self._connect()
                self._back_off.reset()
                wait_s = self._watch()
            except Exception as error:
                if not isinstance(error, BlindtailError):
                    _log.exception("the session of a tail failed; it starts again")
                state, problem, wait_s = self._back_off.after(error)
                self._board.set(state, problem)
            if wait_s > 0 and not self._closed:
                self._wake.wait(wait_s)
                self._wake.clear()

    def _connect(self) -> None:
        """READY at the first cell that gives a session; each is tried once. Raises the least final error.

        A session that was lost is asked for where it was; after any other trouble the next
        cell is the first. Those that drain come last.
        """
        self._joiner.keys(self._board.set)
        kept = self._leave_unless(SessionLost, KeysMissing)
        order = self._cells.order(self._candidate)
        if kept is not None:
            order = [kept.candidate, *(a for a in order if a != kept.candidate)]
        failures: list[BlindtailError] = []
        draining: list[str] = []
        for addresses in (order, draining):
            for address in addresses:
                try:
                    self._settle(
                        self._join(address, self._board.set, kept, prefer_another=addresses is order)
                    )
                    return
                except Draining:
                    draining.append(address)
                except (TailError, ConfigError) as error:
                    if self._closed:
                        raise
                    if isinstance(error, FINAL):
                        self._cells.shun(address)
                    failures.append(error)
        raise min(failures, key=finality)

    def _leave_unless(self, *kinds: type[TailError]) -> Place | None:
        """The place, when the trouble there is one of these kinds; otherwise it is left."""
        with self._changed:
            place, trouble = self._place, self._trouble
            if isinstance(trouble, kinds):
                return place
            self._place = None
        if place is not None:
            place.leave()
            if isinstance(trouble, FINAL):
                self._cells.shun(place.candidate)
        return None

    def _join(self, address: str, tell: Tell, kept: Place | None = None, *, prefer_another: bool) -> Place:
        """A place with a session: the one that was kept, or a new one. Raises what `Joiner.join` does."""
        if kept is not None and kept.candidate == address:
            place = kept
        else:
            place = Place(address, self._cells.dial(address))
        try:
            self._joiner.join(place, tell, prefer_another=prefer_another)
        except BaseException:
            with self._changed:
                if self._place is place:
                    self._place = None
            place.leave()
            raise
        return place

    def _settle(self, place: Place) -> None:
        """From now on requests go there; those that run finish where they are."""
        with self._changed:
            old, self._place = self._place, place
            self._candidate, self._settled_s = place.candidate, self._clock()
            self._trouble = None
            self._attempts.punctual()
            if self._joiner.cipher is not None:
                self._book.begin(place, self._joiner.cipher)
            registrations = self._board.status.registrations + 1
            self._board.set(TailState.READY, registrations=registrations, cell=place.client.address)
        if old is not None and old is not place:
            old.leave()

    def _watch(self) -> float:
        """Sleeps until an evaluation meets trouble; how long to wait before connecting again."""
        while True:
            place = self._place
            draining = place is not None and place.draining
            self._wake.wait(max(0.0, self._next_move_s - self._clock()) if draining else None)
            self._wake.clear()
            with self._changed:
                place, trouble = self._place, self._trouble
            if self._closed or place is None:
                return 0.0
            if trouble is None and place.draining and self._clock() >= self._next_move_s:
                self._move(place)
            elif trouble is None:
                self._ping(place)
            elif isinstance(trouble, KeysMissing):
                return 0.0
            elif isinstance(trouble, SessionLost):
                return self._random.uniform(0.0, REJOIN_S)
            elif self._clock() - self._settled_s >= _SETTLED_S:
                return 0.0
            else:
                return self._back_off.first_s()

    def _move(self, old: Place) -> None:
        """A session at another cell first, then the swap. Without another cell everything stays as it is."""
        self._next_move_s = self._clock() + MOVE_S * self._random.uniform(0.8, 1.2)
        for address in self._cells.order(old.candidate):
            # Behind a balancer, the same address may lead to another cell.
            if address == old.candidate and old.client.address == address:
                continue
            try:
                self._settle(self._join(address, _quietly, prefer_another=True))
                return
            except (BlindtailError, Draining) as error:
                _log.info("no move to %s: %s", address, error or "it drains as well")

    def _ping(self, place: Place) -> None:
        """After replies that came too late: notes `TailUnavailable` when the cloud is not there."""
        if not self._attempts.ask():
            return
        try:
            place.client.key_status(self._joiner.keys(self._board.set).sha256, PING_S)
        except TailError as error:
            self._note(place, TailUnavailable(f"the cloud has gone silent ({error})"))
            return
        self._attempts.punctual()


def _quietly(state: TailState, problem: str = "", *, sent_bytes: int = 0) -> None:
    """While the old cell goes on answering, the state of the tail is still READY."""
