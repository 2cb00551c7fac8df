"""Whose tickets are, and what ends them: sessions, keys, versions, crashes; over gRPC."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from blindtail import wire
from blindtail.errors import (
    AccessDenied,
    EvaluationFailed,
    KeysMissing,
    SessionLost,
)
from blindtail.rpc import INSECURE_LOOPBACK
from blindtail.wire import EvaluateCall, KeyState, RegisterCall, TicketOffer, TicketsTaken
from cloud.engine import Engine
from cloud.evaluators import EvaluatorCrashed, LocalMember, LocalPool, TicketWork
from cloud.local import LocalCell
from cloud.operator_client import OperatorClient
from cloud.registry import Registry
from tests.clock import until
from tests.cloud_cases import program, sha
from tests.model_cases import bundle_of, file_of, retrained
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
    on_loop,
    seed_of,
    tickets_in,
)

pytestmark = NATIVE_ALONE


# -- whose they are --------------------------------------------------------------------------


def test_two_identities_cannot_use_each_others(open_cell: Cells, device: Device) -> None:
    """Not even with the same keys, the same seed and the other's session."""
    cell = open_cell()
    gateway = cell.gateway
    assert gateway is not None
    spec = program().spec
    (container,) = device.containers(1)
    sessions = {}

    async def pieces() -> Any:
        for at in range(0, len(device.keys), 100_000):
            yield device.keys[at : at + 100_000]

    for name in ("alice", "bob"):
        call = RegisterCall("toy", "1", spec.program_id, sha(device.keys))
        sessions[name] = on_loop(cell, lambda n=name, c=call: gateway.register(n, c)).session  # type: ignore[misc]
        header = wire.KeyHeader(spec.program_id, sha(device.keys), len(device.keys), 0)
        cell.call(lambda n=name, h=header: gateway.upload_keys(n, h, pieces()))  # type: ignore[misc]
        cell.call(gateway.keys.checked)
    seeds = TicketOffer(sessions["alice"], (seed_of(container),))
    with pytest.raises(SessionLost):
        on_loop(cell, lambda: gateway.tickets("bob", seeds))
    assert on_loop(cell, lambda: gateway.tickets("alice", seeds)).accepted == 1
    until(lambda: counted(cell).get("made") == 1)

    def ask(name: str) -> wire.EvaluateResult:
        call = EvaluateCall(sessions[name], os.urandom(16), container)
        return cell.call(lambda: gateway.evaluate(name, call, 10.0))

    replies = [ask(name) for name in ("bob", "alice", "alice")]
    assert [reply.ticket for reply in replies] == [False, True, False]
    assert len({reply.container for reply in replies}) == 1
    assert counted(cell) == {"announced": 1, "made": 1, "used": 1}


def test_a_stand_in_takes_the_normal_way(tmp_path: Path) -> None:
    device = Device.of(retrained("1"), tmp_path)
    with (
        LocalCell([bundle_of("1")], backend="native", state_dir=tmp_path / "state") as cell,
        OperatorClient(cell.address, INSECURE_LOOPBACK) as operator,
    ):
        client = device.client(cell.address)
        client.spec, client.sha256 = retrained("1").spec, sha(device.keys)
        assert client.upload_and_wait() is KeyState.READY
        session = client.register().session
        operator.push(file_of(tmp_path, "3"))
        containers = device.containers(3)
        assert offer(client, session, containers).accepted == 3
        until(lambda: counted(cell).get("made") == 3)
        operator.canary("toy", "3", 1.0)
        reply = client.evaluate(session, container=containers[0])
        assert (reply.version, reply.ticket) == ("3", False)
        assert offer(client, session, device.containers(1)) == TicketsTaken(0, 0)  # none would be used
        operator.rollback("toy")
        reply = client.evaluate(session, container=containers[1])
        assert (reply.version, reply.ticket) == ("1", True)
        operator.drop("toy", "1")
        until(lambda: tickets_in(cell) == 0)
        assert counted(cell) == {"announced": 3, "made": 3, "missed": 1, "used": 1, "dropped": 1}


