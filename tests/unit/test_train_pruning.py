"""Pruning: groups, scores, orders, masks, and that a pruned program computes what the pruned tail does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bench.tails import Client
from blindtail.errors import ConfigError, ModelError
from blindtail.he.backends import settle
from blindtail.he.clear import ClearEvaluator
from blindtail.he.compiler import compile_plan, compile_tail
from blindtail.he.frontend import fold_tail
from blindtail.he.layers import FloatArray
from blindtail.he.normal import normalised
from blindtail.he.operations import MapOp
from blindtail.he.program import Program
from blindtail.models.layers import Quadratic, Square
from blindtail.train.pruning import Arranged, Chain, Masks, Policy, Pruned, chain_of, prune
from blindtail.train.pruning.compiled import counted, ordered, renamed
from blindtail.train.pruning.groups import Groups, tiles
from blindtail.train.pruning.owner import by_diagonals
from blindtail.train.pruning.permute import Sides, assigned, clustered, placed, unplaced
from blindtail.train.pruning.policy import first_masks, random_masks

pytestmark = pytest.mark.timeout(120)


def dense_tail() -> tuple[nn.Sequential, tuple[int, ...]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        tail = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), Quadratic(32), nn.Linear(32, 64)
        )
        nn.init.normal_(tail[2].running_mean)
    return tail.eval(), (64,)


def conv_tail() -> tuple[nn.Sequential, tuple[int, ...]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        tail = nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1),
            nn.BatchNorm2d(4),
            Square(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * 4, 16),
            Square(),
            nn.Linear(16, 10),
        )
    return tail.eval(), (2, 8, 8)


def values(shape: tuple[int, ...], count: int = 50) -> FloatArray:
    return np.random.default_rng(1).uniform(0, 1, (count, int(np.prod(shape))))


def pruned_by_diagonals(
    tail: nn.Sequential, shape: tuple[int, ...], policy: Policy, lanes: int
) -> tuple[Program, Program, Pruned]:
    """Before, after, and what pruning found; weights are not trained in between."""
    x, chain = values(shape), chain_of(tail, shape)
    layers = fold_tail(tail, shape)
    before = compile_tail(layers, x, lanes=lanes)
    made, groups = by_diagonals(chain, layers, x, lanes, None)
    found = prune(chain, groups, policy, lambda masks, _: masks.apply())
    after = Arranged(made, found.elements, lanes).compile(fold_tail(tail, shape), x)
    return before, after, found


# Groups


def test_tiles_cover_each_place_once_and_edges_are_smaller() -> None:
    made = tiles((10, 13), (4, 8))
    assert made.count == 6
    assert made.sizes.tolist() == [32, 20, 32, 20, 16, 10]
    assert len({(int(i), int(j)) for i, j in np.argwhere(made.index == 3)}) == 20
    with pytest.raises(ConfigError, match="at least one row"):
        tiles((4, 4), (0, 8))


@pytest.mark.parametrize("lanes", [1, 16])
def test_diagonal_groups_are_what_the_compiled_diagonals_cover(lanes: int) -> None:
    tail, shape = dense_tail()
    chain, layers = chain_of(tail, shape), fold_tail(tail, shape)
    made, groups = by_diagonals(chain, layers, values(shape), lanes, None)
    for at, (layer, group) in enumerate(zip(chain.layers, groups, strict=True)):
        assert group.sizes.sum() == layer.weight.numel()
        kept = np.zeros(group.count, bool)
        kept[[0, -1]] = True
        zeroed = [replace(step) for step in layers]
        step = zeroed[2 * at]
        zeroed[2 * at] = replace(step, weight=np.where(group.places(kept), step.weight, 0.0))  # type: ignore[union-attr]
        op = [o for o in compile_plan(zeroed, values(shape), made).ops if isinstance(o, MapOp)][at]
        assert sorted(op.diagonals) == sorted({*group.offsets[0], *group.offsets[-1]})


def test_a_convolutions_weights_are_one_group_where_diagonals_share_them() -> None:
    tail = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), Square(), nn.Flatten(), nn.Linear(144, 10)).eval()
    chain = chain_of(tail, (1, 8, 8))
    _, groups = by_diagonals(chain, fold_tail(tail, (1, 8, 8)), values((64,)), 8, None)
    assert [g.sizes.sum() for g in groups] == [36, 1440]
    assert all((g.index >= 0).all() for g in groups)


def test_a_layer_that_shares_its_map_has_no_diagonals() -> None:
    tail = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8), Square(), nn.Linear(8, 4)).eval()
    chain = chain_of(tail, (16,))
    with pytest.raises(ModelError, match="prune by tiles"):
        by_diagonals(chain, fold_tail(tail, (16,)), values((16,)), 1, None)
    found = prune(
        chain, [tiles(x.shape, (4, 8)) for x in chain.layers], Policy(groups="tile"), lambda m, _: m.apply()
    )
    assert found.left[0] < 1.0  # tiles do not mind
    assert [list(order) for order in found.orders[:2]] == [list(range(16))] * 2


def test_rotations_that_others_need_already_make_a_diagonal_cheaper() -> None:
    index = np.arange(8)[None]
    made = Groups(index, 8, tuple((k,) for k in range(8)), baby=4, seconds=(1.0, 2.0, 8.0))
    assert made.price(np.ones(8, bool)) == 8 * 1.0 + 3 * 2.0 + 1 * 8.0
    scores = np.array([0.8, 5.0, 0.8, 0.8, 0.8, 0.8, 0.8, 5.5])
    assert np.flatnonzero(made.choose(scores, 2)).tolist() == [0, 1], (
        "offset 7 has the highest score, but a giant step's price"
    )
    free = replace(made, seconds=(1.0, 0.0, 0.0))
    assert np.flatnonzero(free.choose(scores, 2)).tolist() == [1, 7]


# Scores and first masks


@pytest.mark.parametrize("score", ["weight", "min", "max", "avg"])
@pytest.mark.parametrize("scope", ["local", "global"])
def test_scores_pick_planted_tiles(scope: str, score: str) -> None:
    rng = np.random.default_rng(0)
    shape, tile = (16, 32), (4, 8)
    made = tiles(shape, tile)
    weights = [rng.uniform(0.01, 0.02, shape) for _ in range(2)]
    planted = [{1, 6}, {3, 9}]
    for weight, numbers in zip(weights, planted, strict=True):
        weight[np.isin(made.index, list(numbers))] += rng.choice([-1.0, 1.0])
    policy = Policy(fraction=1 - 2 / 16, scope=scope, score=score, groups="tile")  # type: ignore[arg-type]
    kept = first_masks(weights, [made] * 2, [policy.fraction] * 2, policy)
    for mask, numbers in zip(kept, planted, strict=True):
        assert set(np.flatnonzero(made.sums(mask) > 0)) == numbers


def test_global_scores_compete_and_local_ones_do_not() -> None:
    made = tiles((8, 8), (4, 8))
    weights = [np.full((8, 8), 1.0), np.full((8, 8), 2.0)]
    local = first_masks(weights, [made] * 2, [0.5] * 2, Policy(fraction=0.5, groups="tile"))
    assert [m.mean() for m in local] == [0.5, 0.5]
    policy = Policy(fraction=0.5, scope="global", groups="tile")
    assert [m.mean() for m in first_masks(weights, [made] * 2, [0.5] * 2, policy)] == [0.0, 1.0]


def test_random_pruning_leaves_about_3_4_percent_of_tiles_empty() -> None:
    made = tiles((256, 256), (4, 8))
    shares = [float((made.sums(random_masks([(256, 256)], [0.9], seed)[0]) == 0).mean()) for seed in range(5)]
    assert np.mean(shares) == pytest.approx(0.9**32, abs=0.004)  # 0.0343
    assert min(shares) > 0.02


@pytest.mark.parametrize(
    "fields",
    [{"fraction": 1.0}, {"layers": {"0": -0.1}}, {"method": "luck"}, {"tile": (0, 1)}, {"threshold": 2.0}],
)
def test_policies_are_checked(fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="pruning"):
        Policy(**fields)  # type: ignore[arg-type]


def test_policies_from_texts() -> None:
    assert Policy.parse(["0.8"]).fraction == 0.8
    made = Policy.parse(["2=0.5"])
    assert (made.share("2"), made.share("5")) == (0.5, 0.0)
    assert Policy.parse(["0.9", "2=0.5"]).share("5") == 0.9
    with pytest.raises(ConfigError, match="write a fraction"):
        Policy.parse(["much"])


# Orders


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.integers(0, 1000))
def test_placing_and_back(rows: int, units: int, block: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((rows, units * block)) < 0.5
    orders = rng.permutation(rows), rng.permutation(units)
    by_place = placed(mask, *orders, Sides(block))
    assert np.array_equal(unplaced(by_place, *orders, Sides(block)), mask)
    assert np.array_equal(by_place[0, :block], mask[orders[0][0], orders[1][0] * block :][:block])


def test_assignment_finds_a_hidden_band_again() -> None:
    size = 32
    band = (np.arange(size)[None] - np.arange(size)[:, None]) % size
    made = Groups(band.astype(np.int64), size, tuple((k,) for k in range(size)), baby=8)
    rng = np.random.default_rng(0)
    weight = np.where(band < 3, rng.uniform(0.5, 1.0, band.shape), 0.0)
    hidden = weight[rng.permutation(size)]  # rows lost their order
    energy = hidden**2 / (hidden**2).sum()
    start = [np.arange(size), np.arange(size)]
    _, _, held = assigned([energy], [made], [Sides()], start, [False, True], [3], 20)
    assert held > 0.99
    _, _, without = assigned([energy], [made], [Sides()], start, [False, False], [3], 20)
    assert without < 0.3, "without new places the band stays hidden"


def test_k_means_brings_planted_tiles_back() -> None:
    made = tiles((32, 64), (4, 8))
    rng = np.random.default_rng(1)
    mask = np.kron(np.eye(8, dtype=bool), np.ones((4, 8), bool))
    hidden = mask[rng.permutation(32)][:, rng.permutation(64)]
    start = [np.arange(64), np.arange(32)]
    assert (made.sums(hidden) == 0).mean() < 0.3
    found = clustered([hidden], [made], [Sides()], start, [True, True], (4, 8), 0.0, 20, 5, 0)
    assert (made.sums(placed(hidden, found[1], found[0], Sides())) == 0).mean() == 56 / 64


@pytest.mark.parametrize("build", [dense_tail, conv_tail])
def test_orders_leave_the_function_unchanged(
    build: Callable[[], tuple[nn.Sequential, tuple[int, ...]]],
) -> None:
    tail, shape = build()
    layers, chain = fold_tail(tail, shape), chain_of(tail, shape)
    assert all(chain.free)
    elements = chain.elements(chain.shuffled(7))
    x = values(shape, 9)
    wanted = normalised(layers)(x)
    got = normalised(ordered(layers, elements))(x[:, elements[0]])
    assert np.abs(got[:, np.argsort(elements[-1])] - wanted).max() < 1e-12 * max(1.0, np.abs(wanted).max())
    assert np.abs(got - wanted).max() > 1e-3, "in another order"


def test_a_renamed_program_takes_and_gives_its_own_order() -> None:
    tail, shape = dense_tail()
    layers, chain = fold_tail(tail, shape), chain_of(tail, shape)
    elements, x = chain.elements(chain.shuffled(5)), values(shape)
    inside = compile_tail(ordered(layers, elements), x[:, elements[0]], lanes=4)
    program = renamed(inside, elements[0], elements[-1])
    wanted = normalised(layers)(x[:4])
    assert np.abs(ClearEvaluator(program).logits(x[:4]) - wanted).max() < 1e-6
    assert counted(program) == counted(inside)
    assert Program.from_parts(*program.to_parts()).spec == program.spec  # all is checked there
    with pytest.raises(ModelError, match="each element once"):
        renamed(inside, np.zeros(64, np.int64), elements[-1])


def test_a_program_over_several_ciphertexts_is_renamed_alike() -> None:
    torch.manual_seed(3)
    tail, shape = nn.Sequential(nn.Linear(784, 32), Square(), nn.Linear(32, 10)), (784,)
    layers, chain = fold_tail(tail, shape), chain_of(tail, shape)
    elements, x = chain.elements(chain.shuffled(5)), values(shape)
    inside = compile_tail(ordered(layers, elements), x[:, elements[0]], lanes=16)
    assert inside.spec.input_ciphertexts == 2
    program = renamed(inside, elements[0], elements[-1])
    wanted = normalised(layers)(x[:16])
    assert np.abs(ClearEvaluator(program).logits(x[:16]) - wanted).max() < 1e-5
    assert counted(program) == counted(inside)
    assert Program.from_parts(*program.to_parts()).spec == program.spec


# Masks, the pipeline, and programs


def test_a_mask_is_kept_in_training() -> None:
    tail, shape = dense_tail()
    chain = chain_of(tail, shape)
    kept = random_masks([layer.shape for layer in chain.layers], [0.5, 0.5], 0)

    def trained(masks: Masks | None) -> list[int]:
        optimizer = torch.optim.AdamW(tail.parameters(), lr=1e-2)
        x = torch.from_numpy(values(shape)).float()
        for _ in range(3):
            optimizer.zero_grad()
            torch.autograd.backward(((tail(x) - x) ** 2).mean())
            optimizer.step()
            if masks is not None:
                masks.apply()
        pairs = zip(chain.layers, kept, strict=True)
        return [int(np.count_nonzero(layer.matrix()[~mask])) for layer, mask in pairs]

    masks = Masks(chain, kept)
    masks.apply()
    assert trained(masks) == [0, 0]
    assert min(trained(None)) > 0, "without masks the weights come back"
    with pytest.raises(ModelError, match="for layer"):
        Masks(chain, kept[::-1])


@pytest.mark.parametrize("lanes", [1, 16])
@pytest.mark.parametrize("build", [dense_tail, conv_tail])
def test_a_pruned_program_answers_as_the_pruned_tail(
    build: Callable[[], tuple[nn.Sequential, tuple[int, ...]]], lanes: int
) -> None:
    tail, shape = build()
    before, after, found = pruned_by_diagonals(tail, shape, Policy(), lanes)
    assert counted(after)["diagonals"] < counted(before)["diagonals"]
    assert counted(after)["predicted_s"] < counted(before)["predicted_s"]
    x = values(shape)[:lanes]
    with torch.no_grad():
        wanted = tail(torch.from_numpy(x).float().view(-1, *shape)).double().numpy()
    assert np.abs(ClearEvaluator(after).logits(x) - wanted).max() < 1e-5
    assert any(np.any(order != np.arange(len(order))) for order in found.orders)
    if build is dense_tail and lanes == 16:
        settled = settle("auto")  # `native` where it was built
        client = Client.of(after, settled)
        got = client.decryptor.decrypt(client.evaluate(settled, client.encryptor.encrypt(x)))
        assert np.abs(got - wanted).max() < 2e-3 * max(1.0, np.abs(wanted).max())


def test_p4e_expands_within_groups_that_stay_and_is_deterministic() -> None:
    def run(method: str, groups: str) -> tuple[Chain, Pruned]:
        tail, shape = dense_tail()
        chain = chain_of(tail, shape)
        policy = Policy(method=method, groups=groups, fraction=0.8)  # type: ignore[arg-type]
        made = [tiles(layer.shape, policy.tile) for layer in chain.layers]
        if groups == "diagonal":
            _, made = by_diagonals(chain, fold_tail(tail, shape), values(shape), 16, None)
        calls = []
        found = prune(chain, made, policy, lambda masks, _: (calls.append(1), masks.apply())[1])
        assert len(calls) == (2 if method == "p4e" else 1)
        return chain, found

    for groups in ("tile", "diagonal"):
        _, one = run("p4e", groups)
        _, two = run("p4e", groups)
        assert all(np.array_equal(a, b) for a, b in zip(one.masks, two.masks, strict=True))
        # Whole groups stay or go: what is left of the weights is what is left of the groups.
        assert [1 - left for left in one.left] == pytest.approx(one.zero_groups)
    chain, plain = run("magnitude", "tile")
    assert plain.left == pytest.approx([0.2, 0.2], abs=1e-3)
    assert max(plain.zero_groups) < 0.1
    assert [np.count_nonzero(layer.matrix()) for layer in chain.layers] == [m.sum() for m in plain.masks]


def test_nothing_to_prune() -> None:
    with pytest.raises(ModelError, match="no linear layer"):
        chain_of(nn.Sequential(nn.Flatten(), Square()), (4,))
