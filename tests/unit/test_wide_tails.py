"""Tails of which one ciphertext of the largest ring holds no activation: compiled, run, checked, refused."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
from numpy.typing import NDArray

from bench.tails import Client, random_layers
from blindtail.errors import ModelError
from blindtail.he import choice, operations
from blindtail.he.clear import ClearEvaluator
from blindtail.he.compiler import compile_tail
from blindtail.he.diagonals import Met
from blindtail.he.layers import Affine, outputs
from blindtail.he.layout import MOST_CIPHERTEXTS
from blindtail.he.native_backend import available
from blindtail.he.objective import NoPlan, Objective
from blindtail.he.operations import MapOp
from blindtail.he.program import Program
from blindtail.he.slotmaps import TooWide
from blindtail.he.tile_shapes import Look, Which, shapes
from blindtail.he.tiling import Tiling

FloatArray = NDArray[np.float64]
#: Widths and lanes. One ciphertext holds 32,768 values at most.
WIDE = [
    ((33_001, 4), 1),  # an odd number: without imaginary parts
    ((40_000, 8, 4), 1),
    ((65_536, 10), 1),
    ((65_536, 10), 2),
    ((262_144, 1), 1),
    ((8_000, 6, 5), 8),
    ((6, 40_000, 5), 1),
]


def values(width: int, count: int) -> FloatArray:
    return np.random.default_rng(1).uniform(-1, 1, (count, width))


@lru_cache(maxsize=8)
def program(widths: tuple[int, ...], lanes: int = 1) -> Program:
    return compile_tail(random_layers(widths), values(widths[0], 4), lanes=lanes)


@pytest.mark.parametrize(("widths", "lanes"), WIDE, ids=str)
def test_wide_tails_give_what_their_layers_give(widths: tuple[int, ...], lanes: int) -> None:
    made, x = program(widths, lanes), values(widths[0], lanes)
    spec = made.spec
    held = spec.parameters.slots // lanes * (1 if spec.input_layout.imaginary is None else 2)
    assert held * spec.input_ciphertexts >= widths[0]
    assert max(widths) * lanes > 1 << 15
    wanted = outputs(random_layers(widths), x)[-1]
    np.testing.assert_allclose(ClearEvaluator(made).logits(x), wanted, rtol=0, atol=1e-8)


@pytest.mark.skipif(not available(), reason="the native extension is not built")
def test_a_wide_tail_encrypted() -> None:
    widths = (33_001, 4)
    made, x = program(widths), values(widths[0], 1)[0]
    client = Client.of(made, "native")
    got = client.decryptor.decrypt(client.evaluate("native", client.encryptor.encrypt(x)))
    error = np.abs(got - outputs(random_layers(widths), x[None])[-1][0])
    assert (error <= made.error_bounds()[0]).all()


@pytest.mark.parametrize("which", ["all", "some", "rule"])
def test_no_shape_has_more_tiles_than_there_may_be(which: Which) -> None:
    for size in (40_000, 100_000, 131_072):
        found = shapes((size,), Look(which, 2048))
        assert max(shape.tiles for shape in found) <= MOST_CIPHERTEXTS
    assert [shape.tiles for shape in found] == [MOST_CIPHERTEXTS]
    with pytest.raises(TooWide):
        shapes((131_073,), Look(which, 2048))


# -- the check of a map -------------------------------------------------------------------


def wide_map() -> MapOp:
    op = program((40_000, 8, 4)).ops[0]
    assert isinstance(op, MapOp)
    assert len(op.terms) > 1
    return op


def with_met(op: MapOp, met: Met) -> MapOp:
    """With other places of the first operand's weights."""
    made = replace(op)
    made.__dict__["met"] = (met, *op.met[1:])
    return made


def test_one_wrong_product_among_tens_of_thousands_is_found() -> None:
    op = wide_map()
    op.check()  # the control
    met = op.met[0]
    entry = met.real.entry.copy()
    entry[[0, 1]] = entry[[1, 0]]
    with pytest.raises(ModelError, match="does not compute the map"):
        with_met(op, replace(met, real=replace(met.real, entry=entry))).check()
    places = met.real.places.copy()
    places[0] = (places[0] + 1) % met.real.period
    with pytest.raises(ModelError, match="does not compute the map"):
        with_met(op, replace(met, real=replace(met.real, places=places))).check()


