"""What counting costs: microseconds of metrics for each answered and each evaluated request.

The calls that `EdgeRuntime` and a cell's gateway make for one request, on series that
exist already, as in a process that has been up for a while. Batches of calls are timed
and an empty loop of the same length is subtracted; a batch is one measurement. The same
edge batches are timed twice, which shows the machine's own noise. `scrape` is the other
side: what one scrape takes from the process. An evaluator's own counters, which come with
each of its replies, are part of what an evaluated request costs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
from prometheus_client import CollectorRegistry, generate_latest

from bench.rows import Row, row
from blindtail.metrics import CloudMetrics, EdgeMetrics, EvaluatorCounters
from cloud.engine import Engine

SOURCES = ("bench/metrics.py", "blindtail/metrics/*.py", "cloud/engine.py")
TARGET_US = 10.0
#: Calls timed together: the clock's own cost vanishes, a preemption stays visible.
BATCH = 500
#: What is written between two cold calls.
CACHE_BYTES = 8_000_000
_COLD = "single calls, 8 MB written before each"


def rows(args: argparse.Namespace) -> list[Row]:
    batches = 40 if args.quick else 400
    edge_registry, cloud_registry = CollectorRegistry(), CollectorRegistry()
    edge, cloud = EdgeMetrics(edge_registry, "fashion"), CloudMetrics(cloud_registry)
    edge.watch(lambda: {1: "ready"})
    cloud.watch(
        queue_depth=lambda: 0,
        backlog_s=lambda: 0,
        sessions=lambda: 1,
        key_store_bytes=lambda: 1,
        evaluators=lambda: 2,
        restarts=lambda: 0,
        counters=lambda: {0: EvaluatorCounters(), 1: EvaluatorCounters()},
    )

    def exit_answer() -> None:
        edge.answered("exit1", 0.002, None, 0, 0)

    def tail_answer() -> None:
        edge.answered("tail", 0.035, None, 122_996, 25_000)

    def fallback() -> None:
        edge.answered("exit2", 0.5, "deadline", 122_996, 0)

    engine = Engine({}, "clear", 1)

    def evaluated() -> None:
        EvaluatorCounters(*tuple(engine.counters))  # in the evaluator, and back in the gateway
        cloud.waited(0.0004)
        cloud.evaluated("fashion", "ok", 0.006, "1")

    tail = _microseconds(tail_answer, batches)
    return [
        _row("edge, an answer from an exit", _microseconds(exit_answer, batches)),
        _row("edge, an answer from the tail", tail),
        _row(
            "edge, an answer from the tail, again", _microseconds(tail_answer, batches), "the machine's noise"
        ),
        _row("edge, a fallback", _microseconds(fallback, batches)),
        _row("edge, an answer from the tail, cold", _cold(tail_answer, 5 * batches), _COLD),
        _row("cell, a request evaluated", _microseconds(evaluated, batches)),
        _row("cell, a request evaluated, cold", _cold(evaluated, 5 * batches), _COLD),
        _scrape("edge, one scrape", edge_registry, batches),
        _scrape("cell, one scrape", cloud_registry, batches),
    ]


def _microseconds(call: Callable[[], None], batches: int) -> list[float]:
    """Of one call, by batch."""
    made = []
    for _ in range(batches + 1):
        start_s = time.perf_counter()
        for _ in range(BATCH):
            call()
        spent_s = time.perf_counter() - start_s
        start_s = time.perf_counter()
        for _ in range(BATCH):
            _nothing()
        made.append(1e6 * (spent_s - (time.perf_counter() - start_s)) / BATCH)
    return made[1:]  # the first one makes the series


def _cold(call: Callable[[], None], calls: int) -> list[float]:
    """Of single calls, each after other work has taken the processor's caches."""
    other = np.zeros(CACHE_BYTES // 8)
    made = []
    for _ in range(calls):
        spent = []
        for timed in (call, _nothing):
            other += 1
            start_s = time.perf_counter()
            timed()
            spent.append(time.perf_counter() - start_s)
        made.append(1e6 * (spent[0] - spent[1]))
    return made


def _nothing() -> None:
    """What a call costs without metrics."""


def _row(name: str, microseconds: list[float], note: str = "") -> Row:
    low, p50, p95 = np.percentile(microseconds, [5, 50, 95])
    return row(
        f"{name}, p50",
        float(p50),
        "us",
        target=TARGET_US,
        n=len(microseconds),
        spread=float(p95 - low),
        note=note or f"batches of {BATCH} calls; slowest batch {max(microseconds):.1f} us",
    )


def _scrape(name: str, registry: CollectorRegistry, batches: int) -> Row:
    seconds = []
    for _ in range(batches):
        start_s = time.perf_counter()
        text = generate_latest(registry)
        seconds.append(time.perf_counter() - start_s)
    low, p50, p95 = np.percentile(seconds, [5, 50, 95])
    return row(
        f"{name}, p50",
        float(p50),
        "s",
        n=batches,
        spread=float(p95 - low),
        note=f"{len(text):,} bytes of text",
    )
