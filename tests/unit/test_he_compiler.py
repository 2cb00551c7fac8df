"""Compiling: every random network computes what its layers say, and bad ones are refused by name."""

from __future__ import annotations

import contextlib
import copy
import os
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blindtail.errors import BundleError, ModelError
from blindtail.he.clear import ClearEvaluator
from blindtail.he.compiler import compile_tail
from blindtail.he.layers import Affine, Quadratic
from blindtail.he.normal import normalised
from blindtail.he.operations import MapOp, landing_scale, leading_scale, leading_scales
from blindtail.he.program import Program
from blindtail.he.program_file import MAX_OPS
from blindtail.he.sparse import Sparse
from blindtail.he.spec import TailSpec
from tests.he_cases import CASES, Case, activations, clear_logits, layers, program, rewritten_logits

EXAMPLES = int(os.environ.get("BLINDTAIL_EXAMPLES", "40"))


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.integers(1, 200), min_size=2, max_size=4),
    st.sampled_from([1, 1, 2, 8]),
    st.booleans(),
    st.integers(0, 99),
)
def test_random_tails_compute_what_their_layers_say(
    widths: list[int], lanes: int, plain: bool, seed: int
) -> None:
    case = Case(tuple(widths), lanes, plain)
    made = layers(case, seed)
    x = activations(case, 5, seed)
    compiled = compile_tail(made, activations(case, 50, seed + 1), lanes=lanes)
    exact = ClearEvaluator(compiled).logits(x)
    want = normalised(made)(x)
    assert np.allclose(exact, want, rtol=1e-9, atol=1e-9 * max(1.0, np.abs(want).max()))
    assert compiled.depth == 2 * (len(widths) - 1) - 1 == compiled.spec.input_level
    again = Program.from_parts(*compiled.to_parts())
    assert again.spec == compiled.spec
    assert TailSpec.from_json(compiled.spec.to_json()) == compiled.spec


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rewriting_quadratics_changes_nothing(case: Case) -> None:
    x = activations(case, 20)
    assert np.allclose(rewritten_logits(case, x), clear_logits(case, x), atol=1e-9)


def test_the_dense_tails_of_the_comparison_have_the_planned_shape() -> None:
    spec = program(Case((512, 128, 10))).spec
    assert spec.parameters.ring_degree == 8192
    assert len(spec.parameters.primes) == 4
    assert spec.uplink_bytes <= 123_500
    assert spec.reply_bytes <= 26_000
    assert spec.key_bytes <= 15_000_000
    first = program(Case((512, 128, 10))).ops[0]
    assert isinstance(first, MapOp)
    assert first.in_layout.imaginary is not None  # 256 complex slots a copy
    assert first.offsets == 256 // 16 // (256 // 128)  # 16 copies, 2 row groups a copy
    deep = compile_tail(layers(Case((784, 128, 128, 10))), activations(Case((784, 1)), 50)).spec
    assert len(deep.parameters.primes) == 6
    assert deep.uplink_bytes <= 185_000
    assert deep.key_bytes <= 30_000_000
    assert deep.reply_bytes <= 26_000


def _net(weight: float = 1.0, b: float = 0.0, a: float = 1.0) -> list[Affine | Quadratic]:
    eye = np.eye(4) * weight
    return [
        Affine(eye, np.zeros(4), "first"),
        Quadratic(np.full(4, a), np.full(4, b), np.zeros(4), "act"),
        Affine(eye, np.zeros(4), "last"),
    ]


