"""A whole cell over gRPC, without Ray: the four calls, bad input, health, reflection, TLS."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from blindtail import wire
from blindtail.errors import (
    BlindtailError,
    ContainerError,
    KeysMissing,
    Overloaded,
    ProgramMismatch,
    SessionLost,
    TailUnavailable,
)
from blindtail.he import container
from blindtail.he.container import Seeded
from blindtail.pb import tail_pb2, tail_pb2_grpc
from blindtail.rpc import INSECURE_LOOPBACK, TailStub, secure_channel
from blindtail.wire import KeyChunk, KeyHeader, KeyState, KeyStatusCall, RegisterCall
from cloud.config import CloudConfig, SessionLimits
from cloud.local import LocalCell
from tests.cloud_cases import (
    Client,
    activation,
    bundle,
    clear_keys,
    expected,
    layers,
    program,
    sha,
)

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCell]:
    folder = tmp_path_factory.mktemp("cell")
    bundle().save(folder / "cloud.bt")
    with LocalCell([folder / "cloud.bt"], backend="clear", state_dir=folder / "state") as running:
        yield running


@pytest.fixture(scope="module")
def stub(cell: LocalCell) -> Iterator[TailStub]:
    channel = secure_channel(cell.address, INSECURE_LOOPBACK)
    yield TailStub(channel)
    channel.close()


@pytest.fixture(scope="module")
def client(stub: TailStub) -> Client:
    ready = Client(stub)
    assert ready.upload_and_wait() is KeyState.READY
    return ready


def connect(cell: LocalCell) -> Client:
    return Client(TailStub(secure_channel(cell.address, INSECURE_LOOPBACK)))


def variant(index: int) -> bytes:
    """Another well-formed key container: the bytes of a seed differ (the checksum does not matter here)."""
    data = bytearray(clear_keys())
    data[-1] ^= index
    return bytes(data)


# --- the way it should go -----------------------------------------------------


def test_an_encrypted_tail_over_the_wire(client: Client) -> None:
    registered = client.register()
    assert registered.keys is KeyState.READY
    assert registered.idle_timeout_s > 0
    for seed in range(3):
        reply = client.evaluate(registered.session, seed)
        assert np.allclose(client.logits(reply), expected(activation(seed)), atol=1e-9)
        assert reply.eval_s > 0
        assert reply.evaluator


def test_the_generated_stub_talks_to_it(cell: LocalCell, client: Client) -> None:
    """Hand-written handlers and protoc's own client agree on names and messages."""
    with grpc.insecure_channel(cell.address) as channel:
        generated = tail_pb2_grpc.TailStub(channel)
        request = tail_pb2.RegisterRequest(
            model="toy", version="1", program_id=client.spec.program_id, key_sha256=client.sha256
        )
        reply = generated.Register(request, timeout=10)
        assert reply.keys == tail_pb2.KEY_STATE_READY
        answer = generated.Evaluate(
            tail_pb2.EvaluateRequest(
                session=reply.session, request_id=bytes(16), container=client.container()
            ),
            timeout=10,
        )
        assert answer.eval_s > 0
        status = generated.KeyStatus(
            tail_pb2.KeyStatusRequest(program_id=client.spec.program_id, key_sha256=bytes(32)), timeout=10
        )
        assert status.keys == tail_pb2.KEY_STATE_MISSING


def test_health_and_reflection(cell: LocalCell, stub: TailStub) -> None:
    assert stub.serving(5)
    with grpc.insecure_channel(cell.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", wire.SERVICE):
            reply = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        lister = reflection_pb2_grpc.ServerReflectionStub(channel)
        ask = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        (listed,) = lister.ServerReflectionInfo(ask, timeout=5)
        names = {s.name for s in listed.list_services_response.service}
        assert {wire.SERVICE, "grpc.health.v1.Health"} <= names


def test_many_clients_at_once(cell: LocalCell, client: Client) -> None:
    session = client.register().session
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda i: (i, client.evaluate(session, i)), range(40)))
    for seed, reply in replies:
        assert np.allclose(client.logits(reply), expected(activation(seed)), atol=1e-9)


