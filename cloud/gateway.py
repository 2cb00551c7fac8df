"""One cell, without its transport: what the five calls of the service mean.

The gateway ties registry, sessions, key store, queue and evaluators together.
It lives on one asyncio loop. `identity` is who the transport says the caller is;
every call raises a `BlindtailError` whose message is fit for the caller.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

from blindtail.bundle import CloudBundle
from blindtail.errors import BlindtailError, ContainerError, TailError
from blindtail.metrics import CloudMetrics
from blindtail.wire import (
    EvaluateCall,
    EvaluateResult,
    KeyHeader,
    KeyState,
    KeyStatus,
    KeyStatusCall,
    RegisterCall,
    RegisterResult,
    TicketOffer,
    TicketsTaken,
)
from cloud.ahead import Ahead
from cloud.config import CloudConfig
from cloud.costs import Costs
from cloud.drain import Drain
from cloud.evaluators import Pool, Work
from cloud.keystore import KeyStore
from cloud.models import ModelStore
from cloud.peers import GrpcPeer, KeyExchange
from cloud.queue import Predictor, Queue
from cloud.registry import Registry
from cloud.rollout import Rollout
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
        self.registry = Registry()
        self.metrics = metrics
        self.keys = KeyStore(config.state_dir, config.backend, self.registry, config.keys, clock)
        store = ModelStore(config.state_dir, config.backend)  # the key store holds the lock
        try:
            self.registry.adopt(store.load(bundles))
            store.tidy(self.registry.catalogue)
            for entry in self.registry.entries:
                self.keys.know(entry)
            self.keys.tidy()
        except BaseException:
            self.keys.release()
            raise
        self._notes = store.notes
        self.pool = pool_of(self.registry)
        self.costs = Costs(config.state_dir, config.backend, config.threads, config.calibrate_s)
        self._predict = Predictor(self._expected_s)
        self.queue = Queue(self.pool, config.queue, self._predict, clock, on_wait=metrics.waited)
        self.sessions = Sessions(config.sessions, clock)
        self.models = Rollout(
            self.registry,
            store,
            self.keys,
            self.pool,
            sessions_of=self.sessions.count,
            forget=self._forget_program,
            measure=lambda programs: self.costs.measure(programs),
        )
        self.models.forget_withdrawn()
        self.exchange = KeyExchange(
            self._peers(()), self.keys, config.replicas, clock, on_transfer=metrics.key_transfer
        )
        self.keys.on_ready = self.exchange.offer
        #: Told (queue_s, eval_s) of every evaluation that was answered.
        self.on_evaluated: Callable[[float, float], None] = lambda queue_s, eval_s: None
        self._evaluating = 0  # calls of `evaluate` that have not been answered
        self.drain = Drain(config.drain_grace_s, clock, lambda: self._evaluating, self.sessions.used_since)
        self.ahead = Ahead(
            config.tickets, self.pool, self.queue, self.keys, metrics, clock, lambda: not self.drain.on
        )
        self.sessions.on_forgotten = self.ahead.drop_session
        self._sweeper: asyncio.Task[None] | None = None
        metrics.watch(
            queue_depth=lambda: len(self.queue),
            backlog_s=self.queue.backlog_s,
            sessions=lambda: len(self.sessions),
            key_store_bytes=lambda: self.keys.stored_bytes,
            evaluators=lambda: len(self.pool.members),
            restarts=lambda: self.pool.restarts,
            queue_limit=lambda: config.queue.jobs,
            key_store_budget_bytes=lambda: config.keys.budget_bytes,
            evaluators_wanted=lambda: config.evaluators,
            draining=lambda: self.drain.on,
            shares=lambda: {
                name: self.registry.catalogue.share_of(version)
                for name, version in self.registry.catalogue.versions.items()
            },
            counters=self.pool.counters,
            ticket_bytes=self.ahead.book.held_by_model,
        )

    @property
    def serving(self) -> bool:
        """True while at least one evaluator is up and edges are welcome."""
        return bool(self.pool.members) and not self.drain.on

    async def start(self) -> None:
        """Returns when the evaluators are up."""
        for note in self._notes:
            _log.warning("%s", note)
        # Alone on the machine, as far as this cell is concerned: evaluators come after it.
        await asyncio.to_thread(self.costs.measure, list(self.registry.programs.values()))
        await self.pool.start()
        self.exchange.start()
        self._sweeper = asyncio.create_task(self._sweep())

    def meet(self, addresses: Sequence[str]) -> None:
        """The cells found beside this one, on top of the settings' peers."""
        self.exchange.meet(self._peers(addresses))

    def _peers(self, found: Sequence[str]) -> list[GrpcPeer]:
        """Of the settings and of those found. All cells may have one list: the own address is left out."""
        config = self.config
        own = (config.advertise, f"{config.host}:{config.port}")
        addresses = dict.fromkeys((*config.peers, *found))
        return [GrpcPeer(address, config.tls) for address in addresses if address not in own]

    async def close(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
        await self.exchange.close()
        await self.ahead.close()
        await self.queue.close()
        await self.models.close()
        await self.pool.close()
        await self.keys.close()

    # -- the service -------------------------------------------------------------

    def register(self, identity: str, call: RegisterCall) -> RegisterResult:
        """Raises `ProgramMismatch`, `ModelWithdrawn`, `AccessDenied`."""
        entry = self.registry.find(call.model, call.version, call.program_id)
        self.registry.admit(identity, call.model, call.version)
        state = self._key_state(identity, call.program_id, call.key_sha256)
        session = self.sessions.open(identity, entry, call.key_sha256)
        self.drain.used()
        config = self.config
        return RegisterResult(
            session.id, state, config.advertise, config.sessions.idle_s, self.drain.on, config.others
        )

    def _key_state(self, identity: str, program_id: str, sha256: bytes) -> KeyState:
        """Where the keys stand, now that their edge is here: peers hear of them."""
        state = self.keys.status(identity, program_id, sha256).state
        if state is KeyState.READY:
            self.exchange.offer(identity, program_id, sha256)
        elif state is KeyState.MISSING and self.exchange.seek(identity, program_id, sha256):
            return KeyState.CHECKING
        return state

    def key_status(self, identity: str, call: KeyStatusCall) -> KeyStatus:
        """Raises `ProgramMismatch`, `ModelWithdrawn`, `AccessDenied`."""
        self.registry.admit_to_program(identity, call.program_id)
        return self.keys.status(identity, call.program_id, call.key_sha256)

    async def upload_keys(self, identity: str, header: KeyHeader, pieces: AsyncIterator[bytes]) -> KeyStatus:
        """Raises `ProgramMismatch`, `ModelWithdrawn`, `AccessDenied`, `ContainerError`, `Overloaded`,
        `TailUnavailable`."""
        outcome = "TailUnavailable"  # a connection that breaks off
        try:
            self.registry.admit_to_program(identity, header.program_id)
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

    def tickets(self, identity: str, offer: TicketOffer) -> TicketsTaken:
        """Seeds that requests of a session will come with. A cell that drains takes none.

        Raises `SessionLost`, `KeysMissing`, `AccessDenied`, `ModelWithdrawn`.
        """
        session = self.sessions.use(offer.session, identity)
        entry = self.registry.find(session.model, session.version, session.program_id)
        self.registry.admit(identity, session.model, session.version)
        if not self.registry.answers_itself(entry):
            return TicketsTaken(0, 0)
        return self.ahead.offer(session, entry, offer.seeds)

    def _expected_s(self, name: str) -> float:
        """Of one evaluation of a serving that none was measured of."""
        program = self.registry.program(name)
        return 0.0 if program is None else self.costs.predicted_s(program)

    def _forget_program(self, name: str) -> None:
        """A program is served no more."""
        self._predict.forget(name)
        self.ahead.drop_program(name)

    async def evaluate(self, identity: str, call: EvaluateCall, remaining_s: float | None) -> EvaluateResult:
        """`remaining_s` is the transport's deadline; the call's own counts when it is earlier.

        Raises `SessionLost`, `KeysMissing`, `ContainerError`, `Overloaded`, `DeadlineExceeded`,
        `EvaluationFailed`, `AccessDenied`, `ModelWithdrawn`, `ProgramMismatch`.
        """
        model, version, outcome, eval_s = "", "", "other", None
        self._evaluating += 1
        try:
            session = self.sessions.use(call.session, identity)
            model, version = session.model, session.version
            result = await self._evaluate(session, call, remaining_s)
            outcome, eval_s, version = "ok", result.eval_s, result.version
            self.models.answered[model, version] += 1
            self.on_evaluated(result.queue_s, result.eval_s)
            return replace(result, draining=True) if self.drain.on else result
        except TailError as error:
            outcome = type(error).__name__
            raise
        except asyncio.CancelledError:
            outcome = "DeadlineExceeded"  # the caller gave up
            raise
        finally:
            self._evaluating -= 1
            self.drain.used()
            self.metrics.evaluated(model, outcome, eval_s, version)

    async def _evaluate(
        self, session: Session, call: EvaluateCall, remaining_s: float | None
    ) -> EvaluateResult:
        lead = self.registry.find(session.model, session.version, session.program_id)
        self.registry.admit(session.identity, session.model, session.version)
        entry = self.registry.segment(lead, call.program_id)
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
            path = self.keys.pin(session.identity, entry.keys_id, session.key_sha256)
            serving = self.registry.route(entry, call.request_id)
            # Seeds are announced for a session's own program: what comes later waits for a decryption.
            claim = self.ahead.claim(session, entry, serving.name, call.container) if entry is lead else None
            ticket = ("", b"") if claim is None else (claim.member, claim.name)

            def release(used: bool) -> None:
                self.keys.unpin(path)
                if claim is not None:
                    self.ahead.release(claim, used=used)

            try:
                work = Work(
                    serving.name, path, call.container, serving.version, holder=ticket[0], ticket=ticket[1]
                )
                future = self.queue.submit(session.identity, work, left_s)
            except BaseException:
                release(False)
                raise
            self.models.in_flight.begin(serving.name)

            def done(future: asyncio.Future[EvaluateResult]) -> None:
                failed = future.cancelled() or future.exception() is not None
                release(not failed and future.result().ticket)
                self.models.in_flight.end(serving.name)

            future.add_done_callback(done)
            return future

        return await session.requests.run(call.request_id, call.container, left_s, submit, self.queue.abandon)

    def describe(self) -> dict[str, Any]:
        """For the announce file and diagnosis; no identities, no paths of clients' keys."""
        return {
            "evaluators": [{"name": m.name, "pid": m.pid} for m in self.pool.members],
            "models": [{"model": m, "version": v} for m, v in self.registry.models],
            "backend": self.config.backend,
            "restarts": self.pool.restarts,
            "draining": self.drain.on,
            "peers": self.exchange.addresses,
            "keys": {"fetched": self.exchange.fetched, "given": self.exchange.given},
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
