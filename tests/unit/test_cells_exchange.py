"""Asking peers for keys and giving them copies: order, bounds, patience. Peers and the store are fakes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from blindtail.errors import KeysMissing, Overloaded, ProgramMismatch, TailError, TailUnavailable
from blindtail.wire import KeyState, KeyStatus
from blindtail.wire.cell import PeerKeys
from cloud import peers as peers_module
from cloud.peers import KeyExchange, Offer, Peer
from tests.cloud_cases import sha

pytestmark = pytest.mark.timeout(30)
PROGRAM = "ab" * 32
DATA = bytes(range(256)) * 40


class Store:
    """The part of a key store that an exchange uses; `keys` are those that are READY."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.keys: dict[tuple[str, str, bytes], bytes] = {}
        self.awaited: set[tuple[str, str, bytes]] = set()
        self.partial = 0
        self.fault: TailError | None = None

    def status(self, *key: Any) -> KeyStatus:
        if key in self.awaited:
            return KeyStatus(KeyState.CHECKING, self.partial)
        return KeyStatus(KeyState.READY if key in self.keys else KeyState.MISSING, self.partial)

    @contextlib.contextmanager
    def awaiting(self, *key: Any) -> Iterator[None]:
        self.awaited.add(key)
        try:
            yield
        finally:
            self.awaited.discard(key)

    async def receive(
        self,
        identity: str,
        program_id: str,
        sha256: bytes,
        total_bytes: int,
        offset: int,
        pieces: AsyncIterator[bytes],
        *,
        from_cell: bool,
    ) -> KeyStatus:
        assert from_cell
        if self.fault is not None:
            raise self.fault
        data = DATA[:offset] + b"".join([piece async for piece in pieces])
        if len(data) < total_bytes:
            return KeyStatus(KeyState.MISSING, len(data))
        self.keys[identity, program_id, sha256] = data
        return KeyStatus(KeyState.CHECKING, len(data))

    def container(self, *key: Any) -> Path:
        if key not in self.keys:
            raise KeysMissing("not here")
        path = self.folder / "container"
        path.write_bytes(self.keys[key])
        return path


class FakePeer:
    """Has `data`, or raises `fault`, after `wait_s`."""

    def __init__(
        self, address: str, data: bytes | None = None, fault: TailError | None = None, wait_s: float = 0.0
    ) -> None:
        self.address, self.data, self.fault, self.wait_s = address, data, fault, wait_s
        self.asked: list[PeerKeys] = []
        self.took: list[bytes] = []
        self.cancelled = 0

    async def _answer(self) -> None:
        try:
            await asyncio.sleep(self.wait_s)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.fault is not None:
            raise self.fault

    async def fetch(self, keys: PeerKeys, stack: AsyncExitStack) -> Offer:
        self.asked.append(keys)
        await self._answer()
        if self.data is None:
            raise KeysMissing("not here")

        async def pieces(data: bytes) -> AsyncIterator[bytes]:
            for start in range(0, len(data), 1000):
                yield data[start : start + 1000]

        return Offer(len(DATA), pieces(self.data))

    async def give(self, keys: PeerKeys, total_bytes: int, pieces: AsyncIterator[bytes]) -> KeyStatus:
        await self._answer()
        data = b"".join([piece async for piece in pieces])
        assert len(data) == total_bytes
        self.took.append(data)
        return KeyStatus(KeyState.CHECKING, len(data))


class Bench:
    def __init__(self, folder: Path, peers: list[FakePeer], replicas: int = 1) -> None:
        self.now = 100.0
        self.store = Store(folder)
        self.transfers: list[tuple[str, str]] = []
        listed: list[Peer] = list(peers)
        self.exchange = KeyExchange(
            listed,
            self.store,  # type: ignore[arg-type]
            replicas,
            lambda: self.now,
            on_transfer=lambda *what: self.transfers.append(what),
        )

    def seek(self, who: str = "a", data: bytes = DATA) -> bool:
        return self.exchange.seek(who, PROGRAM, sha(data))

    async def settled(self) -> None:
        while self.exchange._seeking:  # noqa: ASYNC110
            await asyncio.sleep(0.005)

    def state(self, who: str = "a") -> KeyState:
        return self.store.status(who, PROGRAM, sha(DATA)).state

    async def given(self, count: int) -> None:
        async with asyncio.timeout(10):
            while self.exchange.given < count:  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    def own(self, index: int = 0) -> bytes:
        data = index.to_bytes(4) + DATA
        self.store.keys["a", PROGRAM, sha(data)] = data
        return data

    def offer(self, data: bytes) -> None:
        self.exchange.offer("a", PROGRAM, sha(data))


