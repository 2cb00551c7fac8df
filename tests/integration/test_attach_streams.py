"""The attachment against orchestrators that are away, say no, hang, send rubbish, or come and go."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import pytest

from blindtail import attach
from blindtail.attach import Attachment, merged
from blindtail.errors import AccessDenied, ConfigError, ContainerError, Overloaded
from blindtail.ports import free_port
from blindtail.rpc import INSECURE_LOOPBACK, to_status
from blindtail.wire.control import (
    CONTROL,
    MOST_ITEMS,
    CellLoad,
    Hello,
    PeerKind,
    PolicyAck,
    PolicyUpdate,
    Report,
    StepTiming,
    Up,
    Welcome,
    decode_up,
    encode_down,
)
from tests.attach_cases import Host
from tests.clock import until

pytestmark = pytest.mark.timeout(40)

Script = Callable[[Iterator[Up], Any], Iterator[bytes]]
WELCOME = encode_down(Welcome(0.05))


class Scripted:
    """An orchestrator that does what a test says; `came` is all that was sent to it."""

    def __init__(self, script: Script, port: int = 0) -> None:
        self.came: list[Up] = []
        self.dials = 0
        self._script = script
        self._server = grpc.server(ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
        methods = {"Attach": grpc.stream_stream_rpc_method_handler(self._attach)}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(CONTROL, methods),))
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self._server.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def of(self, kind: type[Any]) -> list[Any]:
        return [up for up in list(self.came) if isinstance(up, kind)]

    def stop(self) -> None:
        self._server.stop(0).wait()

    def _attach(self, messages: Iterator[bytes], context: Any) -> Iterator[bytes]:
        self.dials += 1

        def kept() -> Iterator[Up]:
            for data in messages:
                up = decode_up(data)
                self.came.append(up)
                yield up

        yield from self._script(kept(), context)


def welcoming(*more: bytes) -> Script:
    """Welcomes, sends `more`, and listens."""

    def script(messages: Iterator[Up], context: Any) -> Iterator[bytes]:
        next(messages)
        yield WELCOME
        yield from more
        for _ in messages:
            pass

    return script


def refusing(error: Exception) -> Script:
    def script(messages: Iterator[Up], context: Any) -> Iterator[bytes]:
        next(messages)
        code, text, metadata = to_status(error)
        context.set_trailing_metadata(metadata)
        context.abort(code, text)
        yield b""

    return script


@contextmanager
def scripted(script: Script, port: int = 0) -> Iterator[Scripted]:
    server = Scripted(script, port)
    try:
        yield server
    finally:
        server.stop()


def test_reports_up_and_policies_down() -> None:
    host = Host()
    changes: list[bool] = []
    with (
        scripted(welcoming(encode_down(PolicyUpdate(3, "toy", b"{}")))) as server,
        host.attached(server.address, on_change=changes.append) as attachment,
    ):
        assert attachment.wait_connected(20)
        until(lambda: server.of(PolicyAck))
        assert server.of(PolicyAck) == [PolicyAck(3, True)]
        assert server.came[0] == Hello(PeerKind.EDGE, host.instance, "1", (("toy", "1"),), 0)
        host.answers += 7
        until(lambda: sum(r.routes["tail"] for r in server.of(Report)) == 7)
        assert all(0 <= r.interval_s < 5 for r in server.of(Report))
    assert changes == [True, False]


def test_an_orchestrator_that_comes_later_and_comes_back() -> None:
    """Nothing counted meanwhile is lost."""
    host = Host()
    port = free_port()
    received = 0
    with host.attached(f"127.0.0.1:{port}") as attachment:
        assert not attachment.wait_connected(0.4)
        host.answers += 5
        for _ in range(3):
            with scripted(welcoming(), port) as server:
                assert attachment.wait_connected(20)
                host.answers += 5
                until(lambda server=server: host.answers == 0 and len(server.of(Report)) > 3)
            until(lambda: not attachment.connected)
            received += sum(r.routes["tail"] for r in server.of(Report))
            host.answers += 5
    assert received + host.answers == 5 + 3 * 10


@pytest.mark.parametrize(
    ("script", "says"),
    [
        (refusing(AccessDenied("this certificate is for a cell")), "this certificate is for a cell"),
        (refusing(ContainerError("no such message")), "no such message"),
        (refusing(Overloaded("full", 20.0)), "full"),
        (welcoming(b"\xff\xff\xff"), "not a AttachDown"),
    ],
    ids=["no access", "not understood", "no room", "rubbish from above"],
)
def test_who_is_refused_asks_seldom(script: Script, says: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "blindtail.attach"), scripted(script) as server:
        with Host().attached(server.address):
            until(lambda: caplog.messages)
            time.sleep(0.6)
        assert server.dials == 1
    assert [says in message for message in caplog.messages] == [True]


def test_something_else_listens_there(caplog: pytest.LogCaptureFixture) -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with caplog.at_level(logging.WARNING, "blindtail.attach"), Host().attached(f"127.0.0.1:{port}"):
        until(lambda: caplog.messages)
    server.stop(0).wait()
    assert "no orchestrator" in caplog.messages[0]


def test_a_stream_without_a_welcome_is_dialled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attach, "WELCOME_S", 0.2)
    held = threading.Event()

    def hang(messages: Iterator[Up], context: Any) -> Iterator[bytes]:
        held.wait(5)
        yield from ()

    with scripted(hang) as server, Host().attached(server.address) as attachment:
        until(lambda: server.dials >= 2)
        assert not attachment.connected
        held.set()


def test_one_line_while_nobody_is_there(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "blindtail.attach"):
        port = free_port()
        with Host().attached(f"127.0.0.1:{port}") as attachment:
            until(lambda: caplog.messages)
            time.sleep(0.6)
            with scripted(welcoming(), port):
                assert attachment.wait_connected(20)
            until(lambda: len(caplog.messages) >= 3)
            time.sleep(0.5)
    # "not attached to ...", "attached to ...": one for each change.
    assert [message.split()[0] for message in caplog.messages] == ["not", "attached", "not"]


def test_a_host_that_fails_keeps_its_stream() -> None:
    host = Host()

    def fails(*_: object) -> Any:
        raise RuntimeError("a fault of the host")

    update = encode_down(PolicyUpdate(3, "toy", b"{}"))
    with (
        scripted(welcoming(update)) as server,
        host.attached(server.address, report=fails, on_policy=fails, on_change=fails) as attachment,
    ):
        until(lambda: server.of(PolicyAck))
        (ack,) = server.of(PolicyAck)
        assert (ack.version, ack.applied) == (3, False)
        assert "a fault of the host" in ack.reason
        time.sleep(0.2)
        assert attachment.connected
        assert not server.of(Report)
    calls: list[int] = []

    def fails_first() -> Hello:
        calls.append(1)
        return fails() if len(calls) == 1 else host.hello()

    with scripted(welcoming()) as server, host.attached(server.address, hello=fails_first) as attachment:
        assert attachment.wait_connected(20)


def test_closing_waits_for_no_one() -> None:
    """A host stuck in its own callback, an address that swallows everything, one never started."""
    stuck, inside = threading.Event(), threading.Event()

    def on_policy(update: PolicyUpdate) -> None:
        inside.set()
        stuck.wait(20)

    update = encode_down(PolicyUpdate(3, "toy", b"{}"))
    with scripted(welcoming(update)) as server:
        with Host().attached(server.address, on_policy=on_policy):
            assert inside.wait(20)
        stuck.set()
    with Host().attached("127.0.0.1:9"):
        pass
    host = Host()
    never = Attachment("127.0.0.1:9", INSECURE_LOOPBACK, host.hello, host.report, host.on_policy)
    never.close()
    never.close()


def test_a_wrong_address_is_said_at_once() -> None:
    host = Host()
    for address in ("127.0.0.1", "example.org:50061"):
        with pytest.raises(ConfigError):
            Attachment(address, INSECURE_LOOPBACK, host.hello, host.report, host.on_policy)


def test_a_host_that_has_nothing_to_say() -> None:
    """The time that passes without a report belongs to the next one."""
    host = Host()
    times: list[float] = []

    def report(interval_s: float) -> Report | None:
        times.append(interval_s)
        return Report(interval_s) if len(times) % 3 == 0 else None

    with scripted(welcoming()) as server, host.attached(server.address, report=report):
        until(lambda: len(server.of(Report)) >= 2)
    assert times[1] > times[0]
    assert times[3] < times[2]
    assert [r.interval_s for r in server.of(Report)][:2] == [times[2], times[5]]


def test_two_reports_make_one() -> None:
    older = Report(
        2.0, {"exit1": 1, "tail": 2}, {"deadline": 1}, (StepTiming("eval", 1, 1.0, 1.0),), 10, 20, "starting"
    )
    newer = Report(3.0, {"tail": 5}, uplink_bytes=1, tail="ready", load=CellLoad(2), models=(("toy", "1"),))
    both = merged(older, newer)
    assert both == Report(
        5.0,
        {"exit1": 1, "tail": 7},
        {"deadline": 1},
        older.steps,
        11,
        20,
        "ready",
        newer.load,
        newer.models,
    )
    many = merged(
        Report(1.0, {f"old-{i}": 1 for i in range(200)}), Report(1.0, {f"new-{i}": 1 for i in range(200)})
    )
    assert len(many.routes) == MOST_ITEMS
    assert sum(many.routes.values()) == 400
