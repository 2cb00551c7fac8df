"""What a cell does ahead of requests: tickets are made while evaluators have nothing else to do.

`cloud.tickets` keeps the book; here it meets the queue, the evaluators and the key
store. A ticket is never needed: whatever goes wrong with one is forgotten, and the
request takes the normal way. Lives on the gateway's loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from blindtail.errors import KeysMissing
from blindtail.he.container import HEADER_BYTES
from blindtail.metrics import CloudMetrics
from blindtail.wire import SEED_BYTES, KeyState, TicketsTaken
from cloud.catalogue import Entry
from cloud.config import TicketLimits
from cloud.evaluators import EvaluatorCrashed, EvaluatorGone, Member, Pool, TicketWork
from cloud.keystore import KeyStore
from cloud.queue import Queue
from cloud.sessions import Session
from cloud.tickets import Book, Claim, Order, Owner

_log = logging.getLogger(__name__)


class Ahead:
    """One cell's tickets. `wanted()` is False while none shall be made (a cell that drains)."""

    def __init__(
        self,
        limits: TicketLimits,
        pool: Pool,
        queue: Queue,
        keys: KeyStore,
        metrics: CloudMetrics,
        clock: Callable[[], float],
        wanted: Callable[[], bool],
    ) -> None:
        self.book = Book(limits, clock, metrics.tickets)
        self._pool, self._queue, self._keys, self._wanted = pool, queue, keys, wanted
        self._on = pool.makes_tickets and limits.per_identity > 0
        self._members: tuple[str, ...] = ()
        self._tasks: set[asyncio.Task[None]] = set()
        if self._on:
            queue.on_idle = self.fill
            pool.on_tickets_lost = self._lost
            keys.on_removed = self._keys_gone

    # -- what the gateway asks -----------------------------------------------------------

    def offer(self, session: Session, entry: Entry, seeds: Sequence[bytes]) -> TicketsTaken:
        """Takes seeds of 64 bytes. Raises `KeysMissing`; `AccessDenied` in quarantine."""
        if not self._on or not self._wanted() or entry.program.spec.input_ciphertexts > 1:
            return TicketsTaken(0, 0)  # a ticket is for one ciphertext
        self._queue.refuse_quarantined(session.identity)
        state = self._keys.status(session.identity, entry.program_id, session.key_sha256).state
        if state is not KeyState.READY:
            raise KeysMissing("the cloud does not hold these evaluation keys (any more): upload them again")
        taken = self.book.offer(self._owner(session, entry), seeds)
        self.fill()
        return taken

    def claim(self, session: Session, entry: Entry, answers: str, container: bytes) -> Claim | None:
        """The ticket of a request, which is used by this; `release` follows.

        answers  name of the program that the request goes to
        """
        if not self._on or not len(self.book):
            return None
        seed = container[HEADER_BYTES : HEADER_BYTES + SEED_BYTES]
        claim = self.book.claim(self._owner(session, entry), seed, fits=answers == entry.program_id)
        self._tell()
        return claim

    def release(self, claim: Claim, *, used: bool) -> None:
        """The request is done, with the ticket or without it."""
        self.book.release(claim, used=used)
        self._tell()

    def drop_session(self, session: bytes) -> None:
        self.book.drop_session(session)
        self._tell()

    def drop_program(self, program_id: str) -> None:
        self.book.drop_program(program_id)
        self._tell()

    async def close(self) -> None:
        """Gives up what is being made."""
        self._on = False
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- making --------------------------------------------------------------------------

    def fill(self) -> None:
        """Gives every idle evaluator a ticket to make."""
        if not self._on:
            return
        members = tuple(member.name for member in self._pool.members)
        if members != self._members:
            self.book.keep_members(members)
            self._members = members
        for member in self._queue.idle() if self.book.waiting and self._wanted() else ():
            order = self.book.start(member.name)
            if order is None:
                break
            self._queue.take_aside(member, order.owner.identity)
            task = asyncio.create_task(self._make(member, order))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        self._tell()

    async def _make(self, member: Member, order: Order) -> None:
        owner, crashed = order.owner, False
        try:
            path = self._keys.pin(owner.identity, owner.program_id, owner.key_sha256)
            try:
                work = TicketWork(order.name, owner.program_id, path, order.seed)
                self.book.made(order, await self._pool.make_ticket(member.name, work))
            finally:
                self._keys.unpin(path)
        except EvaluatorGone as error:
            crashed = isinstance(error, EvaluatorCrashed)
        except Exception as error:
            _log.warning("%s made no ticket: %s", member.name, type(error).__name__)
        finally:
            if not order.bytes:
                self.book.failed(order)
            self._tell()
            self._queue.bring_back(member, crashed=crashed)

    # -- what others tell ----------------------------------------------------------------

    def _lost(self, names: Sequence[bytes]) -> None:
        self.book.lost(names)

    def _keys_gone(self, name: str) -> None:
        self.book.drop_keys(name)
        self._tell()

    def _tell(self) -> None:
        """Evaluators hear what they need not hold any more."""
        for member, names in self.book.take_drops().items():
            self._pool.drop_tickets(member, names)

    def _owner(self, session: Session, entry: Entry) -> Owner:
        keys = self._keys.name(session.identity, entry.program_id, session.key_sha256)
        return Owner(session.identity, session.id, session.model, entry.program_id, session.key_sha256, keys)


__all__ = ["Ahead"]
