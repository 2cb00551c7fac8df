"""The head of one request: stages and exits run, their times booked and learned."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from blindtail.bundle import EdgeBundle
from edge.executor import HeadExecutor, softmax
from edge.latency import LatencyBook
from edge.request import Clock, Request

Activation = NDArray[np.float32]


class Stages:
    """Thread-safe, as the executor is."""

    def __init__(self, bundle: EdgeBundle, head: HeadExecutor, latencies: LatencyBook, clock: Clock) -> None:
        self._bundle, self._head, self._latencies, self._clock = bundle, head, latencies, clock
        self._exit_after = {e.after_stage: i for i, e in enumerate(bundle.exits)}

    def run(self, request: Request, stage: int, x: Activation) -> Activation:
        """The activation after `stage`; the exit there, if there is one, has been seen."""
        start_s = self._clock()
        x = self._head.run_stage(stage, x)
        now_s = self._clock()
        request.add("head", now_s - start_s)
        self._latencies.observe(f"stage{stage}", now_s - start_s, now_s)
        self._run_exit(request, stage, x)
        return x

    def ensure_exit(self, request: Request, stage: int, x: Activation) -> None:
        """When no exit has been seen yet, runs the head on to the next one."""
        while not request.exits and stage + 1 < len(self._bundle.stages):
            stage += 1
            x = self.run(request, stage, x)

    def _run_exit(self, request: Request, stage: int, x: Activation) -> None:
        index = self._exit_after.get(stage)
        if index is None:
            return
        start_s = self._clock()
        logits = self._head.run_exit(index, x)
        request.see(index, softmax(logits, self._bundle.exits[index].temperature))
        now_s = self._clock()
        request.add("exits", now_s - start_s)
        self._latencies.observe(f"exit{index}", now_s - start_s, now_s)
