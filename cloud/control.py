"""A cell's stream to the orchestrator: its models and load go up, nothing comes down.

A cell without an orchestrator serves as ever; one whose orchestrator is away
serves, too, and attaches again when it is back.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from blindtail.attach import Attachment
from blindtail.machine import release
from blindtail.rpc import INSECURE_LOOPBACK, Credentials
from blindtail.wire.control import (
    INSTANCE_BYTES,
    MOST_ITEMS,
    CellLoad,
    Hello,
    Model,
    PeerKind,
    Report,
    StepTiming,
)
from cloud.gateway import Gateway

#: The gateway's loop has this long to say how it is; else this report is left out.
_SNAPSHOT_S = 1.0
#: Evaluations of one interval that count for its quantiles.
_SAMPLES = 512


@dataclass(frozen=True, slots=True)
class _Snapshot:
    models: tuple[Model, ...]
    load: CellLoad


class CellControl:
    """Make it on the gateway's loop; `start`, and `close` from a thread other than the loop's.

    gateway      asked on its own loop alone
    address      of the orchestrator
    advertised   host:port where edges dial this cell
    """

    def __init__(
        self,
        gateway: Gateway,
        address: str,
        credentials: Credentials | Callable[[], Credentials],
        advertised: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        seed: int | None = None,
    ) -> None:
        self._gateway, self._advertised = gateway, advertised
        self._loop = asyncio.get_running_loop()
        self._instance = os.urandom(INSTANCE_BYTES)
        self._last = _take(gateway)
        self._queue_s: deque[float] = deque(maxlen=_SAMPLES)
        self._eval_s: deque[float] = deque(maxlen=_SAMPLES)
        self._attachment = Attachment(
            address, credentials, self._hello, self._report, lambda update: None, clock=clock, seed=seed
        )

    @classmethod
    def of(cls, gateway: Gateway, port: int) -> CellControl | None:
        """What the gateway's settings ask for; None = no orchestrator. Raises `ConfigError`."""
        config = gateway.config
        if config.orchestrator is None:
            return None
        host = f"[{config.host}]" if ":" in config.host else config.host
        credentials: Credentials = INSECURE_LOOPBACK if config.tls is None else config.tls.as_client()
        return cls(gateway, config.orchestrator, credentials, config.advertise or f"{host}:{port}")

    def start(self) -> None:
        self._gateway.on_evaluated = self._evaluated
        self._gateway.metrics.watch_control(lambda: self.connected)
        self._attachment.start()

    @property
    def connected(self) -> bool:
        return self._attachment.connected

    def wait_connected(self, timeout_s: float) -> bool:
        return self._attachment.wait_connected(timeout_s)

    def close(self) -> None:
        """Within two seconds."""
        self._attachment.close()

    # -- on the attachment's threads ---------------------------------------------

    def _hello(self) -> Hello:
        models = self._snapshot().models
        return Hello(PeerKind.CELL, self._instance, release(), models, address=self._advertised)

    def _report(self, interval_s: float) -> Report:
        snapshot = self._snapshot()
        steps = tuple(
            timing
            for timing in (_timing("queue", self._queue_s), _timing("evaluate", self._eval_s))
            if timing is not None
        )
        return Report(interval_s, steps=steps, load=snapshot.load, models=snapshot.models)

    def _snapshot(self) -> _Snapshot:
        """How the cell is, asked on its loop; how it was, when the loop is busy or has ended."""
        asked: Future[_Snapshot] = Future()

        def take() -> None:
            if asked.set_running_or_notify_cancel():
                try:
                    asked.set_result(_take(self._gateway))
                except Exception as error:
                    asked.set_exception(error)

        try:
            self._loop.call_soon_threadsafe(take)
            self._last = asked.result(_SNAPSHOT_S)
        except (TimeoutError, RuntimeError):
            asked.cancel()
        return self._last

    # -- on the gateway's loop ---------------------------------------------------

    def _evaluated(self, queue_s: float, eval_s: float) -> None:
        self._queue_s.append(queue_s)
        self._eval_s.append(eval_s)


def _take(gateway: Gateway) -> _Snapshot:
    load = CellLoad(
        evaluators=len(gateway.pool.members),
        queue_depth=len(gateway.queue),
        backlog_s=gateway.queue.backlog_s(),
        sessions=len(gateway.sessions),
        restarts=gateway.pool.restarts,
        key_store_bytes=int(gateway.keys.stored_bytes),
        draining=gateway.drain.on,
    )
    return _Snapshot(tuple(gateway.registry.models)[:MOST_ITEMS], load)


def _timing(step: str, recent: deque[float]) -> StepTiming | None:
    """Quantiles since the last report, nearest rank; the samples are used up."""
    samples = [recent.popleft() for _ in range(len(recent))]
    if not samples:
        return None
    samples.sort()

    def quantile(share: float) -> float:
        return samples[min(len(samples) - 1, int(share * len(samples)))]

    return StepTiming(step, len(samples), quantile(0.5), quantile(0.95))


__all__ = ["CellControl"]
