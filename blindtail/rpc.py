"""gRPC without surprises: channel and server options, errors, credentials, a typed stub.

Rules that both sides follow:
- reconnect back-off 0.2 to 1 s, keepalive 20 s, no retries inside gRPC but of calls
  that no server has seen (else the edge decides), no HTTP proxies, one TCP
  connection per channel;
- plaintext only to loopback, and only when asked for by name; TLS is 1.3 (see
  `blindtail/_process.py`);
- a `BlindtailError` travels as the status of `errors.STATUS_OF`, its public
  message, and the trailing metadata `blindtail-error: ClassName`. What arrives
  at the edge is always a `TailError`.
"""

from __future__ import annotations

import ipaddress
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, Literal, TypeVar, cast

import grpc
from grpc_health.v1 import health_pb2

from blindtail import errors, wire
from blindtail.errors import (
    STATUS_OF,
    AccessDenied,
    BlindtailError,
    ConfigError,
    ContainerError,
    DeadlineExceeded,
    EvaluationFailed,
    Overloaded,
    ProgramMismatch,
    SessionLost,
    TailError,
    TailUnavailable,
)
from blindtail.tls import ClientTls, ClientTlsFiles, ServerTls, Stamp

INSECURE_LOOPBACK: Final = "insecure-loopback"

#: Trailing metadata: the error's class, and when to try again (whole milliseconds).
ERROR_KEY, RETRY_KEY = "blindtail-error", "blindtail-retry-after-ms"

_Options = list[tuple[str, int | str]]
_Metadata = tuple[tuple[str, str], ...]
_R = TypeVar("_R")

#: A server's connections live this long (gRPC varies it by a tenth), and their calls at most so much longer.
CONNECTION_AGE_S, STREAM_GRACE_S = 3600.0, 900.0
_KEEPALIVE_MS = 20_000
_KEEPALIVE_TIMEOUT_MS = 10_000


#: What `secure_channel` accepts: mutual TLS from bytes, or from files that are read at every dial;
#: plaintext to loopback; or TLS with the system's roots and no certificate of one's own.
Credentials = ClientTls | ClientTlsFiles | Literal["insecure-loopback"] | None


def channel_options(max_reply_bytes: int = wire.REPLY_BYTES) -> _Options:
    """Options of a channel from an edge to a cell."""
    return [
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 1_000),
        # In gRPC's core this one bounds a single connection attempt; it is no back-off.
        ("grpc.min_reconnect_backoff_ms", 5_000),
        ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # Transparent ones alone (no service config): a call that met a connection's orderly end
        # before the server saw it goes out again on the next connection.
        ("grpc.enable_retries", 1),
        ("grpc.enable_http_proxy", 0),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.max_receive_message_length", max_reply_bytes + wire.OVERHEAD_BYTES),
    ]


def server_options(
    max_container_bytes: int,
    connection_age_s: float = CONNECTION_AGE_S,
    stream_grace_s: float = STREAM_GRACE_S,
) -> _Options:
    """Options of a cell's server. `max_container_bytes`: uplink of the biggest program loaded.

    connection_age_s  a connection older than this ends in order, and the client dials again: so a
                      certificate that expires, or an authority that is trusted no more, loses its
                      open connections too
    stream_grace_s    what calls then in flight may take

    Their cap bounds what is read from a connection; `blindtail.wire` then holds every
    method to its own, smaller, cap before it parses.
    """
    biggest = max(max_container_bytes, wire.CHUNK_BYTES, wire.CONTROL_BYTES) + wire.OVERHEAD_BYTES
    return [
        # Without this a second server would share the port in silence.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", biggest),
        ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", _KEEPALIVE_MS // 2),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.max_concurrent_streams", 256),
        ("grpc.max_connection_age_ms", round(connection_age_s * 1000)),
        ("grpc.max_connection_age_grace_ms", round(stream_grace_s * 1000)),
        ("grpc.enable_http_proxy", 0),
    ]