def test_wrong_sums_rows_and_outputs_of_a_wide_map_are_found() -> None:
    op = wide_map()
    content = list(op.out_layout.content)
    at, other = content.index(0), content.index(1)
    content[at], content[other] = content[other], content[at]
    wrong = [
        replace(op, out_layout=replace(op.out_layout, content=tuple(content))),
        replace(op, folds=op.folds[1:]),
        replace(op, folds=(*op.folds, op.folds[-1])),
    ]
    for made in wrong:
        with pytest.raises(ModelError, match="does not compute the map"):
            made.check()


def test_larger_numbers_would_not_be_summed_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    op = wide_map()
    monkeypatch.setattr(operations, "_EXACT_BITS", 64)
    with pytest.raises(ModelError, match="does not compute the map"):
        op.check()


# -- what is chosen, and what is refused ----------------------------------------------------


def test_plans_are_of_several_ciphertexts() -> None:
    layers = random_layers((65_536, 10))
    assert isinstance(choice.best(layers, Objective()), Tiling)
    found = choice.front(layers)
    assert found
    assert all(isinstance(made, Tiling) for made in found)


def test_bounds_that_no_tiling_keeps_are_named() -> None:
    layers, x = random_layers((33_001, 2)), values(33_001, 2)
    with pytest.raises(NoPlan, match="no tiling keeps key_bytes <= 100"):
        compile_tail(layers, x, objective=Objective(at_most={"key_bytes": 100}))
    with pytest.raises(NoPlan, match=r"no tiling keeps uplink_bytes <= 1000 \(the least is [\d,]+\)"):
        compile_tail(layers, x, objective=Objective(at_most={"uplink_bytes": 1000}))
    with pytest.raises(NoPlan, match=r"no plan keeps error <= 1e-07 .*\(the least is"):
        compile_tail(layers, x, objective=Objective(at_most={"error": 1e-7}))


def test_a_bound_on_the_error_is_kept_over_several_ciphertexts() -> None:
    layers, x = random_layers((33_001, 2)), values(33_001, 2)
    program = compile_tail(layers, x, objective=Objective(at_most={"error": 1e-3}))
    want = outputs(layers, x)[-1]
    noisy = ClearEvaluator(program, noise_seed=0).logits(x) - want  # `native` has half of this noise
    assert program.spec.input_ciphertexts > 1
    assert np.abs(noisy).max() <= 2e-3 * max(1.0, float(np.abs(want).max()))


def test_a_larger_ring_is_taken_where_the_most_ciphertexts_do_not_do() -> None:
    """Of N = 4096, 64 ciphertexts hold 262,144 values with imaginary parts."""
    layers = random_layers((262_146, 2))
    found = choice.best(layers, Objective())
    assert found.parameters.ring_degree == 8192
    assert isinstance(found, Tiling)
    assert found.first.halved


@pytest.mark.parametrize(
    ("layers", "ring", "lanes", "told"),
    [
        (
            [Affine(np.ones((1, 262_146)), np.ones(1), "first")],
            4096,
            1,
            "first takes, .* 262,146 .* of 4,096 ",
        ),
        (
            [Affine(np.ones((1, 131_073)), np.ones(1), "first")],
            4096,
            1,
            "first takes, .* 131,073 .* of 2,048 ",
        ),
        ([Affine(np.ones((1, 2_097_154)), np.ones(1), "first")], None, 1, "first takes, .* of 32,768 a lane"),
        ([Affine(np.ones((140_000, 1)), np.ones(140_000), "last")], 4096, 1, "last gives 140,000 .* smaller"),
        (random_layers((20, 3000, 4)), None, 4096, "fc0 gives 3,000 values, and 64 ciphertexts of 4 a lane"),
        (random_layers((20, 4)), None, 1 << 15, "slots for 32768 lanes: use fewer"),
    ],
    ids=["in", "in, odd", "in, any ring", "out", "lanes", "no slots"],
)
def test_what_does_not_fit_is_refused_with_the_layer_the_limit_and_the_way_out(
    layers: list[Affine], ring: int | None, lanes: int, told: str
) -> None:
    x = np.ones((1, layers[0].weight.shape[1]))
    with pytest.raises(TooWide, match=told) as problem:
        compile_tail(layers, x, ring_degree=ring, lanes=lanes)
    assert "fewer" in str(problem.value)
