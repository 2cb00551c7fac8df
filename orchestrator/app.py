"""`serve`: one orchestrator, from start to clean end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from blindtail.announce import write_json
from blindtail.metrics import OrchestratorMetrics, expiry, serve_metrics
from orchestrator.config import OrchestratorConfig
from orchestrator.controller import Controller
from orchestrator.servicer import ControlServer
from orchestrator.store import Store

_log = logging.getLogger(__name__)


def serve(
    config: OrchestratorConfig,
    *,
    announce: Path | None = None,
    on_ready: Callable[[Mapping[str, Any]], None] = lambda announced: None,
) -> int:
    """Runs an orchestrator until SIGTERM or SIGINT. Call it on the main thread. Returns the exit code.

    `announce` is written atomically once edges can attach, and removed at the end; `on_ready`
    gets the same content: {"address", "port", "metrics_port", "pid"}. Raises `ConfigError`
    for a port that is taken, wrong TLS files, or a state directory that cannot be used.
    """
    if announce is not None:
        announce.unlink(missing_ok=True)
    try:
        return asyncio.run(_serve(config, announce, on_ready))
    finally:
        if announce is not None:
            announce.unlink(missing_ok=True)


async def _serve(
    config: OrchestratorConfig, announce: Path | None, on_ready: Callable[[Mapping[str, Any]], None]
) -> int:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with running(config, OrchestratorMetrics(CollectorRegistry())) as (_, port):
        host = f"[{config.host}]" if ":" in config.host else config.host
        announced = {
            "address": f"{host}:{port}",
            "port": port,
            "metrics_port": config.metrics_port or 0,
            "pid": os.getpid(),
        }
        if announce is not None:
            write_json(announce, announced)
        on_ready(announced)
        await stop.wait()
    return 0


@asynccontextmanager
async def running(
    config: OrchestratorConfig, metrics: OrchestratorMetrics
) -> AsyncIterator[tuple[Controller, int]]:
    """An orchestrator on this loop: (controller, port). Raises `ConfigError`."""
    metrics.watch_certificate(expiry(config.tls.certificate if config.tls else None))
    store = await asyncio.to_thread(Store, config.state_dir)
    controller = Controller(config, store, metrics)
    server: ControlServer | None = None
    stop_metrics: Callable[[], None] | None = None
    try:
        await controller.start()
        if config.metrics_port:
            stop_metrics = serve_metrics(config.host, config.metrics_port, metrics.registry)
        server = ControlServer(controller)
        yield controller, await server.start()
    finally:
        if server is not None:
            await server.stop(config.shutdown_grace_s)
        if stop_metrics is not None:
            await asyncio.to_thread(stop_metrics)
        await controller.close()


__all__ = ["running", "serve"]
