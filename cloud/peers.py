"""Evaluation keys between the cells of one operator, so that an edge that moves uploads nothing again.

`KeyExchange` asks all peers side by side for keys that an edge names and this
cell does not hold, and gives away copies of what edges upload here. Both happen
in the background and are bounded; whatever goes wrong, the edge can still upload.
What arrives is checked as any upload is. Keys that came from a peer are not given
on: only what an edge does starts a transfer, so none can go in a circle.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import grpc

from blindtail.errors import (
    BlindtailError,
    ContainerError,
    KeysMissing,
    ProgramMismatch,
    TailError,
    TailUnavailable,
)
from blindtail.rpc import channel_options, from_rpc_error
from blindtail.tls import TlsFiles
from blindtail.wire import KeyChunk, KeyHeader, KeyState, KeyStatus
from blindtail.wire.cell import PEERS, PeerKeyChunk, PeerKeys
from cloud.keystore import KeyStore
from cloud.streams import from_byte, moving, read_file

_log = logging.getLogger(__name__)

#: A peer that has said nothing after this long does not have the keys.
FIND_S = 3.0
#: For one key set: finding it, waiting for a turn, and the transfer. Its edge waits meanwhile.
FETCH_S = 90.0
GIVE_S = 120.0
#: For so long after they were asked for keys, peers are not asked again: the edge uploads.
MISS_S = 10.0
#: Transfers towards this cell at once; key sets that may wait for a turn, of one identity and of all.
FETCHES, SEEKING_PER_IDENTITY, SEEKING = 4, 8, 256
#: Copies that wait to be given, and how many key sets are remembered as given.
GIFTS, REMEMBERED = 1024, 8192
#: A peer may have evicted its copy: after this long it is asked again, when the edge registers.
REPEAT_S = 3600.0
#: Waits before a copy is tried again.
RETRY_S = (2.0, 15.0, 60.0)


@dataclass
class Offer:
    """A peer that has the keys: its stream, at its first piece."""

    total_bytes: int
    pieces: AsyncIterator[bytes]


class Peer(Protocol):
    """Another cell. Raises `TailError` alone."""

    @property
    def address(self) -> str: ...

    async def fetch(self, keys: PeerKeys, stack: AsyncExitStack) -> Offer:
        """Raises `KeysMissing` when it does not hold them. The stream ends with `stack`."""
        ...

    async def give(self, keys: PeerKeys, total_bytes: int, pieces: AsyncIterator[bytes]) -> KeyStatus: ...


class GrpcPeer:
    """A `Peer` over gRPC. Dialled anew for each transfer: they are rare, and a renewed certificate is used.

    With `tls` this cell shows its own certificate, whose role must be `cell`;
    without, plaintext, which the settings accept for loopback alone.
    """

    def __init__(self, address: str, tls: TlsFiles | None) -> None:
        self._address, self._tls = address, tls

    @property
    def address(self) -> str:
        return self._address

    async def fetch(self, keys: PeerKeys, stack: AsyncExitStack) -> Offer:
        channel = await self._dial(stack)
        call = channel.unary_stream(f"/{PEERS}/FetchKeys")(keys.encode(), timeout=FETCH_S)
        chunks = self._chunks(call)
        first = await anext(chunks, None)
        if first is None or first.header is None:
            raise ContainerError("a peer's first message of a key set must carry its header")
        header = first.header
        if (header.program_id, header.key_sha256, header.offset) != (keys.program_id, keys.key_sha256, 0):
            raise ContainerError("a peer sent other keys than it was asked for")

        async def pieces() -> AsyncIterator[bytes]:
            yield first.data
            async for chunk in chunks:
                yield chunk.data

        return Offer(header.total_bytes, pieces())

    async def give(self, keys: PeerKeys, total_bytes: int, pieces: AsyncIterator[bytes]) -> KeyStatus:
        header = KeyHeader(keys.program_id, keys.key_sha256, total_bytes, 0)
        first = PeerKeyChunk(KeyChunk(b"", header), keys.identity).encode()

        async def question() -> AsyncIterator[bytes]:
            yield first

        async def answer() -> AsyncIterator[bytes]:
            yield first
            async for piece in pieces:
                yield PeerKeyChunk(KeyChunk(piece)).encode()

        async with AsyncExitStack() as stack:
            channel = await self._dial(stack)
            method = channel.stream_unary(f"/{PEERS}/GiveKeys")
            try:
                # The header alone first: many peers hold the keys already, or do not serve the program,
                # and a refusal in the middle of a stream may be lost behind the bytes on their way.
                status = KeyStatus.decode(await method(question(), timeout=GIVE_S))
                if status.state is not KeyState.MISSING:
                    return status
                return KeyStatus.decode(await method(answer(), timeout=GIVE_S))
            except grpc.RpcError as error:
                raise from_rpc_error(error) from error

    async def _dial(self, stack: AsyncExitStack) -> Any:
        if self._tls is None:
            channel = grpc.aio.insecure_channel(self._address, options=channel_options())
        else:
            try:
                tls = await asyncio.to_thread(self._tls.as_client().load)
            except BlindtailError as error:
                raise TailUnavailable(f"this cell cannot dial its peers: {error}") from error
            credentials = grpc.ssl_channel_credentials(tls.ca, tls.key, tls.certificate)
            channel = grpc.aio.secure_channel(self._address, credentials, options=channel_options())
        return await stack.enter_async_context(channel)

    @staticmethod
    async def _chunks(call: AsyncIterator[bytes]) -> AsyncIterator[KeyChunk]:
        try:
            async for data in moving(call):
                yield KeyChunk.decode(data)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error


_Key = tuple[str, str, bytes]  # identity, program id, SHA-256 of the container


class KeyExchange:
    """Lives on the gateway's loop. `on_transfer(direction, outcome)` counts: "fetched" or "given"."""

    def __init__(
        self,
        peers: Sequence[Peer],
        keys: KeyStore,
        replicas: int,
        clock: Callable[[], float],
        *,
        on_transfer: Callable[[str, str], None] = lambda direction, outcome: None,
    ) -> None:
        self._peers, self._keys, self._replicas, self._clock = list(peers), keys, replicas, clock
        self._on_transfer = on_transfer
        self._seeking: dict[_Key, asyncio.Task[None]] = {}
        self._missed: OrderedDict[_Key, float] = OrderedDict()
        self._turns = asyncio.Semaphore(FETCHES)
        self._given: OrderedDict[_Key, float] = OrderedDict()
        self._gifts: deque[tuple[_Key, int]] = deque()
        self._gift_came = asyncio.Event()
        self._giver: asyncio.Task[None] | None = None
        #: Since the start: key sets that came from peers, and copies that peers took.
        self.fetched = self.given = 0

    @property
    def addresses(self) -> list[str]:
        return [peer.address for peer in self._peers]

    def start(self) -> None:
        if self._peers and self._replicas:
            self._giver = asyncio.create_task(self._give_all())

    def meet(self, peers: Sequence[Peer]) -> None:
        """These are the peers from now on. Keys that are here are copied when their edge registers again."""
        self._peers = list(peers)
        if self._giver is None:
            self.start()

    async def close(self) -> None:
        tasks = [*self._seeking.values(), *filter(None, (self._giver,))]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- keys that an edge names and this cell does not hold -----------------------------

    def seek(self, identity: str, program_id: str, sha256: bytes) -> bool:
        """Asks the peers in the background, unless they were asked just now. True while that goes on:
        the key store then says CHECKING."""
        key = (identity, program_id, sha256)
        if key in self._seeking:
            return True
        missed_s = self._missed.get(key)
        own = sum(1 for other in self._seeking if other[0] == identity)
        if (
            not self._peers
            or (missed_s is not None and self._clock() - missed_s < MISS_S)
            or own >= SEEKING_PER_IDENTITY
            or len(self._seeking) >= SEEKING
        ):
            return False
        stack = ExitStack()
        stack.enter_context(self._keys.awaiting(*key))

        def done(task: asyncio.Task[None]) -> None:
            stack.close()
            self._seeking.pop(key, None)
            if not task.cancelled() and (error := task.exception()) is not None:
                _log.error("fetching keys failed: %s", type(error).__name__)

        task = self._seeking[key] = asyncio.create_task(self._seek(key))
        task.add_done_callback(done)
        return True

    async def _seek(self, key: _Key) -> None:
        found = False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FETCH_S), self._turns:
                found = await self._fetch(key)
        self._on_transfer("fetched", "ok" if found else "KeysMissing")
        self.fetched += found
        # Also after a success: should the check refuse them, the edge is to upload its own.
        self._missed[key] = self._clock()
        while len(self._missed) > REMEMBERED:
            self._missed.popitem(last=False)

    async def _fetch(self, key: _Key) -> bool:
        """From the first peer that has them, else from the next one."""
        wanted = PeerKeys(*key)
        async with AsyncExitStack() as stack:
            asked = [asyncio.create_task(self._ask(peer, wanted, stack)) for peer in self._peers]
            try:
                for reply in asyncio.as_completed(asked):
                    offer = await reply
                    if offer is not None and await self._take(key, offer):
                        return True
            finally:
                for task in asked:
                    task.cancel()
                await asyncio.gather(*asked, return_exceptions=True)
        return False

    async def _ask(self, peer: Peer, wanted: PeerKeys, stack: AsyncExitStack) -> Offer | None:
        try:
            async with asyncio.timeout(FIND_S):
                return await peer.fetch(wanted, stack)
        except KeysMissing:
            return None
        except (TailError, TimeoutError) as error:
            _log.warning("peer %s gives no keys: %s", peer.address, str(error) or "it does not answer")
            return None

    async def _take(self, key: _Key, offer: Offer) -> bool:
        received = self._keys.status(*key).received_bytes  # of an upload that the edge had begun here
        try:
            status = await self._keys.receive(
                *key, offer.total_bytes, received, from_byte(offer.pieces, received), from_cell=True
            )
        except TailError as error:
            _log.warning("keys from a peer did not arrive: %s", error)
            return False
        return status.state is not KeyState.MISSING

    # -- copies of what edges upload here --------------------------------------------------

    def offer(self, identity: str, program_id: str, sha256: bytes) -> None:
        """These keys are READY and in use here: peers shall have copies. Asked once in `REPEAT_S`."""
        key, now = (identity, program_id, sha256), self._clock()
        if self._giver is None or (key in self._given and now - self._given[key] < REPEAT_S):
            return
        if len(self._gifts) >= GIFTS:
            _log.warning("too many key sets wait to be copied to peers: one is not copied")
            return
        self._given[key] = now
        while len(self._given) > REMEMBERED:
            self._given.popitem(last=False)
        self._put(key, 0)

    def _put(self, key: _Key, tries: int) -> None:
        self._gifts.append((key, tries))
        self._gift_came.set()

    async def _give_all(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while not self._gifts:
                self._gift_came.clear()
                await self._gift_came.wait()
            key, tries = self._gifts.popleft()
            try:
                whole = await self._give(key)
            except Exception as error:
                _log.error("copying keys to peers failed: %s", type(error).__name__)
                whole = False
            if whole:
                continue
            if tries < len(RETRY_S):
                loop.call_later(RETRY_S[tries], self._put, key, tries + 1)
            else:
                self._given.pop(key, None)  # the edge's next registration tries again

    async def _give(self, key: _Key) -> bool:
        """True when there are enough copies, or when more cannot be had from these peers."""
        copies, down = 0, False
        for peer in self._order(key):
            if copies >= self._replicas:
                break
            try:
                status = await self._give_to(peer, key)
                took = status.state in (KeyState.READY, KeyState.CHECKING)
                self._on_transfer("given", "ok" if took else "ContainerError")
                copies += took
                self.given += took
            except KeysMissing:
                return True  # evicted here meanwhile
            except (TailError, OSError) as error:
                self._on_transfer("given", type(error).__name__)
                _log.warning("peer %s takes no keys: %s", peer.address, error)
                # A peer that does not serve the model has said its last word.
                down = down or not isinstance(error, ProgramMismatch)
        return copies >= self._replicas or not down

    async def _give_to(self, peer: Peer, key: _Key) -> KeyStatus:
        path = self._keys.container(*key)
        try:
            total_bytes = path.stat().st_size
        except FileNotFoundError as error:
            raise KeysMissing("the keys were evicted") from error
        pieces = read_file(path)
        try:
            return await peer.give(PeerKeys(*key), total_bytes, pieces)
        finally:
            # Still being read for a call that was broken off: whose end then closes it.
            with contextlib.suppress(RuntimeError):
                await pieces.aclose()

    def _order(self, key: _Key) -> list[Peer]:
        """Another order for each key set, the same every time: copies spread evenly over the peers."""

        def rank(peer: Peer) -> bytes:
            return hashlib.sha256(key[2] + peer.address.encode()).digest()

        return sorted(self._peers, key=rank)


__all__ = ["GrpcPeer", "KeyExchange", "Offer", "Peer"]
