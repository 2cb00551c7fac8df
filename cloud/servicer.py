"""The gateway on the wire: a grpc.aio server with health checking and reflection."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from blindtail.errors import AccessDenied, BlindtailError, ConfigError, ContainerError
from blindtail.rpc import server_credentials, server_options, to_status
from blindtail.wire import SERVICE, EvaluateCall, KeyChunk, KeyStatusCall, RegisterCall
from cloud.gateway import Gateway

_log = logging.getLogger(__name__)
_HEALTH_POLL_S = 0.1
#: An upload that moves no byte for this long is broken off; it can be resumed.
UPLOAD_IDLE_S = 30.0


class TailServer:
    """Serves one gateway. `await start()` binds and returns the port; `await stop(grace_s)`."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._server: Any = None
        self._health = HealthServicer()
        self._health_task: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Raises `ConfigError` when the port is taken or TLS files are wrong."""
        config = self._gateway.config
        server = grpc.aio.server(options=server_options(self._gateway.registry.largest_container_bytes))
        server.add_generic_rpc_handlers((self._handlers(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection(
            (SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME),
            server,
        )
        await self._set_health(False)
        port = self._bind(server)
        await server.start()
        self._server = server
        self._health_task = asyncio.create_task(self._follow_health())
        _log.info("listening on %s:%d", config.host, port)
        return port

    async def stop(self, grace_s: float) -> None:
        """Says NOT_SERVING, lets calls in flight end for `grace_s`, then closes."""
        if self._health_task is not None:
            self._health_task.cancel()
        await self._set_health(False)
        if self._server is not None:
            await self._server.stop(grace_s)

    def _bind(self, server: Any) -> int:
        config = self._gateway.config
        # One address only: "localhost" may mean two, with one port each.
        host = "127.0.0.1" if config.host == "localhost" else config.host
        address = f"[{host}]:{config.port}" if ":" in host else f"{host}:{config.port}"
        _probe(host, config.port)
        try:
            if config.tls is None:
                port = server.add_insecure_port(address)
            else:
                port = server.add_secure_port(address, server_credentials(config.tls.load()))
        except RuntimeError as error:
            raise ConfigError(_taken(address)) from error
        if port == 0:
            raise ConfigError(_taken(address))
        return int(port)

    async def _follow_health(self) -> None:
        shown: bool | None = None
        while True:
            serving = self._gateway.serving
            if serving is not shown:
                await self._set_health(serving)
                shown = serving
            await asyncio.sleep(_HEALTH_POLL_S)

    async def _set_health(self, serving: bool) -> None:
        states = health_pb2.HealthCheckResponse
        state = states.SERVING if serving else states.NOT_SERVING
        for service in ("", SERVICE):
            await self._health.set(service, state)

    # -- the four methods: raw bytes in, checked records, raw bytes out ----------

    def _handlers(self) -> Any:
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Register": grpc.unary_unary_rpc_method_handler(self._register),
                "KeyStatus": grpc.unary_unary_rpc_method_handler(self._key_status),
                "UploadKeys": grpc.stream_unary_rpc_method_handler(self._upload_keys),
                "Evaluate": grpc.unary_unary_rpc_method_handler(self._evaluate),
            },
        )

    async def _register(self, data: bytes, context: Any) -> bytes:
        async def call() -> bytes:
            return self._gateway.register(_identity(context), RegisterCall.decode(data)).encode()

        return await _answer(context, call)

    async def _key_status(self, data: bytes, context: Any) -> bytes:
        async def call() -> bytes:
            return self._gateway.key_status(_identity(context), KeyStatusCall.decode(data)).encode()

        return await _answer(context, call)

    async def _upload_keys(self, messages: AsyncIterator[bytes], context: Any) -> bytes:
        async def call() -> bytes:
            identity = _identity(context)
            chunks = _chunks(messages)
            first = await anext(chunks, None)
            if first is None or first.header is None:
                raise ContainerError("the first message of an upload must carry its header")

            async def pieces() -> AsyncIterator[bytes]:
                yield first.data
                async for chunk in chunks:
                    if chunk.header is not None:
                        raise ContainerError("only the first message of an upload carries a header")
                    yield chunk.data

            return (await self._gateway.upload_keys(identity, first.header, pieces())).encode()

        return await _answer(context, call)

    async def _evaluate(self, data: bytes, context: Any) -> bytes:
        async def call() -> bytes:
            limit = self._gateway.registry.largest_container_bytes
            request = EvaluateCall.decode(data, limit)
            remaining_s = context.time_remaining()
            return (await self._gateway.evaluate(_identity(context), request, remaining_s)).encode()

        return await _answer(context, call)


async def _chunks(messages: AsyncIterator[bytes]) -> AsyncIterator[KeyChunk]:
    iterator = aiter(messages)
    while True:
        try:
            data = await asyncio.wait_for(anext(iterator), UPLOAD_IDLE_S)
        except StopAsyncIteration:
            return
        except TimeoutError as error:
            raise ContainerError("the upload stalled: ask for the key status and go on from there") from error
        yield KeyChunk.decode(data)


async def _answer(context: Any, call: Callable[[], Awaitable[bytes]]) -> bytes:
    """One place where errors become statuses."""
    try:
        return await call()
    except asyncio.CancelledError:
        raise
    except Exception as error:
        if not isinstance(error, BlindtailError):
            _log.exception("a call failed")
        code, message, metadata = to_status(error)
        await context.abort(code, message, metadata)
        raise AssertionError("abort raises") from error


def _identity(context: Any) -> str:
    """The common name in the peer's certificate; without TLS, which means loopback, "loopback"."""
    auth = context.auth_context()
    if "transport_security_type" not in auth or auth["transport_security_type"] != [b"ssl"]:
        return "loopback"
    names = auth.get("x509_common_name") or []
    if len(names) != 1 or not names[0]:
        raise AccessDenied("the client's certificate must have exactly one common name")
    return "cn:" + bytes(names[0]).decode("utf-8", "backslashreplace")


def _probe(host: str, port: int) -> None:
    """Binds and lets go: gRPC would log a stack trace for what is a plain mistake."""
    if port == 0:
        return
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except PermissionError as error:
        raise ConfigError(f"port {port} may not be used by this user: choose one above 1023") from error
    except OSError as error:
        raise ConfigError(_taken(f"{host}:{port}")) from error


def _taken(address: str) -> str:
    return (
        f"cannot listen on {address}: the port is in use (or the address is not this machine's); "
        "stop what uses it, or choose another with --port (0 picks a free one)"
    )


__all__ = ["UPLOAD_IDLE_S", "TailServer"]
