"""Tickets: what is done ahead of requests, as a cell keeps book of it.

A client announces the seeds that its encrypted activations will come with. While an
evaluator has nothing else to do it makes the ticket of one of them: all of the
evaluation that depends on the seed and the keys alone. The request that comes
with the seed goes to that evaluator, which has less left to do and gives the same
bytes. A ticket serves one request, and no request needs one.

This is bookkeeping alone: pure, bounded in every direction, on the gateway's loop.
`cloud.ahead` does what it says. A seed's name is a hash over its identity, keys,
program and the seed, so that nobody reaches another's ticket. Of each seed that was
taken one of these is counted in the end: "used" (a ticket answered), "missed" (its
request came, and went the normal way) or "dropped" (no request came in time).
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

from blindtail.wire import TicketsTaken
from cloud.config import TicketLimits

#: Used seeds that are remembered, for each that may be announced at once.
_REMEMBERED = 4


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose seeds. `keys`: the key store's name of the keys, which belongs to one identity."""

    identity: str
    session: bytes
    model: str
    program_id: str
    key_sha256: bytes
    keys: str

    def name(self, seed: bytes) -> bytes:
        """32 bytes that stand for this seed with these keys, and say nothing of it."""
        scope = f"blindtail-ticket\0{self.keys}\0{self.program_id}\0{self.identity}\0"
        return hashlib.sha256(seed + scope.encode()).digest()


@dataclass(eq=False, slots=True)
class Order:
    """One announced seed. `member`: the evaluator that makes or holds its ticket, "" = none yet;
    `bytes` of the ticket, 0 until it is made."""

    name: bytes
    seed: bytes = field(repr=False)
    owner: Owner
    announced_s: float
    member: str = ""
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class Claim:
    """A request's ticket: its name, and the evaluator that has it or is making it."""

    name: bytes
    member: str


