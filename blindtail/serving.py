"""What every blindtail server has in common: one port, TLS, identities, errors, health.

`GrpcServer` binds, serves and stops a grpc.aio server; `answer` turns errors into
statuses in one place; `identity_of` reads who calls from the TLS session. TLS is
mutual and 1.3 only, in the handshake and again at each call; certificate files are
looked at again at every handshake, so that a renewed one needs no restart.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from blindtail._process import TLS_13_ONLY
from blindtail.errors import AccessDenied, BlindtailError, ConfigError
from blindtail.identity import LOOPBACK, Identity, from_certificate
from blindtail.metrics import expiry
from blindtail.ports import free_port
from blindtail.rpc import is_loopback, to_status
from blindtail.tls import ServerTls, TlsFiles, check_private

_log = logging.getLogger(__name__)
_HEALTH_POLL_S = 0.1
#: New TLS files that were bad are tried again after this long even when they have not changed.
_RETRY_S = 5.0


class _Reloading:
    """The certificate configuration for the next handshake; the last good one when new files are bad."""

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._lock = threading.Lock()  # handshakes come on gRPC's threads
        self._seen = files.stamp()
        self._retry_s = math.inf
        self.initial = _configuration(files.load())
        self._look_at_expiry()

    def __call__(self) -> Any:
        """A configuration to change to, or None to stay."""
        with self._lock:
            stamp, now_s = self._files.stamp(), time.monotonic()
            if stamp == self._seen and now_s < self._retry_s:
                return None
            told, self._seen = stamp == self._seen, stamp
            try:
                fresh = _configuration(self._files.load(wait_s=0.0))
            except Exception as error:
                # Once for each change of the files, not for each handshake.
                if not told:
                    _log.error("the new TLS files are not used, the old ones stay: %s", error)
                self._retry_s = now_s + _RETRY_S
                return None
            self._retry_s = math.inf
            _log.info("TLS files loaded again")
            self._look_at_expiry()
            return fresh

    def _look_at_expiry(self) -> None:
        until_s = expiry(self._files.certificate)()
        if until_s is not None and until_s <= time.time():
            _log.error(
                "the certificate %s has expired: every client will refuse it until it is renewed; new files "
                "are taken without a restart",
                self._files.certificate,
            )


def _configuration(tls: ServerTls) -> Any:
    return grpc.ssl_server_certificate_configuration(
        [(tls.key, tls.certificate)], root_certificates=tls.client_ca
    )


def reloading_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Mutual TLS; clients without a certificate of `client_ca` are refused in the handshake.

    Connections that are open live on with what they began with. Raises `ConfigError`.
    """
    fetch = _Reloading(files)
    return grpc.dynamic_ssl_server_credentials(fetch.initial, fetch, require_client_authentication=True)


def identity_of(context: Any, roles: Mapping[str, str] | None = None) -> Identity:
    """Who calls. Raises `AccessDenied`.

    roles  identity -> role for certificates of another authority, see `blindtail.identity`
    """
    auth = context.auth_context()
    security = auth.get("transport_security_type") or [b"insecure"]
    if security == [b"insecure"]:
        return LOOPBACK  # `GrpcServer` binds plaintext to loopback only
    if security != [b"ssl"]:
        raise AccessDenied("the connection is neither mutual TLS nor plaintext on loopback")
    if auth.get("ssl_tls_version") != [b"TLSv1.3"]:
        raise AccessDenied("only TLS 1.3 is accepted: update the client")
    uris = [_text(value) for value in auth.get("peer_uri") or []]
    names = [_text(value) for value in auth.get("x509_common_name") or []]
    return from_certificate(uris, names, roles or {})


def _text(value: bytes) -> str:
    return bytes(value).decode("utf-8", "backslashreplace")


async def answer(context: Any, call: Callable[[], Awaitable[bytes]]) -> bytes:
    """One place where errors become statuses, for calls with one reply."""
    try:
        return await call()
    except asyncio.CancelledError:
        raise
    except Exception as error:
        await refuse(context, error)
        raise AssertionError("abort raises") from error


