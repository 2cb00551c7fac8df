"""Baby steps, fold groups and arrangements: exact for any split, fast within a budget of keys."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from bench.tails import random_layers
from blindtail.errors import BundleError, ModelError
from blindtail.he import cost, schedule, slotmaps
from blindtail.he.clear import ClearEvaluator
from blindtail.he.compatible import differences
from blindtail.he.compiler import compile_tail
from blindtail.he.container import HEADER_BYTES, key_bytes
from blindtail.he.elementwise import SquareOp
from blindtail.he.frontend import fold_tail
from blindtail.he.layers import Affine, FloatArray, Layer
from blindtail.he.normal import normalised
from blindtail.he.operations import MapOp, fold
from blindtail.he.params import Parameters
from blindtail.he.program import Program
from blindtail.models.layers import Square
from tests.he_cases import CASES, Case, activations, layers, program

#: What a request may take on the reference core with `native`, seconds, and the sizes it may have.
TARGETS = {
    "A": (0.020, 185_000, 45_000_000),
    "B": (0.006, 123_500, 15_000_000),
    "C": (0.016, 185_000, 30_000_000),
}


def _convolutional() -> list[Layer]:
    torch.manual_seed(0)
    tail = nn.Sequential(
        nn.Conv2d(1, 4, 7, stride=3), Square(), nn.Flatten(), nn.Linear(256, 64), Square(), nn.Linear(64, 10)
    )
    return fold_tail(tail, (1, 28, 28))


@lru_cache(maxsize=4)
def net(name: str) -> tuple[list[Layer], Program]:
    widths = {"B": (512, 128, 10), "C": (784, 128, 128, 10)}
    made = random_layers(widths[name]) if name in widths else _convolutional()
    return made, compile_tail(made, _inputs(made, 50))


def _inputs(made: list[Layer], count: int) -> FloatArray:
    assert isinstance(made[0], Affine)
    return np.random.default_rng(1).uniform(0, 1, (count, made[0].weight.shape[1]))


def _maps(compiled: Program) -> list[MapOp]:
    return [op for op in compiled.ops if isinstance(op, MapOp)]


@pytest.mark.parametrize("name", TARGETS)
def test_the_nets_of_the_comparison_keep_their_targets(name: str) -> None:
    seconds, uplink_bytes, keys = TARGETS[name]
    made, compiled = net(name)
    assert compiled.predicted_s("native") < seconds
    assert compiled.spec.uplink_bytes <= uplink_bytes
    assert compiled.spec.key_bytes <= min(keys, schedule.default_budget(compiled.spec.parameters))
    x = _inputs(made, 3)
    assert np.allclose(ClearEvaluator(compiled).logits(x), normalised(made)(x), atol=1e-9)


def test_a_choice_takes_little_time() -> None:
    made = normalised(net("C")[0])
    parameters = Parameters.create(5)
    start = time.process_time()  # of this process alone: the machine may be busy
    firsts = slotmaps.first_maps(made.maps[0].weight, parameters.slots, 1)
    schedule.choose(made, firsts, parameters, 16)
    assert time.process_time() - start < 1


def test_channels_of_a_convolution_share_what_they_read() -> None:
    """49 pixels for each of 64 windows fill half the slots, as complex numbers; four channels need two."""
    first = _maps(net("A")[1])[0]
    assert (first.stride, first.offsets, len(first.diagonals)) == (64, 128, 2)
    assert sum(len(group) for group in first.folds) <= 7
    assert all(k % 64 == 0 for k in first.diagonals)
    made = net("A")[0]
    assert isinstance(made[0], Affine)
    dense = replace(made[0], weight=np.where(made[0].weight == 0, 1e-9, made[0].weight))
    wide = compile_tail([dense, *made[1:]], _inputs(made, 50))
    assert _maps(wide)[0].offsets == 26  # 392 complex slots, 10 copies: ceil(256 / floor(4096 / 392))
    assert wide.predicted_s("native") > 1.5 * net("A")[1].predicted_s("native")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_random_convolutions_compute_what_their_layers_say(data: st.DataObject) -> None:
    size, kernel = data.draw(st.integers(3, 12)), data.draw(st.integers(1, 3))
    stride, padding = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 1))
    inputs, channels = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 6))
    lanes = data.draw(st.sampled_from([1, 1, 2]))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    convolution = nn.Conv2d(inputs, channels, kernel, stride=stride, padding=padding)
    width = convolution(torch.zeros(1, inputs, size, size)).numel()
    tail = nn.Sequential(convolution, Square(), nn.Flatten(), nn.Linear(width, 5))
    made = fold_tail(tail, (inputs, size, size))
    compiled = compile_tail(made, _inputs(made, 20), lanes=lanes)
    x = _inputs(made, 3)
    assert np.allclose(ClearEvaluator(compiled).logits(x), normalised(made)(x), atol=1e-9)
    assert Program.from_parts(*compiled.to_parts()).spec == compiled.spec


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 256), st.integers(1, 512), st.sampled_from([256, 512, 1024]))
def test_the_layout_at_the_cut_needs_the_fewest_offsets(rows: int, size: int, positions: int) -> None:
    period = slotmaps.power_of_two(rows)
    if max(period, slotmaps.power_of_two(size)) > positions:
        return
    (_, made), *halved = slotmaps.first_maps(np.ones((rows, size)), positions, 1)
    assert made.offsets == max(1, -(-period // (positions // size)))
    for layout, other in halved:
        assert other.complex_input
        assert layout.imaginary is not None
        assert other.offsets == max(1, -(-period // (positions // -(-size // 2))))
    assert len(halved) == (size > 1)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 8), st.data())
def test_the_conjugate_is_one_step_of_any_group(bits: list[int], step: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    values = rng.integers(0, 1 << 20, 64) + 1j * rng.integers(0, 1 << 20, 64)
    place = data.draw(st.integers(0, len(bits) - 1))
    groups = slotmaps.fold_groups(step, bits, place)
    assert [len(group) for group in groups] == [(1 << b) - 1 for b in bits]
    plain = slotmaps.fold_groups(step, [1] * (sum(bits) - 1))
    assert (fold(values, groups) == 2 * fold(values.real, plain)).all()
    assert (fold(values, plain).imag != 0).any()  # the control


@given(st.lists(st.integers(1, 4), max_size=4), st.integers(1, 8), st.integers(0, 99))
def test_fold_groups_do_what_doubling_does(bits: list[int], step: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 1 << 20, 64).astype(np.float64)
    doubling = slotmaps.fold_groups(step, [1] * sum(bits))
    assert [len(group) for group in slotmaps.fold_groups(step, bits)] == [(1 << b) - 1 for b in bits]
    assert (fold(values, slotmaps.fold_groups(step, bits)) == fold(values, doubling)).all()
    if doubling:
        assert (fold(values, doubling[:-1]) != fold(values, doubling)).any()  # the control


@pytest.mark.parametrize("baby", [1, 3, 5, 8])
@pytest.mark.parametrize(
    ("bits", "conjugating"), [((6,), 0), ((1, 5), 0), ((2, 2, 2), 1), ((1,) * 6, 5), ((1,) * 6, 2)], ids=str
)
def test_any_split_computes_the_same(baby: int, bits: tuple[int, ...], conjugating: int) -> None:
    compiled = net("B")[1]
    first, *rest = compiled.ops
    assert isinstance(first, MapOp)
    assert first.in_layout.imaginary is not None
    other = replace(first, baby=baby, folds=slotmaps.fold_groups(128, bits, conjugating))
    other.check()
    moved = Program(compiled.spec, (other, *rest))
    x = _inputs(net("B")[0], 2)
    assert np.allclose(ClearEvaluator(moved).logits(x), ClearEvaluator(compiled).logits(x), atol=1e-9)
    assert set(other.rotations()) == {*range(1, baby), *([baby] if baby < 8 else [])} | {
        f for group in other.folds for f in group
    }
    for left_out in range(len(bits)):
        with pytest.raises(ModelError, match="does not compute the map"):
            replace(other, folds=(*other.folds[:left_out], *other.folds[left_out + 1 :])).check()


def test_fewer_keys_cost_time_and_a_budget_is_kept() -> None:
    made, free = net("C")
    x = _inputs(made, 50)
    seconds, before = 0.0, 1 << 60
    for budget in (30_000_000, 18_000_000, 12_000_000, 9_000_000):
        compiled = compile_tail(made, x, key_budget_bytes=budget)
        assert compiled.spec.key_bytes <= budget
        assert compiled.spec.key_bytes < before
        assert compiled.predicted_s("native") > seconds
        seconds, before = compiled.predicted_s("native"), compiled.spec.key_bytes
    assert compile_tail(made, x, key_budget_bytes=200_000_000).spec.keys == free.spec.keys
    with pytest.raises(schedule.KeysTooLarge, match="bytes at least, the budget is 1,000,000"):
        compile_tail(made, x, key_budget_bytes=1_000_000)


def test_of_close_choices_the_one_with_fewer_keys() -> None:
    tail, parameters = normalised(net("B")[0]), Parameters.create(3)
    firsts = slotmaps.first_maps(tail.maps[0].weight, parameters.slots, 1)
    states = schedule.search(tail, firsts, parameters, 16)
    fastest = min(states, key=lambda s: s.price)
    spec = net("B")[1].spec
    assert spec.key_bytes < fastest.key_bytes
    assert spec.key_bytes == min(s.key_bytes for s in states if s.price <= schedule.CLOSE * fastest.price)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_key_bytes_are_those_of_the_container(case: Case) -> None:
    spec = program(case).spec
    one = sum(schedule.key_bytes(spec.parameters, key.level) for key in spec.keys)
    assert HEADER_BYTES + one == key_bytes(spec) == spec.key_bytes


@pytest.mark.parametrize("budget", [4_000_000, 6_000_000, None])
def test_a_tail_for_held_keys_needs_exactly_those(budget: int | None) -> None:
    case = Case((512, 128, 10))
    x = activations(case, 100)
    held = compile_tail(layers(case), x, key_budget_bytes=budget)
    *rest, last = layers(case, 5)
    assert isinstance(last, Affine)
    fresh = compile_tail([*rest, replace(last, weight=last.weight / 4)], x, like=held.spec)
    assert differences(fresh.spec, held.spec) == []
    assert fresh.spec.program_id != held.spec.program_id


def test_a_convolution_retrained_takes_the_place_of_another() -> None:
    made, held = net("A")
    first, *rest = made
    assert isinstance(first, Affine)
    x = _inputs(made, 50)
    fresh = compile_tail([replace(first, weight=first.weight * 0.9), *rest], x, like=held.spec)
    assert differences(fresh.spec, held.spec) == []
    # Dense weights in its place read other elements: devices' layout does not serve them.
    dense = replace(first, weight=first.weight * 0.9 + 1e-9)
    with pytest.raises(ModelError, match=r"differs in .*input_layout"):
        compile_tail([dense, *rest], x, like=held.spec)


def test_counts_on_paper() -> None:
    """Net B: level 3 has k = 4 primes and then 3, level 1 has 2 and then 1."""
    first, squared, last = net("B")[1].ops
    assert isinstance(first, MapOp)
    assert isinstance(last, MapOp)
    first = replace(first, baby=4, folds=slotmaps.fold_groups(128, (2, 2, 2), 0))
    assert cost.count(first, "native") == cost.Counts(
        rotations=4 + 9,
        products=8,
        # decompose, one giant step, division by P and q_3, three groups, division by P
        transforms=4 * 5 + (5 + 20) + (5 + 5) + 3 * (4 + 12) + 2 * 4,
        key_pairs=4 * 4 * 5 + 9 * 3 * 4,
        limb_passes=8 * 2 * 5,
        turns=4 * 2 * 5 + 9 * 2 * 4,
        # c0 joins: a factor, a copy, a factor; the bias; both sums into each of three groups
        copies=3 * 4 + 3 + 3 * 2 * 4,
    )
    assert cost.count(first, "seal") == cost.Counts(
        rotations=13,
        products=8,
        transforms=4 * (4 + 16 + 10) + 2 * 4 + 9 * (3 + 9 + 8),
        key_pairs=4 * 4 * 5 + 9 * 3 * 4,
        limb_passes=8 * 4 * 4,
        turns=4 * 2 * 5 + 9 * 2 * 4,
        copies=3 * 4 + 3 + 3 * 2 * 4,
    )
    assert isinstance(squared, SquareOp)
    assert cost.count(squared, "native") == cost.Counts(0, 1, 3 + 9 + 4 + 4, 3 * 4, 9)
    last = replace(last, baby=16, folds=())
    assert cost.count(last, "native").transforms == 2 * 3 + (3 + 3)
    reference = cost.REFERENCE["native"]
    predicted = net("B")[1].predicted_s("native")
    rows = net("B")[1].op_summary("native")
    assert predicted == pytest.approx(sum(row["predicted_s"] for row in rows) + reference.request_s)
    with pytest.raises(ModelError, match="no cost model for backend 'gpu'"):
        net("B")[1].predicted_s("gpu")


def test_programs_of_the_format_before_are_refused() -> None:
    structure, tensors = net("B")[1].to_parts()
    assert structure["format"] == 4
    with pytest.raises(BundleError, match="program format 3, this release reads 4: compile the model again"):
        Program.from_parts({**structure, "format": 3}, tensors)