class Book:
    """One cell's seeds and tickets. `clock`: monotonic seconds; `count(model, event, number)` is told
    of "announced", "made", "used", "missed" and "dropped"."""

    def __init__(
        self,
        limits: TicketLimits,
        clock: Callable[[], float],
        count: Callable[[str, str, int], None] = lambda model, event, number: None,
    ) -> None:
        self._limits, self._clock, self._count = limits, clock, count
        self._orders: OrderedDict[bytes, Order] = OrderedDict()  # unclaimed, oldest first
        self._claimed: dict[bytes, Order] = {}
        self._groups: dict[tuple[str, str], OrderedDict[bytes, Order]] = {}  # by identity and program
        self._sessions: dict[bytes, set[bytes]] = {}
        self._waiting: OrderedDict[str, OrderedDict[bytes, Order]] = OrderedDict()  # identities take turns
        self._made: OrderedDict[bytes, Order] = OrderedDict()  # least recently made first
        self._used: OrderedDict[bytes, None] = OrderedDict()
        self._sizes: dict[str, int] = {}  # bytes of a ticket, by program
        self._held: Counter[str] = Counter()  # bytes by model
        self._drops: dict[str, list[bytes]] = {}

    def __len__(self) -> int:
        """Seeds that wait for their request."""
        return len(self._orders)

    @property
    def waiting(self) -> bool:
        """Whether there are tickets to be made."""
        return bool(self._waiting)

    @property
    def held_bytes(self) -> int:
        """Of all tickets in all evaluators."""
        return sum(self._held.values())

    def held_by_model(self) -> dict[str, int]:
        return dict(self._held)

    def capacity(self, program_id: str) -> int:
        """How many seeds one identity may have here at once for a program."""
        size = self._sizes.get(program_id)
        most = self._limits.per_identity
        return most if size is None else min(most, self._limits.budget_bytes // size)

    # -- from announcement to use --------------------------------------------------------

    def offer(self, owner: Owner, seeds: Sequence[bytes]) -> TicketsTaken:
        """Takes seeds in their order until one does not fit or was used before."""
        capacity, accepted, fresh = self.capacity(owner.program_id), 0, 0
        for seed in seeds if capacity else ():
            name = owner.name(seed)
            if name in self._used:
                break
            if name not in self._orders:
                if not self._room(owner, capacity):
                    break
                self._add(Order(name, seed, owner, self._clock()))
                fresh += 1
            accepted += 1
        if fresh:
            self._count(owner.model, "announced", fresh)
        return TicketsTaken(accepted, capacity)

    def start(self, member: str) -> Order | None:
        """The ticket that an idle evaluator makes next: identities take turns, oldest seed first."""
        if not self._waiting:
            return None
        identity, own = next(iter(self._waiting.items()))
        _, order = own.popitem(last=False)
        if own:
            self._waiting.move_to_end(identity)
        else:
            del self._waiting[identity]
        order.member = member
        return order

    def made(self, order: Order, size: int) -> None:
        """The evaluator holds it, `size` bytes. Others go when that is beyond the budget."""
        model = order.owner.model
        self._count(model, "made", 1)
        if size > 0:
            self._sizes[order.owner.program_id] = size
        claimed = self._claimed.get(order.name) is order
        if not claimed and self._orders.get(order.name) is not order:
            self._drop(order)  # no longer wanted
            return
        order.bytes = size
        self._held[model] += size
        if not claimed:
            self._made[order.name] = order
        while self._made and self.held_bytes > self._limits.budget_bytes:
            self._remove(next(iter(self._made.values())), "dropped")

    def failed(self, order: Order) -> None:
        """It could not be made: its request takes the normal way."""
        if self._orders.get(order.name) is order:
            self._remove(order, "dropped")

    def claim(self, owner: Owner, seed: bytes, *, fits: bool = True) -> Claim | None:
        """A request with this seed has come; call `release` when it is done. From now on the seed is
        used. `fits`: the program that answers is the one that tickets are made for."""
        name = owner.name(seed)
        order = self._orders.get(name)
        if order is None:
            return None
        self._used[name] = None
        while len(self._used) > _REMEMBERED * self._limits.announced:
            self._used.popitem(last=False)
        if not order.member or not fits:
            self._remove(order, "missed")
            return None
        self._unlink(order)
        self._claimed[name] = order
        return Claim(name, order.member)

    def release(self, claim: Claim, *, used: bool) -> None:
        """The request is done. `used`: with the ticket, which its evaluator has dropped by that."""
        order = self._claimed.pop(claim.name, None)
        if order is None:
            return
        self._let_go(order)
        if not used:
            self._drop(order)
        self._count(order.owner.model, "used" if used else "missed", 1)

    # -- what ends a ticket before its use -----------------------------------------------

    def lost(self, names: Iterable[bytes]) -> None:
        """Evaluators no longer hold these (they loaded other keys)."""
        for name in names:
            order = self._orders.get(name) or self._claimed.get(name)
            if order is not None:
                self._let_go(order)
                if name in self._orders:
                    self._remove(order, "dropped")

    def drop_session(self, session: bytes) -> None:
        for name in list(self._sessions.get(session, ())):
            self._remove(self._orders[name], "dropped")

    def drop_keys(self, keys: str) -> None:
        """`keys`: as in `Owner`."""
        self._drop_all(lambda order: order.owner.keys == keys)

    def drop_program(self, program_id: str) -> None:
        self._drop_all(lambda order: order.owner.program_id == program_id)
        self._sizes.pop(program_id, None)

    def keep_members(self, members: Collection[str]) -> None:
        """Evaluators other than these are gone, and what they held with them."""
        gone = {order.member for order in (*self._orders.values(), *self._claimed.values())} - {"", *members}
        if not gone:
            return
        self._drop_all(lambda order: order.member in gone)
        for order in self._claimed.values():
            if order.member in gone:
                self._let_go(order)
        for member in gone:
            self._drops.pop(member, None)

    def take_drops(self) -> dict[str, list[bytes]]:
        """Evaluator -> names of tickets to be thrown away there; each is given once."""
        drops, self._drops = self._drops, {}
        return drops

    # -- steps ---------------------------------------------------------------------------

    def _room(self, owner: Owner, capacity: int) -> bool:
        """Makes room for one more. At an identity's bound seeds that have waited long go, oldest first:
        they are those that a client threw away without a word."""
        group = self._groups.get((owner.identity, owner.program_id))
        if group is not None and len(group) >= capacity:
            oldest = next(iter(group.values()))
            if oldest.announced_s > self._clock() - self._limits.stale_s:
                return False
            self._remove(oldest, "dropped")
        return len(self._orders) < self._limits.announced

    def _add(self, order: Order) -> None:
        owner = order.owner
        self._orders[order.name] = order
        self._groups.setdefault((owner.identity, owner.program_id), OrderedDict())[order.name] = order
        self._sessions.setdefault(owner.session, set()).add(order.name)
        self._waiting.setdefault(owner.identity, OrderedDict())[order.name] = order

    def _remove(self, order: Order, event: str) -> None:
        self._unlink(order)
        if order.bytes:
            self._drop(order)
        self._let_go(order)
        self._count(order.owner.model, event, 1)

    def _unlink(self, order: Order) -> None:
        """Out of all that leads to seeds whose request has not come."""
        owner, name = order.owner, order.name
        del self._orders[name]
        self._made.pop(name, None)
        group = self._groups[owner.identity, owner.program_id]
        del group[name]
        if not group:
            del self._groups[owner.identity, owner.program_id]
        named = self._sessions[owner.session]
        named.discard(name)
        if not named:
            del self._sessions[owner.session]
        waiting = self._waiting.get(owner.identity)
        if waiting is not None and waiting.pop(name, None) is not None and not waiting:
            del self._waiting[owner.identity]

    def _let_go(self, order: Order) -> None:
        """Its bytes count no more."""
        model = order.owner.model
        self._held[model] -= order.bytes
        if self._held[model] <= 0:
            del self._held[model]
        order.bytes = 0

    def _drop(self, order: Order) -> None:
        self._drops.setdefault(order.member, []).append(order.name)

    def _drop_all(self, which: Callable[[Order], bool]) -> None:
        for order in [order for order in self._orders.values() if which(order)]:
            self._remove(order, "dropped")


__all__ = ["Book", "Claim", "Order", "Owner"]
