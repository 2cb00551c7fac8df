"""Min-max normalisation before squares: bounded in training, an affine map afterwards."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from blindtail.errors import ModelError
from blindtail.he.frontend import fold_tail
from blindtail.he.layers import outputs
from blindtail.models.layers import Quadratic, Square
from blindtail.models.pack import check_tails
from blindtail.models.split import SplitModel
from blindtail.models.zoo import nets
from blindtail.train.amm import Amm, BoundActivations, Bounded, bound_activations, folded
from blindtail.train.phases import Moment
from blindtail.train.turning import AllAtOnce, turnings


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build() -> SplitModel:
    torch.manual_seed(0)
    return nets.digits()


def trained(amm: Amm, shape: tuple[int, ...]) -> Amm:
    for seed in range(4):
        amm(3 * noise(*shape, seed=seed) + 1)
    return amm.eval()


@pytest.mark.parametrize("shape", [(40, 3), (5, 3, 4, 4), (5, 3, 7)])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
def test_in_training_values_lie_within_1_and_reach_it(shape: tuple[int, ...], size: float) -> None:
    amm, x = Amm(3), size * (noise(*shape) + 5)
    y = amm(x)
    assert float(x.abs().max()) > 2 * size
    assert float(y.abs().max()) <= 1.0
    by_channel = y.transpose(0, 1).flatten(1)
    assert by_channel.amin(1).tolist() == [-1.0] * 3
    assert by_channel.amax(1).tolist() == pytest.approx([1.0] * 3, abs=1e-5)


def test_values_that_are_all_the_same_stay_finite() -> None:
    amm = Amm(2)
    x = torch.full((4, 2), 7.0, requires_grad=True)
    y = amm(x)
    torch.autograd.backward(y.sum())
    assert y.tolist() == [[-1.0, -1.0]] * 4
    assert bool(torch.isfinite(x.grad).all())  # type: ignore[arg-type]


def test_running_extremes_by_hand() -> None:
    amm = Amm(1)
    x = torch.tensor([[0.0], [10.0]])
    assert torch.equal(copy.deepcopy(amm).eval()(x), x)  # before any batch
    amm(x)
    assert (float(amm.low), float(amm.high)) == (0.0, 10.0)
    amm(torch.tensor([[-10.0], [30.0]]))
    assert (float(amm.low), float(amm.high)) == pytest.approx((-1.0, 12.0))
    amm.eval()
    y = amm(torch.tensor([[-1.0], [5.5], [12.0], [25.0]]))
    assert y.flatten().tolist() == pytest.approx([-1.0, 0.0, 1.0, 3.0], abs=1e-6)
    assert int(amm.batches) == 2  # evaluation moves nothing


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 4), (5, 6)),
        (nn.Linear(6, 4, bias=False), (5, 6)),
        (nn.Conv2d(2, 4, 3, padding=1), (5, 2, 6, 6)),
        (nn.Conv1d(2, 4, 3, bias=False), (5, 2, 9)),
    ],
)
def test_folded_into_the_layer_before_it_is_the_same(layer: nn.Linear, shape: tuple[int, ...]) -> None:
    amm, x = Amm(4), noise(*shape)
    for seed in range(3):
        amm(layer(noise(*shape, seed=seed)))
    amm.eval()
    weight = layer.weight.detach().clone()
    made = folded(layer, amm)
    torch.testing.assert_close(made(x), amm(layer(x)), rtol=1e-6, atol=1e-6)
    assert torch.equal(layer.weight, weight)
    assert not torch.allclose(made(x), layer(x), atol=1e-3)
    with pytest.raises(ModelError):
        folded(layer, Amm(3))


@pytest.mark.parametrize("shape", [(6,), (3, 4, 4)])
def test_the_front_end_folds_it_at_no_level(shape: tuple[int, ...]) -> None:
    channels = shape[0]
    first: list[nn.Module] = [nn.Linear(6, 6)] if len(shape) == 1 else [nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)]
    last = [nn.Flatten(), nn.Linear(6 if len(shape) == 1 else 12, 4)]
    amm = Amm(channels)
    plain = nn.Sequential(*first, Square(), *last)
    tail = nn.Sequential(*first, Bounded(amm, Square()), *last)
    for seed in range(3):
        tail(noise(9, *shape, seed=seed))
    tail.eval()
    layers = fold_tail(tail, shape)
    assert [type(one) for one in layers] == [type(one) for one in fold_tail(plain, shape)]
    x = noise(7, *shape)
    with torch.no_grad():
        wanted = tail(x).numpy()
    np.testing.assert_allclose(outputs(layers, x.double().flatten(1).numpy())[-1], wanted, atol=1e-5)


def test_a_chain_of_squares_stays_bounded_where_it_would_escape() -> None:
    def chain() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(*[m for _ in range(8) for m in (nn.Linear(8, 8), Square())])

    def largest(chain: nn.Sequential, x: Tensor) -> float:
        top = 0.0
        for module in chain:
            x = module(x)
            top = max(top, float(x.detach().abs().max()))
        return top

    free, bounded = chain(), chain()
    for i in range(1, 16, 2):
        bounded[i] = Bounded(Amm(8), Square())
    x = 10 * noise(64, 8)
    assert largest(bounded, x) < 50
    assert not largest(free, x) < 1e6


def test_a_schedule_puts_it_before_activations_once_and_can_go_on() -> None:
    model, again, schedule = build(), build(), BoundActivations(momentum=0.2)
    for one in (model, again):
        schedule.begin(one)
    (amm,) = bound_activations(model)
    assert (amm.channels, amm.momentum) == (32, 0.2)
    assert isinstance(model.tails["1"][4], Bounded)  # type: ignore[index]
    model.train()
    for seed in range(3):
        schedule.step(model, Moment(seed, 3, 0, 1))
        model(noise(16, 1, 8, 8, seed=seed))
    before = [id(m) for m in model.modules()]
    schedule.begin(model)
    schedule.end(model)
    assert [id(m) for m in model.modules()] == before
    again.load_state_dict(model.state_dict())
    x = noise(4, 1, 8, 8)
    for a, b in zip(again.eval()(x), model.eval()(x), strict=True):
        assert torch.equal(a, b)
    check_tails(model)


def test_it_bounds_activations_that_turn() -> None:
    old = build()
    tail = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
    model = SplitModel.from_parts(
        name="turns",
        stages=list(old.stages),
        exits={0: old.exits["0"]},
        tails={1: tail},
        preprocessing=old.preprocessing,
        class_names=old.class_names,
    )
    schedules = (AllAtOnce(), BoundActivations())
    for _ in range(2):
        for schedule in schedules:
            schedule.begin(model)
    assert len(turnings(model)) == 1
    model.train()
    for schedule in schedules:
        schedule.step(model, Moment(5, 10, 0, 1))
    model(noise(16, 1, 8, 8))
    for schedule in schedules:
        schedule.end(model)
    assert [type(m) for m in tail[2].children()] == [Amm, Quadratic]
    check_tails(model)


@pytest.mark.parametrize(
    "wrong", [{"channels": 0}, {"channels": 1, "momentum": 0.0}, {"channels": 1, "eps": 0.0}]
)
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ModelError):
        Amm(**wrong)  # type: ignore[arg-type]