# -- what ends them --------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["session", "keys", "files", "off"])
def test_tickets_go_with_their_session_and_their_keys(open_cell: Cells, device: Device, what: str) -> None:
    cell = open_cell()
    client, session = attached(cell, device)
    containers = device.containers(2)
    want = client.evaluate(session, container=containers[0]).container
    offer(client, session, containers)
    until(lambda: counted(cell).get("made") == 2)
    if what == "session":
        cell.forget_sessions()
    elif what == "keys":
        cell.evict_keys()
    elif what == "files":
        for path in (cell.config.state_dir / "native" / "ready").iterdir():
            path.unlink()
        with pytest.raises(KeysMissing):
            client.evaluate(session, container=containers[0])
    else:
        assert on_loop(cell, lambda: setattr(cell.gateway.drain, "on", True)) is None  # type: ignore[union-attr]
        assert offer(client, session, device.containers(1)) == TicketsTaken(0, 0)
        assert client.evaluate(session, container=containers[0]).ticket  # what is there is used
        return
    until(lambda: tickets_in(cell) == 0)
    assert held_bytes(cell) == 0
    with pytest.raises(SessionLost if what == "session" else KeysMissing):
        offer(client, session, containers)
    client, session = attached(cell, device)
    reply = client.evaluate(session, container=containers[0])
    assert (reply.container, reply.ticket) == (want, False)
    assert counted(cell)["dropped"] == 2


class FragilePool(LocalPool):
    """Its evaluators can be made to crash: whatever they are sent is lost, and another takes the place."""

    def crash(self) -> None:
        old = self._members[0]
        name = f"evaluator-after-{old.name}"
        engine = Engine(self._programs, self._backend, self._loaded_keys_bytes)
        self._members[0] = LocalMember(name, engine, lambda names: self.on_tickets_lost(names))
        self.on_change()


def test_a_crash_takes_tickets_along_and_nothing_else(open_cell: Cells, device: Device) -> None:
    pools: list[FragilePool] = []

    def pool_of(registry: Registry) -> FragilePool:
        pools.append(FragilePool(registry.programs, "native", 1, 1 << 30))
        return pools[0]

    cell = open_cell(pool_of=pool_of)
    client, session = attached(cell, device)
    containers = device.containers(3)
    want = [client.evaluate(session, container=c).container for c in containers]
    offer(client, session, containers)
    until(lambda: counted(cell).get("made") == 3)
    on_loop(cell, pools[0].crash)
    assert held_bytes(cell) == 0
    replies = [client.evaluate(session, container=c) for c in containers]
    assert [reply.container for reply in replies] == want
    assert not any(reply.ticket for reply in replies)
    assert counted(cell) == {"announced": 3, "made": 3, "dropped": 3}
    fresh = device.containers(1)
    assert offer(client, session, fresh).accepted == 1  # and on it goes
    until(lambda: counted(cell).get("made") == 4)
    assert client.evaluate(session, container=fresh[0]).ticket


@pytest.mark.parametrize("error", [EvaluationFailed, RuntimeError, EvaluatorCrashed])
def test_a_ticket_that_cannot_be_made_is_nobodys_business(
    open_cell: Cells, device: Device, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    async def fails(member: LocalMember, work: TicketWork) -> int:
        raise error("no")

    cell = open_cell()
    client, session = attached(cell, device)
    monkeypatch.setattr(LocalMember, "make_ticket", fails)
    containers = device.containers(4)
    offer(client, session, containers[:1])
    until(lambda: counted(cell).get("dropped") == 1)
    assert not client.evaluate(session, container=containers[0]).ticket
    offer(client, session, containers[1:])
    until(lambda: cell.gateway is not None and not cell.gateway.ahead.book.waiting)
    if error is EvaluatorCrashed:  # seeds that crash evaluators are quarantined like requests
        with pytest.raises(AccessDenied):
            offer(client, session, containers)
    else:
        assert not client.evaluate(session, container=containers[1]).ticket
        assert offer(client, session, device.containers(1)).accepted == 1
