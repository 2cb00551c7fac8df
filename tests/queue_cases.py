"""A queue in front of evaluators whose answers a test gives by hand, with a clock of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from cloud.config import QueueLimits
from cloud.evaluators import Evaluated, Member, Pool, Work
from cloud.queue import Predictor, Queue
from tests.clock import FakeClock


class Hand:
    """An evaluator whose answers are given by the test, in order."""

    def __init__(self, name: str) -> None:
        self.name, self.pid = name, 1
        self.waiting: list[tuple[Work, asyncio.Future[Evaluated]]] = []

    async def evaluate(self, work: Work) -> Evaluated:
        future: asyncio.Future[Evaluated] = asyncio.get_running_loop().create_future()
        self.waiting.append((work, future))
        return await future

    async def answer(self, eval_s: float = 0.01, *, ticket: bool = False) -> bytes:
        work, future = self.waiting.pop(0)
        future.set_result(Evaluated(work.container + b"!", eval_s, ticket))
        await settle()
        return work.container

    async def fail(self, error: Exception, count: int = 1) -> None:
        for _ in range(count):
            self.waiting.pop(0)[1].set_exception(error)
        await settle()


class HandPool(Pool):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.hands = [Hand(f"e{i}") for i in range(count)]

    @property
    def members(self) -> Sequence[Member]:
        return self.hands

    async def start(self) -> None: ...

    async def close(self) -> None: ...


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def work(tag: str, program: str = "p", holder: str = "") -> Work:
    return Work(program, Path("keys"), tag.encode(), holder=holder)


def run(
    body: Callable[[Queue, HandPool, FakeClock], Awaitable[None]],
    evaluators: int = 1,
    limits: QueueLimits | None = None,
    cost_s: Callable[[str], float] = lambda program: 0.1,
) -> None:
    async def main() -> None:
        pool, clock = HandPool(evaluators), FakeClock()
        queue = Queue(pool, limits or QueueLimits(), Predictor(cost_s), clock)
        await body(queue, pool, clock)
        await queue.close()

    asyncio.run(main())