def test_networks_that_cannot_run_are_refused_by_name() -> None:
    x = np.ones((3, 4))
    with pytest.raises(ModelError, match="act: the quadratic coefficient is 0"):
        compile_tail(_net(a=0.0), x)
    with pytest.raises(ModelError, match=r"act: \|b / 2a\| reaches 20"):
        compile_tail(_net(b=40.0), x)
    with pytest.raises(ModelError, match="first: weights hold NaN"):
        _net(weight=float("nan"))
    with pytest.raises(ModelError, match="start and end with a linear layer"):
        compile_tail(_net()[:2], x)
    with pytest.raises(ModelError, match="must alternate"):
        compile_tail([_net()[0], _net()[2], _net()[2]], x)
    with pytest.raises(ModelError, match="takes 3 values but gets 4"):
        compile_tail([*_net()[:2], Affine(np.ones((2, 3)), np.zeros(2), "odd")], x)
    with pytest.raises(ModelError, match=r"shape \(3, 5\); the tail takes \(n, 4\).* goes into first"):
        compile_tail(_net(), np.ones((3, 5)))
    with pytest.raises(ModelError, match="NaN or infinity"):
        compile_tail(_net(), np.full((3, 4), np.nan))
    with pytest.raises(ModelError, match="power of two"):
        compile_tail(_net(), x, lanes=3)
    with pytest.raises(ModelError, match="wide takes, at the cut, 40,000 values, and 64 ciphertexts of 32 a"):
        compile_tail([Affine(np.ones((2, 40000)), np.zeros(2), "wide")], np.ones((1, 40000)), lanes=1024)
    with pytest.raises(ModelError, match="too large for the modulus"):
        compile_tail(_net(weight=1e9), x)
    deep = _net()[:2] * 20 + _net()[2:]
    with pytest.raises(
        ModelError, match=r"^tail layer act: .* 41 levels, .* holds 26 at 128 bits: cut the network later"
    ):
        compile_tail(deep, x)


def test_scales_land_to_the_last_bit() -> None:
    """SEAL refuses to add operands whose scales differ in the last bit; so does `clear`."""
    rng = np.random.default_rng(0)
    missed = 0
    for _ in range(2000):
        current, target = 2.0 ** rng.uniform(20, 40, 2)
        q = 1073643521
        missed += current * (target * q / current) / q != target  # the control: rounding does miss
        landed = landing_scale(current, target, q)
        assert abs(landed / target - 1) < 1e-15
        op = program(CASES[0]).ops[0]
        assert isinstance(op, MapOp)
        parameters = program(CASES[0]).spec.parameters
        prime = parameters.primes[op.level]
        moved = replace(op, in_scale=current, out_scale=landing_scale(current, target, prime))
        assert current * moved.plain_scale(parameters) / prime == moved.out_scale
    assert missed > 0


def test_products_that_are_added_up_have_one_scale_before_they_are_rescaled() -> None:
    rng = np.random.default_rng(1)
    q, apart = 1072496641, 0
    for _ in range(2000):
        read = (2.0 ** rng.uniform(20, 40, 2)).tolist()
        out = landing_scale(read[0], 2.0 ** int(rng.integers(20, 40)), q)  # as plans choose them
        nearest = [leading_scale(scale, out, q) for scale in read]
        found = leading_scales(read, out, q)
        if found is None:
            continue
        one, two = (scale * plain for scale, plain in zip(read, found, strict=True))
        assert one == two
        assert one / q == out
        assert nearest[1] is not None
        apart += read[0] * found[0] != read[1] * nearest[1]  # the control: the nearest do miss
    assert apart > 0


def test_the_program_id_depends_on_every_weight() -> None:
    made = layers(CASES[1])
    x = activations(CASES[1], 50)
    first = made[0]
    assert isinstance(first, Affine)
    weight = first.weight.copy()
    weight[3, 5] = np.nextafter(weight[3, 5], 1)
    changed = compile_tail([replace(first, weight=weight), *made[1:]], x)
    assert changed.spec.program_id != compile_tail(made, x).spec.program_id


