"""Losses at cuts and of what goes into activations."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from blindtail.errors import ConfigError
from blindtail.models.layers import Square
from blindtail.models.split import SplitModel
from blindtail.models.zoo import nets
from blindtail.preprocessing import Preprocessing
from blindtail.train.inside import attention
from blindtail.train.losses import (
    CrossEntropy,
    Features,
    RangePenalty,
)
from blindtail.train.phases import Batch, Loss, Sum
from tests.loss_cases import (
    IMAGES,
    batch,
    gradient,
    random,
    seeds,
    some,
    through,
)

# ---- At a cut


def with_cuts(student: Tensor, teacher: Tensor) -> Batch:
    return replace(batch(teacher=replace(batch(), cuts={1: teacher})), cuts={1: student})


def test_equal_networks_have_equal_features() -> None:
    model = nets.digits().eval()
    images = random(0, 6, 1, 8, 8)
    b = through(model, images, through(copy.deepcopy(model), images))
    other = through(model, images, through(nets.digits().eval(), images))
    losses: list[Loss] = [Features(1), Features(1, attention), Features(1, normalise=False)]
    for loss in losses:
        assert loss(b).item() == 0.0
        assert loss(other).item() > 0.0
    torch.autograd.backward(Sum([(1.0, loss) for loss in losses])(other))
    assert all(p.grad is None for p in other.taught.model.parameters()), "the teacher learns"
    assert model.stages[0][0].weight.grad.abs().max() > 0  # type: ignore[index, union-attr]


@some
@given(seed=seeds, size=st.floats(0.01, 100))
def test_normalised_features_do_not_count_for_their_size(seed: int, size: float) -> None:
    student, teacher = random(seed, IMAGES, 3, 2, 2), random(seed + 1, IMAGES, 3, 2, 2)
    loss = Features(1)
    torch.testing.assert_close(
        loss(with_cuts(size * student, size * teacher)), loss(with_cuts(student, teacher)), rtol=1e-4, atol=0
    )


def test_features_by_their_formula() -> None:
    student, teacher = random(0, IMAGES, 4), random(1, IMAGES, 4)
    teacher[:, 3] = 1.5  # an element that never moves
    s, t = student.double().numpy(), teacher.double().numpy()
    floor = 0.01 * t.var(0).mean()
    expected = ((s - t) ** 2 / (t.var(0) + floor)).mean()
    assert Features(1)(with_cuts(student, teacher)).item() == pytest.approx(expected, rel=1e-5)
    plain = Features(1, normalise=False)(with_cuts(student, teacher)).item()
    assert plain == pytest.approx(((s - t) ** 2).mean(), rel=1e-5)
    still = with_cuts(student, torch.ones(IMAGES, 4))
    assert Features(1)(still).item() == pytest.approx(((s - 1) ** 2).mean(), rel=1e-5)


def test_features_of_other_shapes_are_refused_unless_projected() -> None:
    b = with_cuts(random(0, IMAGES, 3, 2, 2), random(1, IMAGES, 8, 2, 2))
    with pytest.raises(ConfigError, match=r"\(7, 3, 2, 2\) of the network at 1"):
        Features(1)(b)
    assert Features(1, attention)(b).item() > 0
    with pytest.raises(ConfigError, match="attention map"):
        Features(1, attention)(with_cuts(random(0, IMAGES, 3), random(1, IMAGES, 3)))
    with pytest.raises(ConfigError, match="its teacher has no cut 0"):
        Features(1, teacher_cut=0)(b)


# ---- Ranges


def tail_of(*layers: nn.Module) -> SplitModel:
    return SplitModel.from_parts(
        name="ranges",
        stages=[nn.Flatten()],
        exits={0: nn.Linear(4, 2)},
        tails={0: nn.Sequential(*layers, nn.Linear(4, 2))},
        preprocessing=Preprocessing(input_shape=(1, 2, 2), mean=(0.0,), std=(1.0,)),
        class_names=("a", "b"),
    )


def test_values_outside_a_range_are_penalised() -> None:
    model = tail_of(Square(), Square())
    images = torch.tensor([[0.5, -1.0, 2.0, -3.0]]).view(1, 1, 2, 2).requires_grad_()
    b = through(model, images)
    # Into the first: 1 and 2 beyond a limit of 1; into the second (0.25, 1, 4, 9): 3 and 8.
    assert RangePenalty(1.0)(b).item() == pytest.approx(((1 + 4) / 4 + (9 + 64) / 4) / 2)
    assert RangePenalty(1.0, ("tails.0.0",))(b).item() == pytest.approx(5 / 4)
    assert RangePenalty(9.0)(b).item() == 0.0
    slope = gradient(RangePenalty(1.0, ("tails.0.0",))(b), images).flatten()
    assert slope.tolist() == [0.0, 0.0, 0.5, -1.0]  # 2 (|x| - limit) sign(x) / 4
    assert not gradient(RangePenalty(9.0)(b), images).any()


def test_layers_of_the_head_are_watched_by_name() -> None:
    model = nets.digits()
    b = through(model.train(), random(0, 6, 1, 8, 8))
    first = RangePenalty(0.0, ("stages.0.2",))(b)  # into the first ReLU: values of a batch norm
    assert first.item() == pytest.approx(1.0, rel=1e-3)
    assert gradient(first, model.stages[0][1].weight).any()  # type: ignore[index]


class Meeting(nn.Module):
    """Dropout and a square behind two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.norm, self.act = nn.Dropout(0.5), nn.BatchNorm1d(4), Square()
        self.last = nn.Linear(4, 2)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        x: Tensor = self.last(self.act(self.norm(self.drop(a + b))))
        return x


class Two(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.flatten(1), 2.0 * x.flatten(1)


class Added(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (a + b)[:, :2]


def test_the_pass_of_a_penalty_leaves_no_trace() -> None:
    model = SplitModel.from_parts(
        name="several",
        stages=[Two()],
        exits={0: Added()},
        tails={0: Meeting()},
        preprocessing=Preprocessing(input_shape=(1, 2, 2), mean=(0.0,), std=(1.0,)),
        class_names=("a", "b"),
    )
    model.train()
    b = through(model, random(0, 6, 1, 2, 2))
    state = {name: t.clone() for name, t in model.state_dict().items()}
    randomness = torch.get_rng_state()
    loss = RangePenalty(0.5)(b)
    assert loss.item() > 0
    assert torch.equal(torch.get_rng_state(), randomness)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    # It is trained with, beside what the first pass gave.
    torch.autograd.backward(Sum([(1.0, CrossEntropy()), (0.1, RangePenalty(0.5))])(b))
    assert all(p.grad is not None and p.grad.any() for p in model.tails["0"].norm.parameters())  # type: ignore[union-attr]
    # A control: another pass of the network itself does move its statistics.
    model(b.images)
    assert not all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_hooks_go_also_when_the_pass_fails() -> None:
    model = tail_of(Square())
    b = replace(through(model, torch.zeros(2, 1, 2, 2)), cuts={0: torch.zeros(2, 3)})
    with pytest.raises(RuntimeError):
        RangePenalty(1.0)(b)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_network_without_such_layers_is_refused() -> None:
    model = tail_of(nn.ReLU())
    b = through(model, torch.zeros(2, 1, 2, 2))
    with pytest.raises(ConfigError, match="no polynomial activation"):
        RangePenalty(1.0)(b)
    with pytest.raises(ConfigError, match=r"no layer named tails\.1\.\*"):
        RangePenalty(1.0, ("tails.1.*",))(b)
    assert RangePenalty(1.0, ("tails.0.0",))(b).item() == 0.0
