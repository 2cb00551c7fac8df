"""Plans: what they say they cost, what an objective chooses, and how close the search comes to the best."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from bench.plans import PREDICTED, searched
from bench.tails import random_layers
from blindtail.bundle import CloudBundle
from blindtail.errors import ConfigError, ModelError
from blindtail.he import plan, schedule
from blindtail.he.backends import open_evaluator
from blindtail.he.clear import ClearEvaluator
from blindtail.he.compiler import NoPlan, compile_plan, compile_tail
from blindtail.he.layers import Layer
from blindtail.he.native_backend import available
from blindtail.he.normal import normalised
from blindtail.he.objective import METRICS, Costs, Objective
from blindtail.he.secret import SecretKey
from blindtail.plan_cli import describe, draw

DEEP, SHALLOW = (300, 64, 32, 10), (128, 32, 10)


def _tail(widths: tuple[int, ...]) -> tuple[list[Layer], np.ndarray]:
    return random_layers(widths), np.random.default_rng(1).uniform(0, 1, (50, widths[0]))


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_close_to_exhaustive_search(seed: int) -> None:
    assert searched(seed) <= PREDICTED


def test_the_search_can_miss() -> None:
    """The control: with a single state handed on, it does."""
    tail = normalised(random_layers((784, 128, 128, 10)))
    (parameters, *_) = plan.rings(5)
    firsts, last = plan.ways_in(tail, parameters, 1)
    found = schedule.search(tail, firsts, parameters, last)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "_BEAM", 2)
        narrow = schedule.search(tail, firsts, parameters, last)
    budget = sorted(s.key_bytes for s in found)[len(found) // 2]
    best, other = (min(s.price for s in some if s.key_bytes <= budget) for some in (found, narrow))
    assert other > best


@pytest.mark.parametrize("widths", [DEEP, SHALLOW, (100, 10)], ids=str)
def test_a_plan_costs_what_its_program_costs(widths: tuple[int, ...]) -> None:
    layers, x = _tail(widths)
    for made in plan.front(layers)[::20]:
        program = compile_plan(layers, x, made)
        costs = plan.costs_of(program)
        assert (costs.key_bytes, costs.uplink_bytes) == (made.costs.key_bytes, made.costs.uplink_bytes)
        assert costs.key_bytes == program.spec.key_bytes
        for name in ("total_s", "online_s", "memory_bytes"):
            assert costs.of(name) == pytest.approx(made.costs.of(name), rel=0.05)
        assert costs.online_s < costs.total_s
        want = normalised(layers)(x[:3])
        assert np.allclose(ClearEvaluator(program).logits(x[:3]), want, atol=1e-9)


@pytest.mark.skipif(not available(), reason="the native backend was not built")
def test_memory_is_what_the_evaluator_takes(tmp_path: Path) -> None:
    program = compile_tail(*_tail(SHALLOW))
    evaluator = open_evaluator("native", program)
    SecretKey.generate(program.spec, tmp_path / "keys")
    head = 4096  # of the prepared file
    prepared = evaluator.prepare_keys(tmp_path / "keys", tmp_path / "prepared") - head
    assert plan.costs_of(program).memory_bytes == evaluator.plain_bytes + prepared  # type: ignore[attr-defined]


@pytest.mark.parametrize("widths", [DEEP, SHALLOW], ids=str)
def test_a_front_holds_no_plan_that_another_beats(widths: tuple[int, ...]) -> None:
    layers, _ = _tail(widths)
    found = plan.front(layers)
    assert len(found) > 10
    for a, b in itertools.permutations(found, 2):
        assert not a.costs.beats(b.costs)
    for metric in METRICS:
        chosen = plan.best(layers, Objective({metric: 1.0}))
        least = min(p.costs.of(metric) for p in found)
        assert chosen.costs.of(metric) <= schedule.CLOSE * least
        assert least <= chosen.costs.of(metric) * 1.02


def test_bounds_are_kept_and_cost_something() -> None:
    layers, x = _tail(DEEP)
    free = plan.best(layers, Objective())
    assert compile_tail(layers, x).spec.keys == compile_tail(layers, x, objective=Objective()).spec.keys
    for metric in ("key_bytes", "memory_bytes"):
        bound = 0.8 * free.costs.of(metric)
        program = compile_tail(layers, x, objective=Objective(at_most={metric: bound}))
        costs = plan.costs_of(program)
        assert costs.of(metric) <= bound
        assert costs.total_s > free.costs.total_s
    both = Objective({"total_s": 1.0, "online_s": 5.0}, {"key_bytes": 1e7, "memory_bytes": 2.6e7})
    assert both.admits(plan.best(layers, both).costs)
    fast = plan.best(layers, Objective({"online_s": 1.0})).costs.online_s
    assert fast <= free.costs.online_s
    slower = Objective({"key_bytes": 1.0}, {"online_s": 1.02 * fast})
    assert plan.best(layers, slower).costs.online_s <= 1.02 * fast


def test_what_cannot_be_had_is_said() -> None:
    layers, x = _tail(SHALLOW)
    with pytest.raises(NoPlan, match=r"key_bytes <= 1000 \(the least is .*\): allow more"):
        compile_tail(layers, x, objective=Objective(at_most={"key_bytes": 1000}))
    costs = [p.costs for p in plan.front(layers)]
    keys, seconds = min(c.key_bytes for c in costs), min(c.total_s for c in costs)
    contradiction = Objective(at_most={"key_bytes": keys, "total_s": seconds})
    with pytest.raises(NoPlan, match="at once, though each can be kept alone"):
        plan.best(layers, contradiction)
    with pytest.raises(ConfigError, match="as a bound of the objective"):
        compile_tail(layers, x, key_budget_bytes=10**7, objective=Objective())
    with pytest.raises(ModelError, match="layers of other sizes"):
        compile_plan(_tail((64, 32, 10))[0], _tail((64, 32, 10))[1], plan.best(layers, Objective()))
    with pytest.raises(ModelError, match="a ciphertext holds"):
        plan.front(random_layers((128, 32, 10)), lanes=4096)


def test_objectives_from_a_command_line() -> None:
    assert dict(Objective.parse().weights) == {"total_s": 1.0}
    wanted = Objective.parse(["total_s", "online_s=2"], ["key_bytes=5e6"])
    assert (dict(wanted.weights), dict(wanted.at_most)) == (
        {"total_s": 1.0, "online_s": 2.0},
        {"key_bytes": 5e6},
    )
    costs = Costs(1.0, 0.5, 10, 5_000_000, 7)
    assert wanted.value(costs) == 2.0
    assert wanted.admits(costs)
    assert not Objective.parse([], ["key_bytes=4e6"]).admits(costs)
    for weights, bounds, words in (
        (["speed"], [], "knows no 'speed': use total_s"),
        (["total_s=fast"], [], "write METRIC=NUMBER"),
        ([], ["key_bytes"], "write METRIC=NUMBER"),
        (["total_s=-1"], [], "none is negative"),
        (["total_s=0"], [], "one is above zero"),
        (["total_s=nan"], [], "finite"),
        ([], ["key_bytes=0"], "above zero"),
        ([], ["key_bytes=nan"], "above zero"),
    ):
        with pytest.raises(ConfigError, match=words):
            Objective.parse(weights, bounds)


def test_the_command_reports_and_draws(tmp_path: Path) -> None:
    program = compile_tail(*_tail(SHALLOW))
    report = json.loads(json.dumps(describe(CloudBundle("m", "1", {1: program}), Objective())))
    found = report["cuts"]["1"]
    assert found["present"] == pytest.approx({name: found["chosen"][name] for name in METRICS}, rel=0.05)
    assert len(found["front"]) > 10
    assert all(math.isfinite(row["total_s"]) for row in found["front"])
    pytest.importorskip("matplotlib")
    draw(report, tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"\.png or \.svg"):
        draw(report, tmp_path / "front.doc")
    with pytest.raises(ConfigError, match="cannot write"):
        draw(report, tmp_path / "nowhere" / "front.png")
