"""What a cell does for other cells of its operator: gives them evaluation keys, and takes theirs.

Keys are public material, but whose they are and that they exist is nobody's
business: both calls are for the role `cell` alone. Without TLS, which is accepted
on loopback only, everybody on this machine has every role, and may fetch any keys
of any identity whose hash it knows.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import grpc

from blindtail.errors import ContainerError
from blindtail.identity import Role
from blindtail.serving import answer, identity_of, refuse
from blindtail.wire import KeyChunk, KeyHeader
from blindtail.wire.cell import PeerKeyChunk, PeerKeys
from cloud.streams import from_byte, moving, read_file

if TYPE_CHECKING:
    from cloud.gateway import Gateway


def peer_handlers(gateway: Gateway) -> dict[str, Any]:
    """The service `Peers`."""

    def require(context: Any) -> None:
        identity_of(context, gateway.config.roles).require(Role.CELL)

    async def fetch(data: bytes, context: Any) -> AsyncIterator[bytes]:
        try:
            require(context)
            async for message in _fetch(gateway, PeerKeys.decode(data)):
                yield message
        except Exception as error:
            await refuse(context, error)

    async def give(messages: AsyncIterator[bytes], context: Any) -> bytes:
        async def call() -> bytes:
            require(context)
            return await _give(gateway, moving(messages))

        return await answer(context, call)

    return {
        "FetchKeys": grpc.unary_stream_rpc_method_handler(fetch),
        "GiveKeys": grpc.stream_unary_rpc_method_handler(give),
    }


async def _fetch(gateway: Gateway, keys: PeerKeys) -> AsyncIterator[bytes]:
    """The container, its header first. Raises `KeysMissing`."""
    path = gateway.keys.container(keys.identity, keys.program_id, keys.key_sha256)
    header: KeyHeader | None = KeyHeader(keys.program_id, keys.key_sha256, path.stat().st_size, 0)
    async for piece in read_file(path):
        yield KeyChunk(piece, header).encode()
        header = None


async def _give(gateway: Gateway, messages: AsyncIterator[bytes]) -> bytes:
    """As an upload of the identity's own, from its start; the header alone asks where the keys stand.

    Raises `ProgramMismatch`, `ContainerError`.
    """
    first = PeerKeyChunk.decode(await anext(messages, b""))
    header = first.chunk.header
    if header is None or not first.identity or header.offset:
        raise ContainerError("the first message must carry the identity and the header of a whole key set")

    async def pieces() -> AsyncIterator[bytes]:
        yield first.chunk.data
        async for data in messages:
            yield PeerKeyChunk.decode(data).chunk.data

    held = gateway.keys.status(first.identity, header.program_id, header.key_sha256).received_bytes
    status = await gateway.keys.receive(
        first.identity,
        header.program_id,
        header.key_sha256,
        header.total_bytes,
        held,
        from_byte(pieces(), held),
        from_cell=True,
    )
    return status.encode()


__all__ = ["peer_handlers"]
