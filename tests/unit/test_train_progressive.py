"""Heads that blend ReLU with a smooth activation while they are trained."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blindtail.errors import ConfigError, ModelError
from blindtail.models.split import SplitModel
from blindtail.models.zoo import nets
from blindtail.train.phases import Moment
from blindtail.train.progressive import Blend, Progressive, blend_head, other_activations, strip

COURSES = ("linear", "cosine", "layers")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build() -> SplitModel:
    torch.manual_seed(0)
    return nets.digits()


def blends(model: SplitModel) -> list[Blend]:
    return [m for m in model.modules() if isinstance(m, Blend)]


def train_a_little(model: SplitModel, schedule: Progressive, moments: list[Moment]) -> None:
    model.train()
    for moment in moments:
        schedule.step(model, moment)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        model.zero_grad()
        torch.autograd.backward(model(noise(8, 1, 8, 8, seed=moment.step))[1].square().mean())
        optimizer.step()


@pytest.mark.parametrize(("smooth", "g"), [("gelu", F.gelu), ("swish", F.silu), ("mish", F.mish)])
def test_a_blend_is_both_of_its_ends_exactly(smooth: str, g: object) -> None:
    x, layer = 3 * noise(100), Blend(smooth)  # type: ignore[arg-type]
    assert torch.equal(layer(x), g(x))  # type: ignore[operator]
    layer.blend_(0.3)
    torch.testing.assert_close(layer(x), 0.3 * F.relu(x) + 0.7 * g(x))  # type: ignore[operator]
    layer.blend_(1.0)
    assert torch.equal(layer(x), F.relu(x))
    with pytest.raises(ModelError):
        layer.blend_(-0.1)


@pytest.mark.parametrize("course", COURSES)
def test_a_stripped_head_is_the_blended_one_at_its_end_to_the_last_bit(course: str) -> None:
    model = build()
    schedule = Progressive("mish", course)  # type: ignore[arg-type]
    schedule.begin(model)
    train_a_little(model, schedule, [Moment(i, 10, i // 5, 2) for i in range(10)])
    model.eval()
    x = noise(6, 1, 8, 8)
    assert other_activations(model) == ("stages.0.2", "stages.1.1")
    assert {float(b.alpha) for b in blends(model)} == {1.0}  # the last step lies at 0.9 of the phase
    blended = model(x)
    before = copy.deepcopy(model)
    schedule.end(model)
    assert other_activations(model) == ()
    assert not blends(model)
    for a, b in zip(model(x), blended, strict=True):
        assert float((a - b).detach().abs().max()) == 0.0
    for blend in blends(before):
        blend.blend_(0.5)
    assert not torch.equal(before(x)[0], blended[0])  # the comparison can tell


def test_courses_by_hand() -> None:
    def table(course: str, places: int, by: float = 0.8) -> list[list[float]]:
        schedule = Progressive("gelu", course, by)  # type: ignore[arg-type]
        moments = [Moment(i, 10, 0, 1) for i in (0, 2, 4, 6, 8, 9)]
        return [[schedule.reached(m, place, places) for m in moments] for place in range(places)]

    assert table("linear", 2) == [pytest.approx([0, 0.25, 0.5, 0.75, 1, 1])] * 2
    rising = [0, (1 - 0.5**0.5) / 2, 0.5, (1 + 0.5**0.5) / 2, 1, 1]
    assert table("cosine", 2) == [pytest.approx(rising)] * 2
    assert table("layers", 2) == [pytest.approx([0, 0.5, 1, 1, 1, 1]), pytest.approx([0, 0, 0, 0.5, 1, 1])]


@pytest.mark.parametrize("course", COURSES)
def test_a_phase_that_goes_on_in_a_rebuilt_network_is_the_same_phase(course: str) -> None:
    schedule = Progressive("swish", course)  # type: ignore[arg-type]
    moments = [Moment(i, 12, i // 3, 4) for i in range(12)]
    whole, again = build(), build()
    schedule.begin(whole)
    train_a_little(whole, schedule, moments[:5])
    schedule.begin(again)
    again.load_state_dict(copy.deepcopy(whole.state_dict()))
    x = noise(4, 1, 8, 8)
    for a, b in zip(again.eval()(x), whole.eval()(x), strict=True):
        assert torch.equal(a, b)
    for model in (whole, again):
        train_a_little(model, schedule, moments[5:])
        schedule.end(model)
    one, two = whole.state_dict(), again.state_dict()
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert one.keys() == build().state_dict().keys()  # nothing is left of it


def test_begin_twice_changes_nothing_more() -> None:
    model, schedule = build(), Progressive()
    modes = [m.training for m in model.stages.modules()]
    schedule.begin(model)
    assert [m.training for m in model.stages.modules()] == modes
    schedule.step(model, Moment(3, 10, 0, 1))
    before = [id(m) for m in model.modules()]
    schedule.begin(model)
    assert [id(m) for m in model.modules()] == before
    assert all(float(b.alpha) > 0 for b in blends(model))
    strip(model)
    strip(model)
    assert not blends(model)


def test_blends_are_numbered_in_the_order_they_run_in() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.second, self.first, self.unused = nn.ReLU(), nn.ReLU(), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x) - 1)  # type: ignore[no-any-return]

    old = build()
    stages: Any = [Backwards(), *old.stages]
    model = SplitModel.from_parts(
        name="backwards",
        stages=stages,
        exits={1: old.exits["0"]},
        tails={2: old.tails["1"]},
        preprocessing=old.preprocessing,
        class_names=old.class_names,
    )
    found = blend_head(model, "mish")
    assert [b.place for b in found] == [0, 1, 2, 3]
    assert {b.places for b in found} == {4}
    assert found[0] is stages[0].first
    assert found[1] is stages[0].second
    assert type(stages[0].unused) is nn.ReLU


def test_mistakes_are_told() -> None:
    for wrong in ({"smooth": "selu"}, {"course": "up"}, {"by": 0.0}):
        with pytest.raises(ConfigError):
            Progressive(**wrong)
    with pytest.raises(ModelError):
        Blend("selu")  # type: ignore[arg-type]
    model = build()
    stages: Any = model.stages
    stages[0][2] = stages[1][1] = nn.Identity()
    with pytest.raises(ModelError, match=r"no nn\.ReLU to blend"):
        blend_head(model)
