"""Request ids: the same one is evaluated once, whoever asks how often."""

from __future__ import annotations

import asyncio

import pytest

from blindtail.errors import ContainerError, DeadlineExceeded, EvaluationFailed
from blindtail.wire import EvaluateResult
from cloud.requests import Requests
from tests.clock import FakeClock
from tests.queue_cases import settle

pytestmark = pytest.mark.timeout(20)


class Source:
    """`submit` and `abandon` as the queue has them."""

    def __init__(self) -> None:
        self.futures: list[asyncio.Future[EvaluateResult]] = []
        self.abandoned = 0

    def submit(self) -> asyncio.Future[EvaluateResult]:
        self.futures.append(asyncio.get_running_loop().create_future())
        return self.futures[-1]

    def abandon(self, future: asyncio.Future[EvaluateResult]) -> None:
        self.abandoned += 1
        future.cancel()


RESULT = EvaluateResult(b"r", 0.0, 0.0)
ID = bytes(16)


def test_the_same_request_is_evaluated_once() -> None:
    async def main() -> None:
        clock, source = FakeClock(), Source()
        requests = Requests(clock)

        async def ask(container: bytes = b"c") -> EvaluateResult:
            return await requests.run(ID, container, 5, source.submit, source.abandon)

        both = [asyncio.create_task(ask()) for _ in range(2)]
        await settle()
        assert len(source.futures) == 1
        source.futures[0].set_result(RESULT)
        assert await asyncio.gather(*both) == [RESULT, RESULT]
        assert await ask() == RESULT  # from the recent results
        assert len(source.futures) == 1
        with pytest.raises(ContainerError, match="other bytes"):
            await ask(b"d")
        clock.now += 61  # results are not kept for ever; the id still names its bytes
        again = asyncio.create_task(ask())
        await settle()
        assert len(source.futures) == 2
        source.futures[1].set_result(RESULT)
        await again

    asyncio.run(main())


def test_a_waiter_that_leaves_takes_nothing_from_the_other() -> None:
    async def main() -> None:
        source = Source()
        requests = Requests(FakeClock())
        first, second = (
            asyncio.create_task(requests.run(ID, b"c", 5, source.submit, source.abandon)) for _ in range(2)
        )
        await settle()
        first.cancel()
        await settle()
        assert source.abandoned == 0
        source.futures[0].set_result(RESULT)
        assert await second == RESULT

    asyncio.run(main())


def test_the_last_waiter_withdraws_and_a_failure_is_tried_again() -> None:
    async def main() -> None:
        source = Source()
        requests = Requests(FakeClock())

        async def ask(remaining_s: float) -> EvaluateResult:
            return await requests.run(ID, b"c", remaining_s, source.submit, source.abandon)

        with pytest.raises(DeadlineExceeded):
            await ask(0.01)
        assert source.abandoned == 1
        again = asyncio.create_task(ask(5))
        await settle()
        source.futures[1].set_exception(EvaluationFailed("x"))
        with pytest.raises(EvaluationFailed):
            await again
        last = asyncio.create_task(ask(5))
        await settle()
        source.futures[2].set_result(RESULT)
        assert await last == RESULT

    asyncio.run(main())


def test_remembered_ids_and_results_are_bounded() -> None:
    async def main() -> None:
        clock = FakeClock()
        requests = Requests(clock)

        def done() -> asyncio.Future[EvaluateResult]:
            future: asyncio.Future[EvaluateResult] = asyncio.get_running_loop().create_future()
            future.set_result(RESULT)
            return future

        for i in range(1000):
            clock.now += 0.001
            await requests.run(i.to_bytes(16), b"c", 5, done, lambda f: None)
            await settle()
        assert len(requests._known) <= 256
        assert sum(r.result is not None for r in requests._known.values()) <= 8

    asyncio.run(main())