def run(bench: Bench, body: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        bench.exchange.start()
        try:
            await body()
        finally:
            await bench.exchange.close()

    asyncio.run(main())


def test_all_peers_are_asked_side_by_side_and_the_first_that_has_them_wins(tmp_path: Path) -> None:
    empty, slow, quick = FakePeer("empty"), FakePeer("slow", DATA, wait_s=5.0), FakePeer("quick", DATA)
    b = Bench(tmp_path, [empty, slow, quick])

    async def body() -> None:
        assert b.seek()
        assert b.state() is KeyState.CHECKING  # at once: the edge waits
        assert b.seek()  # asking again starts nothing
        await b.settled()
        assert b.store.keys["a", PROGRAM, sha(DATA)] == DATA
        assert [len(p.asked) for p in (empty, slow, quick)] == [1, 1, 1]
        assert slow.cancelled == 1
        assert b.exchange.fetched == 1
        assert b.transfers == [("fetched", "ok")]

    run(b, body)


def test_a_peer_that_breaks_off_is_followed_by_the_next(tmp_path: Path) -> None:
    b = Bench(tmp_path, [FakePeer("short", DATA[:5000]), FakePeer("whole", DATA, wait_s=0.05)])

    async def body() -> None:
        b.seek()
        await b.settled()
        assert b.state() is KeyState.READY

    run(b, body)


def test_what_an_edge_has_sent_already_is_not_taken_twice(tmp_path: Path) -> None:
    b = Bench(tmp_path, [FakePeer("peer", DATA)])
    b.store.partial = 2500  # in the middle of a piece

    async def body() -> None:
        b.seek()
        await b.settled()
        assert b.store.keys["a", PROGRAM, sha(DATA)] == DATA

    run(b, body)


def test_peers_that_have_nothing_are_not_asked_again_for_a_while(tmp_path: Path) -> None:
    peer = FakePeer("peer")
    b = Bench(tmp_path, [peer])

    async def body() -> None:
        assert b.seek()
        await b.settled()
        assert b.state() is KeyState.MISSING
        assert not b.seek()
        assert b.seek(who="b")  # another's keys are another matter
        await b.settled()
        b.now += peers_module.MISS_S + 1
        peer.data = DATA
        assert b.seek()
        await b.settled()
        assert b.state() is KeyState.READY
        assert len(peer.asked) == 3

    run(b, body)


@pytest.mark.parametrize("fault", [TailUnavailable("down"), Overloaded("full", 1.0)])
def test_a_peer_in_trouble_is_as_one_without_the_keys(tmp_path: Path, fault: TailError) -> None:
    b = Bench(tmp_path, [FakePeer("bad", fault=fault), FakePeer("good", DATA, wait_s=0.05)])

    async def body() -> None:
        b.seek()
        await b.settled()
        assert b.state() is KeyState.READY

    run(b, body)


def test_silent_peers_hold_an_edge_up_for_a_bounded_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers_module, "FIND_S", 0.1)
    b = Bench(tmp_path, [FakePeer("silent", DATA, wait_s=60.0)])

    async def body() -> None:
        assert b.seek()
        async with asyncio.timeout(2):
            await b.settled()
        assert b.state() is KeyState.MISSING

    run(b, body)