async def refuse(context: Any, error: Exception) -> None:
    """Ends a call with the status of `error`; always raises."""
    if not isinstance(error, BlindtailError):
        _log.exception("a call failed")
    code, message, metadata = to_status(error)
    await context.abort(code, message, metadata)


class GrpcServer:
    """One port with some services, health checking and reflection.

    handlers  full service name -> {method: grpc method handler}, raw bytes in and out
    serving   polled: what the health service says, of every service
    """

    def __init__(
        self,
        host: str,
        port: int,
        tls: TlsFiles | None,
        handlers: Mapping[str, Mapping[str, Any]],
        *,
        options: Sequence[tuple[str, int | str]],
        serving: Callable[[], bool] = lambda: True,
    ) -> None:
        self._host, self._port, self._tls = host, port, tls
        self._handlers, self._options, self._serving = handlers, list(options), serving
        self._server: Any = None
        self._health = HealthServicer()
        self._health_task: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """The port. Raises `ConfigError` when it is taken or TLS files are wrong."""
        server = grpc.aio.server(options=self._options)
        server.add_generic_rpc_handlers(
            tuple(
                grpc.method_handlers_generic_handler(name, dict(methods))
                for name, methods in self._handlers.items()
            )
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        health = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
        reflection.enable_server_reflection((*self._handlers, health, reflection.SERVICE_NAME), server)
        await self._set_health(False)
        port = self._bind(server)
        await server.start()
        self._server = server
        self._health_task = asyncio.create_task(self._follow_health())
        _log.info("listening on %s:%d", self._host, port)
        return port

    async def stop(self, grace_s: float) -> None:
        """Says NOT_SERVING, lets calls in flight end for `grace_s`, then closes."""
        if self._health_task is not None:
            self._health_task.cancel()
        await self._set_health(False)
        if self._server is not None:
            await self._server.stop(grace_s)

    def _bind(self, server: Any) -> int:
        # One address only: "localhost" may mean two, with one port each.
        host = "127.0.0.1" if self._host == "localhost" else self._host
        address = f"[{host}]:{self._port}" if ":" in host else f"{host}:{self._port}"
        probe_port(host, self._port)
        try:
            if self._tls is None:
                if not is_loopback(host):
                    raise ConfigError(f"without TLS a server listens on loopback only, and {host} is not")
                port = server.add_insecure_port(address)
            else:
                if not TLS_13_ONLY:
                    _log.warning(
                        "gRPC was imported before blindtail: connections with TLS 1.2 are possible, though "
                        "every call over one is refused; import blindtail first"
                    )
                port = server.add_secure_port(address, reloading_credentials(self._tls))
        except (RuntimeError, ValueError) as error:
            raise ConfigError(_taken(address)) from error
        if port == 0:
            raise ConfigError(_taken(address))
        return int(port)

    async def _follow_health(self) -> None:
        shown: bool | None = None
        while True:
            serving = self._serving()
            if serving is not shown:
                await self._set_health(serving)
                shown = serving
            await asyncio.sleep(_HEALTH_POLL_S)

    async def _set_health(self, serving: bool) -> None:
        states = health_pb2.HealthCheckResponse
        state = states.SERVING if serving else states.NOT_SERVING
        for service in ("", *self._handlers):
            await self._health.set(service, state)


def probe_port(host: str, port: int) -> int:
    """The port to use: `port`, or for 0 one of `free_port`. Raises `ConfigError` when it cannot be bound.

    Binds and lets go, since gRPC would log a stack trace for what is a plain mistake.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bind_to = "127.0.0.1" if host == "localhost" else host
    try:
        if port == 0:
            return free_port(bind_to)
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((bind_to, port))
            return port
    except PermissionError as error:
        raise ConfigError(f"port {port} may not be used by this user: choose one above 1023") from error
    except OSError as error:
        raise ConfigError(_taken(f"{host}:{port}")) from error


def _taken(address: str) -> str:
    return (
        f"cannot listen on {address}: the port is in use (or the address is not this machine's); "
        "stop what uses it, or choose another with --port (0 picks a free one)"
    )


__all__ = [
    "GrpcServer",
    "TlsFiles",
    "answer",
    "check_private",
    "identity_of",
    "probe_port",
    "refuse",
    "reloading_credentials",
]
