"""Errors over gRPC, addresses and credentials."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from blindtail import errors, rpc
from blindtail.errors import (
    STATUS_OF,
    ConfigError,
    EvaluationFailed,
    Overloaded,
    SessionLost,
    TailError,
    TailUnavailable,
)
from blindtail.rpc import from_rpc_error, secure_channel, split_address, to_status


class Arrived(grpc.RpcError):
    """An error as the edge's gRPC shows it."""

    def __init__(self, code: Any, details: Any, metadata: Any = ()) -> None:
        super().__init__()
        self._parts = code, details, metadata

    def code(self) -> Any:
        return self._parts[0]

    def details(self) -> Any:
        return self._parts[1]

    def trailing_metadata(self) -> Any:
        return self._parts[2]


TAIL_ERRORS = [e for e in STATUS_OF if issubclass(e, TailError)]


@pytest.mark.parametrize("kind", TAIL_ERRORS, ids=lambda e: e.__name__)
def test_every_tail_error_arrives_as_itself(kind: type[TailError]) -> None:
    code, text, metadata = to_status(kind("what to do"))
    back = from_rpc_error(Arrived(code, text, metadata))
    assert type(back) is kind
    assert str(back) == "what to do"


@pytest.mark.parametrize("kind", TAIL_ERRORS, ids=lambda e: e.__name__)
def test_the_status_alone_tells_the_class_or_a_neighbour(kind: type[TailError]) -> None:
    code, text, _ = to_status(kind("x"))
    back = from_rpc_error(Arrived(code, text))
    assert STATUS_OF[type(back)] == STATUS_OF[kind]


def test_retry_delay_travels_and_is_bounded() -> None:
    code, text, metadata = to_status(Overloaded("full", 2.5))
    back = from_rpc_error(Arrived(code, text, metadata))
    assert isinstance(back, Overloaded)
    assert back.retry_after_s == 2.5
    for value in ("-5", "9" * 30, "soon", ""):
        hostile = Arrived(code, text, ((rpc.ERROR_KEY, "Overloaded"), (rpc.RETRY_KEY, value)))
        back = from_rpc_error(hostile)
        assert isinstance(back, Overloaded)
        assert 0 <= back.retry_after_s <= 600


@pytest.mark.parametrize("name", ["InputError", "ConfigError", "TailError", "STATUS_OF", "__import__", ""])
def test_a_peer_cannot_choose_a_class_outside_the_tail_errors(name: str) -> None:
    back = from_rpc_error(Arrived(grpc.StatusCode.INTERNAL, "x", ((rpc.ERROR_KEY, name),)))
    assert type(back) is EvaluationFailed


def test_what_is_no_call_at_all_is_unavailability() -> None:
    assert type(from_rpc_error(grpc.RpcError())) is TailUnavailable
    assert type(from_rpc_error(Arrived(grpc.StatusCode.UNAVAILABLE, None, None))) is TailUnavailable


def test_a_fault_of_ours_travels_without_its_text() -> None:
    code, text, metadata = to_status(RuntimeError("/secret/path"))
    assert code is grpc.StatusCode.INTERNAL
    assert "/secret" not in text
    assert (rpc.ERROR_KEY, "EvaluationFailed") in metadata


def test_a_subclass_travels_with_its_parents_status() -> None:
    class Special(SessionLost):
        pass

    code, _, _ = to_status(Special("x"))
    assert code is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    ("address", "expected"),
    [("127.0.0.1:1", ("127.0.0.1", 1)), ("[::1]:50051", ("::1", 50051)), ("a.b:65535", ("a.b", 65535))],
)
def test_addresses(address: str, expected: tuple[str, int]) -> None:
    assert split_address(address) == expected


@pytest.mark.parametrize("address", ["", "host", "host:", ":5", "host:0", "host:65536", "host:x"])
def test_wrong_addresses_are_named(address: str) -> None:
    with pytest.raises(ConfigError, match="host:port"):
        split_address(address)


def test_plaintext_is_for_loopback_and_only_when_asked() -> None:
    for address in ("127.0.0.1:1", "[::1]:1", "localhost:1"):
        secure_channel(address, rpc.INSECURE_LOOPBACK).close()
    for address in ("192.0.2.1:1", "example.org:1", "0.0.0.0:1"):
        with pytest.raises(ConfigError, match="loopback"):
            secure_channel(address, rpc.INSECURE_LOOPBACK)
    with pytest.raises(ConfigError, match="credentials"):
        secure_channel("127.0.0.1:1", "plain")  # type: ignore[arg-type]


def test_every_exported_error_has_a_status() -> None:
    kinds = [getattr(errors, n) for n in errors.__all__ if n != "STATUS_OF"]
    concrete = [k for k in kinds if not k.__subclasses__() and k is not errors.DataError]
    for kind in concrete:
        assert to_status(kind("x"))[0].name == STATUS_OF[kind]


def test_a_closed_channel_and_a_silent_address_are_unavailability() -> None:
    channel = secure_channel("127.0.0.1:9", rpc.INSECURE_LOOPBACK)
    stub = rpc.TailStub(channel)
    with pytest.raises((TailUnavailable, errors.DeadlineExceeded)):
        stub.serving(0.5)
    channel.close()
    with pytest.raises(TailUnavailable):
        stub.serving(0.5)
