"""Maps between tile tensors, what they cost, and the choice of shapes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from bench.tails import random_layers
from blindtail.errors import ModelError
from blindtail.he import cost
from blindtail.he.backends import open_evaluator
from blindtail.he.clear import ClearEvaluator
from blindtail.he.elementwise import Linear
from blindtail.he.frontend import fold_tail
from blindtail.he.layers import Affine, Layer, Quadratic
from blindtail.he.native_backend import NativeEvaluator, available
from blindtail.he.normal import normalised
from blindtail.he.objective import METRICS, Objective
from blindtail.he.operations import MapOp, grouped
from blindtail.he.params import Parameters
from blindtail.he.program import Program
from blindtail.he.tile_counts import count
from blindtail.he.tile_shapes import Look, shapes
from blindtail.he.tiled_compiler import compile_tiled, compile_tiling
from blindtail.he.tiles import TileShape
from blindtail.he.tiling import Tiling, choose
from tests.tiled_cases import TILED, Tiled, program, random_affine, random_convolution

FASTEST = Objective({"total_s": 1.0})
COUNTED = ("rotations", "products", "transforms", "key_pairs", "limb_passes", "turns", "copies")


def _any(rng: np.random.Generator, found: list[TileShape]) -> TileShape:
    few = [shape for shape in found if shape.tiles <= 12]
    return few[int(rng.integers(len(few)))]


@pytest.mark.parametrize("seed", range(36))
def test_a_map_between_any_two_tile_tensors_is_the_layers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    layer = random_affine(rng) if seed % 3 == 0 else random_convolution(rng, seed)
    assert layer.shapes is not None
    lanes = int(rng.choice([64, 128]))  # of 2048 slots: 32 or 16 positions
    given, made = (_any(rng, shapes(image, Look("all", 2048 // lanes))) for image in layer.shapes)
    parameters, tail = Parameters.create(1, 4096), normalised([layer])
    tiling = choose(tail, parameters, FASTEST, lanes=lanes, only=[[given], [made]])
    x = rng.uniform(-1, 1, (lanes, layer.weight.shape[1]))
    compiled = compile_tiling(tail, x, tiling)
    spec = compiled.spec
    assert (spec.input_ciphertexts, spec.output_ciphertexts) == (given.tiles, made.tiles)
    np.testing.assert_allclose(ClearEvaluator(compiled).logits(x), layer(x), rtol=0, atol=1e-9)
    assert _counts(compiled) == _predicted(tiling)


def _counts(compiled: Program) -> list[int]:
    found = cost.counted(compiled.ops, compiled.spec.input_ciphertexts, "native")
    maps = [one for one, op in zip(found, compiled.ops, strict=True) if isinstance(op, MapOp)]
    return [sum(getattr(one, name) for one in maps) for name in COUNTED]


def _predicted(tiling: Tiling) -> list[int]:
    """Of all maps, by what the choice was made with."""
    total, level = np.zeros(len(COUNTED), np.int64), tiling.parameters.max_level
    for made, split in zip(tiling.maps, tiling.splits, strict=True):
        turned = made.rotations(split.baby)
        tiles = len({tile for tile, _ in turned})
        told = count(
            level, len(made.rows), made.products, len(turned), tiles, made.giants(split.baby), split.folds
        )
        total += [getattr(told, name) for name in COUNTED]
        level -= 2  # and a square
    return [int(one) for one in total]


@pytest.mark.parametrize("halved", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_maps_with_a_square_between(seed: int, halved: bool) -> None:
    rng = np.random.default_rng(100 + seed)
    lanes, widths = 256, (12, int(rng.integers(4, 9)), 5)  # of 4096 slots
    layers = random_layers(widths, seed, plain=False)
    sizes = [(12 // (1 + halved),), *((width,) for width in widths[1:])]
    every = [[s for s in shapes(size, Look("all", 16)) if s.defined or not halved] for size in sizes]
    tail, parameters = normalised(layers), Parameters.create(3, 8192)
    tiling = choose(tail, parameters, FASTEST, lanes=lanes, only=[[_any(rng, one)] for one in every])
    x = rng.uniform(-1, 1, (lanes, 12))
    compiled = compile_tiling(tail, x, tiling)
    assert (compiled.spec.input_layout.imaginary is not None) == halved
    np.testing.assert_allclose(ClearEvaluator(compiled).logits(x), tail(x), rtol=0, atol=1e-9)
    assert _counts(compiled) == _predicted(tiling)


# -- the choice ----------------------------------------------------------------------------


def _nets() -> Iterator[tuple[str, list[Layer], int]]:
    """Name, layers, lanes."""
    yield "dense", random_layers((12, 6, 4)), 256
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 2, 3, padding=1, dtype=torch.float64)
    (first,) = fold_tail(nn.Sequential(conv, nn.Flatten()), (2, 4, 4))
    assert isinstance(first, Affine)
    ones = np.ones(len(first.bias))
    last = Affine(np.random.default_rng(0).normal(size=(3, len(ones))), np.zeros(3))
    yield "image", [first, Quadratic(ones, 0 * ones, 0 * ones), last], 256


@pytest.mark.parametrize(
    ("name", "layers", "lanes"), list(_nets()), ids=lambda v: v if isinstance(v, str) else ""
)
def test_the_search_finds_what_looking_at_all_finds(name: str, layers: list[Layer], lanes: int) -> None:
    tail, parameters = normalised(layers), Parameters.create(3, 8192)
    first = tail.maps[0]
    known = [*(first.shapes or ((12,), (6,))), (len(tail.maps[-1].bias),)]
    rng = np.random.default_rng(0)
    only = []
    for number, image in enumerate(known):
        found = shapes(image, Look("all", 4096 // lanes), last=number == 2)
        found = [found[i] for i in sorted(rng.permutation(len(found))[:6])]
        only.append(found)
    costs = []
    for metric in METRICS:
        objective = Objective({metric: 1.0})
        quick = choose(tail, parameters, objective, lanes=lanes, only=only)
        whole = choose(tail, parameters, objective, lanes=lanes, only=only, every=True)
        assert objective.value(quick.costs) <= 1.05 * objective.value(whole.costs), metric
        costs.append(whole.costs)
    assert len(set(costs)) > 1  # objectives want different things, or this says little


def test_shapes_are_square_unless_others_are_fewer() -> None:
    """Of square images: 64 x 64 pixels are twice 2048 positions."""
    assert [str(s) for s in shapes((1, 64, 64), Look("some", 2048))][:2] == [
        "[1, 64/64, 64~/32]",
        "[1, 64~/32, 64/64]",
    ]
    assert str(shapes((1, 64, 64), Look("some", 4096))[0]) == "[1, 64/64, 64/64]"
    assert all(s.axes[-1].tile == s.axes[-2].tile for s in shapes((64, 8, 8), Look("some", 2048)))


def test_half_of_an_activation_rides_as_imaginary_parts() -> None:
    """Without being told, where that saves a ciphertext."""
    layers = random_layers((3000, 4))
    x = np.random.default_rng(0).uniform(-1, 1, (4, 3000))
    compiled = compile_tiled(layers, x, ring_degree=4096)
    assert compiled.spec.input_layout.imaginary is not None
    assert compiled.spec.input_ciphertexts == 1
    np.testing.assert_allclose(ClearEvaluator(compiled).logits(x), layers[0](x), rtol=0, atol=1e-9)


def test_no_tile_is_nothing_but_bias() -> None:
    """Of an output whose second half is pruned, tiles hold both halves, or it is not compiled."""
    weight = np.random.default_rng(0).normal(size=(8, 8))
    weight[4:] = 0
    layer, x = Affine(weight, np.arange(8.0)), np.random.default_rng(1).uniform(-1, 1, (256, 8))
    given = [TileShape.parse("[*/2, 8/8]")]
    apart, both = TileShape.parse("[*/4, 8/4]"), TileShape.parse("[*/4, 8~/4]")
    with pytest.raises(ModelError, match="a tile are zero; prune"):
        compile_tiled([layer], x, ring_degree=8192, lanes=256, only=[given, [apart]])
    found = compile_tiled([layer], x, ring_degree=8192, lanes=256, only=[given, [apart, both]])
    np.testing.assert_allclose(ClearEvaluator(found).logits(x), layer(x), rtol=0, atol=1e-9)
    assert found.spec.output_layout.content == both.layout(256).content


@pytest.mark.parametrize(
    ("only", "told"),
    [
        (["[6/4, ?/512]"], "2 lists, none empty"),
        (["[6/4, ?/512]", ""], "2 lists, none empty"),
        (["[6/4, ?/256]", "[*/128, 10/16]"], "1024 positions, a ciphertext has 2048"),
        (["[5/4, ?/512]", "[*/128, 10/16]"], "5 elements, value 0 of this tail has 6"),
        (["[6/4, ?/512]", "[*/256, 5/8]"], "5 elements, value 1 of this tail has 10"),
        (["[3/4, ?/512]", "[*/128, 10/16]"], "nothing may be undefined"),
        (["[6/4, ?/512]", "[2/2, */64, 5/16]"], "first axis alone"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(only: list[str], told: str) -> None:
    layers = random_layers((6, 10))
    given = [[TileShape.parse(text)] if text else [] for text in only]
    with pytest.raises(ModelError, match=told):
        compile_tiled(layers, np.ones((2, 6)), ring_degree=4096, only=given)


# -- groups --------------------------------------------------------------------------------


@pytest.mark.skipif(not available(), reason="the native extension is not built")
@pytest.mark.parametrize("case", TILED, ids=str)
def test_rotations_are_shared_as_the_engine_shares_them(case: Tiled) -> None:
    made = program(case)
    inputs, ops = made.spec.input_ciphertexts, made.ops
    numbers = grouped(ops, inputs)
    maps = [number for number, op in zip(numbers, ops, strict=True) if isinstance(op, Linear)]
    evaluator = open_evaluator("native", made)
    assert isinstance(evaluator, NativeEvaluator)
    assert evaluator._tail.groups == [len(list(members)) for _, members in itertools.groupby(maps)]
    # One key switch for each rotation of a group, giant step and fold.
    found = cost.counted(ops, inputs, "native")
    for _, members in itertools.groupby(zip(numbers, ops, found, strict=True), key=lambda one: one[0]):
        of_group = [(op, counts) for _, op, counts in members if isinstance(op, MapOp)]
        turned = {(term, b) for op, _ in of_group for term, _, b in op.used if b}
        more = sum(op.giant - 1 + sum(map(len, op.folds)) for op, _ in of_group)
        assert sum(counts.rotations for _, counts in of_group) == len(turned) + more
