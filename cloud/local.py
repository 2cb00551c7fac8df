"""A whole cell in this process, without Ray: for tests and for trying things out.

    with LocalCell(["cloud.bt"], backend="clear", state_dir=tmp) as cell:
        EdgeRuntime.open("edge.bt", cell.address, credentials="insecure-loopback")

The same gateway, key store, queue and gRPC server as in production; evaluators
are threads of this process.
"""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry

from blindtail.bundle import CloudBundle
from blindtail.errors import StateError
from blindtail.metrics import CloudMetrics
from blindtail.serving import probe_port
from blindtail.wire.cell import DrainStatus
from cloud.config import Backend, CloudConfig
from cloud.control import CellControl
from cloud.evaluators import LocalPool, Pool
from cloud.gateway import Gateway
from cloud.keyfolder import encoded_folder
from cloud.registry import Registry, open_bundles
from cloud.servicer import TailServer

_T = TypeVar("_T")


class LocalCell:
    """A context manager; also `start` and `stop`, any number of times: keys survive.

    models     paths of `cloud.bt` files, or opened bundles; none: models are pushed
    port       0: a free one, the same after `stop` and `start`
    config     further settings; models, backend, state_dir and evaluators given here win
    pool_of    another kind of evaluators (tests)
    """

    def __init__(
        self,
        models: Sequence[str | Path | CloudBundle],
        *,
        backend: Backend = "auto",
        evaluators: int = 1,
        state_dir: str | Path | None = None,
        port: int = 0,
        config: CloudConfig | None = None,
        pool_of: Callable[[Registry], Pool] | None = None,
        registry: CollectorRegistry | None = None,
    ) -> None:
        self._cleanup = ExitStack()
        if state_dir is None:
            state_dir = self._cleanup.enter_context(tempfile.TemporaryDirectory(prefix="blindtail-"))
        self._bundles = [m if isinstance(m, CloudBundle) else open_bundles([Path(m)])[0] for m in models]
        paths = tuple(Path(m) for m in models if not isinstance(m, CloudBundle))
        base = config or CloudConfig(models=paths)
        self.config = replace(
            base,
            models=paths,
            backend=backend,
            evaluators=evaluators,
            state_dir=Path(state_dir),
            port=port or base.port,
        )
        self._pool_of = pool_of or self._local_pool
        self.metrics = CloudMetrics(registry or CollectorRegistry())
        self.gateway: Gateway | None = None
        self.control: CellControl | None = None
        self.port = self.config.port
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._server: TailServer | None = None

    @property
    def address(self) -> str:
        """host:port to dial; stays the same over `stop` and `start`."""
        return f"{self.config.host}:{self.port}"

    def start(self) -> LocalCell:
        """Returns when evaluations can start. Raises `ConfigError`."""
        if self._thread is not None:
            raise StateError("this cell has been started already")
        loop = asyncio.new_event_loop()
        self._loop = loop
        self._thread = threading.Thread(target=loop.run_forever, name="cell", daemon=True)
        self._thread.start()
        try:
            self.call(self._start)
        except BaseException:
            self._end_loop()
            raise
        return self

    def stop(self, grace_s: float = 0.0) -> None:
        """Ends the cell as an operator would; 0 breaks calls in flight off."""
        if self._thread is None:
            return
        try:
            self.call(lambda: self._stop(grace_s))
        finally:
            self._end_loop()

    def call(self, function: Callable[[], Awaitable[_T]], timeout_s: float = 60.0) -> _T:
        """Runs a coroutine function on the cell's loop and waits for it."""
        if self._loop is None:
            raise StateError("this cell is not running")

        async def run() -> _T:
            return await function()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(timeout_s)

    def drain(self, grace_s: float | None = None) -> DrainStatus:
        """Sends edges away; returns when they have gone, or after the grace (None = the settings')."""
        longest_s = self.config.drain_grace_s if grace_s is None else grace_s
        return self.call(lambda: self._running.drain.begin(grace_s), longest_s + 60.0)

    def resume(self) -> DrainStatus:
        """Edges are welcome again."""

        async def resume() -> DrainStatus:
            return self._running.drain.end()

        return self.call(resume)

    @property
    def _running(self) -> Gateway:
        if self.gateway is None:
            raise StateError("this cell is not running")
        return self.gateway

    def evict_keys(self) -> None:
        """Drops all keys that are not in use, as a full budget would."""

        async def evict() -> None:
            if self.gateway is not None:
                self.gateway.keys.evict_all()

        self.call(evict)

    def forget_sessions(self) -> None:
        """Forgets every session, as a restart would."""

        async def forget() -> None:
            if self.gateway is not None:
                self.gateway.sessions.clear()

        self.call(forget)

    def describe(self) -> dict[str, Any]:
        async def describe() -> dict[str, Any]:
            return {} if self.gateway is None else self.gateway.describe()

        return self.call(describe)

    def __enter__(self) -> LocalCell:
        return self.start()

    def __exit__(self, *_: object) -> None:
        try:
            self.stop()
        finally:
            self._cleanup.close()

    def _local_pool(self, registry: Registry) -> Pool:
        c = self.config
        weights = encoded_folder(c.state_dir, c.backend)
        return LocalPool(registry.programs, c.backend, c.evaluators, c.loaded_keys_bytes, c.threads, weights)

    async def _start(self) -> None:
        # A port that it finds again when it has been stopped.
        config = replace(self.config, port=self.port or probe_port(self.config.host, 0))
        gateway = Gateway(config, self._bundles, self._pool_of, self.metrics)
        server = TailServer(gateway)
        try:
            await gateway.start()
            self.port = await server.start()
            self.control = CellControl.of(gateway, self.port)
            if self.control is not None:
                self.control.start()
        except BaseException:
            await gateway.close()
            raise
        self.gateway, self._server = gateway, server

    async def _stop(self, grace_s: float) -> None:
        if self.control is not None:
            await asyncio.to_thread(self.control.close)
            self.control = None
        if self._server is not None:
            await self._server.stop(grace_s)
        if self.gateway is not None:
            await self.gateway.close()
        self._server = self.gateway = None

    def _end_loop(self) -> None:
        loop, thread = self._loop, self._thread
        self._loop = self._thread = None
        if loop is not None and thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            thread.join(timeout=10)
            loop.close()


__all__ = ["LocalCell"]
