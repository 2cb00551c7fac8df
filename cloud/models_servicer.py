"""The service `Models`: what operators ask of a cell's models. Nobody else may."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc

from blindtail.errors import ContainerError
from blindtail.identity import Role
from blindtail.serving import answer, identity_of
from blindtail.wire.cell import (
    CanaryCall,
    DropCall,
    ModelChunk,
    ModelEntry,
    decode_model_query,
    decode_rollback,
    encode_models,
)
from cloud.streams import moving

if TYPE_CHECKING:
    from cloud.gateway import Gateway


def model_handlers(gateway: Gateway) -> dict[str, Any]:
    """Raw bytes in, checked records, raw bytes out."""
    models = gateway.models

    def require(context: Any) -> None:
        identity_of(context, gateway.config.roles).require(Role.OPERATOR)

    def unary(work: Callable[[bytes], Awaitable[list[ModelEntry]]]) -> Any:
        async def handle(data: bytes, context: Any) -> bytes:
            async def call() -> bytes:
                require(context)
                return encode_models(await work(data))

            return await answer(context, call)

        return grpc.unary_unary_rpc_method_handler(handle)

    async def push(messages: AsyncIterator[bytes], context: Any) -> bytes:
        async def call() -> bytes:
            require(context)
            chunks = moving(messages)
            first = ModelChunk.decode(await anext(chunks, b""))
            if first.header is None:
                raise ContainerError("the first message of a push must carry its header")
            return encode_models(await models.push(first.header, _pieces(first, chunks)))

        return await answer(context, call)

    async def listed(data: bytes) -> list[ModelEntry]:
        return models.listed(decode_model_query(data))

    return {
        "Push": grpc.stream_unary_rpc_method_handler(push),
        "List": unary(listed),
        "Canary": unary(lambda data: models.canary(CanaryCall.decode(data))),
        "Rollback": unary(lambda data: models.rollback(decode_rollback(data))),
        "Drop": unary(lambda data: models.drop(DropCall.decode(data))),
    }


async def _pieces(first: ModelChunk, messages: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first.data
    async for data in messages:
        chunk = ModelChunk.decode(data)
        if chunk.header is not None:
            raise ContainerError("only the first message of a push carries a header")
        yield chunk.data


__all__ = ["model_handlers"]
