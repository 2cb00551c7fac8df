"""Models of a running cell over gRPC: pushed, shared, rolled back, dropped, and who may do so."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest

from blindtail.errors import (
    BundleError,
    ConfigError,
    KeysMissing,
    ModelWithdrawn,
    ProgramMismatch,
)
from blindtail.rpc import INSECURE_LOOPBACK, TailStub, secure_channel
from blindtail.wire import KeyState
from blindtail.wire.cell import MODELS, DropCall, ModelChunk, ModelEntry, ModelHeader
from cloud.local import LocalCell
from cloud.operator_client import OperatorClient
from tests.clock import until
from tests.cloud_cases import Client, activation, clear_keys
from tests.gated_pool import Gate
from tests.model_cases import bundle_of, file_of, logits_of, retrained

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def cell(tmp_path: Path) -> Iterator[LocalCell]:
    """It starts without any model."""
    with LocalCell([], backend="clear", evaluators=2, state_dir=tmp_path / "state") as running:
        yield running


@pytest.fixture
def operator(cell: LocalCell) -> Iterator[OperatorClient]:
    with OperatorClient(cell.address, INSECURE_LOOPBACK) as client:
        yield client


def connect(cell: LocalCell) -> Client:
    return Client(TailStub(secure_channel(cell.address, INSECURE_LOOPBACK)))


def shown(entries: list[ModelEntry]) -> dict[str, tuple[float, int, str]]:
    return {e.version: (e.share, e.sessions, e.compatible_with) for e in entries}


def versions_of(edge: Client, session: bytes, count: int) -> Counter[str]:
    """Who answered; every reply is checked to be that version's."""
    found: Counter[str] = Counter()
    for seed in range(count):
        reply = edge.evaluate(session, seed)
        assert np.allclose(edge.logits(reply), logits_of(reply.version, seed), atol=1e-9)
        found[reply.version] += 1
    return found


def loaded(cell: LocalCell) -> set[frozenset[str]]:
    """What each evaluator holds."""
    assert cell.gateway is not None
    return {frozenset(member._engine.names) for member in cell.gateway.pool.members}  # type: ignore[attr-defined]


def test_from_an_empty_cell_to_a_canary_and_back(
    cell: LocalCell, operator: OperatorClient, tmp_path: Path
) -> None:
    edge = connect(cell)
    with pytest.raises(ProgramMismatch, match="blindtail model push"):
        edge.register()
    assert operator.models() == []
    operator.push(file_of(tmp_path, "1"))
    assert edge.upload_and_wait() is KeyState.READY
    session = edge.register().session
    assert versions_of(edge, session, 5) == {"1": 5}

    assert shown(operator.push(file_of(tmp_path, "2"))) == {"1": (0, 1, "2"), "2": (0, 0, "1")}
    assert versions_of(edge, session, 5) == {"1": 5}  # served beside it, and asked for nothing
    assert shown(operator.canary("toy", "2", 0.25))["2"][0] == 0.25
    one, two = (retrained(v).spec.program_id for v in "12")
    assert loaded(cell) == {frozenset((one, two, f"{one}:{two}"))}
    counts = versions_of(edge, session, 160)
    assert 12 <= counts["2"] <= 72  # 40 expected, 6 standard deviations
    assert counts.total() == 160

    request_id = os.urandom(16)
    answers = {edge.evaluate(session, 1, request_id=request_id, attempt=n).version for n in range(3)}
    assert len(answers) == 1

    assert operator.canary("toy", "2", 1)[1].share == 1
    assert versions_of(edge, session, 10) == {"2": 10}
    assert operator.rollback("toy")[1].share == 0.25
    assert operator.rollback("toy")[1].share == 0
    assert versions_of(edge, session, 10) == {"1": 10}
    with pytest.raises(ConfigError, match="nothing to roll back"):
        operator.rollback("toy")
    requests = {e.version: e.requests for e in operator.models("toy")}
    assert requests["1"] + requests["2"] == 5 + 5 + 160 + 1 + 2 + 10 + 10
    until(lambda: loaded(cell) == {frozenset((one, two))})  # the stand-in is unloaded again


