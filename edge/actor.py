"""EdgeActor: one `EdgeRuntime` in a process of its own, inside the site's Ray cluster."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import ray
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry

from blindtail.bundle import EdgeBundle
from blindtail.errors import ConfigError
from blindtail.metrics import EdgeMetrics, expiry, serve_metrics
from blindtail.records import Answer
from edge.config import EdgeConfig
from edge.runtime import EdgeRuntime

_log = logging.getLogger(__name__)


class EdgeActor:
    """Answers images; knows no more than an `EdgeRuntime` does. Restarted when it dies.

    Several actors of a site share one state directory, and so one key set. `index`
    is the actor's place in the site: its metrics have a port of their own.
    """

    def __init__(self, config: EdgeConfig, index: int = 0) -> None:
        bundle = EdgeBundle.open(config.model)
        registry = CollectorRegistry()
        metrics = EdgeMetrics(registry, bundle.model)
        if config.tls is not None:
            metrics.watch_certificate(expiry(config.tls.certificate))
        self._runtime = EdgeRuntime.open(bundle, metrics=metrics, **config.runtime_settings())
        self._stop_metrics = _serve(config.metrics_host, config.metrics_port_of(index), registry)

    async def pid(self) -> int:
        return os.getpid()

    async def wait_ready(self, timeout_s: float) -> bool:
        """True when offloads are possible within `timeout_s` (always, for a site without a cloud)."""
        return await asyncio.to_thread(self._runtime.wait_ready, timeout_s)

    async def infer(self, image: NDArray[Any], deadline_s: float | None = None) -> Answer:
        """(C, H, W) -> answer. Raises `InputError` for a bad image."""
        return await self._runtime.infer_async(image, deadline_s)

    async def status(self) -> dict[str, Any]:
        """`RuntimeStatus` as plain data; states as their text."""
        status = asdict(self._runtime.status())
        for tail in status["tails"].values():
            tail["state"] = tail["state"].value
        return status

    async def close(self) -> None:
        await asyncio.to_thread(self._stop_metrics)
        await asyncio.to_thread(self._runtime.close)


def _serve(host: str, port: int, registry: CollectorRegistry) -> Callable[[], None]:
    """Serves metrics where that can be; a restarted actor answers images also where it cannot."""
    if not port:
        return lambda: None
    try:
        return serve_metrics(host, port, registry)
    except ConfigError as error:
        _log.error("%s", error)
        return lambda: None


def start_actor(name: str, config: EdgeConfig, index: int = 0) -> Any:
    """A handle to a new EdgeActor in the Ray cluster of this process; `index` is its place in the site."""
    options = {"name": name, "num_cpus": 0, "max_restarts": 3, "max_task_retries": 1}
    return ray.remote(**options)(EdgeActor).remote(config, index)
