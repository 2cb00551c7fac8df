"""The book of tickets: who may have how many, what fits, what ends one; a clock of the test's own."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from blindtail.config import load_config
from blindtail.errors import ConfigError
from blindtail.wire import TicketsTaken
from cloud.config import CloudConfig, TicketLimits
from cloud.engine import makes_tickets
from cloud.tickets import Book, Claim, Order, Owner
from tests.cloud_cases import program

SIZE = 100
A = Owner("a", b"session-a", "toy", "p", b"sha", "keys-of-a")
B = Owner("b", b"session-b", "toy", "p", b"sha", "keys-of-b")


def seed(number: int) -> bytes:
    return number.to_bytes(64, "big")


def seeds(count: int, start: int = 0) -> list[bytes]:
    return [seed(start + i) for i in range(count)]


class Case:
    """A book, its clock and what it counted."""

    def __init__(self, **limits: float) -> None:
        self.now, self.counted = 100.0, Counter[str]()
        chosen = {"per_identity": 4, "budget_bytes": 10 * SIZE, **limits}
        self.book = Book(TicketLimits(**chosen), lambda: self.now, self.count)  # type: ignore[arg-type]

    def count(self, model: str, event: str, number: int) -> None:
        assert model == "toy"
        self.counted[event] += number

    def make(self, member: str = "e0", size: int = SIZE) -> Order:
        order = self.book.start(member)
        assert order is not None
        self.book.made(order, size)
        return order

    def ends(self) -> int:
        return sum(self.counted[event] for event in ("used", "missed", "dropped"))


def test_a_ticket_from_its_seed_to_its_use() -> None:
    case = Case()
    assert case.book.offer(A, seeds(2)) == TicketsTaken(2, 4)
    first = case.make()
    assert (first.seed, first.owner) == (seed(0), A)
    assert case.book.held_by_model() == {"toy": SIZE}
    claim = case.book.claim(A, seed(0))
    assert claim == Claim(A.name(seed(0)), "e0")
    assert case.book.claim(A, seed(0)) is None  # once
    case.book.release(claim, used=True)
    assert case.book.held_bytes == 0
    assert case.book.take_drops() == {}  # whoever uses one drops it
    assert case.counted == {"announced": 2, "made": 1, "used": 1}
    assert len(case.book) == 1


def test_a_seed_that_was_used_is_not_taken_again() -> None:
    case = Case()
    case.book.offer(A, seeds(3))
    case.make()
    assert case.book.claim(A, seed(0))
    assert case.book.claim(A, seed(1)) is None  # not made yet
    assert case.counted["missed"] == 1
    assert case.book.offer(A, [seed(0)]).accepted == 0
    assert case.book.offer(A, [seed(5), seed(1), seed(6)]).accepted == 1
    assert case.book.offer(B, [seed(0)]).accepted == 1  # another's is another


def test_a_seed_that_comes_twice_counts_once() -> None:
    case = Case()
    assert case.book.offer(A, [seed(0), seed(0), seed(1)]) == TicketsTaken(3, 4)
    assert case.book.offer(A, seeds(2)) == TicketsTaken(2, 4)
    assert len(case.book) == case.counted["announced"] == 2


def test_one_may_have_so_many_and_others_are_not_touched() -> None:
    case = Case()
    assert case.book.offer(A, seeds(9)) == TicketsTaken(4, 4)
    assert case.book.offer(A, seeds(1, 20)) == TicketsTaken(0, 4)
    assert case.book.offer(replace(A, session=b"another"), seeds(1, 20)).accepted == 0
    assert case.book.offer(replace(A, program_id="q"), seeds(9)).accepted == 4
    assert case.book.offer(B, seeds(9)).accepted == 4


def test_all_together_have_a_bound() -> None:
    case = Case(announced=5)
    assert case.book.offer(A, seeds(4)).accepted == 4
    assert case.book.offer(B, seeds(4)).accepted == 1


def test_seeds_that_waited_long_make_room_for_newer_ones() -> None:
    case = Case(stale_s=60.0)
    case.book.offer(A, seeds(3))
    case.make("e3")
    case.now += 30
    case.book.offer(A, seeds(1, 10))
    case.now += 31
    assert case.book.offer(A, seeds(4, 20)).accepted == 3  # the one of 31 s ago stays
    assert case.counted["dropped"] == 3
    assert case.book.take_drops() == {"e3": [A.name(seed(0))]}
    assert case.book.held_bytes == 0


def test_identities_take_turns_and_the_oldest_seed_comes_first() -> None:
    case = Case()
    case.book.offer(A, seeds(4))
    case.book.offer(B, seeds(2))
    made = [case.make() for _ in range(6)]
    assert [order.owner.identity for order in made] == ["a", "b", "a", "b", "a", "a"]
    assert [order.seed for order in made if order.owner is A] == seeds(4)
    assert case.book.start("e0") is None


def test_the_least_recently_made_go_when_the_budget_is_full() -> None:
    case = Case(per_identity=8, budget_bytes=3 * SIZE)
    case.book.offer(A, seeds(4))
    orders = [case.make(f"e{i}") for i in range(4)]
    assert case.book.take_drops() == {"e0": [orders[0].name]}
    assert case.book.held_bytes == 3 * SIZE
    assert case.book.claim(A, seed(0)) is None
    # Now that their size is known, no more are taken than the budget has room for.
    assert case.book.capacity("p") == 3
    assert case.book.capacity("q") == 8


def test_a_ticket_larger_than_the_budget_is_made_once() -> None:
    case = Case(budget_bytes=SIZE)
    case.book.offer(A, seeds(4))
    case.make(size=SIZE + 1)
    assert case.book.held_bytes == 0
    assert case.book.offer(A, seeds(1, 9)) == TicketsTaken(0, 0)


def test_one_that_is_claimed_is_not_thrown_away_for_another() -> None:
    case = Case(budget_bytes=SIZE)
    case.book.offer(A, seeds(2))
    case.make()
    claim = case.book.claim(A, seed(0))
    assert claim
    case.make()
    assert case.book.take_drops() == {"e0": [A.name(seed(1))]}
    case.book.release(claim, used=True)
    assert case.book.held_bytes == 0


def test_nobody_reaches_anothers() -> None:
    case = Case()
    case.book.offer(A, seeds(1))
    case.make()
    for other in (B, replace(A, identity="b"), replace(A, keys="k"), replace(A, program_id="q")):
        assert case.book.claim(other, seed(0)) is None
    assert case.book.claim(replace(A, session=b"another of the same client"), seed(0))


def test_a_request_that_goes_elsewhere_ends_its_ticket() -> None:
    case = Case()
    case.book.offer(A, seeds(2))
    case.make()
    claim = case.book.claim(A, seed(0))
    assert claim
    case.book.release(claim, used=False)  # another evaluator answered, or nobody
    assert case.book.take_drops() == {"e0": [claim.name]}
    case.make()
    assert case.book.claim(A, seed(1), fits=False) is None  # a stand-in answers
    assert case.book.take_drops() == {"e0": [A.name(seed(1))]}
    assert case.counted["missed"] == 2
    assert case.book.held_bytes == 0


def test_a_request_that_comes_while_its_ticket_is_made_waits_for_it() -> None:
    case = Case()
    case.book.offer(A, seeds(1))
    order = case.book.start("e0")
    assert order
    claim = case.book.claim(A, seed(0))
    assert claim == Claim(order.name, "e0")
    case.book.made(order, SIZE)
    assert case.book.held_bytes == SIZE
    case.book.release(claim, used=True)
    assert (case.book.held_bytes, case.book.take_drops()) == (0, {})


def test_one_that_nobody_wants_any_more_is_dropped_when_it_is_made() -> None:
    case = Case()
    case.book.offer(A, seeds(1))
    order = case.book.start("e0")
    assert order
    case.book.drop_session(A.session)
    case.book.made(order, SIZE)
    assert case.book.take_drops() == {"e0": [order.name]}
    assert case.book.held_bytes == 0
    assert case.counted == {"announced": 1, "made": 1, "dropped": 1}


def test_one_that_cannot_be_made_is_forgotten() -> None:
    case = Case()
    case.book.offer(A, seeds(1))
    order = case.book.start("e0")
    assert order
    case.book.failed(order)
    assert case.book.claim(A, seed(0)) is None
    assert case.counted["dropped"] == 1


@pytest.mark.parametrize("how", ["session", "keys", "program", "evaluator", "lost"])
def test_tickets_go_with_what_they_were_made_of(how: str) -> None:
    case = Case()
    case.book.offer(A, seeds(2))
    case.book.offer(B, seeds(1))
    held = [case.make("e0"), case.make("e1"), case.make("e0")]
    claim = case.book.claim(A, seed(1))
    assert claim
    if how == "session":
        case.book.drop_session(A.session)
    elif how == "keys":
        case.book.drop_keys(A.keys)
    elif how == "program":
        case.book.drop_program("p")
    elif how == "evaluator":
        case.book.keep_members(["e1"])
    else:
        case.book.lost([order.name for order in held if order.member == "e0"])
    assert case.book.claim(A, seed(0)) is None
    told = case.book.take_drops()
    names = [name for dropped in told.values() for name in dropped]
    assert (held[0].name in names) == (how in ("session", "keys", "program"))
    assert (case.book.claim(B, seed(0)) is None) == (how == "program")
    case.book.release(claim, used=False)
    assert case.counted["dropped"] == (2 if how == "program" else 1)


def test_off_is_no_capacity() -> None:
    case = Case(per_identity=0)
    assert case.book.offer(A, seeds(2)) == TicketsTaken(0, 0)
    assert len(case.book) == 0


def test_a_repr_shows_no_seed_and_a_name_says_nothing_of_it() -> None:
    order = Order(A.name(seed(7)), seed(7), A, 0.0)
    assert "\\x07" not in repr(order).replace(repr(order.name), "")
    assert len(order.name) == 32
    names = {o.name(s) for o in (A, B, replace(A, keys="x"), replace(A, program_id="q")) for s in seeds(3)}
    assert len(names) == 12


@pytest.mark.parametrize(
    "limits",
    [{"per_identity": -1}, {"per_identity": 5000}, {"budget_bytes": 0}, {"stale_s": 0.0}, {"announced": 0}],
)
def test_limits_are_checked_at_the_door(limits: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=rf"tickets\.{next(iter(limits))}"):
        CloudConfig(backend="clear", tickets=TicketLimits(**limits))


def test_limits_are_settings(tmp_path: Path) -> None:
    (tmp_path / "cell.toml").write_text('backend = "clear"\ntickets = { per_identity = 2, stale_s = 5 }\n')
    limits = load_config(CloudConfig, tmp_path / "cell.toml").tickets
    assert limits == TicketLimits(per_identity=2, stale_s=5.0)


def test_the_cell_knows_which_backends_make_tickets() -> None:
    from blindtail.he.backends import open_evaluator
    from blindtail.he.native_backend import available

    for name in ("clear", "seal", *(["native"] if available() else [])):
        assert open_evaluator(name, program()).makes_tickets == makes_tickets(name)


class Life(RuleBasedStateMachine):
    """Whatever comes in whatever order: every seed ends once, nothing is held that nobody can name."""

    def __init__(self) -> None:
        super().__init__()
        self.case = Case(per_identity=3, budget_bytes=4 * SIZE, announced=5, stale_s=2.0)
        self.making: list[Order] = []
        self.claims: list[Claim] = []
        self.at: dict[str, set[bytes]] = {f"e{i}": set() for i in range(3)}  # what evaluators hold

    owners = st.sampled_from([A, B, replace(A, session=b"second"), replace(B, program_id="q")])

    def obey(self) -> None:
        for member, names in self.case.book.take_drops().items():
            self.at[member] -= set(names)

    @rule(owner=owners, numbers=st.lists(st.integers(0, 12), max_size=6))
    def offer(self, owner: Owner, numbers: list[int]) -> None:
        assert self.case.book.offer(owner, [seed(n) for n in numbers]).accepted <= len(numbers)

    @rule(member=st.sampled_from(["e0", "e1", "e2"]))
    def start(self, member: str) -> None:
        if member not in {order.member for order in self.making}:
            order = self.case.book.start(member)
            if order is not None:
                self.making.append(order)

    @rule(works=st.booleans(), size=st.integers(1, 2))
    def finish(self, works: bool, size: int) -> None:
        if self.making:
            order = self.making.pop(0)
            if works:
                self.at[order.member].add(order.name)
                self.case.book.made(order, size * SIZE)
            else:
                self.case.book.failed(order)

    @rule(owner=owners, number=st.integers(0, 12), fits=st.booleans())
    def claim(self, owner: Owner, number: int, fits: bool) -> None:
        claim = self.case.book.claim(owner, seed(number), fits=fits)
        if claim is not None:
            assert claim.name not in {other.name for other in self.claims}
            self.claims.append(claim)

    @rule(at_holder=st.booleans())
    def release(self, at_holder: bool) -> None:
        if self.claims:
            claim = self.claims.pop(0)
            used = at_holder and claim.name in self.at[claim.member]
            self.at[claim.member].discard(claim.name) if used else None
            self.case.book.release(claim, used=used)

    @rule(what=st.sampled_from(["session", "keys", "program"]))
    def drop(self, what: str) -> None:
        book = self.case.book
        {"session": book.drop_session, "keys": book.drop_keys, "program": book.drop_program}[what](  # type: ignore[operator]
            {"session": A.session, "keys": B.keys, "program": "p"}[what]
        )

    @rule(member=st.sampled_from(["e0", "e1"]))
    def crash(self, member: str) -> None:
        self.at[member].clear()
        self.case.book.keep_members({"e0", "e1", "e2"} - {member})
        for order in [order for order in self.making if order.member == member]:
            self.making.remove(order)
            self.case.book.failed(order)

    @rule(seconds=st.integers(1, 3))
    def wait(self, seconds: int) -> None:
        self.case.now += seconds

    @invariant()
    def in_order(self) -> None:
        book, counted = self.case.book, self.case.counted
        self.obey()
        held = sum(map(len, self.at.values()))
        assert book.held_bytes <= 4 * SIZE + 2 * SIZE * len(self.claims)
        assert held <= len(book) + len(self.claims)
        assert (book.held_bytes > 0) <= (held > 0)
        assert counted["announced"] == self.case.ends() + len(book) + len(self.claims)
        assert len(book) <= 5

    def teardown(self) -> None:
        for order in self.making:
            self.case.book.made(order, SIZE)
        for claim in self.claims:
            self.case.book.release(claim, used=False)
        for owner in (A, B, replace(A, session=b"second")):
            self.case.book.drop_session(owner.session)
        assert (len(self.case.book), self.case.book.held_bytes, self.case.book.waiting) == (0, 0, False)
        assert self.case.counted["announced"] == self.case.ends()


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
