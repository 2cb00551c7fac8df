"""One ciphertext a value or several: the common front, and that the choice shown is what is compiled."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bench.tails import random_layers
from blindtail.errors import ModelError
from blindtail.he import choice, plan
from blindtail.he.compiler import NoPlan, compile_tail
from blindtail.he.objective import METRICS, Costs, Objective
from blindtail.he.plan import Plan
from blindtail.he.slotmaps import TooWide
from blindtail.he.tiling import Tiling

#: N = 4096 has 2048 slots, 8192 has 4096: the first's activation does not fit, the second's hidden layer.
WIDE, HIDDEN, SMALL = (9000, 10), (20, 4200, 4), (128, 32, 10)


@pytest.mark.parametrize(("widths", "n"), [(WIDE, 4096), (HIDDEN, 8192)], ids=str)
def test_both_kinds_share_a_front(widths: tuple[int, ...], n: int) -> None:
    layers = random_layers(widths)
    found = choice.front(layers)
    several = [made for made in found if isinstance(made, Tiling)]
    assert several
    assert any(isinstance(made, Plan) for made in found)
    for made in several:
        row = choice.describe(made)
        assert (row["ring_degree"], max(row["ciphertexts"]) > 1) == (n, True)
        assert row["ciphertexts"] == [len(value.tiles) for value in made.values]
        assert len(row["values"]) == len(widths)
        assert {*METRICS, "prime_bits", "lanes", "complex_slots"} <= set(row)
    for a, b in itertools.permutations(found, 2):
        assert not a.costs.beats(b.costs)
    assert found == sorted(found, key=lambda made: made.costs.total_s)


def test_what_several_ciphertexts_beat_leaves_the_front(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = random_layers(WIDE)
    one = plan.best(layers, Objective())
    for factor, stays in ((1, True), (1000, False)):
        costs = Costs(*(factor * getattr(one.costs, name) for name in METRICS))
        made = replace(one, costs=costs)
        monkeypatch.setattr(plan, "front", lambda *_, made=made, **__: [made])
        assert (made in choice.front(layers)) == stays


@pytest.mark.parametrize(
    "objective",
    [
        *(Objective({metric: 1.0}) for metric in ("total_s", "online_s", "key_bytes", "memory_bytes")),
        Objective(at_most={"key_bytes": 4e5}),  # no plan in one ciphertext has so few
    ],
    ids=lambda objective: str(objective.to_json()),
)
def test_what_is_shown_is_what_is_compiled(objective: Objective) -> None:
    layers = random_layers(WIDE)
    made = choice.best(layers, objective)
    program = compile_tail(layers, np.random.default_rng(0).normal(size=(4, WIDE[0])), objective=objective)
    costs = plan.costs_of(program)
    assert objective.admits(costs)
    assert (program.spec.input_ciphertexts > 1) == isinstance(made, Tiling)
    assert (costs.key_bytes, costs.uplink_bytes) == (made.costs.key_bytes, made.costs.uplink_bytes)
    near = 1e-9 if isinstance(made, Tiling) else 0.05
    for name in ("total_s", "online_s", "memory_bytes"):
        assert costs.of(name) == pytest.approx(made.costs.of(name), rel=near)


@pytest.mark.parametrize(
    "objective",
    [
        Objective(at_most={"uplink_bytes": 90_000}),  # what primes of the usual size do not keep
        Objective(at_most={"error": 1.0}),
        Objective({"uplink_bytes": 1.0}, {"disagreement": 0.2}),
    ],
    ids=lambda objective: str(objective.to_json()),
)
def test_where_errors_count_several_ciphertexts_are_compiled_too(objective: Objective) -> None:
    layers = random_layers(WIDE)
    x = np.random.default_rng(0).normal(size=(20, WIDE[0]))
    program = compile_tail(layers, x, objective=objective)
    costs = plan.costs_of(program)
    assert objective.admits(costs)
    assert program.spec.input_ciphertexts == 3
    try:
        alone = plan.best(layers, objective).costs
    except NoPlan:  # the smallest ring that holds it in one ciphertext sends more
        assert "uplink_bytes" in objective.at_most
    else:
        assert objective.value(costs) < objective.value(alone)
    assert isinstance(choice.best(layers, objective), Tiling)


def test_bounds_that_one_ciphertext_breaks_are_kept_by_several() -> None:
    layers, bound = random_layers(WIDE), Objective(at_most={"key_bytes": 4e5})
    with pytest.raises(NoPlan):
        plan.best(layers, bound)
    assert bound.admits(choice.best(layers, bound).costs)
    with pytest.raises(NoPlan, match=r"key_bytes <= 1000 \(the least is"):
        choice.best(layers, Objective(at_most={"key_bytes": 1000}))


def test_a_small_tail_has_the_front_that_it_had() -> None:
    layers = random_layers(SMALL)
    found, before = choice.front(layers), plan.front(layers)
    assert [choice.describe(made) for made in found] == [made.describe() for made in before]
    wanted = Objective()
    assert choice.best(layers, wanted).costs == plan.best(layers, wanted).costs


def test_where_nothing_can_be_tiled_the_front_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> Tiling:
        raise ModelError("more than 64 ciphertexts")

    monkeypatch.setattr(choice.tiling, "choose", refused)
    layers = random_layers(WIDE)
    assert _costs(choice.front(layers)) == _costs(plan.front(layers))
    with pytest.raises(TooWide):
        choice.front(layers, ring_degree=4096)


def test_a_ring_in_which_only_tiles_fit() -> None:
    found = choice.front(random_layers(WIDE), ring_degree=4096)
    assert found
    assert all(isinstance(made, Tiling) for made in found)


def test_large_tails_are_tiled_only_where_they_must(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_LARGE", 1000)
    layers = random_layers(WIDE)
    assert all(isinstance(made, Plan) for made in choice.front(layers))
    assert isinstance(choice.best(layers, Objective()), Plan)
    assert isinstance(choice.best(layers, Objective(), ring_degree=4096), Tiling)


def _costs(found: list[Any]) -> list[Costs]:
    return [made.costs for made in found]