def test_the_seal_backend_end_to_end(tmp_path: Path) -> None:
    from blindtail.he.secret import Decryptor, Encryptor, SecretKey

    spec = program().spec
    secret = SecretKey.generate(spec, tmp_path / "keys")
    with LocalCell([bundle()], backend="seal", state_dir=tmp_path / "state") as cell:
        edge = Client(
            TailStub(secure_channel(cell.address, INSECURE_LOOPBACK)), keys=(tmp_path / "keys").read_bytes()
        )
        assert edge.upload_and_wait() is KeyState.READY
        session = edge.register().session
        container = Encryptor(spec, secret).encrypt(activation(1))
        reply = edge.evaluate(session, container=container)
        assert len(reply.container) == spec.reply_bytes
        assert np.allclose(
            Decryptor(spec, secret).decrypt(reply.container), expected(activation(1)), atol=1e-2
        )
        flipped = bytearray(container)
        flipped[len(container) // 2] ^= 1
        with pytest.raises(ContainerError):
            edge.evaluate(session, container=bytes(flipped))
        with pytest.raises(ContainerError):  # a clear container is never taken for an encrypted one
            edge.evaluate(session, container=edge.container())


# --- bad input ------------------------------------------------------------------


REFUSED_CONTAINERS = {
    "empty": lambda c: b"",
    "truncated": lambda c: c[:-1],
    "oversized by one": lambda c: c + b"\0",
    "bit flipped": lambda c: c[:500] + bytes([c[500] ^ 4]) + c[501:],
    "header flipped": lambda c: bytes([c[0] ^ 1]) + c[1:],
    "zeros": lambda c: bytes(len(c)),
    "another program": lambda c: Client(None, seed=1).container(),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", REFUSED_CONTAINERS)
def test_a_bad_container_is_refused_and_costs_nothing_else(client: Client, name: str) -> None:
    session = client.register().session
    with pytest.raises(ContainerError) as caught:
        client.evaluate(session, container=REFUSED_CONTAINERS[name](client.container()))
    assert "/" not in str(caught.value).replace("edge.bt/cloud.bt", "")  # no paths of ours
    client.evaluate(session)  # and the session goes on


def test_a_message_far_beyond_the_cap_is_refused(client: Client) -> None:
    session = client.register().session
    with pytest.raises((ContainerError, Overloaded)):
        client.evaluate(session, container=bytes(5_000_000))
    client.evaluate(session)


def keys_above_the_primes() -> bytes:
    """Well-formed and with a right checksum, but every residue is the largest number of its width."""
    spec = program().spec
    primes = spec.parameters.primes

    def digits(level: int) -> Iterator[Seeded]:
        moduli = (*primes[: level + 1], spec.parameters.special)
        rows = [[(1 << p.bit_length()) - 1] * spec.parameters.ring_degree for p in moduli]
        for _ in range(level + 1):
            yield Seeded(np.array(rows, np.uint64), bytes(container.SEED_BYTES))

    return container.write_keys(spec, (digits(need.level) for need in spec.keys))


BAD_KEYS = {
    "wrong hash": (lambda k: k, lambda k: sha(b"other"), "hash"),
    "bit flipped": (lambda k: k[:900_000] + bytes([k[900_000] ^ 1]) + k[900_001:], sha, "checksum"),
    "residue above its prime": (lambda k: keys_above_the_primes(), sha, "residue"),
    "another program's": (lambda k: clear_keys(1), sha, "program"),
    "zeros": (lambda k: bytes(len(k)), sha, ""),
}


@pytest.mark.parametrize("name", BAD_KEYS)
def test_bad_keys_are_refused_with_a_reason_and_gone(cell: LocalCell, stub: TailStub, name: str) -> None:
    damage, digest, reason = BAD_KEYS[name]
    data = damage(clear_keys())
    edge = Client(stub, keys=data)
    edge.sha256 = digest(data)
    assert edge.upload_and_wait() is KeyState.REFUSED
    status = stub.key_status(KeyStatusCall(edge.spec.program_id, edge.sha256), 5)
    assert reason in status.problem
    assert status.received_bytes == 0
    assert list((cell.config.state_dir / "clear" / "partial").iterdir()) == []
    assert edge.register().keys is KeyState.REFUSED
    with pytest.raises(KeysMissing):
        edge.evaluate(edge.register().session)


@pytest.mark.parametrize("change", [-1, 1, 1 << 40])
def test_keys_of_a_wrong_size_are_refused_at_once(stub: TailStub, change: int) -> None:
    spec = program().spec
    header = KeyHeader(spec.program_id, bytes(32), spec.key_bytes + change, 0)
    with pytest.raises(ContainerError, match=str(spec.key_bytes)):
        stub.upload_keys(header, [b"x"], 5)


def test_an_upload_without_a_header_or_with_two_is_refused(cell: LocalCell) -> None:
    channel = secure_channel(cell.address, INSECURE_LOOPBACK)
    upload = channel.stream_unary(f"/{wire.SERVICE}/UploadKeys", None, None)
    header = KeyHeader(program().spec.program_id, sha(b"two"), program().spec.key_bytes, 0)
    streams: list[list[bytes]] = [
        [],
        [KeyChunk(b"data").encode()],
        [KeyChunk(b"data", header).encode(), KeyChunk(b"data", header).encode()],
        [b"\xff\xff\xff"],
    ]
    for stream in streams:
        with pytest.raises(grpc.RpcError) as caught:
            upload(iter(stream), timeout=5)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]
    channel.close()


def test_an_upload_is_resumed_after_its_connection_broke(cell: LocalCell) -> None:
    edge = connect(cell)
    edge.keys = variant(1)
    edge.sha256 = sha(edge.keys)
    header = KeyHeader(edge.spec.program_id, edge.sha256, edge.spec.key_bytes, 0)
    broken = secure_channel(cell.address, INSECURE_LOOPBACK)

    def arrived() -> None:
        end_s = time.monotonic() + 20
        while (
            edge.stub.key_status(KeyStatusCall(edge.spec.program_id, edge.sha256), 5).received_bytes < 150_000
            and time.monotonic() < end_s
        ):
            time.sleep(0.02)

    def pieces() -> Iterator[bytes]:
        yield edge.keys[:100_000]
        yield edge.keys[100_000:150_000]
        arrived()
        broken.close()
        yield edge.keys[150_000:200_000]

    with pytest.raises(BlindtailError):
        TailStub(broken).upload_keys(header, pieces(), 10)
    status = edge.stub.key_status(KeyStatusCall(edge.spec.program_id, edge.sha256), 5)
    assert (status.state, status.received_bytes) == (KeyState.MISSING, 150_000)
    with pytest.raises(ContainerError, match="150000"):
        edge.upload(0)
    assert edge.upload(150_000) in (KeyState.CHECKING, KeyState.REFUSED)


@pytest.mark.parametrize(
    ("model", "version", "seed", "text"),
    [
        ("dog", "1", 0, "does not serve model 'dog'"),
        ("toy", "2", 0, "version 2, the cloud holds version 1"),
        ("toy", "1", 1, "pack the model again"),
    ],
)
def test_another_model_version_or_program(
    stub: TailStub, model: str, version: str, seed: int, text: str
) -> None:
    with pytest.raises(ProgramMismatch, match=text):
        Client(stub, seed, model, version).register()


def test_unknown_sessions_and_ids_of_wrong_length(client: Client) -> None:
    with pytest.raises(SessionLost):
        client.evaluate(os.urandom(16))
    with pytest.raises(ContainerError, match="16"):
        client.evaluate(b"short")
    with pytest.raises(ContainerError):
        RegisterCall("toy", "1", "not hex", bytes(32))


def test_a_request_id_names_its_bytes(client: Client) -> None:
    session, request_id = client.register().session, os.urandom(16)
    first = client.evaluate(session, 0, request_id=request_id)
    again = client.evaluate(session, 0, request_id=request_id, attempt=1)
    assert again == first
    with pytest.raises(ContainerError, match="other bytes"):
        client.evaluate(session, 1, request_id=request_id)


def test_keys_evicted_between_two_requests(cell: LocalCell, client: Client) -> None:
    session = client.register().session
    client.evaluate(session)
    cell.evict_keys()
    with pytest.raises(KeysMissing, match="upload them again"):
        client.evaluate(session)
    assert client.upload_and_wait() is KeyState.READY
    client.evaluate(session)  # the session needs no renewal


def test_a_restart_loses_sessions_and_keeps_keys(tmp_path: Path) -> None:
    with LocalCell([bundle()], backend="clear", state_dir=tmp_path) as cell:
        edge = connect(cell)
        assert edge.upload_and_wait() is KeyState.READY
        session = edge.register().session
        cell.stop()
        with pytest.raises(TailUnavailable):
            edge.evaluate(session)
        cell.start()
        deadline_s = time.monotonic() + 10
        while True:
            try:
                edge.evaluate(session)
            except TailUnavailable:
                assert time.monotonic() < deadline_s
                time.sleep(0.1)
            except SessionLost:
                break
        registered = edge.register()
        assert registered.keys is KeyState.READY
        edge.evaluate(registered.session)


def test_idle_sessions_are_forgotten(tmp_path: Path) -> None:
    config = CloudConfig(sessions=SessionLimits(idle_s=0.2))
    with LocalCell([bundle()], backend="clear", state_dir=tmp_path, config=config) as cell:
        edge = connect(cell)
        registered = edge.register()
        assert registered.idle_timeout_s == 0.2
        time.sleep(0.3)
        with pytest.raises(SessionLost):
            edge.evaluate(registered.session)


def test_the_toy_tail_is_what_the_tests_take_it_for() -> None:
    """Positive control: another seed gives other logits, so agreement above means something."""
    assert layers(0) is not layers(1)
    assert not np.allclose(expected(activation(0), 0), expected(activation(0), 1), atol=1e-2)
