"""A cell at its limits: full queues, deadlines, time and memory of checks, ports, TLS."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

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
from blindtail.ports import free_port
from blindtail.rpc import INSECURE_LOOPBACK, ClientTls, TailStub, secure_channel
from blindtail.wire import EvaluateCall, KeyState, KeyStatusCall
from cloud.config import CloudConfig, KeyLimits, QueueLimits, TlsFiles
from cloud.local import LocalCell
from tests.certificates import certificates
from tests.clock import until
from tests.cloud_cases import (
    Client,
    bundle,
)
from tests.gated_pool import Gate

pytestmark = pytest.mark.timeout(60)


def connect(cell: LocalCell) -> Client:
    return Client(TailStub(secure_channel(cell.address, INSECURE_LOOPBACK)))


# --- slow evaluators ----------------------------------------------------------------


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def slow(gate: Gate, tmp_path: Path) -> Iterator[LocalCell]:
    """Its evaluator waits for the gate."""
    config = CloudConfig(queue=QueueLimits(jobs=2))
    with LocalCell(
        [bundle()], backend="clear", state_dir=tmp_path, config=config, pool_of=gate.pool
    ) as running:
        yield running
        gate.open()


def occupy(edge: Client, session: bytes, count: int) -> ThreadPoolExecutor:
    pool = ThreadPoolExecutor(count)
    for i in range(count):
        pool.submit(edge.evaluate, session, i, remaining_s=60)
    return pool


def test_a_full_queue_answers_at_once_with_a_delay(slow: LocalCell, gate: Gate) -> None:
    edge = connect(slow)
    edge.upload_and_wait()
    session = edge.register().session
    gateway = slow.gateway
    assert gateway is not None
    pool = occupy(edge, session, 4)
    until(lambda: len(gateway.queue) == 2, "the queue did not fill")
    with pytest.raises(Overloaded) as caught:
        edge.evaluate(session, 9)
    assert gate.ran == 2  # nothing that waits had got its turn before it was answered
    assert 0.1 <= caught.value.retry_after_s <= 30
    gate.open()
    pool.shutdown(wait=True)
    edge.evaluate(session, 9)


def test_a_deadline_ends_the_wait_and_the_work_is_never_sent(slow: LocalCell, gate: Gate) -> None:
    edge = connect(slow)
    edge.upload_and_wait()
    session = edge.register().session
    gateway = slow.gateway
    assert gateway is not None
    pool = occupy(edge, session, 2)
    until(lambda: gate.ran == 2, "the evaluator was not filled")
    with pytest.raises(DeadlineExceeded):
        edge.evaluate(session, 5, remaining_s=0.2)
    assert gate.ran == 2  # the evaluator is as busy as before
    assert len(gateway.queue) == 0
    gate.open()
    pool.shutdown(wait=True)
    assert gate.ran == 2


def test_a_client_that_gives_up_leaves_no_work_behind(slow: LocalCell, gate: Gate) -> None:
    edge = connect(slow)
    edge.upload_and_wait()
    session = edge.register().session
    gateway = slow.gateway
    assert gateway is not None
    pool = occupy(edge, session, 2)
    until(lambda: gate.ran == 2, "the evaluator was not filled")
    call = EvaluateCall(session, os.urandom(16), edge.container(7), 0, 10)
    future = edge.stub.evaluate_future(call, 10)
    until(lambda: len(gateway.queue) == 1, "the request did not queue")
    future.cancel()
    until(lambda: len(gateway.queue) == 0, "the request was not withdrawn")
    gate.open()
    pool.shutdown(wait=True)
    assert gate.ran == 2


def test_keys_in_use_are_not_evicted(slow: LocalCell, gate: Gate) -> None:
    edge = connect(slow)
    edge.upload_and_wait()
    session = edge.register().session
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(edge.evaluate, session, 0)
        until(lambda: gate.ran == 1, "the evaluation did not start")
        slow.evict_keys()
        gate.open()
        assert waiting.result(10).container
    slow.evict_keys()
    with pytest.raises(KeysMissing):
        edge.evaluate(session)


def test_stopping_says_not_serving_first_and_ends_what_waits(slow: LocalCell, gate: Gate) -> None:
    edge = connect(slow)
    edge.upload_and_wait()
    session = edge.register().session
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(edge.evaluate, session, i, remaining_s=60) for i in range(3)]
        until(lambda: gate.ran == 2, "the evaluator was not filled")
        threading.Timer(0.5, gate.open).start()
        slow.stop(grace_s=0.1)
        for future in waiting:
            with pytest.raises((TailUnavailable, Overloaded, EvaluationFailed)):
                future.result(10)


# --- ports, limits, TLS --------------------------------------------------------------


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", free_port()))
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
