"""What counts and reports show of an answer, and what they must not show."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest

from blindtail.metrics import EdgeMetrics
from blindtail.records import Answer, Timings
from edge.accounting import Accounting, report_of


def answer(route: str, fallback: str | None, reply_bytes: int) -> Answer:
    return Answer(3, "dress", (1.0,), 1.0, route, fallback, Timings(total_s=0.2), 100, reply_bytes)


def test_a_reply_that_did_not_open_looks_like_one_that_did() -> None:
    registry = CollectorRegistry()
    books = Accounting(EdgeMetrics(registry, "toy"))
    opened, unopened = answer("tail", None, 50), answer("exit2", "refused", 50)
    assert books.count(unopened) is unopened
    one = report_of(books.take(), 1.0, {}, [])
    shown = generate_latest(registry)
    other_registry = CollectorRegistry()
    other = Accounting(EdgeMetrics(other_registry, "toy"))
    other.count(opened)
    assert one == report_of(other.take(), 1.0, {}, [])
    assert _without_times(shown) == _without_times(generate_latest(other_registry))
    # The device's own people see what happened.
    assert books.totals() == ({"exit2": 1}, {"refused": 1})


def test_what_the_network_did_is_shown() -> None:
    """The control: faults that depend on no decryption are counted as they are."""
    books = Accounting()
    for fallback, reply_bytes in (("deadline", 50), ("refused", 0), ("unavailable", 0)):
        books.count(answer("exit1", fallback, reply_bytes))
    sums = books.take()
    assert sums.fallbacks == {"deadline": 1, "refused": 1, "unavailable": 1}
    assert sums.routes == {"exit1": 3}
    assert books.take().routes == {}


def _without_times(exposition: bytes) -> list[str]:
    return [line for line in exposition.decode().splitlines() if "_created" not in line]
