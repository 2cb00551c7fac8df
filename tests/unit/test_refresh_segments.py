"""Segments as one chain: shared parameters and keys, whole or refused; where runs are cut."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blindtail.bundle import CloudBundle, EdgeBundle, open_program, save_program, sniff
from blindtail.errors import BundleError, ModelError
from blindtail.he.compatible import differences
from blindtail.he.compiler import compile_tail
from blindtail.he.dataflow import finish
from blindtail.he.layers import Affine, Layer, Quadratic
from blindtail.he.normal import normalised
from blindtail.he.program import Program
from blindtail.he.schedule import KeysTooLarge
from blindtail.he.segments import Run, chained, check_programs, compile_runs, divide, fewest, united
from blindtail.he.spec import Segment, TailSpec
from tests.refresh_cases import TRIPS, packed, saved

RNG = np.random.default_rng(0)


def affine(out: int, given: int, name: str) -> Affine:
    return Affine(RNG.normal(size=(out, given)) / math.sqrt(given), RNG.normal(size=out) / 10, name)


def squares(widths: list[int]) -> list[Layer]:
    layers: list[Layer] = []
    for i, (before, out) in enumerate(itertools.pairwise(widths)):
        if i:
            ones = np.ones(before)
            layers.append(Quadratic(ones, 0 * ones, 0 * ones, f"square{i}"))
        layers.append(affine(out, before, f"map{i}"))
    return layers


DEEP, FLAT = squares([16, 16, 8]), squares([8, 4])
X = RNG.uniform(-1, 1, (32, 16))


def one_by_one(n: int = 4096) -> list[Program]:
    deep = compile_tail(DEEP, X, ring_degree=8192 if n == 8192 else None)
    n = deep.spec.parameters.ring_degree
    return [deep, compile_tail(FLAT, RNG.uniform(0, 1, (32, 8)), ring_degree=n)]


@pytest.fixture(scope="module")
def chain() -> tuple[Program, ...]:
    return chained(one_by_one())


def test_segments_share_parameters_and_keys_and_keep_their_operations(chain: tuple[Program, ...]) -> None:
    alone = one_by_one()
    deep, flat = (p.spec for p in chain)
    assert deep.parameters == flat.parameters == alone[0].spec.parameters
    assert (deep.input_level, flat.input_level) == (3, 1)
    assert deep.keys == flat.keys == united(alone)
    for before, after in zip(alone, chain, strict=True):
        own = {k.element: k.level for k in before.spec.keys}
        shared = {k.element: k.level for k in after.spec.keys}
        assert all(shared[element] >= level for element, level in own.items())
        assert [op.level for op in after.ops] == [op.level for op in before.ops]
    assert flat.keys_id == deep.keys_id == deep.program_id != flat.program_id
    assert flat.segment == Segment(1, 2, deep.program_id)
    check_programs(chain)


def test_a_chain_is_whole_and_in_order_or_refused(chain: tuple[Program, ...]) -> None:
    deep, flat = chain
    other = chained([compile_tail(squares([16, 8]), X, ring_degree=8192), one_by_one()[1]])
    for wrong in ((deep,), (flat, deep), (deep, deep), (deep, other[1]), (deep, flat, flat)):
        with pytest.raises(ModelError, match="segment"):
            check_programs(wrong)


def test_keys_that_do_not_follow_from_the_segments_are_refused(chain: tuple[Program, ...]) -> None:
    deep, flat = chain
    with pytest.raises(ModelError, match="do not cover"):
        finish(deep.ops, replace(deep.spec, keys=deep.spec.keys[1:]))
    # One key too many: each program stands, the chain does not.
    extra = replace(deep.spec.keys[-1], element=deep.spec.keys[-1].element + 2)
    lead = Program(finish(deep.ops, replace(deep.spec, keys=(*deep.spec.keys, extra))), deep.ops)
    place = Segment(1, 2, lead.spec.program_id)
    last = Program(finish(flat.ops, replace(flat.spec, keys=lead.spec.keys, segment=place)), flat.ops)
    with pytest.raises(ModelError, match="keys"):
        check_programs((lead, last))
    with pytest.raises(ModelError, match="keys"):
        CloudBundle("m", "1", {0: lead}, {0: (last,)})


def test_programs_of_different_rings_are_no_chain() -> None:
    small = compile_tail(FLAT, X[:, :8], ring_degree=4096)
    with pytest.raises(ModelError, match="one ring"):
        chained([one_by_one()[0], small])
    with pytest.raises(ModelError, match="one lane"):
        chained([one_by_one()[0], compile_tail(FLAT, X[:, :8], ring_degree=8192, lanes=2)])


def test_a_segment_alone_takes_no_others_place(chain: tuple[Program, ...]) -> None:
    deep, _ = chain
    heavier = replace(deep.ops[0], bias=deep.ops[0].bias + 1)  # type: ignore[call-arg, union-attr]
    ops = (heavier, *deep.ops[1:])
    assert differences(finish(ops, deep.spec), deep.spec) == ["segment"]
    assert differences(deep.spec, deep.spec) == []


def test_a_segments_description_survives_json_and_damage_is_told(chain: tuple[Program, ...]) -> None:
    for program in chain:
        assert TailSpec.from_json(program.spec.to_json()) == program.spec
    data = chain[1].spec.to_json()
    for place in (
        [0, 2, "x" * 64],
        [1, 2, ""],
        [2, 2, "0" * 64],
        [1, 1, "0" * 64],
        [1, 99, "0" * 64],
        [1, 2],
    ):
        with pytest.raises(BundleError, match="damaged"):
            TailSpec.from_json({**data, "segment": place})
    # A tail of its own is written as it always was.
    assert "segment" not in one_by_one()[1].spec.to_json()


# -- files -------------------------------------------------------------------------------


def test_both_files_come_back_whole(tmp_path: Path) -> None:
    edge, _ = packed()
    edge_bt, cloud_bt = saved(tmp_path)
    again, programs = EdgeBundle.open(edge_bt), CloudBundle.open(cloud_bt)
    assert again == edge
    assert [s.program_id for s in again.segments(0)] == [p.spec.program_id for p in programs.segments(0)]
    assert len(again.segments(0)) == TRIPS
    assert (sniff(edge_bt), sniff(cloud_bt)) == ("edge", "cloud")


def test_a_bundle_without_all_segments_is_refused(tmp_path: Path) -> None:
    edge, cloud = packed()
    with pytest.raises(ModelError, match="all segments"):
        CloudBundle("m", "1", cloud.programs)
    with pytest.raises(ModelError, match="segment"):
        CloudBundle("m", "1", cloud.programs, {0: cloud.following[0][:-1]})
    with pytest.raises(ModelError, match="segment"):
        replace(edge, refreshed={})
    tail = edge.refreshed[0]
    with pytest.raises(ModelError, match="segment"):
        replace(tail, specs=tail.specs[:-1])
    with pytest.raises(ModelError, match="not all known"):
        replace(tail, interludes=(("y1",), *tail.interludes[1:]))


def test_one_program_alone_is_a_cells_own_file(tmp_path: Path) -> None:
    path = tmp_path / "x.bt"
    segment = packed()[1].following[0][0]
    save_program(path, segment)
    assert open_program(path).spec == segment.spec
    with pytest.raises(BundleError, match="is needed"):
        CloudBundle.open(path)
    with pytest.raises(BundleError, match=r"cloud\.bt"):
        sniff(path)


# -- where to cut ------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 7),
    st.integers(1, 4),
    st.lists(st.sampled_from([1.0, 2.0, 5.0, math.inf]), min_size=49, max_size=49),
)
def test_fewest_pieces_then_least_price(maps: int, most: int, prices: list[float]) -> None:
    def price(i: int, j: int) -> float:
        return prices[7 * i + j - 1]

    def ways(left: int) -> list[tuple[int, ...]]:
        return [()] if not left else [(k, *w) for k in range(1, min(most, left) + 1) for w in ways(left - k)]

    def cost(way: tuple[int, ...]) -> float:
        ends = list(itertools.accumulate(way))
        return sum(price(e - k, e) for k, e in zip(way, ends, strict=True))

    possible = [w for w in ways(maps) if not math.isinf(cost(w))]
    found, spent = fewest(maps, price, most)
    if not possible:
        assert math.isinf(spent)
        return
    best = min((len(w), cost(w)) for w in possible)
    assert (len(found), spent) == (best[0], pytest.approx(best[1]))
    assert sum(found) == maps


def test_a_run_that_fits_is_one_segment_and_a_deep_one_the_fewest() -> None:
    assert divide([DEEP, FLAT]).segments == 2
    deep = squares([4] * 5)  # 4 maps: 7 levels
    assert divide([deep], ring_degree=4096).pieces == ((1, 1, 1, 1),)
    assert divide([deep], ring_degree=8192).segments == 2
    assert divide([deep]).pieces == ((4,),)  # in a larger ring
    assert divide([squares([4, 5000])], ring_degree=4096).pieces == ((1,),)  # in three ciphertexts
    with pytest.raises(ModelError, match="map0: 140,000 values, and 64 ciphertexts hold 131,072"):
        divide([squares([4, 140_000])], ring_degree=4096)


def test_compiled_pieces_compute_what_the_run_does() -> None:
    layers = squares([8, 8, 8, 4])
    x = RNG.uniform(-1, 1, (32, 8))
    programs, division = compile_runs([Run(layers, x, "deep")], ring_degree=4096)
    assert division.pieces == ((1, 1, 1),)
    from blindtail.he.clear import ClearEvaluator

    values = x[:4]
    for i, program in enumerate(programs):
        values = ClearEvaluator(program).logits(values)
        values = values if i == 2 else values**2  # what the edge does between them
    np.testing.assert_allclose(values, normalised(layers)(x[:4]), atol=1e-9)


def test_keys_keep_the_budget_or_it_is_told() -> None:
    runs = [
        Run(squares([64, 64]), RNG.uniform(size=(8, 64)), "a"),
        Run(squares([64, 40]), X[:, :1] * np.ones(64), "b"),
    ]
    free, _ = compile_runs(runs, ring_degree=4096)
    kept, _ = compile_runs(runs, ring_degree=4096, key_budget_bytes=free[0].spec.key_bytes * 7 // 10)
    assert kept[0].spec.key_bytes <= free[0].spec.key_bytes * 7 // 10
    with pytest.raises(KeysTooLarge, match="2 segments"):
        compile_runs(runs, ring_degree=4096, key_budget_bytes=1000)