def test_a_dropped_version_takes_its_keys_along_and_comes_back_by_a_push(
    cell: LocalCell, operator: OperatorClient, tmp_path: Path
) -> None:
    one, two = file_of(tmp_path, "1"), file_of(tmp_path, "2")
    operator.push(one)
    operator.push(two)
    edge = connect(cell)
    edge.upload_and_wait()
    session = edge.register().session
    keys = cell.config.state_dir / "clear" / "ready"
    assert len(list(keys.iterdir())) == 1
    entries = operator.drop("toy", "1")
    assert [(e.version, bool(e.programs)) for e in entries] == [("2", True), ("1", False)]
    assert list(keys.iterdir()) == []
    assert loaded(cell) == {frozenset({retrained("2").spec.program_id})}
    for call in (lambda: edge.evaluate(session), edge.register, edge.status, edge.upload):
        with pytest.raises(ModelWithdrawn, match=r"version 1; version 2 is served.*exits"):
            call()
    cell.stop()
    cell.start()
    with (
        OperatorClient(cell.address, INSECURE_LOOPBACK) as again,
        pytest.raises(ModelWithdrawn),
    ):
        connect(cell).register()
    with OperatorClient(cell.address, INSECURE_LOOPBACK) as again:
        again.push(one)
    edge = connect(cell)
    session = edge.register().session
    with pytest.raises(KeysMissing):
        edge.evaluate(session)
    assert edge.upload_and_wait() is KeyState.READY
    assert versions_of(edge, session, 3) == {"1": 3}


def test_the_seal_backend_shares_one_key_set(tmp_path: Path) -> None:
    from blindtail.he.secret import Decryptor, Encryptor, SecretKey

    spec = retrained("1").spec
    secret = SecretKey.generate(spec, tmp_path / "keys")
    with (
        LocalCell([bundle_of("1")], backend="seal", state_dir=tmp_path / "state") as cell,
        OperatorClient(cell.address, INSECURE_LOOPBACK) as operator,
    ):
        edge = Client(
            TailStub(secure_channel(cell.address, INSECURE_LOOPBACK)), keys=(tmp_path / "keys").read_bytes()
        )
        assert edge.upload_and_wait() is KeyState.READY
        session = edge.register().session
        operator.push(file_of(tmp_path, "3"))
        for share, version in ((0.0, "1"), (1.0, "3"), (0.0, "1")):
            operator.canary("toy", "3", share)
            container = Encryptor(spec, secret).encrypt(activation(1))
            reply = edge.evaluate(session, container=container)
            assert reply.version == version
            got = Decryptor(spec, secret).decrypt(reply.container)
            assert np.allclose(got, logits_of(version, 1), atol=1e-2)
        assert cell.gateway is not None
        assert cell.gateway.pool.counters()[0].key_loads == 1


# --- while requests run ---------------------------------------------------------------


def test_a_drop_waits_for_requests_in_flight(tmp_path: Path) -> None:
    gate = Gate()
    with (
        LocalCell([bundle_of("1")], backend="clear", state_dir=tmp_path, pool_of=gate.pool) as cell,
        OperatorClient(cell.address, INSECURE_LOOPBACK) as operator,
        ThreadPoolExecutor(4) as threads,
    ):
        edge = connect(cell)
        edge.upload_and_wait()
        session = edge.register().session
        running = [threads.submit(edge.evaluate, session, seed) for seed in range(3)]
        gateway = cell.gateway
        assert gateway is not None
        until(lambda: sum(gateway.models.in_flight._count.values()) == 3)
        dropping = threads.submit(operator.drop, "toy", "1")
        until(lambda: not gateway.registry.models)
        with pytest.raises(ModelWithdrawn, match="no other version"):
            edge.evaluate(session)
        time.sleep(0.2)
        assert not dropping.done()
        assert list((tmp_path / "clear" / "ready").iterdir())  # in use
        gate.open()
        assert all(np.allclose(edge.logits(r.result(30)), logits_of("1", i)) for i, r in enumerate(running))
        dropping.result(30)
        assert not list((tmp_path / "clear" / "ready").iterdir())


