"""Tails that turn while they are trained: what is replaced, schedules, and that they fold in the end."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blindtail.errors import ConfigError, ModelError
from blindtail.he.clear import ClearEvaluator
from blindtail.he.compiler import compile_tail
from blindtail.he.frontend import fold_tail
from blindtail.he.layers import outputs
from blindtail.models.layers import Square
from blindtail.models.lint import lint, split
from blindtail.models.pack import check_tails
from blindtail.models.several import flat
from blindtail.models.split import SplitModel
from blindtail.preprocessing import Preprocessing
from blindtail.train.activations import IDENTITY, Target
from blindtail.train.phases import Moment, Schedule
from blindtail.train.turning import (
    AllAtOnce,
    LayerByLayer,
    polynomial_tails,
    ranges,
    settle_tails,
    turnings,
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Residual(nn.Module):
    """One ReLU module that its forward calls twice."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.conv = nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.conv(self.act(x)))  # type: ignore[no-any-return]


class First(nn.Module):
    """An exit of the first of two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 4)

    def forward(self, main: Tensor, skip: Tensor) -> Tensor:
        return self.fc(main.flatten(1))  # type: ignore[no-any-return]


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(48, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x.flatten(1))))  # type: ignore[no-any-return]


def tail_of_three() -> nn.Sequential:
    """(3, 4, 4) -> 4 classes. Modules are defined in another order than they run in, and one is shared."""
    act = nn.ReLU()
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), act, nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(24, 8), act, nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 4)),
    )


def build(tail: nn.Module | None = None, stages: Sequence[nn.Module] | None = None) -> SplitModel:
    torch.manual_seed(0)
    tail = tail_of_three() if tail is None else tail
    return SplitModel.from_parts(
        name="small",
        stages=stages or [nn.Sequential(nn.Conv2d(1, 3, 3, padding=1, stride=2), nn.ReLU())],
        exits={0: nn.Sequential(nn.Flatten(), nn.Linear(48, 4))},
        tails={0: tail},
        preprocessing=Preprocessing(input_shape=(1, 8, 8), mean=(0.0,), std=(1.0,)),
        class_names=("a", "b", "c", "d"),
    )


def at(passed: float, epochs: int, per_epoch: int = 12) -> Moment:
    step = round(passed * per_epoch)
    return Moment(step, epochs * per_epoch, step // per_epoch, epochs)


@pytest.mark.parametrize("make", [lambda: AllAtOnce(0.0), lambda: AllAtOnce(by=0.0), lambda: AllAtOnce(by=2)])
def test_impossible_schedules_are_refused(make: object) -> None:
    with pytest.raises(ConfigError):
        make()  # type: ignore[operator]
    for wrong in ({"start": -1.0}, {"each": 0.0}, {"first": 0.95}):
        with pytest.raises(ConfigError):
            LayerByLayer(**wrong)  # type: ignore[arg-type]


def test_tails_turn_in_the_order_they_run_in() -> None:
    model = build()
    x = noise(4, 1, 8, 8)
    model.eval()
    pooled = copy.deepcopy(model)
    tail: Any = pooled.tails["0"]
    tail[3] = nn.AvgPool2d(2, 2)
    found = polynomial_tails(model, per_channel=True)
    assert [(m.place, m.places, m.channels) for m in found] == [(0, 3, 6), (1, 3, 8), (2, 3, 8)]
    tail = model.tails["0"]
    assert [type(m).__name__ for m in tail] == [
        *("Conv2d", "BatchNorm2d", "Turning", "AvgPool2d", "Flatten"),
        *("Linear", "Turning", "Linear", "Turning", "Linear"),
    ]
    assert all(isinstance(m, nn.ReLU) for m in model.stages[0][1:])  # type: ignore[index]
    # At r = 0 nothing but the pooling has changed.
    for a, b in zip(model(x), pooled(x), strict=True):
        assert torch.equal(a, b)
    for turning in found:
        turning.turn_(0.5)
    assert not torch.equal(model(x)[1], pooled(x)[1])


def test_a_relu_that_is_called_twice_is_one_activation() -> None:
    tail = nn.Sequential(Residual(), nn.Flatten(), nn.Linear(48, 4))
    model = build(tail)
    (found,) = polynomial_tails(model, per_channel=True)
    assert (found.channels, found.place, found.places) == (3, 0, 1)
    settle_tails(model)
    check_tails(model)


def test_widths_that_differ_have_no_channels_in_common() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.a, self.b = nn.ReLU(), nn.Linear(48, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.act(self.a(self.act(x.flatten(1)))))  # type: ignore[no-any-return]

    with pytest.raises(ModelError, match=r"tails\.0\.act runs on activations of several widths"):
        polynomial_tails(build(Twice()), per_channel=True)
    assert len(polynomial_tails(build(Twice()))) == 1


@pytest.mark.parametrize(
    ("tail", "said"),
    [
        (Functional(), r"tail at cut 0: relu \(F\.relu\) \[in tails\.0, .*nn\.ReLU\(\) in its __init__"),
        (nn.Sequential(nn.Flatten(), nn.GELU(), nn.Linear(48, 4)), r"tails\.0\.1 \(GELU\)"),
        (nn.Sequential(nn.Flatten(), nn.LayerNorm(48), nn.Linear(48, 4)), "BatchNorm"),
        (nn.Sequential(nn.MaxPool2d(2, 1, dilation=2), nn.Flatten(), nn.Linear(12, 4)), r"tails\.0\.0"),
    ],
)
def test_what_cannot_be_replaced_is_told_with_a_way_out(tail: nn.Module, said: str) -> None:
    model = build(tail)
    kept = [type(m) for m in model.modules()]
    with pytest.raises(ModelError, match=said):
        polynomial_tails(model)
    assert [type(m) for m in model.modules()] == kept


def test_a_relu_in_place_whose_input_is_read_again_is_told_of() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.last = nn.ReLU(inplace=True), nn.Linear(48, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = 2 * x.flatten(1) - 1
            return self.last(self.act(y) + y)  # type: ignore[no-any-return]

    model = build(Writes())
    with pytest.raises(ModelError, match="inplace"):
        polynomial_tails(model)
    assert model.tails["0"].act.inplace is True  # type: ignore[union-attr]


def test_all_at_once_by_hand() -> None:
    ten = AllAtOnce(epochs=10)
    assert [ten.reached(at(e, 20), 0, 3) for e in (0, 1, 5, 10, 19)] == [0.0, 0.1, 0.5, 1.0, 1.0]
    assert ten.reached(at(5, 20), 2, 3) == 0.5  # the same for all
    # In a phase of 4 epochs it is over by 3.6.
    assert [ten.reached(at(e, 4, 10), 0, 1) for e in (1.8, 3.6)] == pytest.approx([0.5, 1.0])
    assert AllAtOnce(by=0.5).reached(at(5, 20), 0, 1) == 0.5


def test_layer_by_layer_by_hand() -> None:
    # Row 1's numbers: from epoch 3, three epochs each.
    table: dict[float, tuple[float, ...]] = {
        0: (0, 0, 0),
        3: (0, 0, 0),
        4: (1 / 3, 0, 0),
        6: (1, 0, 0),
        7.5: (1, 0.5, 0),
    }
    table |= {9: (1, 1, 0), 11: (1, 1, 2 / 3), 12: (1, 1, 1), 19: (1, 1, 1)}
    for epoch, wanted in table.items():
        found = [LayerByLayer().reached(at(epoch, 20), place, 3) for place in range(3)]
        assert found == pytest.approx(wanted, abs=1e-12)
    # Sped up to end at 0.9 of 5 epochs: 12 epochs in 4.5, the first begins at 1.125.
    short = [LayerByLayer().reached(at(e, 5, 80), 0, 3) for e in (1.125, 1.6875, 2.25)]
    assert short == pytest.approx([0.0, 0.5, 1.0])
    assert LayerByLayer().reached(at(4.5, 5), 2, 3) == pytest.approx(1.0)
    # By shares: from a tenth to nine tenths of ten epochs, two layers, four epochs each.
    shares = LayerByLayer(first=0.1)
    assert [shares.reached(at(e, 10), 0, 2) for e in (1, 3, 5)] == pytest.approx([0, 0.5, 1])
    assert [shares.reached(at(e, 10), 1, 2) for e in (5, 7, 9)] == pytest.approx([0, 0.5, 1])


SCHEDULES: list[Schedule] = [AllAtOnce(per_channel=True), LayerByLayer(start=1, each=1)]


def train_a_little(model: SplitModel, schedule: Schedule, moments: Sequence[Moment]) -> None:
    model.train()
    for moment in moments:
        schedule.step(model, moment)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        model.zero_grad()
        torch.autograd.backward(model(noise(8, 1, 8, 8, seed=moment.step))[1].square().mean())
        optimizer.step()
        for turning in turnings(model):
            turning.project_()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_phase_that_goes_on_in_a_rebuilt_network_is_the_same_phase(schedule: Schedule) -> None:
    moments = [Moment(i, 12, i // 3, 4) for i in range(12)]
    whole = build()
    schedule.begin(whole)
    train_a_little(whole, schedule, moments[:7])
    held = copy.deepcopy(whole.state_dict())
    again = build()
    schedule.begin(again)
    assert not torch.equal(again.eval()(noise(4, 1, 8, 8))[1], whole.eval()(noise(4, 1, 8, 8))[1])
    again.load_state_dict(held)
    for a, b in zip(again.eval()(noise(4, 1, 8, 8)), whole.eval()(noise(4, 1, 8, 8)), strict=True):
        assert torch.equal(a, b)
    for model in (whole, again):
        train_a_little(model, schedule, moments[7:])
        schedule.end(model)
    one, two = whole.state_dict(), again.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_begin_and_end_twice_change_nothing_more(schedule: Schedule) -> None:
    model = build()
    schedule.begin(model)
    schedule.step(model, Moment(5, 10, 2, 4))
    before = [id(m) for m in model.modules()]
    state = copy.deepcopy(model.state_dict())
    schedule.begin(model)
    assert [id(m) for m in model.modules()] == before
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert any(float(t.r) > 0 for t in turnings(model))
    schedule.end(model)
    before = [id(m) for m in model.modules()]
    assert not turnings(model)
    schedule.end(model)
    schedule.begin(model)
    assert [id(m) for m in model.modules()] == before


@pytest.mark.parametrize(
    "schedule", [*SCHEDULES, AllAtOnce(target=Target.fitted(-2, 2, 4)), AllAtOnce(target=IDENTITY)]
)
def test_a_tail_that_has_turned_folds_into_the_same_function(schedule: Schedule) -> None:
    model = build()
    with pytest.raises(ModelError):
        check_tails(model)  # ReLU does not fold
    schedule.begin(model)
    train_a_little(model, schedule, [Moment(i, 6, i // 2, 3) for i in range(6)])
    schedule.end(model)
    check_tails(model)
    tail = model.tails["0"].eval()
    report = lint(tail, model.stage_infos[0].output_shape, plans=False)
    assert report.whole is not None
    assert report.whole.verdict == "runs"
    layers = fold_tail(tail, model.stage_infos[0].output_shape)
    x = noise(6, 3, 4, 4)
    with torch.no_grad():
        wanted = tail(x).numpy()
    np.testing.assert_allclose(outputs(layers, x.double().flatten(1).numpy())[-1], wanted, atol=1e-4)


def test_the_compiled_tail_gives_what_the_module_gives() -> None:
    """Of the program, run without keys and without noise."""
    model = build(nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 4)))
    schedule = AllAtOnce(per_channel=True)
    schedule.begin(model)
    train_a_little(model, schedule, [Moment(i, 6, i // 2, 3) for i in range(6)])
    schedule.end(model)
    tail, x = model.eval().tails["0"], noise(20, 48)
    program = compile_tail(fold_tail(tail, model.stage_infos[0].output_shape), x.double().numpy())
    with torch.no_grad():
        wanted = tail(x).numpy()
    assert np.ptp(wanted) > 0.01
    np.testing.assert_allclose(ClearEvaluator(program).logits(x.double().numpy()), wanted, atol=1e-5)


class Meeting(nn.Module):
    """A tail of two tensors, as `split` and others make them."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.pool, self.fc = nn.ReLU(), nn.MaxPool2d(2), nn.Linear(8, 4)

    def forward(self, main: Tensor, skip: Tensor) -> Tensor:
        met = torch.cat([self.pool(main).flatten(1), self.act(skip).flatten(1)], 1)
        return self.fc(met)  # type: ignore[no-any-return]


