"""Draining: a cell that is about to end sends its edges away, and answers until they have gone.

While it drains, every reply says so and the health service says NOT_SERVING: edges
with another cell to go to open a session there first and then leave; those
without one stay, and are answered until the end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import grpc

from blindtail.identity import Role
from blindtail.serving import answer, identity_of
from blindtail.wire.cell import DrainStatus, decode_drain

if TYPE_CHECKING:
    from cloud.gateway import Gateway

#: A cell that nobody has used for this long, and in which nothing waits, has been left.
QUIET_S = 1.0
_POLL_S = 0.05


class Drain:
    """The state of one cell. Lives on the gateway's loop.

    waiting   requests that wait or run
    sessions  how many sessions were used since a time on `clock`
    """

    def __init__(
        self,
        grace_s: float,
        clock: Callable[[], float],
        waiting: Callable[[], int],
        sessions: Callable[[float], int],
    ) -> None:
        self._grace_s, self._clock, self._waiting, self._sessions = grace_s, clock, waiting, sessions
        self._used_s = -QUIET_S
        self.on = False

    def used(self) -> None:
        """An edge was here just now."""
        self._used_s = self._clock()

    async def begin(self, grace_s: float | None = None) -> DrainStatus:
        """Sends edges away. Returns when they have gone, after the grace, or when `end` is called.

        grace_s  None = the settings'
        """
        self.on = True
        end_s = self._clock() + (self._grace_s if grace_s is None else grace_s)
        while self.on and not self._left() and self._clock() < end_s:  # noqa: ASYNC110
            await asyncio.sleep(_POLL_S)
        return self.status()

    def end(self) -> DrainStatus:
        """Edges are welcome again."""
        self.on = False
        return self.status()

    def status(self) -> DrainStatus:
        return DrainStatus(self.on, self._sessions(self._clock() - QUIET_S), self._waiting())

    def _left(self) -> bool:
        return self._clock() - self._used_s >= QUIET_S and self._waiting() == 0


def cell_handlers(gateway: Gateway) -> dict[str, Any]:
    """The service `Cell`, for operators."""

    def require(context: Any) -> None:
        identity_of(context, gateway.config.roles).require(Role.OPERATOR)

    async def drain(data: bytes, context: Any) -> bytes:
        async def call() -> bytes:
            require(context)
            return (await gateway.drain.begin(decode_drain(data) or None)).encode()

        return await answer(context, call)

    async def resume(data: bytes, context: Any) -> bytes:
        async def call() -> bytes:
            require(context)
            return gateway.drain.end().encode()

        return await answer(context, call)

    async def status(data: bytes, context: Any) -> bytes:
        async def call() -> bytes:
            require(context)
            return gateway.drain.status().encode()

        return await answer(context, call)

    methods = {"Drain": drain, "Resume": resume, "Status": status}
    return {name: grpc.unary_unary_rpc_method_handler(method) for name, method in methods.items()}


__all__ = ["QUIET_S", "Drain", "cell_handlers"]