def split_address(address: str) -> tuple[str, int]:
    """Splits "host:port" or "[v6]:port" into host and port. Raises `ConfigError`."""
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"{address!r} is not an address: write host:port, for example 127.0.0.1:50051")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """True for `localhost` and loopback addresses; names are not resolved."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def secure_channel(
    address: str, credentials: Credentials, *, max_reply_bytes: int = wire.REPLY_BYTES
) -> grpc.Channel:
    """A channel to a cell; it connects when first used. Raises `ConfigError`.

    `credentials`: `ClientTls`; `ClientTlsFiles`, read now; `"insecure-loopback"`
    (plaintext, refused for any other host); or None for TLS with the system's roots
    and no client certificate.
    """
    host, _ = split_address(address)
    options = channel_options(max_reply_bytes)
    if credentials == INSECURE_LOOPBACK:
        if not is_loopback(host):
            raise ConfigError(
                f"plaintext is for loopback only, and {host} is another host: give TLS certificates"
            )
        return grpc.insecure_channel(address, options=options)
    if credentials is None:
        return grpc.secure_channel(address, grpc.ssl_channel_credentials(), options=options)
    if isinstance(credentials, ClientTlsFiles):
        credentials = credentials.load()
    if not isinstance(credentials, ClientTls):
        raise ConfigError(
            f'credentials are ClientTlsFiles(...), ClientTls(...), "{INSECURE_LOOPBACK}" or None'
        )
    if credentials.server_name:
        options.append(("grpc.ssl_target_name_override", credentials.server_name))
    tls = grpc.ssl_channel_credentials(credentials.ca, credentials.key, credentials.certificate)
    return grpc.secure_channel(address, tls, options=options)


def stamp(credentials: Credentials) -> Stamp:
    """Changes when certificate files have changed; always () for credentials without files."""
    return credentials.stamp() if isinstance(credentials, ClientTlsFiles) else ()


# --- errors -----------------------------------------------------------------


def to_status(error: BaseException) -> tuple[grpc.StatusCode, str, _Metadata]:
    """Status code, public message and trailing metadata of an error.

    Anything but a `BlindtailError` is a fault of ours: it travels as
    `EvaluationFailed` without its text, which may name internals.
    """
    if not isinstance(error, BlindtailError):
        error = EvaluationFailed("the cloud failed on this call; its log says why")
    for kind in type(error).__mro__:
        name = STATUS_OF.get(cast(Any, kind))
        if name is not None:
            break
    else:
        name = "INTERNAL"
    metadata: list[tuple[str, str]] = [(ERROR_KEY, type(error).__name__)]
    if isinstance(error, Overloaded):
        metadata.append((RETRY_KEY, str(max(0, round(error.retry_after_s * 1000)))))
    return grpc.StatusCode[name], str(error), tuple(metadata)


_BY_STATUS: dict[grpc.StatusCode, type[TailError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: ContainerError,
    grpc.StatusCode.FAILED_PRECONDITION: ProgramMismatch,
    grpc.StatusCode.NOT_FOUND: SessionLost,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.PERMISSION_DENIED: AccessDenied,
    grpc.StatusCode.UNAUTHENTICATED: AccessDenied,
    grpc.StatusCode.UNAVAILABLE: TailUnavailable,
    grpc.StatusCode.CANCELLED: TailUnavailable,
}


def from_rpc_error(error: BaseException) -> TailError:
    """The `TailError` that a failed call stands for; raise it `from` the original.

    The class named by the peer counts only when it is a `TailError`; otherwise
    the status decides. Never raises, whatever a hostile peer put in.
    """
    if isinstance(error, TailError):
        return error
    code, text, metadata = None, "", {}
    try:
        call = cast(Any, error)
        code, text = call.code(), str(call.details() or "")[:1000]
        metadata = {str(k): str(v) for k, v in call.trailing_metadata() or ()}
    except (AttributeError, TypeError, ValueError):
        pass
    named = metadata.get(ERROR_KEY, "")
    kind = getattr(errors, named, None) if named in errors.__all__ else None
    if not (isinstance(kind, type) and issubclass(kind, TailError) and kind is not TailError):
        kind = _BY_STATUS.get(code, EvaluationFailed) if code is not None else TailUnavailable
    if not named and kind is TailUnavailable:
        text = f"the cloud does not answer ({text or type(error).__name__}); the edge goes on alone"
    text = text or "the cloud refused the call without a reason"
    if issubclass(kind, Overloaded):
        try:
            retry_s = min(max(int(metadata.get(RETRY_KEY, "1000")), 0), 600_000) / 1000
        except ValueError:
            retry_s = 1.0
        return kind(text, retry_s)
    return kind(text)


def named_error(error: BaseException) -> BlindtailError:
    """As `from_rpc_error`, for calls between hosts of one operator: any class of ours that the
    server names counts, so that its `ConfigError` arrives as one."""
    if isinstance(error, BlindtailError):
        return error
    try:
        call = cast(Any, error)
        named = dict(call.trailing_metadata() or ()).get(ERROR_KEY, "")
        text = str(call.details() or "")[:1000]
    except (AttributeError, TypeError, ValueError):
        return from_rpc_error(error)
    kind = getattr(errors, str(named), None) if named in errors.__all__ else None
    if isinstance(kind, type) and issubclass(kind, BlindtailError) and not issubclass(kind, TailError):
        return kind(text)
    return from_rpc_error(error)


# --- the edge's stub -----------------------------------------------------------


class TailStub:
    """The five calls of the service on a channel, in records; raises only `TailError`.

    Thread-safe. `timeout_s` bounds each call. Does not own the channel.
    """

    def __init__(self, channel: grpc.Channel) -> None:
        def unary(name: str) -> Any:
            return channel.unary_unary(f"/{wire.SERVICE}/{name}", None, None)

        self._register, self._key_status, self._evaluate = map(unary, ("Register", "KeyStatus", "Evaluate"))
        self._tickets = unary("Tickets")
        self._upload = channel.stream_unary(f"/{wire.SERVICE}/UploadKeys", None, None)
        self._health = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            health_pb2.HealthCheckRequest.SerializeToString,
            health_pb2.HealthCheckResponse.FromString,
        )

    def register(self, call: wire.RegisterCall, timeout_s: float) -> wire.RegisterResult:
        data = _translated(lambda: self._register(call.encode(), timeout=timeout_s))
        return wire.RegisterResult.decode(data)

    def key_status(self, call: wire.KeyStatusCall, timeout_s: float) -> wire.KeyStatus:
        data = _translated(lambda: self._key_status(call.encode(), timeout=timeout_s))
        return wire.KeyStatus.decode(data)

    def upload_keys(
        self,
        header: wire.KeyHeader,
        data: Iterable[bytes],
        timeout_s: float | None = None,
        cancel: threading.Event | None = None,
    ) -> wire.KeyStatus:
        """Streams `data` (pieces of at most 256 KiB, from byte `header.offset` on).

        Pace the upload by sleeping inside the iterable; setting `cancel` ends it
        after the current piece: the cloud keeps what has arrived and answers MISSING.
        """

        def messages() -> Iterator[bytes]:
            first: wire.KeyHeader | None = header
            for piece in data:
                if cancel is not None and cancel.is_set():
                    break
                yield wire.KeyChunk(piece, first).encode()
                first = None
            if first is not None:
                yield wire.KeyChunk(b"", first).encode()

        reply = _translated(lambda: self._upload(messages(), timeout=timeout_s))
        return wire.KeyStatus.decode(reply)

    def evaluate(
        self, call: wire.EvaluateCall, timeout_s: float | None, reply_bytes: int = wire.REPLY_BYTES
    ) -> wire.EvaluateResult:
        """`reply_bytes`: the largest container accepted in the reply."""
        data = _translated(lambda: self._evaluate(call.encode(), timeout=timeout_s))
        return wire.EvaluateResult.decode(data, reply_bytes)

    def evaluate_future(self, call: wire.EvaluateCall, timeout_s: float | None) -> grpc.Future:
        """As `evaluate`, without waiting: a `grpc.Future` of the raw reply. Cancel it to give up;
        turn its exception into a `TailError` with `from_rpc_error`, its result into a record with
        `EvaluateResult.decode`."""
        return self._evaluate.future(call.encode(), timeout=timeout_s)

    def tickets(self, offer: wire.TicketOffer, timeout_s: float) -> wire.TicketsTaken:
        """Announces seeds. A cell that knows nothing of tickets takes none: `TicketsTaken(0, 0)`."""
        try:
            data = self._tickets(offer.encode(), timeout=timeout_s)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                return wire.TicketsTaken(0, 0)
            raise from_rpc_error(error) from error
        except ValueError as error:  # the channel is closed
            raise TailUnavailable("the connection to the cloud is closed") from error
        return wire.TicketsTaken.decode(data)

    def serving(self, timeout_s: float) -> bool:
        """True when the cell says that its evaluators are up. Raises `TailError` when nobody answers."""
        request = health_pb2.HealthCheckRequest(service=wire.SERVICE)
        reply = _translated(lambda: self._health(request, timeout=timeout_s))
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


def _translated(call: Callable[[], _R]) -> _R:
    try:
        return call()
    except grpc.RpcError as error:
        raise from_rpc_error(error) from error
    except ValueError as error:  # the channel is closed
        raise TailUnavailable("the connection to the cloud is closed") from error


def read_pieces(read: Callable[[int], bytes], pause: Callable[[int], None] | None = None) -> Iterator[bytes]:
    """Pieces of `CHUNK_BYTES` from a `read(n)`; `pause(bytes)` is called after each, to pace."""
    while piece := read(wire.CHUNK_BYTES):
        yield piece
        if pause is not None:
            pause(len(piece))


__all__: Sequence[str] = [
    "ERROR_KEY",
    "INSECURE_LOOPBACK",
    "RETRY_KEY",
    "ClientTls",
    "ClientTlsFiles",
    "Credentials",
    "ServerTls",
    "Stamp",
    "TailStub",
    "channel_options",
    "from_rpc_error",
    "is_loopback",
    "named_error",
    "read_pieces",
    "secure_channel",
    "server_options",
    "split_address",
    "stamp",
    "to_status",
]
