"""The gateway on the wire: the tail's service on a grpc.aio server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc

from blindtail.errors import ContainerError
from blindtail.identity import Role
from blindtail.rpc import server_options
from blindtail.serving import GrpcServer, answer, identity_of
from blindtail.wire import SERVICE, EvaluateCall, KeyChunk, KeyStatusCall, RegisterCall, TicketOffer
from blindtail.wire.cell import CELL, MODELS, PEERS
from cloud.drain import cell_handlers
from cloud.gateway import Gateway
from cloud.models_servicer import model_handlers
from cloud.peer_service import peer_handlers
from cloud.streams import moving

#: Above the container of any program of 128 bits of security, so that a model can be pushed whatever
#: was there before. `EvaluateCall.decode` holds messages to what the models here really take.
_LARGEST_BYTES = 4 * 1024 * 1024


class TailServer:
    """Serves one gateway. `await start()` binds and returns the port; `await stop(grace_s)`."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        config = gateway.config
        self._server = GrpcServer(
            config.host,
            config.port,
            config.tls,
            {
                SERVICE: self._handlers(),
                CELL: cell_handlers(gateway),
                PEERS: peer_handlers(gateway),
                MODELS: model_handlers(gateway),
            },
            options=server_options(_LARGEST_BYTES),
            serving=lambda: gateway.serving,
        )

    async def start(self) -> int:
        """Raises `ConfigError` when the port is taken or TLS files are wrong."""
        return await self._server.start()

    async def stop(self, grace_s: float) -> None:
        """Says NOT_SERVING, lets calls in flight end for `grace_s`, then closes."""
        await self._server.stop(grace_s)

    # -- the five methods: raw bytes in, checked records, raw bytes out ----------

    def _handlers(self) -> dict[str, Any]:
        return {
            "Register": grpc.unary_unary_rpc_method_handler(self._register),
            "KeyStatus": grpc.unary_unary_rpc_method_handler(self._key_status),
            "UploadKeys": grpc.stream_unary_rpc_method_handler(self._upload_keys),
            "Evaluate": grpc.unary_unary_rpc_method_handler(self._evaluate),
            "Tickets": grpc.unary_unary_rpc_method_handler(self._tickets),
        }

    def _identity(self, context: Any) -> str:
        identity = identity_of(context, self._gateway.config.roles)
        identity.require(Role.EDGE)
        return str(identity)

    async def _register(self, data: bytes, context: Any) -> bytes:
        async def call() -> bytes:
            return self._gateway.register(self._identity(context), RegisterCall.decode(data)).encode()

        return await answer(context, call)

    async def _key_status(self, data: bytes, context: Any) -> bytes:
        async def call() -> bytes:
            return self._gateway.key_status(self._identity(context), KeyStatusCall.decode(data)).encode()

        return await answer(context, call)

    async def _upload_keys(self, messages: AsyncIterator[bytes], context: Any) -> bytes:
        async def call() -> bytes:
            identity = self._identity(context)
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

        return await answer(context, call)

    async def _evaluate(self, data: bytes, context: Any) -> bytes:
        async def call() -> bytes:
            limit = self._gateway.registry.largest_container_bytes
            request = EvaluateCall.decode(data, limit)
            remaining_s = context.time_remaining()
            return (await self._gateway.evaluate(self._identity(context), request, remaining_s)).encode()

        return await answer(context, call)

    async def _tickets(self, data: bytes, context: Any) -> bytes:
        async def call() -> bytes:
            return self._gateway.tickets(self._identity(context), TicketOffer.decode(data)).encode()

        return await answer(context, call)


async def _chunks(messages: AsyncIterator[bytes]) -> AsyncIterator[KeyChunk]:
    """A stream that stalls is broken off; what has arrived stays, and the upload can go on from there."""
    async for data in moving(messages):
        yield KeyChunk.decode(data)


__all__ = ["TailServer"]
