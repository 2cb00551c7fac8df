"""EdgeActor: one `EdgeRuntime` in a process of its own, inside the site's Ray cluster."""

from __future__ import annotations

import asyncio
import os
from dataclasses import asdict
from typing import Any

import ray
from numpy.typing import NDArray

from blindtail.records import Answer
from edge.config import EdgeConfig
from edge.runtime import EdgeRuntime


class EdgeActor:
    """Answers images; knows no more than an `EdgeRuntime` does. Restarted when it dies.

    Several actors of a site share one state directory, and so one key set.
    """

    def __init__(self, config: EdgeConfig) -> None:
        self._runtime = EdgeRuntime.open(config.model, **config.runtime_settings())

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
        await asyncio.to_thread(self._runtime.close)


def start_actor(name: str, config: EdgeConfig) -> Any:
    """A handle to a new EdgeActor in the Ray cluster of this process."""
    options = {"name": name, "num_cpus": 0, "max_restarts": 3, "max_task_retries": 1}
    return ray.remote(**options)(EdgeActor).remote(config)
