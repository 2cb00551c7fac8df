"""Tickets in a whole cell over gRPC: the same bytes sooner, and never anything but that."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import grpc
import pytest

from blindtail import wire
from blindtail.errors import (
    ContainerError,
    KeysMissing,
    SessionLost,
    TailUnavailable,
)
from blindtail.he.backends import open_evaluator
from blindtail.pb import tail_pb2 as pb
from blindtail.rpc import from_rpc_error
from blindtail.wire import KeyState, TicketOffer, TicketsTaken
from cloud.config import Backend
from cloud.engine import Engine
from tests.clock import until
from tests.cloud_cases import Client, program
from tests.ticket_cases import (
    NATIVE_ALONE,
    Cells,
    Device,
    attached,
    cells_of_one_test,  # noqa: F401
    counted,
    device_with_keys,  # noqa: F401
    held_bytes,
    offer,
    tickets_in,
)

pytestmark = NATIVE_ALONE


# -- the way it should go --------------------------------------------------------------------


def test_a_ticket_changes_nothing_but_the_time(open_cell: Cells, device: Device) -> None:
    containers = device.containers(6)
    plain = open_cell(per_identity=0)
    client, session = attached(plain, device)
    assert offer(client, session, containers) == TicketsTaken(0, 0)
    replies = [client.evaluate(session, container=c) for c in containers]
    assert not any(reply.ticket for reply in replies)

    cell = open_cell(evaluators=2)
    client, session = attached(cell, device)
    assert offer(client, session, []) == TicketsTaken(0, 16)  # asks for the capacity alone
    assert offer(client, session, containers[:4]) == TicketsTaken(4, 16)
    until(lambda: counted(cell).get("made") == 4)
    assert held_bytes(cell) > 0
    assert tickets_in(cell) == 4
    sooner = [client.evaluate(session, container=c) for c in containers]
    assert [reply.ticket for reply in sooner] == [True] * 4 + [False] * 2
    assert [reply.container for reply in sooner] == [reply.container for reply in replies]
    assert counted(cell) == {"announced": 4, "made": 4, "used": 4}
    assert (held_bytes(cell), tickets_in(cell)) == (0, 0)


def test_a_retry_goes_the_normal_way_and_gives_the_same(open_cell: Cells, device: Device) -> None:
    cell = open_cell()
    client, session = attached(cell, device)
    (container,) = device.containers(1)
    offer(client, session, [container])
    until(lambda: counted(cell).get("made") == 1)
    request_id = os.urandom(16)
    first = client.evaluate(session, container=container, request_id=request_id)
    joined = client.evaluate(session, container=container, request_id=request_id, attempt=1)
    later = client.evaluate(session, container=container)
    assert (first.ticket, joined, later.ticket) == (True, first, False)
    assert later.container == first.container
    assert offer(client, session, [container]) == TicketsTaken(0, 16)  # used is used
    assert counted(cell) == {"announced": 1, "made": 1, "used": 1}


def test_a_request_before_its_ticket_is_ready(open_cell: Cells, device: Device) -> None:
    """However the two meet, the reply comes and is the same."""
    cell = open_cell()
    client, session = attached(cell, device)
    containers = device.containers(8)
    want = [client.evaluate(session, container=c).container for c in containers]
    offer(client, session, containers)
    got = [client.evaluate(session, container=c) for c in reversed(containers)]
    assert [reply.container for reply in reversed(got)] == want
    until(lambda: counted(cell).get("used", 0) + counted(cell).get("missed", 0) == 8)
    assert counted(cell).get("used", 0) == sum(reply.ticket for reply in got)
    until(lambda: tickets_in(cell) == 0)


def test_requests_go_first_and_wait_for_one_ticket_at_most(
    open_cell: Cells, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    gate = threading.Event()
    make, evaluate = Engine.make_ticket, Engine.evaluate

    def slow_make(engine: Engine, *values: Any) -> int:
        log.append("make")
        assert gate.wait(20)
        return make(engine, *values)

    def noted(engine: Engine, *values: Any) -> Any:
        log.append("evaluate")
        return evaluate(engine, *values)

    cell = open_cell()
    client, session = attached(cell, device)
    containers = device.containers(6)
    monkeypatch.setattr(Engine, "make_ticket", slow_make)
    monkeypatch.setattr(Engine, "evaluate", noted)
    assert cell.gateway is not None
    queue = cell.gateway.queue
    with ThreadPoolExecutor(4) as threads:
        offer(client, session, containers[:3])
        until(lambda: log == ["make"])
        # Beside what is made, one has a place with the evaluator; three wait.
        sent = [threads.submit(client.evaluate, session, container=c) for c in containers[2:]]
        until(lambda: len(queue) == 3)
        gate.set()
        replies = [future.result() for future in sent]
    assert log[:5] == ["make"] + ["evaluate"] * 4
    until(lambda: log[5:] == ["make"])  # the third one's request has come meanwhile
    assert not any(reply.ticket for reply in replies)
    assert counted(cell)["missed"] == 1


def test_many_clients_at_once(open_cell: Cells, device: Device, tmp_path: Path) -> None:
    (tmp_path / "sent").write_bytes(device.keys)
    evaluator = open_evaluator("native", program())
    evaluator.prepare_keys(tmp_path / "sent", tmp_path / "ready")
    keys = evaluator.load_keys(tmp_path / "ready")
    each, rounds = 6, 8
    containers = device.containers(4 * each * rounds)
    want = {c: evaluator.evaluate(keys, c) for c in containers}
    cell = open_cell(evaluators=2, budget_bytes=3_000_000, stale_s=0.05)
    client, _ = attached(cell, device)

    def edge(index: int) -> int:
        random, used = Random(index), 0
        session = client.register().session
        for round_ in range(rounds):
            start = (index * rounds + round_) * each
            own = containers[start : start + each]
            offer(client, session, own[: random.randrange(each + 1)])
            for container in random.sample(own, random.randrange(each + 1)):
                reply = client.evaluate(session, container=container)
                assert reply.container == want[container]
                used += reply.ticket
        return used

    with ThreadPoolExecutor(4) as threads:
        used = sum(threads.map(edge, range(4)))
    assert cell.gateway is not None
    book = cell.gateway.ahead.book
    until(lambda: not book.waiting and tickets_in(cell) == len(book))
    events = counted(cell)
    assert events["used"] == used > 0
    ended = sum(events.get(event, 0) for event in ("used", "missed", "dropped"))
    assert events["announced"] == ended + len(book)
    cell.forget_sessions()
    until(lambda: tickets_in(cell) == 0)
    assert held_bytes(cell) == 0


# -- bounds ----------------------------------------------------------------------------------


def test_one_client_has_so_many_and_all_have_a_budget(open_cell: Cells, device: Device) -> None:
    cell = open_cell(per_identity=4)
    client, session = attached(cell, device)
    containers = device.containers(6)
    assert offer(client, session, [containers[0], *containers]) == TicketsTaken(5, 4)
    assert offer(client, session, containers[4:]) == TicketsTaken(0, 4)
    until(lambda: counted(cell).get("made") == 4)
    one = held_bytes(cell) / 4

    small = open_cell(budget_bytes=int(2.5 * one))
    client, session = attached(small, device)
    assert offer(client, session, containers) == TicketsTaken(6, 16)  # nobody knows their size yet
    until(lambda: counted(small).get("made") == 6)
    assert held_bytes(small) == 2 * one
    until(lambda: tickets_in(small) == 2)
    replies = [client.evaluate(session, container=c) for c in containers]
    assert [reply.ticket for reply in replies] == [False] * 4 + [True] * 2
    assert replies[0].container == client.evaluate(session, container=containers[0]).container
    assert offer(client, session, device.containers(6)) == TicketsTaken(2, 2)


@pytest.mark.parametrize("backend", ["clear", "seal"])
def test_backends_without_tickets_take_none(open_cell: Cells, device: Device, backend: Backend) -> None:
    cell = open_cell(backend)
    client = Client(device.client(cell.address).stub) if backend == "clear" else device.client(cell.address)
    client.upload_and_wait()
    session = client.register().session
    container = client.container() if backend == "clear" else device.containers(1)[0]
    assert offer(client, session, [bytes(10_000)]) == TicketsTaken(0, 0)
    assert not client.evaluate(session, container=container).ticket
    assert counted(cell) == {}


def test_hostile_offers_get_one_clear_error(open_cell: Cells, device: Device) -> None:
    cell = open_cell()
    client = device.client(cell.address)
    session = client.register().session
    with pytest.raises(KeysMissing, match="upload"):
        offer(client, session, [bytes(1000)])
    assert client.upload_and_wait() is KeyState.READY
    with pytest.raises(SessionLost):
        client.stub.tickets(TicketOffer(bytes(16), ()), 10)
    broken = [
        pb.TicketsRequest(session=session, seeds=[bytes(63)]),
        pb.TicketsRequest(session=session, seeds=[bytes(64)] * 65),
        pb.TicketsRequest(session=session, seeds=[bytes(64 * 1024)]),
        pb.TicketsRequest(seeds=[bytes(64)]),
    ]
    with grpc.insecure_channel(cell.address) as channel:
        call = channel.unary_unary(f"/{wire.SERVICE}/Tickets", None, None)
        for message in (*(m.SerializeToString() for m in broken), b"\xff\xff"):
            with pytest.raises(grpc.RpcError) as caught:
                call(message, timeout=10)
            assert isinstance(from_rpc_error(caught.value), ContainerError)
    assert counted(cell) == {}


def test_an_older_cell_takes_none(open_cell: Cells, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    from cloud.servicer import TailServer

    handlers = TailServer._handlers

    def without(server: TailServer) -> dict[str, Any]:
        found = handlers(server)
        del found["Tickets"]
        return found

    monkeypatch.setattr(TailServer, "_handlers", without)
    cell = open_cell()
    client, session = attached(cell, device)
    assert offer(client, session, device.containers(1)) == TicketsTaken(0, 0)
    cell.stop()
    with pytest.raises(TailUnavailable):
        offer(client, session, [])
