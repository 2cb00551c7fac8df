"""Tickets from end to end: an edge that encrypts in earnest, cells that work ahead or know nothing of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from blindtail.he.container import HEADER_BYTES
from blindtail.records import Answer, TailReply
from blindtail.wire import SEED_BYTES
from cloud.config import CloudConfig, TicketLimits
from cloud.local import LocalCell
from edge.runtime import EdgeRuntime
from tests.clock import until
from tests.edge_fakes import FEATURES, bundle_of, image, program
from tests.scripted_cell import ScriptedCell
from tests.ticket_cases import tickets_in

pytestmark = pytest.mark.timeout(120)
ZOO = Path(__file__).resolve().parents[2] / "blindtail" / "models" / "zoo" / "fashion"


def at_hand(edge: EdgeRuntime) -> int:
    (tail,) = edge.status().tails.values()
    return tail.tickets


def made(cell: LocalCell) -> None:
    """Waits until the cell has made a ticket of every seed that it was told."""
    assert cell.gateway is not None
    book = cell.gateway.ahead.book
    until(lambda: not book.waiting and tickets_in(cell) == len(book))


def opened(cell: LocalCell, folder: Path, tickets: int) -> EdgeRuntime:
    return EdgeRuntime.open(
        ZOO / "edge.bt",
        cell.address,
        credentials="insecure-loopback",
        policy="cloud-only",
        state_dir=folder / "edge",
        tickets=tickets,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tickets")


@pytest.fixture(scope="module")
def cell(folder: Path) -> Iterator[LocalCell]:
    pytest.importorskip("blindtail.he._native")
    with LocalCell([ZOO / "cloud.bt"], backend="native", state_dir=folder / "cloud") as cell:
        yield cell


def pictures(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(7)
    return [rng.integers(0, 256, (1, 28, 28)).astype(np.uint8) for _ in range(count)]


def test_answers_by_ticket_are_the_answers(cell: LocalCell, folder: Path) -> None:
    pixels = pictures(12)
    with opened(cell, folder, 0) as edge:
        assert edge.wait_ready(60), edge.status()
        plain = [edge.infer(x) for x in pixels]
        assert (edge.status().by_ticket, at_hand(edge)) == (0, 0)
    paced: list[Answer] = []
    with opened(cell, folder, 4) as edge:
        assert edge.wait_ready(60), edge.status()
        for x in pixels:
            until(lambda: at_hand(edge) == 4)
            made(cell)
            paced.append(edge.infer(x))
        assert edge.status().by_ticket >= 10
        # Faster than tickets are made: they run out, and the normal way answers.
        at_once = [edge.infer(x) for x in pixels]
        assert any("ticket" not in a.extra for a in at_once)
    for found in (paced, at_once):
        assert [a.route for a in found] == ["tail"] * len(pixels)
        assert [a.label for a in found] == [a.label for a in plain]
        for a, b in zip(found, plain, strict=True):
            assert a.probabilities == pytest.approx(b.probabilities, abs=1e-2)
    assert {a.uplink_bytes for a in [*plain, *paced]} == {plain[0].uplink_bytes}
    assert {a.reply_bytes for a in [*plain, *paced]} == {plain[0].reply_bytes}


def test_no_seed_is_ever_sent_with_two_messages(cell: LocalCell, folder: Path) -> None:
    """Threads in competition for tickets, with pauses in which new ones are made."""
    sent: list[bytes] = []
    with opened(cell, folder, 4) as edge:
        assert edge.wait_ready(60), edge.status()
        (tail,) = edge._tails.values()
        evaluate = tail.evaluate

        def watch(container: bytes, remaining_s: float | None, segment: int = 0) -> TailReply:
            sent.append(container)
            return evaluate(container, remaining_s, segment)

        tail.evaluate = watch  # type: ignore[method-assign]

        def work(pixels: list[np.ndarray]) -> None:
            for x in pixels:
                edge.infer(x)

        for _ in range(5):
            until(lambda: at_hand(edge) == 4)
            threads = [threading.Thread(target=work, args=(pictures(3),)) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(30)
        used = edge.status().by_ticket
    seeds = {container[HEADER_BYTES : HEADER_BYTES + SEED_BYTES] for container in sent}
    assert len(sent) == len(seeds) == 60
    assert used > 0


def test_a_session_that_the_cell_forgot_comes_back_with_new_tickets(cell: LocalCell, folder: Path) -> None:
    with opened(cell, folder, 2) as edge:
        assert edge.wait_ready(60), edge.status()
        until(lambda: at_hand(edge) == 2)
        cell.forget_sessions()
        answer = edge.infer(pictures(1)[0])
        assert answer.fallback == "session"
        until(lambda: edge.status().ready and at_hand(edge) == 2)
        made(cell)
        assert edge.infer(pictures(1)[0]).extra.get("ticket") == 1.0


def test_a_cell_that_makes_none(folder: Path, tmp_path: Path) -> None:
    config = CloudConfig(models=(ZOO / "cloud.bt",), tickets=TicketLimits(per_identity=0))
    with (
        LocalCell([ZOO / "cloud.bt"], state_dir=tmp_path / "cloud", config=config) as cell,
        opened(cell, folder, 4) as edge,
    ):
        assert edge.wait_ready(60), edge.status()
        time.sleep(0.2)
        answer = edge.infer(pictures(1)[0])
        assert (answer.route, at_hand(edge)) == ("tail", 0)


def test_a_cell_of_before_tickets(tmp_path: Path) -> None:
    """Its server does not know the call."""
    (tmp_path / "cell").mkdir()
    with (
        ScriptedCell(program(), tmp_path / "cell") as cell,
        EdgeRuntime.open(
            bundle_of(),
            cell.address,
            credentials="insecure-loopback",
            policy="cloud-only",
            state_dir=tmp_path / "edge",
            backend="clear",
            tickets=4,
        ) as edge,
    ):
        assert edge.wait_ready(60), edge.status()
        time.sleep(0.2)
        answers = [edge.infer(image(i % 4, 60)) for i in range(FEATURES)]
        assert [a.route for a in answers] == ["tail"] * FEATURES
        assert (at_hand(edge), edge.status().tails[2].registrations) == (0, 1)
