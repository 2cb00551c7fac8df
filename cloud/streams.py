"""Streams from and to other hosts: what arrives is waited for, but not for ever."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

from blindtail.errors import ContainerError, TailUnavailable
from blindtail.wire import CHUNK_BYTES

#: A stream of keys that moves no byte for this long is broken off.
IDLE_S = 30.0


async def moving(messages: AsyncIterator[bytes], idle_s: float = IDLE_S) -> AsyncIterator[bytes]:
    """The messages. Raises `TailUnavailable` when the next one does not come within `idle_s`."""
    iterator = aiter(messages)
    while True:
        try:
            yield await asyncio.wait_for(anext(iterator), idle_s)
        except StopAsyncIteration:
            return
        except TimeoutError as error:
            raise TailUnavailable(f"the other side sent nothing for {idle_s:.0f} s") from error


async def read_file(path: Path) -> AsyncGenerator[bytes, None]:
    """A file in pieces of 256 KiB, read on a thread. Raises `OSError`.

    It is opened once: a file that is unlinked meanwhile is read to its end.
    """
    file = await asyncio.to_thread(path.open, "rb")
    try:
        while piece := await asyncio.to_thread(file.read, CHUNK_BYTES):
            yield piece
    finally:
        file.close()


async def from_byte(pieces: AsyncIterator[bytes], offset: int) -> AsyncIterator[bytes]:
    """The pieces without their first `offset` bytes. Raises `ContainerError` when there are fewer."""
    async for piece in pieces:
        if offset >= len(piece):
            offset -= len(piece)
        else:
            yield piece[offset:]
            offset = 0
    if offset:
        raise ContainerError("the keys ended before the part that is missing here")


__all__ = ["IDLE_S", "from_byte", "moving", "read_file"]