class Branches(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, :, :4, :4], x[:, :, 6:, 6:]


def test_tails_of_several_tensors_and_tails_that_lint_cut_turn_too() -> None:
    several = SplitModel.from_parts(
        name="several",
        stages=[Branches()],
        exits={0: First()},
        tails={0: Meeting()},
        preprocessing=Preprocessing(input_shape=(1, 8, 8), mean=(0.0,), std=(1.0,)),
        class_names=("a", "b", "c", "d"),
    )
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1, stride=2), nn.ReLU(), *tail_of_three())
    head, tail = split(whole, (1, 8, 8), after="1")
    # The graph that lint cuts calls the shared ReLU twice: one set of coefficients.
    for model, activations in ((several, 1), (build(tail, [head]), 2)):
        for _ in range(2):
            assert len(polynomial_tails(model)) == activations
        settle_tails(model)
        check_tails(model)


def test_ranges_are_of_what_goes_into_each_activation() -> None:
    model = build(nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 4)))
    x = noise(30, 1, 8, 8)
    found = ranges(model, x, batch=7)
    with torch.no_grad():
        first = flat(model.head(x, 0))
        second = model.tails["0"][2](first.relu())  # type: ignore[index]
    wanted = [(float(v.min()), float(v.max())) for v in (first, second)]
    assert np.allclose(found, wanted, atol=1e-6)
    targets = [Target.fitted(low - 0.1, high) for low, high in found]
    turned = polynomial_tails(model, target=targets)
    assert [t.target for t in turned] == targets
    assert np.allclose(ranges(model, x), found, atol=1e-6)


def test_squares_are_left_as_they_are() -> None:
    model = build(nn.Sequential(nn.Flatten(), nn.Linear(48, 8), Square(), nn.Linear(8, 4)))
    before = [id(m) for m in model.modules()]
    assert polynomial_tails(model) == ()
    assert [id(m) for m in model.modules()] == before


def test_targets_are_one_for_all_or_one_for_each() -> None:
    with pytest.raises(ModelError, match="1 targets for 3 activations"):
        polynomial_tails(build(), target=[Target()])
