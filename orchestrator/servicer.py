"""The orchestrator on the wire: streams of edges and cells, and operators' calls, on one port."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from blindtail.errors import BlindtailError, ContainerError
from blindtail.identity import Role
from blindtail.rpc import server_options
from blindtail.serving import GrpcServer, answer, identity_of, refuse
from blindtail.wire.control import CONTROL, UP_BYTES, Hello, Welcome, decode_up, encode_down
from blindtail.wire.policies import (
    LIST_BYTES,
    POLICIES,
    PolicyChange,
    PolicyQuery,
    UsageQuery,
    encode_entries,
    encode_fleet,
    encode_usage,
)
from orchestrator.controller import Controller
from orchestrator.peers import Peer

#: A stream whose first message has not come after this long is closed.
HELLO_S = 10.0


class ControlServer:
    """Serves one controller. `await start()` binds and returns the port; `await stop(grace_s)`."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        config = controller.config
        self._roles = config.roles
        self._server = GrpcServer(
            config.host,
            config.port,
            config.tls,
            {CONTROL: self._control(), POLICIES: self._policies()},
            options=server_options(UP_BYTES),
        )

    async def start(self) -> int:
        """Raises `ConfigError` when the port is taken or TLS files are wrong."""
        return await self._server.start()

    async def stop(self, grace_s: float) -> None:
        self._controller.end_streams()
        await self._server.stop(grace_s)

    # -- edges and cells ---------------------------------------------------------

    def _control(self) -> dict[str, Any]:
        return {"Attach": grpc.stream_stream_rpc_method_handler(self._attach)}

    async def _attach(self, _: Any, context: Any) -> None:
        try:
            await self._stream(context)
        except asyncio.CancelledError:
            self._controller.observer.stream_error("broken")
            raise
        except grpc.aio.BaseError:  # gRPC's own: nobody is there to be told
            self._controller.observer.stream_error("broken")
        except Exception as error:
            self._controller.observer.stream_error(type(error).__name__)
            await refuse(context, error)

    async def _stream(self, context: Any) -> None:
        identity = identity_of(context, self._roles)
        identity.require(Role.EDGE, Role.CELL)
        try:
            first = await asyncio.wait_for(_read(context), HELLO_S)
        except TimeoutError as error:
            raise ContainerError("no Hello came") from error
        if first is None:
            return
        hello = decode_up(first)
        if not isinstance(hello, Hello):
            raise ContainerError("the first message of a stream must be a Hello")
        peer = self._controller.attach(identity, hello)
        try:
            await context.write(encode_down(Welcome(self._controller.config.report_interval_s)))
            await _first_to_end(self._up(peer, context), self._down(peer, context))
        finally:
            self._controller.detach(peer)

    async def _up(self, peer: Peer, context: Any) -> None:
        while (data := await _read(context)) is not None:
            self._controller.receive(peer, decode_up(data))

    async def _down(self, peer: Peer, context: Any) -> None:
        while True:
            await context.write(encode_down(await peer.next_update()))

    # -- operators ---------------------------------------------------------------

    def _policies(self) -> dict[str, Any]:
        methods = {
            "Get": self._get,
            "Set": self._set,
            "History": self._history,
            "Fleet": self._fleet,
            "Usage": self._usage,
        }
        return {name: grpc.unary_unary_rpc_method_handler(method) for name, method in methods.items()}

    def _operator(self, context: Any) -> Any:
        identity = identity_of(context, self._roles)
        identity.require(Role.OPERATOR)
        return identity

    async def _get(self, data: bytes, context: Any) -> bytes:
        async def call() -> bytes:
            self._operator(context)
            return encode_entries(await self._controller.get(PolicyQuery.decode(data).model))

        return await answer(context, call)

    async def _set(self, data: bytes, context: Any) -> bytes:
        async def call() -> bytes:
            author = self._operator(context)
            return (await self._controller.set(author, PolicyChange.decode(data))).encode()

        return await answer(context, call)

    async def _history(self, data: bytes, context: Any) -> bytes:
        async def call() -> bytes:
            self._operator(context)
            query = PolicyQuery.decode(data)
            return encode_entries(await self._controller.history(query.model, query.limit))

        return await answer(context, call)

    async def _fleet(self, data: bytes, context: Any) -> bytes:
        async def call() -> bytes:
            self._operator(context)
            if data:
                raise ContainerError("a query of the fleet carries nothing")
            whole = encode_fleet(self._controller.fleet())
            if len(whole) > LIST_BYTES:
                whole = encode_fleet(self._controller.fleet(with_reports=False))
            return whole

        return await answer(context, call)

    async def _usage(self, data: bytes, context: Any) -> bytes:
        async def call() -> bytes:
            self._operator(context)
            query = UsageQuery.decode(data)
            return encode_usage(await self._controller.usage(query.model, query.last_s))

        return await answer(context, call)


async def _read(context: Any) -> bytes | None:
    """The peer's next message; None when it has ended its side."""
    data = await context.read()
    return None if data is grpc.aio.EOF else bytes(data)


async def _first_to_end(*streams: Any) -> None:
    """Runs both directions until one ends or fails, then ends the other."""
    tasks = [asyncio.create_task(stream) for stream in streams]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    errors = [r for r in results if isinstance(r, Exception)]
    # What one of ours says explains more than the broken pipe that may come with it.
    errors.sort(key=lambda error: not isinstance(error, BlindtailError))
    if errors:
        raise errors[0]


__all__ = ["HELLO_S", "ControlServer"]
