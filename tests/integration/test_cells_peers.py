"""Evaluation keys between two cells over gRPC: fetched, given, refused, and to nobody else."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from blindtail.errors import AccessDenied, KeysMissing
from blindtail.rpc import INSECURE_LOOPBACK, ClientTls, Credentials, TailStub, named_error, secure_channel
from blindtail.tls import TlsFiles
from blindtail.wire import KeyChunk, KeyHeader, KeyState, KeyStatus
from blindtail.wire.cell import CELL, PEERS, PeerKeyChunk, PeerKeys, encode_drain
from cloud.local import LocalCell
from tests.cell_pair import cell_pair, transfers, uploads
from tests.certificates import certificates
from tests.clock import until
from tests.cloud_cases import CHUNK, Client, activation, bundle, expected

pytestmark = pytest.mark.timeout(60)


def client_of(cell: LocalCell, credentials: Credentials = INSECURE_LOOPBACK, **settings: Any) -> Client:
    return Client(TailStub(secure_channel(cell.address, credentials)), **settings)


def answers(client: Client) -> bool:
    reply = client.evaluate(client.register().session)
    return bool(np.allclose(client.logits(reply), expected(activation(0)), atol=1e-9))


def state_of(client: Client) -> KeyState:
    """What an edge learns from registering: it waits while the cell asks others."""
    client.register()
    until(lambda: client.status() is not KeyState.CHECKING)
    return client.register().keys


def fetch(cell: LocalCell, keys: PeerKeys, credentials: Credentials = INSECURE_LOOPBACK) -> bytes:
    """As another cell. Raises `BlindtailError`."""
    with secure_channel(cell.address, credentials) as channel:
        try:
            messages = list(
                channel.unary_stream(f"/{PEERS}/FetchKeys", None, None)(keys.encode(), timeout=10)
            )
        except grpc.RpcError as error:
            raise named_error(error) from error
    return b"".join(KeyChunk.decode(m).data for m in messages)


def give(
    cell: LocalCell,
    keys: PeerKeys,
    data: bytes,
    credentials: Credentials = INSECURE_LOOPBACK,
) -> KeyStatus:
    header = KeyHeader(keys.program_id, keys.key_sha256, len(data), 0)
    pieces = [KeyChunk(data[i : i + CHUNK]) for i in range(0, len(data), CHUNK)]
    messages = [PeerKeyChunk(KeyChunk(b"", header), keys.identity), *map(PeerKeyChunk, pieces)]
    with secure_channel(cell.address, credentials) as channel:
        method = channel.stream_unary(f"/{PEERS}/GiveKeys", None, None)
        try:
            return KeyStatus.decode(method((m.encode() for m in messages), timeout=10))
        except grpc.RpcError as error:
            raise named_error(error) from error


def test_uploaded_keys_are_given_to_the_peer_once_and_never_back(tmp_path: Path) -> None:
    with cell_pair(tmp_path, bundle()) as (a, b):
        assert client_of(a).upload_and_wait() is KeyState.READY
        until(lambda: transfers(a, "given") == 1)
        at_b = client_of(b)
        until(lambda: at_b.status() is KeyState.READY)
        assert at_b.register().keys is KeyState.READY
        assert answers(at_b)
        assert (uploads(a), uploads(b)) == (1, 0)
        for client in (client_of(a), at_b):  # registering again starts nothing new
            client.register()
        time.sleep(0.2)
        assert transfers(a, "given") == 1
        assert transfers(b, "fetched") == transfers(a, "fetched") == 0


def test_keys_that_a_peer_holds_are_fetched_while_the_edge_waits(tmp_path: Path) -> None:
    with cell_pair(tmp_path, bundle(), replicas=0) as (a, b):
        assert client_of(a).upload_and_wait() is KeyState.READY
        at_b = client_of(b)
        assert at_b.status() is KeyState.MISSING  # asking for the status starts nothing
        assert at_b.register().keys is KeyState.CHECKING
        assert state_of(at_b) is KeyState.READY
        assert answers(at_b)
        assert (uploads(b), transfers(b, "fetched"), transfers(b, "given")) == (0, 1, 0)


def test_keys_that_nobody_holds_are_missing_at_once(tmp_path: Path) -> None:
    with cell_pair(tmp_path, bundle()) as (_, b):
        client = client_of(b)
        assert state_of(client) is KeyState.MISSING
        assert client.register().keys is KeyState.MISSING  # the peers are not asked again just now
        assert transfers(b, "fetched", "KeysMissing") == 1
        assert client.upload_and_wait() is KeyState.READY
        assert answers(client)


def test_a_peer_that_is_down_holds_nothing_up_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloud.peers.RETRY_S", (0.1, 0.1, 0.2, 0.4, 0.8, 1.6))
    with cell_pair(tmp_path, bundle(), start_b=False) as (a, b):
        client = client_of(a)
        assert state_of(client) is KeyState.MISSING
        assert client.upload_and_wait() is KeyState.READY
        assert answers(client)
        until(lambda: transfers(a, "given", "TailUnavailable") >= 1)
        with b:
            at_b = client_of(b)
            until(lambda: at_b.status() is KeyState.READY)
            assert uploads(b) == 0


def test_a_peer_that_does_not_serve_the_model_refuses_and_is_left_alone(tmp_path: Path) -> None:
    models = {"a": bundle(), "b": bundle(1, model="other")}
    with cell_pair(tmp_path, models) as (a, b):
        assert client_of(a).upload_and_wait() is KeyState.READY
        until(lambda: transfers(a, "given", "ProgramMismatch") == 1)
        time.sleep(0.1)
        assert list((tmp_path / "b" / "clear" / "partial").iterdir()) == []
        assert b.describe()["keys"] == {"fetched": 0, "given": 0}


def test_a_cell_is_no_peer_of_its_own(tmp_path: Path) -> None:
    with cell_pair(tmp_path, bundle()) as (a, _):
        own = a.address
    with cell_pair(tmp_path / "again", bundle()) as (a, b):
        a.stop()
        a.config = replace(a.config, peers=(a.address, own, b.address), advertise=own)
        with a:
            assert client_of(a).upload_and_wait() is KeyState.READY
            until(lambda: transfers(a, "given") == 1)
            assert client_of(b).status() is not KeyState.MISSING


def test_an_upload_that_broke_off_is_completed_from_the_peer(tmp_path: Path) -> None:
    with cell_pair(tmp_path, bundle(), replicas=0) as (a, b):
        at_b = client_of(b)
        at_b.upload(until=CHUNK + 1)
        assert client_of(a).upload_and_wait() is KeyState.READY
        assert state_of(at_b) is KeyState.READY
        assert answers(at_b)


def test_bad_keys_from_a_peer_are_refused_and_not_held_against_the_edge(tmp_path: Path) -> None:
    with cell_pair(tmp_path, bundle(), replicas=0) as (_, b):
        client = client_of(b)
        keys = PeerKeys("loopback", client.spec.program_id, client.sha256)
        bad = client.keys[:-1] + bytes([client.keys[-1] ^ 1])
        assert give(b, keys, bad).state is KeyState.CHECKING
        until(lambda: client.status() is not KeyState.CHECKING)
        assert client.status() is KeyState.MISSING
        # Positive control: the same call with the right bytes.
        assert give(b, keys, client.keys).state is KeyState.CHECKING
        until(lambda: client.status() is KeyState.READY)
        assert fetch(b, keys) == client.keys


def test_keys_and_drain_are_for_their_roles_alone(tmp_path: Path) -> None:
    made = certificates(tmp_path / "tls", "cell", "camera", "wearable", "alice")
    files = TlsFiles(made["cell.pem"], made["cell.key"], made["ca.pem"])
    roles = {"cn:cell": "cell", "cn:alice": "operator"}

    def tls(name: str) -> ClientTls:
        ca, certificate, key = (made[n].read_bytes() for n in ("ca.pem", f"{name}.pem", f"{name}.key"))
        return ClientTls(ca, certificate, key)

    def drain(name: str) -> None:
        with secure_channel(b.address, tls(name)) as channel:
            try:
                channel.unary_unary(f"/{CELL}/Drain", None, None)(encode_drain(0.01), timeout=10)
            except grpc.RpcError as error:
                raise named_error(error) from error

    with cell_pair(tmp_path, bundle(), tls=files, roles=roles) as (a, b):
        camera = client_of(a, tls("camera"))
        assert camera.upload_and_wait() is KeyState.READY
        until(lambda: transfers(a, "given") == 1)  # over mutual TLS, with the cell's own certificate
        at_b = client_of(b, tls("camera"))
        until(lambda: at_b.status() is KeyState.READY)
        keys = PeerKeys("cn:camera", camera.spec.program_id, camera.sha256)
        # Another edge that knows the hash gets neither the keys nor a word on them.
        wearable = client_of(b, tls("wearable"))
        assert state_of(wearable) is KeyState.MISSING
        for name in ("camera", "wearable", "alice"):
            with pytest.raises(AccessDenied, match="role cell"):
                fetch(b, keys, tls(name))
            with pytest.raises(AccessDenied, match="role cell"):
                give(b, PeerKeys("cn:wearable", keys.program_id, keys.key_sha256), camera.keys, tls(name))
        assert fetch(b, keys, tls("cell")) == camera.keys
        with pytest.raises(KeysMissing):
            fetch(b, PeerKeys("cn:wearable", keys.program_id, keys.key_sha256), tls("cell"))
        for name in ("camera", "cell"):
            with pytest.raises(AccessDenied, match="role operator"):
                drain(name)
        assert not b.describe()["draining"]
        drain("alice")
        assert b.describe()["draining"]
