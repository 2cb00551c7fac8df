"""Tails with connections around activations over several ciphertexts: each map reads values of any shapes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bench.tails import Client
from blindtail.errors import ModelError
from blindtail.he import cost
from blindtail.he.clear import ClearEvaluator
from blindtail.he.compiler import compile_tail
from blindtail.he.frontend import fold_tail
from blindtail.he.layers import Affine, FloatArray, Layer, Polynomial, Quadratic, Skip, outputs
from blindtail.he.native_backend import available
from blindtail.he.normal import Normal, normalised
from blindtail.he.objective import Objective
from blindtail.he.operations import MapOp
from blindtail.he.params import Parameters
from blindtail.he.program import Program
from blindtail.he.recover import layers_of
from blindtail.he.tile_counts import count
from blindtail.he.tile_shapes import Look, shapes
from blindtail.he.tiled import Placed, between
from blindtail.he.tiled_compiler import compile_tiled, compile_tiling
from blindtail.he.tiles import TileShape
from blindtail.he.tiling import Tiling, choose
from blindtail.models.layers import Square

pytestmark = pytest.mark.usefixtures("one_torch_thread")
FASTEST = Objective({"total_s": 1.0})
COUNTED = ("rotations", "products", "transforms", "key_pairs", "limb_passes", "turns", "copies")


def _matrix(rng: np.random.Generator, rows: int, columns: int) -> FloatArray:
    """With zeros now and then; no row without a weight."""
    made = rng.normal(size=(rows, columns)) / np.sqrt(columns)
    made *= rng.random(made.shape) < rng.choice([0.6, 1.0])
    made[np.arange(rows), rng.integers(0, columns, rows)] = 0.5
    return made


def _graph(seed: int) -> list[Layer]:
    """Two or three maps, each of the last value and of any older ones; squares, quadratics and cubes."""
    rng = np.random.default_rng(seed)
    widths = [int(n) for n in rng.integers(3, 10, int(rng.integers(3, 5)))]
    made: list[Layer] = []
    for index, (n, m) in enumerate(itertools.pairwise(widths)):
        older = [back for back in range(1, index + 1) if rng.random() < 0.7]
        skips = tuple(Skip(back, _matrix(rng, m, widths[index - back])) for back in older)
        made.append(Affine(_matrix(rng, m, n), rng.normal(size=m) / 8, f"map{index}", skips=skips))
        if index + 2 < len(widths):
            found = rng.uniform(0.2, 0.5, (int(rng.integers(3, 5 if index else 4)), m))
            made.append(Quadratic(*found[::-1]) if len(found) == 3 else Polynomial(found))
    return made


def _counts(program: Program) -> list[int]:
    found = cost.counted(program.ops, program.spec.input_ciphertexts, "native")
    maps = [one for one, op in zip(found, program.ops, strict=True) if isinstance(op, MapOp)]
    return [sum(getattr(one, name) for one in maps) for name in COUNTED]


def _predicted(tail: Normal, tiling: Tiling) -> list[int]:
    """Of all maps, by what the choice was made with."""
    total = np.zeros(len(COUNTED), np.int64)
    for depth, made, split in zip(tail.depths[0], tiling.maps, tiling.splits, strict=True):
        turned = made.rotations(split.baby)
        tiles, level = len({tile for tile, _ in turned}), tiling.parameters.max_level - depth
        told = count(
            level, len(made.rows), made.products, len(turned), tiles, made.giants(split.baby), split.folds
        )
        total += [getattr(told, name) for name in COUNTED]
    return [int(one) for one in total]


@pytest.mark.parametrize("seed", range(16))
def test_a_graph_of_any_tile_tensors_is_the_layers(seed: int) -> None:
    """Without noise, and with a prediction of what the program has."""
    rng, layers = np.random.default_rng(1000 + seed), _graph(seed)
    tail = normalised(layers)
    parameters = Parameters.create(tail.depth)
    positions = int(rng.choice([8, 16]))
    lanes = parameters.slots // positions
    sizes = [tail.maps[0].weight.shape[1], *(len(step.bias) for step in tail.maps)]
    every = [[s for s in shapes((n,), Look("all", positions)) if s.tiles <= 6] for n in sizes]
    only = [[found[int(rng.integers(len(found)))]] for found in every]
    tiling = choose(tail, parameters, FASTEST, lanes=lanes, only=only)
    x = rng.uniform(-1, 1, (lanes, sizes[0]))
    program = compile_tiling(tail, x, tiling)
    np.testing.assert_allclose(ClearEvaluator(program).logits(x), outputs(layers, x)[-1], rtol=0, atol=1e-9)
    assert _counts(program) == _predicted(tail, tiling)
    again = Program.from_parts(*program.to_parts())
    assert (again.spec, again.content_id) == (program.spec, program.content_id)


def test_graphs_are_of_all_kinds() -> None:
    """Or the tests above say little."""
    tails = [normalised(_graph(seed)) for seed in range(16)]
    assert {len(tail.maps) for tail in tails} == {2, 3}
    assert {len(tail.sources(len(tail.maps) - 1)) for tail in tails} >= {2, 3}
    assert any(act.coefficients is not None for tail in tails for act in tail.activations)


class _Blocks(nn.Module):
    """A shortcut, a shortcut with weights at a stride, and one around a polynomial."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)
        self.conv2, self.short = nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Conv2d(2, 3, 1, stride=2)
        self.square1, self.square2, self.head = Square(), Square(), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.square1(self.norm(self.conv1(x)))
        h = self.short(h) + self.square2(self.conv2(h))
        return self.head(h.flatten(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("backend", ["clear", "native"])
@pytest.mark.parametrize("positions", [4, 16])
def test_residual_blocks_answer_as_pytorch_does(positions: int, backend: str) -> None:
    if backend == "native" and not available():
        pytest.skip("the native extension is not built")
    torch.manual_seed(positions)
    net = _Blocks().double().eval()
    layers = fold_tail(net, (2, 4, 4))
    lanes = 4096 // positions
    x = np.random.default_rng(0).uniform(-1, 1, (lanes, 32))
    natural = ["[2, 4~/2, 4~/2]"] * 2 + ["[3, 2/2, 2/2]"] if positions == 4 else ["[2, 4/4, 4/4]"] * 3
    if positions == 16:
        natural[2] = "[3/4, 2/2, 2/2]"
    only = [[TileShape.parse(text)] for text in (*natural, f"[*/{positions // 4}, 5/4]")]
    program = compile_tiled(layers, x[:32], lanes=lanes, only=only, objective=FASTEST)
    assert program.spec.input_ciphertexts == 32 // positions
    want = net(torch.from_numpy(x.reshape(-1, 2, 4, 4))).detach().numpy()
    if backend == "clear":
        np.testing.assert_allclose(ClearEvaluator(program).logits(x), want, rtol=0, atol=1e-9)
        return
    client = Client.of(program, "native")
    got = client.decryptor.decrypt(client.evaluate("native", client.encryptor.encrypt(x)))
    ratio = np.abs(got - want) / program.error_bounds()
    assert 1 / 32 <= ratio.max() <= 1


@pytest.mark.skipif(not available(), reason="the native extension is not built")
@pytest.mark.parametrize("seed", range(3))
def test_shapes_are_chosen_and_encrypted_logits_keep_their_bounds(seed: int) -> None:
    layers = _graph(seed)
    tail = normalised(layers)
    lanes = Parameters.create(tail.depth).slots // 4
    x = np.random.default_rng(seed).uniform(-1, 1, (lanes, tail.maps[0].weight.shape[1]))
    program = compile_tiled(layers, x[:64], lanes=lanes, objective=FASTEST)
    assert program.spec.input_ciphertexts > 1
    assert not program.is_chain
    client = Client.of(program, "native")
    got = client.decryptor.decrypt(client.evaluate("native", client.encryptor.encrypt(x)))
    assert (np.abs(got - outputs(layers, x)[-1]) / program.error_bounds()).max() <= 1


@pytest.mark.parametrize("seed", range(6))
def test_the_layers_of_a_program_over_tiles_come_back(seed: int) -> None:
    """What they say, and what a program of them says again; of the same sizes, so that plans are."""
    layers = _graph(seed)
    tail = normalised(layers)
    lanes = Parameters.create(tail.depth).slots // 4
    x = np.random.default_rng(seed).uniform(-1, 1, (8, tail.maps[0].weight.shape[1]))
    program = compile_tiled(layers, x, lanes=lanes, objective=FASTEST)
    assert program.spec.input_ciphertexts > 1
    found = layers_of(program)
    np.testing.assert_allclose(outputs(found, x)[-1], outputs(layers, x)[-1], rtol=0, atol=1e-9)
    again = normalised(found)
    assert [step.name for step in again.maps] == [step.name for step in tail.maps]
    for a, b in zip(again.maps, tail.maps, strict=True):
        np.testing.assert_allclose(np.asarray(a.weight), np.asarray(b.weight), rtol=0, atol=1e-12)
        assert {skip.back for skip in a.skips} == {skip.back for skip in b.skips}
    assert choose(again, program.spec.parameters, FASTEST, lanes=lanes).costs == (
        choose(tail, program.spec.parameters, FASTEST, lanes=lanes).costs
    )


class _Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.square = nn.Conv2d(1, 1, 3, padding=1), Square()
        self.pool, self.head = nn.AvgPool2d(9), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(x + self.square(self.conv(x))).flatten(1))  # type: ignore[no-any-return]


def test_a_residual_tail_that_one_ciphertext_does_not_hold_is_compiled_over_several() -> None:
    torch.manual_seed(0)
    net = _Wide().double().eval()
    layers = fold_tail(net, (1, 72, 72))
    x = np.random.default_rng(0).uniform(-1, 1, (4, 72 * 72))
    program = compile_tail(layers, x, ring_degree=8192)  # of 4096 slots
    assert program.spec.input_ciphertexts > 1
    want = net(torch.from_numpy(x.reshape(-1, 1, 72, 72))).detach().numpy()
    np.testing.assert_allclose(ClearEvaluator(program).logits(x), want, rtol=0, atol=1e-6)
    again = layers_of(Program.from_parts(*program.to_parts()))
    np.testing.assert_allclose(outputs(again, x)[-1], want, rtol=0, atol=1e-6)
    known = [step.shapes for step in normalised(layers).maps]
    assert known[0] is not None
    assert [step.shapes for step in normalised(again).maps] == known  # images, for planning again


def test_real_and_complex_values_are_not_added() -> None:
    rng = np.random.default_rng(0)
    first, second = (
        Placed(TileShape.parse("[*/2, 6/8]"), 256),
        Placed(TileShape.parse("[*/2, 6/8]"), 256, True),
    )
    target = Placed(TileShape.parse("[*/4, 4/4]"), 256)
    matrices = rng.normal(size=(4, 6)), rng.normal(size=(4, 12))
    for halved in (first, second):
        weight = matrices[halved.halved]
        assert between([(weight, halved), (weight, halved)], target).products == 8
    with pytest.raises(ModelError, match="count the real ones twice"):
        between([(matrices[0], first), (matrices[1], second)], target)
