"""A whole orchestrator in this process: for tests and for trying things out.

    with LocalOrchestrator(state_dir=tmp) as orchestrator:
        EdgeRuntime.open("edge.bt", cell.address, orchestrator=orchestrator.address, ...)

The same store, controller and gRPC server as in production, on a thread of this process.
"""

from __future__ import annotations

import asyncio
import tempfile
import threading
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from prometheus_client import CollectorRegistry

from blindtail.errors import StateError
from blindtail.metrics import OrchestratorMetrics
from blindtail.rpc import INSECURE_LOOPBACK, Credentials
from blindtail.serving import probe_port
from orchestrator.app import running
from orchestrator.config import OrchestratorConfig
from orchestrator.policies_client import PoliciesClient

_START_S = 30.0


class LocalOrchestrator:
    """A context manager; also `start` and `stop`, any number of times: policies survive, and so does
    the port.

    config     further settings; state_dir and port given here win
    """

    def __init__(
        self,
        *,
        state_dir: str | Path | None = None,
        port: int = 0,
        config: OrchestratorConfig | None = None,
        registry: CollectorRegistry | None = None,
    ) -> None:
        self._cleanup = ExitStack()
        if state_dir is None:
            state_dir = self._cleanup.enter_context(tempfile.TemporaryDirectory(prefix="blindtail-"))
        self.config = replace(config or OrchestratorConfig(), state_dir=Path(state_dir))
        self.port = port or self.config.port
        self.metrics = OrchestratorMetrics(registry or CollectorRegistry())
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._ready = threading.Event()
        self._failure: BaseException | None = None

    @property
    def address(self) -> str:
        """host:port to dial; stays the same over `stop` and `start`."""
        return f"{self.config.host}:{self.port}"

    def start(self) -> LocalOrchestrator:
        """Returns when edges can attach. Raises `ConfigError`."""
        if self._thread is not None:
            raise StateError("this orchestrator has been started already")
        self._ready.clear()
        self._failure = None
        self._thread = threading.Thread(target=self._run, name="orchestrator", daemon=True)
        self._thread.start()
        if not self._ready.wait(_START_S):
            raise StateError(f"the orchestrator did not start within {_START_S:.0f} s")
        self._raise_failure()
        return self

    def stop(self) -> None:
        """Ends it as an operator would."""
        thread, loop, stop = self._thread, self._loop, self._stop
        if thread is None or loop is None or stop is None:
            return
        loop.call_soon_threadsafe(stop.set)
        thread.join(_START_S)
        self._thread = self._loop = self._stop = None

    def policies(self, credentials: Credentials = INSECURE_LOOPBACK) -> PoliciesClient:
        """An operator's client of it; close it, or use it as a context manager."""
        return PoliciesClient(self.address, credentials)

    def __enter__(self) -> LocalOrchestrator:
        return self.start()

    def __exit__(self, *_: object) -> None:
        try:
            self.stop()
        finally:
            self._cleanup.close()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            self._thread = None
            raise self._failure

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self._failure = error
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        # A port that it finds again when it has been stopped.
        config = replace(self.config, port=self.port or probe_port(self.config.host, 0))
        async with running(config, self.metrics) as (_, self.port):
            self._ready.set()
            await self._stop.wait()


__all__ = ["LocalOrchestrator"]
