"""A cell at its limits: full queues, deadlines, time and memory of checks, ports, TLS."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from blindtail.errors import (
    ConfigError,
    DeadlineExceeded,
    EvaluationFailed,
    KeysMissing,
    Overloaded,
    SessionLost,
    TailUnavailable,
)
from blindtail.rpc import INSECURE_LOOPBACK, ClientTls, TailStub, secure_channel
from blindtail.wire import EvaluateCall, KeyState, KeyStatusCall
from cloud.config import CloudConfig, KeyLimits, QueueLimits, TlsFiles
from cloud.evaluators import Evaluated, LocalMember, LocalPool, Member, Work
from cloud.local import LocalCell
from cloud.registry import Registry
from tests.certificates import certificates
from tests.cloud_cases import (
    Client,
    bundle,
)

pytestmark = pytest.mark.timeout(60)


def connect(cell: LocalCell) -> Client:
    return Client(TailStub(secure_channel(cell.address, INSECURE_LOOPBACK)))


# --- slow evaluators ----------------------------------------------------------------


class SlowMember(LocalMember):
    """Waits for `gate` before every evaluation; counts those that ran."""

    gate = threading.Event()
    ran = 0

    async def evaluate(self, work: Work) -> Evaluated:
        import asyncio

        type(self).ran += 1
        await asyncio.to_thread(type(self).gate.wait, 20)
        return await super().evaluate(work)


class SlowPool(LocalPool):
    async def start(self) -> None:
        await super().start()
        self._slow = [SlowMember(m.name, m._engine) for m in self._members]

    @property
    def members(self) -> Sequence[Member]:
        return getattr(self, "_slow", [])


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[LocalCell]:
    SlowMember.gate, SlowMember.ran = threading.Event(), 0

    def pool_of(registry: Registry) -> LocalPool:
        return SlowPool(registry.programs, "clear", 1, 1 << 30)

    config = CloudConfig(queue=QueueLimits(jobs=2))
    with LocalCell(
        [bundle()], backend="clear", state_dir=tmp_path, config=config, pool_of=pool_of
    ) as running:
        yield running
        SlowMember.gate.set()


def occupy(edge: Client, session: bytes, count: int) -> ThreadPoolExecutor:
    pool = ThreadPoolExecutor(count)
    for i in range(count):
        pool.submit(edge.evaluate, session, i, remaining_s=60)
    return pool


def wait_for(condition: Any, text: str) -> None:
    deadline_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline_s, text
        time.sleep(0.01)


def test_a_full_queue_answers_at_once_with_a_delay(slow: LocalCell) -> None:
    edge = connect(slow)
    edge.upload_and_wait()
    session = edge.register().session
    gateway = slow.gateway
    assert gateway is not None
    pool = occupy(edge, session, 4)
    wait_for(lambda: len(gateway.queue) == 2, "the queue did not fill")
    with pytest.raises(Overloaded) as caught:
        edge.evaluate(session, 9)
    assert SlowMember.ran == 2  # nothing that waits had got its turn before it was answered
    assert 0.1 <= caught.value.retry_after_s <= 30
    SlowMember.gate.set()
    pool.shutdown(wait=True)
    edge.evaluate(session, 9)


def test_a_deadline_ends_the_wait_and_the_work_is_never_sent(slow: LocalCell) -> None:
    edge = connect(slow)
    edge.upload_and_wait()
    session = edge.register().session
    gateway = slow.gateway
    assert gateway is not None
    pool = occupy(edge, session, 2)
    wait_for(lambda: SlowMember.ran == 2, "the evaluator was not filled")
    with pytest.raises(DeadlineExceeded):
        edge.evaluate(session, 5, remaining_s=0.2)
    assert SlowMember.ran == 2  # the evaluator is as busy as before
    assert len(gateway.queue) == 0
    SlowMember.gate.set()
    pool.shutdown(wait=True)
    assert SlowMember.ran == 2


def test_a_client_that_gives_up_leaves_no_work_behind(slow: LocalCell) -> None:
    edge = connect(slow)
    edge.upload_and_wait()
    session = edge.register().session
    gateway = slow.gateway
    assert gateway is not None
    pool = occupy(edge, session, 2)
    wait_for(lambda: SlowMember.ran == 2, "the evaluator was not filled")
    call = EvaluateCall(session, os.urandom(16), edge.container(7), 0, 10)
    future = edge.stub.evaluate_future(call, 10)
    wait_for(lambda: len(gateway.queue) == 1, "the request did not queue")
    future.cancel()
    wait_for(lambda: len(gateway.queue) == 0, "the request was not withdrawn")
    SlowMember.gate.set()
    pool.shutdown(wait=True)
    assert SlowMember.ran == 2


def test_keys_in_use_are_not_evicted(slow: LocalCell) -> None:
    edge = connect(slow)
    edge.upload_and_wait()
    session = edge.register().session
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(edge.evaluate, session, 0)
        wait_for(lambda: SlowMember.ran == 1, "the evaluation did not start")
        slow.evict_keys()
        SlowMember.gate.set()
        assert waiting.result(10).container
    slow.evict_keys()
    with pytest.raises(KeysMissing):
        edge.evaluate(session)


def test_stopping_says_not_serving_first_and_ends_what_waits(slow: LocalCell) -> None:
    edge = connect(slow)
    edge.upload_and_wait()
    session = edge.register().session
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(edge.evaluate, session, i, remaining_s=60) for i in range(3)]
        wait_for(lambda: SlowMember.ran == 2, "the evaluator was not filled")
        threading.Timer(0.5, SlowMember.gate.set).start()
        slow.stop(grace_s=0.1)
        for future in waiting:
            with pytest.raises((TailUnavailable, Overloaded, EvaluationFailed)):
                future.result(10)


# --- ports, limits, TLS --------------------------------------------------------------


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{port}.*--port"):
            LocalCell([bundle()], backend="clear", state_dir=tmp_path, port=port).start()
    with LocalCell([bundle()], backend="clear", state_dir=tmp_path, port=port) as cell:
        assert cell.port == port  # and what the failed start held is free again


def test_a_check_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    config = CloudConfig(keys=KeyLimits(check_timeout_s=0.05))
    with LocalCell([bundle()], backend="clear", state_dir=tmp_path, config=config) as cell:
        edge = connect(cell)
        assert edge.upload_and_wait() is KeyState.REFUSED
        status = edge.stub.key_status(KeyStatusCall(edge.spec.program_id, edge.sha256), 5)
        assert "longer than" in status.problem
        assert list((tmp_path / "clear" / "ready").iterdir()) == []


def test_a_check_beyond_its_memory_is_refused_and_the_cell_lives(tmp_path: Path) -> None:
    config = CloudConfig(keys=KeyLimits(check_memory_bytes=1_000_000))
    with LocalCell([bundle()], backend="clear", state_dir=tmp_path, config=config) as cell:
        edge = connect(cell)
        assert edge.upload_and_wait() is KeyState.REFUSED
        assert edge.stub.serving(5)


def test_mutual_tls_gives_every_client_its_own_keys_and_sessions(tmp_path: Path) -> None:
    made = certificates(tmp_path / "certs", "server", "alice", "bob")
    tls = TlsFiles(made["server.pem"], made["server.key"], made["ca.pem"])
    config = CloudConfig(tls=tls)
    with LocalCell([bundle()], backend="clear", state_dir=tmp_path / "s", config=config) as cell:

        def edge(name: str) -> Client:
            credentials = ClientTls(
                made["ca.pem"].read_bytes(),
                made[f"{name}.pem"].read_bytes(),
                made[f"{name}.key"].read_bytes(),
            )
            return Client(TailStub(secure_channel(cell.address, credentials)))

        alice, bob = edge("alice"), edge("bob")
        assert alice.upload_and_wait() is KeyState.READY
        session = alice.register().session
        alice.evaluate(session)
        assert bob.register().keys is KeyState.MISSING  # the same hash, another identity
        with pytest.raises(SessionLost):
            bob.evaluate(session)
        with pytest.raises((TailUnavailable, DeadlineExceeded)):  # plaintext does not get through
            connect(cell).stub.serving(2)
        nameless = grpc.secure_channel(
            cell.address, grpc.ssl_channel_credentials(made["ca.pem"].read_bytes())
        )
        with pytest.raises((TailUnavailable, DeadlineExceeded)):  # no certificate of its own
            TailStub(nameless).serving(2)
        nameless.close()
    with pytest.raises(ConfigError, match="loopback only"):
        replace(config, host="0.0.0.0", tls=None)