def test_a_drop_is_whole_though_its_operator_hangs_up(tmp_path: Path) -> None:
    gate = Gate()
    with (
        LocalCell([bundle_of("1")], backend="clear", state_dir=tmp_path, pool_of=gate.pool) as cell,
        ThreadPoolExecutor(1) as threads,
    ):
        edge = connect(cell)
        edge.upload_and_wait()
        session = edge.register().session
        running = threads.submit(edge.evaluate, session)
        gateway = cell.gateway
        assert gateway is not None
        until(lambda: sum(gateway.models.in_flight._count.values()) == 1)
        channel = secure_channel(cell.address, INSECURE_LOOPBACK)
        asked = channel.unary_unary(f"/{MODELS}/Drop", None, None).future(DropCall("toy", "1").encode())
        until(lambda: not gateway.registry.models)
        asked.cancel()
        channel.close()
        gate.open()
        assert running.result(30).version == "1"
        until(lambda: not list((tmp_path / "clear" / "ready").iterdir()))
        assert loaded(cell) == {frozenset()}


def test_nobody_fails_while_versions_come_share_and_go(
    cell: LocalCell, operator: OperatorClient, tmp_path: Path
) -> None:
    files = {version: file_of(tmp_path, version) for version in ("1", "2", "3", "other")}
    operator.push(files["1"])
    edge = connect(cell)
    edge.upload_and_wait()
    session = edge.register().session
    over, counts = threading.Event(), Counter[str]()

    def ask() -> None:
        while not over.is_set():
            counts.update(versions_of(edge, session, 5))

    with ThreadPoolExecutor(2) as threads:
        asking = [threads.submit(ask) for _ in range(2)]
        try:
            for version in ("2", "3", "other"):
                operator.push(files[version])
            operator.canary("toy", "2", 0.5)
            operator.canary("toy", "3", 1)
            operator.rollback("toy")
            operator.rollback("toy")
            operator.drop("toy", "3")
            operator.drop("toy", "other")
            operator.push(files["3"])
        finally:
            over.set()
        for one in asking:
            one.result(20)
    assert counts["1"] > 0
    listed = {e.version: e.requests for e in operator.models()}
    assert {v: listed[v] for v in ("1", "2")} == {v: counts[v] for v in ("1", "2")}
    assert listed["3"] == 0  # it was dropped in between


def test_a_bad_file_changes_nothing(cell: LocalCell, operator: OperatorClient, tmp_path: Path) -> None:
    good = file_of(tmp_path, "1")
    operator.push(good)
    edge = connect(cell)
    edge.upload_and_wait()
    session = edge.register().session
    before = operator.models()
    data = bytearray(good.read_bytes())
    data[len(data) // 2] ^= 1
    bad = tmp_path / "bad.bt"
    bad.write_bytes(data)
    with pytest.raises(BundleError, match="the pushed file") as caught:
        operator.push(bad)
    assert str(tmp_path) not in str(caught.value)
    assert operator.models() == before
    assert len(list((cell.config.state_dir / "models").iterdir())) == 1
    assert versions_of(edge, session, 2) == {"1": 2}


def test_a_push_that_breaks_off_leaves_nothing(
    cell: LocalCell, operator: OperatorClient, tmp_path: Path
) -> None:
    data = file_of(tmp_path, "1").read_bytes()
    folder = cell.config.state_dir / "models"
    header = ModelHeader(hashlib.sha256(data).digest(), len(data))
    goes_on = threading.Event()

    def messages() -> Iterator[bytes]:
        yield ModelChunk(data[:1000], header).encode()
        goes_on.wait(10)

    channel = secure_channel(cell.address, INSECURE_LOOPBACK)
    call = channel.stream_unary(f"/{MODELS}/Push", None, None).future(messages())
    until(lambda: bool(list(folder.glob(".push-*"))))
    call.cancel()
    goes_on.set()
    until(lambda: not list(folder.iterdir()))
    channel.close()
    operator.push(tmp_path / "toy-1.bt")
    assert [e.version for e in operator.models()] == ["1"]


@pytest.mark.parametrize(
    "stream",
    [[], [ModelChunk(b"data").encode()], [b"\xff\xff"]],
    ids=["nothing", "no header", "no message"],
)
def test_malformed_pushes(cell: LocalCell, stream: list[bytes]) -> None:
    with grpc.insecure_channel(cell.address) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.stream_unary(f"/{MODELS}/Push", None, None)(iter(stream), timeout=10)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]


def test_keys_of_the_toy_fit_every_compatible_version() -> None:
    """Positive control: what the tests above rest on."""
    assert len(clear_keys()) == retrained("2").spec.key_bytes
