"""Several things measured in turns, so that a busy moment of the machine hits all of them alike."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

#: Seconds of `times` runs of one thing, on its i-th input.
Run = Callable[[int, int], list[float]]

ROUNDS, SLOW_ROUNDS, QUICK_ROUNDS = 20, 3, 3
#: From here on `SLOW_ROUNDS` are enough.
SLOW_S = 1.0
#: A turn lasts about so long, or `_MOST` runs.
_TURN_S, _MOST = 0.05, 5
#: Runs that are not counted open every turn of what takes less than `_SLOWER_S`: others had the caches
#: meanwhile. They last about `_WARM_S`.
_SLOWER_S, _WARM_S, _MOST_WARM = 0.5, 0.003, 50


def clocked(call: Callable[[int], Any]) -> Run:
    """A call of this process, as a `Run`."""

    def run(index: int, times: int) -> list[float]:
        found = []
        for _ in range(times):
            start = time.perf_counter()
            call(index)
            found.append(time.perf_counter() - start)
        return found

    return run


def interleaved(
    runs: Mapping[str, Run],
    quick: bool = False,
    failed: Callable[[str, Exception], None] | None = None,
    expected: type[Exception] | tuple[type[Exception], ...] = (),
) -> dict[str, list[float]]:
    """Seconds of each, in turns whose order rotates and turns around.

    A first run of each, not counted, says how long it takes: `SLOW_ROUNDS` turns
    spread over the whole time from `SLOW_S` up, else `ROUNDS`, and several runs a turn
    when they are short. One that raises an `expected` error goes to `failed` and is left out.
    """
    rounds = QUICK_ROUNDS if quick else ROUNDS
    live: dict[str, Run] = dict(runs)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    turns: dict[str, int] = {}
    times: dict[str, int] = {}
    warm: dict[str, int] = {}

    def turn(name: str, index: int, count: int) -> list[float]:
        try:
            return live[name](index, count)
        except expected as error:
            del live[name], seconds[name]
            if failed is not None:
                failed(name, error)
            return []

    for name in runs:
        if not (first := turn(name, 0, 1)):
            continue
        turns[name] = min(rounds, SLOW_ROUNDS if first[0] > SLOW_S else rounds)
        times[name] = max(1, min(_MOST, math.ceil(_TURN_S / max(first[0], 1e-9))))
        short = first[0] < _SLOWER_S
        warm[name] = min(_MOST_WARM, math.ceil(_WARM_S / max(first[0], 1e-9))) if short else 0
    for i in range(rounds):
        order = [name for name in runs if name in live][:: -1 if i % 2 else 1]
        start = i % max(1, len(order))
        for name in order[start:] + order[:start]:
            done = i * turns[name] // rounds
            if (i + 1) * turns[name] // rounds == done:
                continue  # not this round
            if name in live and (found := turn(name, i, warm[name] + times[name])):
                seconds[name] += found[warm[name] :]
    return seconds


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """The fields `n` and `spread` of a row whose value is the median."""
    low, high = np.percentile(seconds, [5, 95])
    return {"n": len(seconds), "spread": float(high - low)}


def median_ratio(a: Sequence[float], b: Sequence[float]) -> float:
    return statistics.median(a) / statistics.median(b)


def cores(count: int) -> tuple[int, ...]:
    """`count` of the cores that this process may use, the last ones; all when there are fewer."""
    return tuple(sorted(os.sched_getaffinity(0))[::-1][:count])


@contextmanager
def pinned(to: Sequence[int]) -> Iterator[None]:
    """This thread on these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, to)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def pin_workers(to: Sequence[int]) -> Iterator[None]:
    """Threads that are born inside get a core each, from the second of `to` on; this thread has the first."""
    before = set(os.listdir("/proc/self/task"))
    os.sched_setaffinity(0, to[:1])
    yield
    born = sorted(set(os.listdir("/proc/self/task")) - before, key=int)
    for i, thread in enumerate(born):
        os.sched_setaffinity(int(thread), [to[(i + 1) % len(to)]])