def test_searches_are_bounded_by_identity_and_in_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers_module, "SEEKING", 10)
    peer = FakePeer("peer", wait_s=0.05)
    b = Bench(tmp_path, [peer])

    async def body() -> None:
        mine = [b.seek(data=index.to_bytes(4)) for index in range(12)]
        assert mine == [True] * peers_module.SEEKING_PER_IDENTITY + [False] * 4
        theirs = [b.seek(who=f"edge-{index}") for index in range(4)]
        assert theirs == [True, True, False, False]
        await asyncio.sleep(0.02)
        assert len(peer.asked) == peers_module.FETCHES  # the others wait for a turn
        await b.settled()
        assert len(peer.asked) == 10

    run(b, body)


def test_without_peers_nothing_is_asked_or_given(tmp_path: Path) -> None:
    b = Bench(tmp_path, [])

    async def body() -> None:
        assert not b.seek()
        b.offer(b.own())
        await asyncio.sleep(0.02)
        assert b.transfers == []

    run(b, body)


@pytest.mark.parametrize("replicas", [0, 1, 2])
def test_so_many_copies_go_elsewhere_and_once(tmp_path: Path, replicas: int) -> None:
    peers = [FakePeer(name) for name in ("one", "two", "three")]
    b = Bench(tmp_path, peers, replicas)

    async def body() -> None:
        data = b.own()
        for _ in range(3):
            b.offer(data)
        await b.given(replicas)
        await asyncio.sleep(0.02)
        took = [p.took for p in peers]
        assert sorted(took) == sorted([[data]] * replicas + [[]] * (3 - replicas))

    run(b, body)


def test_copies_spread_over_the_peers(tmp_path: Path) -> None:
    peers = [FakePeer(name) for name in ("one", "two", "three")]
    b = Bench(tmp_path, peers)

    async def body() -> None:
        for index in range(60):
            b.offer(b.own(index))
        await b.given(60)
        assert min(len(p.took) for p in peers) >= 8

    run(b, body)


def test_a_peer_that_is_down_is_passed_over_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers_module, "RETRY_S", (0.02, 0.02))
    down = FakePeer("down", fault=TailUnavailable("down"))
    b = Bench(tmp_path, [down, FakePeer("up")], replicas=2)

    async def body() -> None:
        data = b.own()
        b.offer(data)
        await b.given(1)
        assert down.took == []
        down.fault = None
        await b.given(2)
        assert down.took == [data]

    run(b, body)


def test_it_gives_up_after_a_few_tries_until_the_edge_comes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers_module, "RETRY_S", (0.01, 0.01))
    peer = FakePeer("down", fault=TailUnavailable("down"))
    b = Bench(tmp_path, [peer])

    async def body() -> None:
        data = b.own()
        b.offer(data)
        await asyncio.sleep(0.3)
        assert b.transfers == [("given", "TailUnavailable")] * 3
        peer.fault = None
        b.offer(data)
        await b.given(1)

    run(b, body)


def test_a_copy_is_asked_after_again_much_later(tmp_path: Path) -> None:
    b = Bench(tmp_path, [FakePeer("peer")])

    async def body() -> None:
        data = b.own()
        b.offer(data)
        await b.given(1)
        b.now += peers_module.REPEAT_S - 1
        b.offer(data)
        await asyncio.sleep(0.02)
        assert b.exchange.given == 1
        b.now += 2
        b.offer(data)
        await b.given(2)

    run(b, body)


@pytest.mark.parametrize("fault", [ProgramMismatch("another model"), KeysMissing("evicted")])
def test_a_last_word_is_not_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: TailError
) -> None:
    monkeypatch.setattr(peers_module, "RETRY_S", (0.01, 0.01))
    b = Bench(tmp_path, [FakePeer("peer", fault=fault)])

    async def body() -> None:
        b.offer(b.own())
        await asyncio.sleep(0.2)
        assert len(b.transfers) <= 1

    run(b, body)


def test_a_full_queue_of_copies_drops_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers_module, "GIFTS", 3)
    peer = FakePeer("peer", wait_s=0.01)
    b = Bench(tmp_path, [peer])

    async def body() -> None:
        for index in range(10):
            b.offer(b.own(index))
        await b.given(3)
        await asyncio.sleep(0.1)
        assert len(peer.took) == 3

    run(b, body)
