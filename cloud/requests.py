"""At-most-once evaluation: a request id names one container, whatever is sent again.

Same id and same bytes: joined to the evaluation that waits or runs, or answered
from the recent result. Same id and other bytes: refused. A failed evaluation is
not kept, so a further attempt runs again. When the last waiter is gone, waiting
work is withdrawn; work that runs is finished and its result kept for a retry.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from blindtail.errors import ContainerError, DeadlineExceeded
from blindtail.wire import EvaluateResult

#: Results kept for a client whose connection broke, and for how long.
RECENT_RESULTS, RECENT_S = 8, 60.0
#: Request ids whose bytes are remembered.
REMEMBERED_IDS = 256


@dataclass
class _Request:
    digest: bytes
    future: asyncio.Future[EvaluateResult] | None = None
    waiters: int = 0
    result: EvaluateResult | None = None
    done_s: float = 0.0


class Requests:
    """The requests of one session. Lives on the gateway's loop."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._known: OrderedDict[bytes, _Request] = OrderedDict()

    async def run(
        self,
        request_id: bytes,
        container: bytes,
        remaining_s: float,
        submit: Callable[[], asyncio.Future[EvaluateResult]],
        abandon: Callable[[asyncio.Future[EvaluateResult]], None],
    ) -> EvaluateResult:
        """The result of `submit()`, called at most once at a time for this id.

        `abandon(future)` says that nobody waits any more. Raises `ContainerError`
        for an id that was used with other bytes, `DeadlineExceeded` after
        `remaining_s`, and what `submit` or its future raises.
        """
        digest = hashlib.sha256(container).digest()
        request = self._known.get(request_id)
        if request is not None and request.digest != digest:
            raise ContainerError("this request id was used with other bytes: draw a new id for every request")
        if request is not None and request.result is not None:
            if self._clock() - request.done_s <= RECENT_S:
                return request.result
            request.result = None
        future = None if request is None else request.future
        if request is None or future is None:
            future = submit()
            if request is None:
                self._trim()
                request = self._known[request_id] = _Request(digest)
            request.future = future
            future.add_done_callback(partial(self._done, request))
        return await self._wait(request, future, remaining_s, abandon)

    async def _wait(
        self,
        request: _Request,
        future: asyncio.Future[EvaluateResult],
        remaining_s: float,
        abandon: Callable[[asyncio.Future[EvaluateResult]], None],
    ) -> EvaluateResult:
        request.waiters += 1
        try:
            done, _ = await asyncio.wait([future], timeout=remaining_s)
            if not done:
                raise DeadlineExceeded("the evaluation was not done within the remaining time")
            if future.cancelled():
                raise DeadlineExceeded("the request was withdrawn")
            return future.result()
        finally:
            request.waiters -= 1
            if request.waiters == 0 and not future.done():
                abandon(future)

    def _done(self, request: _Request, future: asyncio.Future[EvaluateResult]) -> None:
        if request.future is future:
            request.future = None
        if future.cancelled() or future.exception() is not None:
            return
        request.result, request.done_s = future.result(), self._clock()
        held = sorted((r for r in self._known.values() if r.result is not None), key=lambda r: r.done_s)
        for old in held[:-RECENT_RESULTS]:
            old.result = None

    def _trim(self) -> None:
        """Forgets the oldest ids that nothing runs for."""
        for request_id, request in list(self._known.items()):
            if len(self._known) < REMEMBERED_IDS:
                return
            if request.future is None:
                del self._known[request_id]


__all__ = ["Requests"]
