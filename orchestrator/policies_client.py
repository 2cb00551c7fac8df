"""What operators ask an orchestrator: policies in force, a new one, history, who is attached."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc

from blindtail.errors import BlindtailError, TailUnavailable
from blindtail.rpc import ERROR_KEY, Credentials, named_error, secure_channel
from blindtail.wire.policies import (
    LIST_BYTES,
    POLICIES,
    FleetPeer,
    PolicyChange,
    PolicyEntry,
    PolicyQuery,
    UsageCount,
    UsageQuery,
    decode_entries,
    decode_fleet,
    decode_usage,
)

CALL_S = 10.0


class PoliciesClient:
    """A context manager; thread-safe. Every call raises a `BlindtailError`, the orchestrator's own
    `ConfigError` and `StateError` included.

    credentials  as for every client (`blindtail.rpc.Credentials`); the certificate's role is operator
    """

    def __init__(self, address: str, credentials: Credentials, *, timeout_s: float = CALL_S) -> None:
        self._address, self._timeout_s = address, timeout_s
        self._channel = secure_channel(address, credentials, max_reply_bytes=LIST_BYTES)

    def get(self, model: str = "") -> list[PolicyEntry]:
        """What is in force for `model`, its own or else the default one; "" = all there are."""
        return decode_entries(self._call("Get", PolicyQuery(model).encode()))

    def set(self, change: PolicyChange) -> PolicyEntry:
        """The new version. Raises `ConfigError` when the orchestrator does not accept it."""
        return PolicyEntry.decode(self._call("Set", change.encode()))

    def history(self, model: str = "", limit: int = 0) -> list[PolicyEntry]:
        """Newest first; `limit` 0 = the orchestrator's own."""
        return decode_entries(self._call("History", PolicyQuery(model, limit).encode()))

    def fleet(self) -> list[FleetPeer]:
        return decode_fleet(self._call("Fleet", b""))

    def usage(self, model: str = "", last_s: float = 86_400.0) -> list[UsageCount]:
        """What edges reported in the last `last_s` seconds; "" = all models."""
        return decode_usage(self._call("Usage", UsageQuery(model, last_s).encode()))

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> PoliciesClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, method: str, request: bytes) -> bytes:
        call: Callable[..., Any] = self._channel.unary_unary(f"/{POLICIES}/{method}", None, None)
        try:
            return bytes(call(request, timeout=self._timeout_s))
        except grpc.RpcError as error:
            raise self._understood(error) from error

    def _understood(self, error: grpc.RpcError) -> BlindtailError:
        said = ERROR_KEY in dict(error.trailing_metadata() or ())
        silent = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        if not said and error.code() in silent:
            return TailUnavailable(f"no orchestrator answers at {self._address} ({error.details()})")
        if not said and error.code() is grpc.StatusCode.UNIMPLEMENTED:
            return TailUnavailable(f"what listens at {self._address} is no orchestrator: check the address")
        return named_error(error)


__all__ = ["CALL_S", "PoliciesClient"]
