"""The planner: its choice beside exhaustive search, and its five best plans measured.

Networks are small and random for the search, within budgets of keys from tight to
loose; measured are A, B, C, D and a narrow one: the five best plans that differ by
more than their last fold, encrypted, on `native`, in turns.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence

import numpy as np

from bench.interleave import Run, clocked, interleaved, median_ratio
from bench.rows import Row, row
from bench.tails import Client, dense_or_conv, random_layers
from blindtail.he import plan, schedule
from blindtail.he.backends import settle
from blindtail.he.compiler import compile_plan
from blindtail.he.layers import Layer
from blindtail.he.normal import normalised
from blindtail.he.objective import Objective

SOURCES = (
    "blindtail/he/*.py",
    "native/src/*",
    "bench/interleave.py",
    "bench/plans.py",
    "bench/tails.py",
)
_SEARCHED, _RUN = 40, 5
#: The choice is at most so much worse than the best there is, in the model and measured.
PREDICTED, MEASURED = 1.05, 1.15


def rows(args: argparse.Namespace) -> list[Row]:
    made = [_searched(_SEARCHED // (4 if args.quick else 1))]
    for name, layers, x in _networks():
        made.append(_measured(name, layers, x, bool(args.quick)))
    return made


def searched(seed: int) -> float:
    """The choice's predicted time over that of exhaustive search, the worst of several budgets of keys."""
    rng = np.random.default_rng(seed)
    maps, lanes = (2, int(rng.choice([1, 4, 16]))) if seed % 2 else (3, int(rng.choice([16, 64, 128])))
    widest = 4096 // lanes
    widths = [int(rng.integers(4, min(widest, 1000))), *rng.integers(2, min(widest, 64), maps).tolist()]
    tail = normalised(random_layers(widths, seed))
    (parameters, *_) = plan.rings(2 * maps - 1)
    firsts, last = plan.ways_in(tail, parameters, lanes)
    every = schedule.search(tail, firsts, parameters, last, exhaustive=True)
    found = schedule.search(tail, firsts, parameters, last)
    sizes = sorted({state.key_bytes for state in every})
    worst = 1.0
    for budget in (sizes[0], sizes[len(sizes) // 4], sizes[len(sizes) // 2], sizes[-1]):
        least = min(state.price for state in every if state.key_bytes <= budget)
        fitting = [state for state in found if state.key_bytes <= budget]
        if not fitting:
            return float("inf")
        worst = max(worst, schedule.cheapest(fitting).price / least)
    return worst


def _searched(count: int) -> Row:
    found = [searched(seed) for seed in range(count)]
    return row(
        "chosen over exhaustive search, predicted seconds, worst",
        max(found),
        "1",
        target=PREDICTED,
        n=count,
        note=f"{sum(ratio > 1 for ratio in found)} of them above 1; 2% are given up for fewer keys",
    )


def _networks() -> Iterator[tuple[str, list[Layer], np.ndarray]]:
    for name in "ABCD":
        net = dense_or_conv(name)
        yield name, net.layers, net.calibration
    narrow = random_layers((200, 30, 12))
    yield "200-30-12", narrow, np.random.default_rng(1).uniform(0, 1, (200, 200))


def _measured(name: str, layers: Sequence[Layer], x: np.ndarray, quick: bool) -> Row:
    """The chosen plan and the next best ones, each on keys of its own, in turns."""
    backend = settle("auto")
    chosen = plan.best(layers, Objective(at_most={"key_bytes": 30e6}))
    best = plan.ranked(layers, Objective(at_most={"key_bytes": 30e6}))
    picked = [chosen]
    for other in best:
        if len(picked) == _RUN:
            break
        if all(_unlike(other, held) for held in picked):
            picked.append(other)
    runs: dict[str, Run] = {}
    for i, made in enumerate(picked):
        program = compile_plan(layers, x, made)
        client = Client.of(program, backend)
        request = client.encryptor.encrypt(x[0])
        runs[str(i)] = clocked(lambda _, c=client, r=request: c.evaluate(backend, r))  # type: ignore[misc]
    runs["again"] = runs["0"]
    seconds = interleaved(runs, quick)
    fastest = min(runs, key=lambda key: statistics.median(seconds[key]))
    noise = abs(median_ratio(seconds["again"], seconds["0"]) - 1)
    predicted = ", ".join(f"{1e3 * p.costs.total_s:.2f}" for p in picked)
    took = ", ".join(f"{1e3 * statistics.median(seconds[str(i)]):.2f}" for i in range(len(picked)))
    return row(
        f"{name}: chosen over the fastest of its {len(picked)} best plans, measured",
        median_ratio(seconds["0"], seconds[fastest]),
        "1",
        target=MEASURED,
        n=len(seconds["0"]),
        note=f"predicted {predicted} ms; measured {took} ms; machine's noise {100 * noise:.1f}%",
    )


def _unlike(a: plan.Plan, b: plan.Plan) -> bool:
    """Other rotations or sums: not only other folds, whose order changes next to nothing."""

    def shape(made: plan.Plan) -> list[tuple[object, ...]]:
        return [(s.arrangement.kind, s.baby, s.arrangement.offsets, len(s.folds)) for s in made.steps]

    return a.complex_slots != b.complex_slots or shape(a) != shape(b)