def test_damaged_programs_are_refused() -> None:
    structure, tensors = program(CASES[1]).to_parts()
    assert Program.from_parts(structure, tensors).spec == program(CASES[1]).spec  # the control
    damages: list[Callable[[Any, Any], Any]] = [
        lambda s, t: s.update(format=99),
        lambda s, t: s.pop("ops"),
        lambda s, t: s["ops"].pop(),
        lambda s, t: s["ops"][0].update(offsets=[[2 * o, t] for o, t in s["ops"][0]["offsets"]]),
        lambda s, t: s["ops"][0]["folds"].pop(),
        lambda s, t: s["ops"][0]["folds"].append([]),
        lambda s, t: s["ops"][0]["folds"].append([1] * 64),
        lambda s, t: s["ops"][0]["folds"][-1].append(0),
        lambda s, t: s["ops"][0]["folds"][-1].append(s["ops"][0]["folds"][-1][0]),
        lambda s, t: s["ops"][0]["offsets"][0].__setitem__(1, 0),
        lambda s, t: s["ops"][0]["offsets"][0].__setitem__(1, 3),
        lambda s, t: s["ops"][0].update(reads=[]),
        lambda s, t: s["ops"][1].update(reads=[2]),
        lambda s, t: s["ops"][1].update(reads=[3]),
        lambda s, t: s["ops"][1].update(reads=[0]),
        lambda s, t: s["ops"][1].update(reads=[1, 1]),
        lambda s, t: s["ops"][1].update(op="sum"),
        lambda s, t: s["ops"][0].update(baby=0),
        lambda s, t: s["ops"][0].update(op="shell"),
        lambda s, t: s["ops"][0].update(level=1),
        lambda s, t: s["ops"][1].update(out_scale=(2.0**33).hex()),
        lambda s, t: s["ops"][0].update(rows=[[0, 1, 1 << 40]]),
        lambda s, t: s["spec"].update(program_id="0" * 64),
        lambda s, t: s["spec"].update(predicted_noise=0.0),
        lambda s, t: s["spec"]["parameters"].update(special=4),
        lambda s, t: s["spec"]["keys"].pop(),
        lambda s, t: t.pop("op0.weight"),
        lambda s, t: t.update({"op0.weight": t["op0.weight"] * 1.5}),
        lambda s, t: t.update({"op0.weight": np.full_like(t["op0.weight"], np.nan)}),
        lambda s, t: t.update({"op0.weight": t["op0.weight"][:-1]}),
        lambda s, t: t.update({"extra": np.zeros(1)}),
    ]
    for damage in damages:
        s, t = copy.deepcopy(structure), dict(tensors)
        damage(s, t)
        with pytest.raises(BundleError):
            Program.from_parts(s, t)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("size", [2**20, 2**33, 2**62])
def test_a_layout_that_claims_more_than_it_holds_is_refused_before_it_costs_memory(
    sparse: bool, size: int
) -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(40, 60)) * (rng.random((40, 60)) < 0.1)
    structure, tensors = compile_tail([Affine(weight, np.zeros(40))], rng.uniform(-1, 1, (50, 60))).to_parts()
    Program.from_parts(structure, tensors)  # the control
    if sparse:  # a file may store any weight so, however small: its size then costs nothing
        held = Sparse.of(tensors.pop("op0.weight"))
        tensors |= {
            "op0.weight.starts": held.starts,
            "op0.weight.columns": held.columns,
            "op0.weight.values": held.values,
        }
        structure["ops"][0]["sparse"] = [list(held.shape)]

    def out(s: Any) -> None:
        s["ops"][0]["out_layout"]["size"] = size

    def into(s: Any) -> None:
        s["spec"]["input_layout"]["size"] = size
        if sparse:
            s["ops"][0]["sparse"] = [[40, size]]

    for damage in (out, into):
        s = copy.deepcopy(structure)
        damage(s)
        tracemalloc.start()
        try:
            with pytest.raises(BundleError):
                Program.from_parts(s, tensors)
            assert tracemalloc.get_traced_memory()[1] < 4_000_000
        finally:
            tracemalloc.stop()


def test_a_program_has_at_most_so_many_operations() -> None:
    structure, tensors = program(CASES[1]).to_parts()
    s = copy.deepcopy(structure)
    s["ops"] = [copy.deepcopy(s["ops"][0]) for _ in range(MAX_OPS + 1)]
    with pytest.raises(BundleError, match=f"between 1 and {MAX_OPS} operations"):
        Program.from_parts(s, tensors)
    s["ops"].pop()
    with pytest.raises(BundleError) as caught:  # as many as there may be: something else is wrong with them
        Program.from_parts(s, tensors)
    assert f"between 1 and {MAX_OPS}" not in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_spec_with_any_field_replaced_is_whole_or_refused(data: st.DataObject) -> None:
    spec = copy.deepcopy(program(CASES[0]).spec.to_json())
    field = data.draw(st.sampled_from(sorted(spec)))
    spec[field] = data.draw(st.sampled_from([None, [], {}, -1, "x", 2**70, float("inf"), [[1, 2, 3]]]))
    with contextlib.suppress(BundleError):
        TailSpec.from_json(spec)


def test_simulated_noise_is_what_was_predicted() -> None:
    for case in (CASES[1], CASES[2]):
        compiled = program(case)
        x = activations(case, 40, seed=5)
        error = ClearEvaluator(compiled, noise_seed=7).logits(x) - rewritten_logits(case, x)
        assert 0.5 < error.std() / compiled.spec.predicted_noise < 2
