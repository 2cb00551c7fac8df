"""One cell, without its transport: what the four calls of the service mean.

The gateway ties registry, sessions, key store, queue and evaluators together.
It lives on one asyncio loop. `identity` is who the transport says the caller is;
every call raises a `BlindtailError` whose message is fit for the caller.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from blindtail.bundle import CloudBundle
from blindtail.errors import BlindtailError, ContainerError, TailError
from blindtail.metrics import CloudMetrics
from blindtail.wire import (
    EvaluateCall,
    EvaluateResult,
    KeyHeader,
    KeyStatus,
    KeyStatusCall,
    RegisterCall,
    RegisterResult,
)
from cloud.config import CloudConfig
from cloud.evaluators import Pool, Work
from cloud.keystore import KeyStore
from cloud.queue import Predictor, Queue
from cloud.registry import Registry
from cloud.sessions import Session, Sessions

_log = logging.getLogger(__name__)
_SWEEP_S = 5.0


class Gateway:
    """Compose with `Gateway(config, bundles, pool_of, metrics)`; `start`, calls, `close`.

    `pool_of(registry)` makes the evaluators. Construction opens the state
    directory and raises `ConfigError` when that cannot be.
    """

    def __init__(
        self,
        config: CloudConfig,
        bundles: Sequence[CloudBundle],
        pool_of: Callable[[Registry], Pool],
        metrics: CloudMetrics,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.registry = Registry(bundles, config.backend)
        self.metrics = metrics
        self.keys = KeyStore(config.state_dir, config.backend, self.registry, config.keys, clock)
        self.pool = pool_of(self.registry)
        programs = self.registry.programs
        predict = Predictor(lambda program_id: programs[program_id].predicted_s(config.backend))
        self.queue = Queue(self.pool, config.queue, predict, clock, on_wait=metrics.waited)
        self.sessions = Sessions(config.sessions, clock)
        self._sweeper: asyncio.Task[None] | None = None
        metrics.watch(
            queue_depth=lambda: len(self.queue),
            backlog_s=self.queue.backlog_s,
            sessions=lambda: len(self.sessions),
            key_store_bytes=lambda: self.keys.stored_bytes,
            evaluators=lambda: len(self.pool.members),
            restarts=lambda: self.pool.restarts,
        )

    @property
    def serving(self) -> bool:
        """True while at least one evaluator is up."""
        return bool(self.pool.members)

    async def start(self) -> None:
        """Returns when the evaluators are up."""
        await self.pool.start()
        self._sweeper = asyncio.create_task(self._sweep())

    async def close(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
        await self.queue.close()
        await self.pool.close()
        await self.keys.close()

    # -- the service -------------------------------------------------------------

    def register(self, identity: str, call: RegisterCall) -> RegisterResult:
        """Raises `ProgramMismatch`."""
        entry = self.registry.find(call.model, call.version, call.program_id)
        status = self.keys.status(identity, call.program_id, call.key_sha256)
        session = self.sessions.open(identity, entry, call.key_sha256)
        return RegisterResult(session.id, status.state, self.config.advertise, self.config.sessions.idle_s)

    def key_status(self, identity: str, call: KeyStatusCall) -> KeyStatus:
        """Raises `ProgramMismatch`."""
        self.registry.by_program(call.program_id)
        return self.keys.status(identity, call.program_id, call.key_sha256)

    async def upload_keys(self, identity: str, header: KeyHeader, pieces: AsyncIterator[bytes]) -> KeyStatus:
        """Raises `ProgramMismatch`, `ContainerError`, `Overloaded`, `TailUnavailable`."""
        outcome = "TailUnavailable"  # a connection that breaks off
        try:
            status = await self.keys.receive(
                identity, header.program_id, header.key_sha256, header.total_bytes, header.offset, pieces
            )
            outcome = "ok"
            return status
        except BlindtailError as error:
            outcome = type(error).__name__
            raise
        finally:
            self.metrics.uploaded(outcome)

    async def evaluate(self, identity: str, call: EvaluateCall, remaining_s: float | None) -> EvaluateResult:
        """`remaining_s` is the transport's deadline; the call's own counts when it is earlier.

        Raises `SessionLost`, `KeysMissing`, `ContainerError`, `Overloaded`,
        `DeadlineExceeded`, `EvaluationFailed`, `AccessDenied`.
        """
        model, outcome, eval_s = "", "other", None
        try:
            session = self.sessions.use(call.session, identity)
            model = session.entry.model
            result = await self._evaluate(session, call, remaining_s)
            outcome, eval_s = "ok", result.eval_s
            return result
        except TailError as error:
            outcome = type(error).__name__
            raise
        except asyncio.CancelledError:
            outcome = "DeadlineExceeded"  # the caller gave up
            raise
        finally:
            self.metrics.evaluated(model, outcome, eval_s)

    async def _evaluate(
        self, session: Session, call: EvaluateCall, remaining_s: float | None
    ) -> EvaluateResult:
        entry = session.entry
        if len(call.container) != entry.container_bytes:
            raise ContainerError(
                f"the container has {len(call.container)} bytes, this program's have "
                f"{entry.container_bytes}: encrypt with the edge.bt of this version"
            )
        limits = [self.config.queue.max_wait_s]
        if call.remaining_s > 0:
            limits.append(call.remaining_s)
        if remaining_s is not None:
            limits.append(remaining_s)
        left_s = min(limits)

        def submit() -> asyncio.Future[EvaluateResult]:
            path = self.keys.pin(session.identity, entry.program_id, session.key_sha256)
            try:
                work = Work(entry.program_id, path, call.container)
                future = self.queue.submit(session.identity, work, left_s)
            except BaseException:
                self.keys.unpin(path)
                raise
            future.add_done_callback(lambda _: self.keys.unpin(path))
            return future

        return await session.requests.run(call.request_id, call.container, left_s, submit, self.queue.abandon)

    def describe(self) -> dict[str, Any]:
        """For the announce file and diagnosis; no identities, no paths of clients' keys."""
        return {
            "evaluators": [{"name": m.name, "pid": m.pid} for m in self.pool.members],
            "models": [{"model": m, "version": v} for m, v in self.registry.models],
            "backend": self.config.backend,
            "restarts": self.pool.restarts,
        }

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            try:
                self.sessions.sweep()
                self.keys.sweep()
            except Exception as error:
                _log.error("housekeeping failed: %s", type(error).__name__)


__all__ = ["Gateway"]
