"""A key store with one call per step, and a check that is a fake."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from blindtail.errors import ContainerError
from blindtail.wire import KeyState, KeyStatus
from cloud.config import KeyLimits
from cloud.keycheck import Order
from cloud.keystore import KeyStore
from cloud.registry import Registry
from tests.cloud_cases import bundle, program, sha

PROGRAM = program().spec.program_id
SIZE = program().spec.key_bytes
KEYS = bytes(1000) + bytes(SIZE - 1000)
READY_BYTES = 100
BOTH = READY_BYTES + SIZE  # prepared keys and the container beside them


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


class Checker:
    """Copies 100 bytes; refuses containers that begin with "bad"; can be held."""

    def __init__(self) -> None:
        self.calls = 0
        self.needs_bundle = True
        self.go = threading.Event()
        self.go.set()

    def __call__(self, order: Order, timeout_s: float) -> int:
        self.calls += 1
        assert self.go.wait(10)
        source, target = Path(order.source), Path(order.target)
        assert Path(order.bundle).is_file() or not self.needs_bundle
        assert source.stat().st_size == SIZE
        if source.read_bytes().startswith(b"bad"):
            target.write_bytes(b"half")
            raise ContainerError("residue above its prime")
        target.write_bytes(bytes(READY_BYTES))
        return READY_BYTES


async def pieces(data: bytes, size: int = 50_000, stop: int | None = None) -> AsyncIterator[bytes]:
    for start in range(0, len(data) if stop is None else stop, size):
        yield data[start : start + size]
        await asyncio.sleep(0)


class Bench:
    """A store with one call per step; identity "a" unless said otherwise."""

    def __init__(self, root: Path, limits: KeyLimits | None = None, clock: Clock | None = None) -> None:
        self.check = Checker()
        self.clock = clock or Clock()
        registry = Registry([bundle()], "clear")
        self.store = KeyStore(root, "clear", registry, limits or KeyLimits(), self.clock, check=self.check)

    async def send(self, data: bytes = KEYS, offset: int = 0, who: str = "a", **options: object) -> KeyStatus:
        stop = options.pop("stop", None)
        assert stop is None or isinstance(stop, int)
        digest = options.pop("digest", sha(data))
        assert isinstance(digest, bytes)
        total = options.pop("total", SIZE)
        assert isinstance(total, int)
        stream = pieces(data[offset:], stop=stop)
        return await self.store.receive(who, PROGRAM, digest, total, offset, stream)

    async def ready(self, data: bytes = KEYS, who: str = "a") -> None:
        await self.send(data, who=who)
        await self.checked()
        assert self.status(data, who).state is KeyState.READY

    async def checked(self) -> None:
        await asyncio.gather(*self.store._tasks)

    def status(self, data: bytes = KEYS, who: str = "a") -> KeyStatus:
        return self.store.status(who, PROGRAM, sha(data))


def run(
    root: Path,
    body: Callable[[Bench], Awaitable[None]],
    limits: KeyLimits | None = None,
    clock: Clock | None = None,
) -> None:
    async def main() -> None:
        bench = Bench(root, limits, clock)
        try:
            await body(bench)
        finally:
            bench.check.go.set()
            await bench.store.close()

    asyncio.run(main())


def other(index: int) -> bytes:
    return index.to_bytes(4) + KEYS[4:]


def files(root: Path, kind: str) -> list[str]:
    return sorted(p.name for p in (root / "clear" / kind).iterdir())
