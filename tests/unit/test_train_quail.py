"""QuaIL's objectives: one layer at a time learns from a ReLU network's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blindtail.errors import ConfigError
from blindtail.models.layers import Square
from blindtail.models.several import flat
from blindtail.models.split import SplitModel
from blindtail.models.zoo import nets
from blindtail.train.amm import bound_activations
from blindtail.train.phases import Batch, Moment
from blindtail.train.quail import LayerFromTeacher, TailFrom


def build(kind: type[nn.Module], seed: int = 0) -> SplitModel:
    torch.manual_seed(seed)
    old = nets.digits()
    layers = [nn.Linear(64, 12), nn.BatchNorm1d(12), kind(), nn.Linear(12, 8), kind(), nn.Linear(8, 10)]
    return SplitModel.from_parts(
        name="two",
        stages=list(old.stages),
        exits={0: old.exits["0"]},
        tails={1: nn.Sequential(nn.Flatten(), *layers)},
        preprocessing=old.preprocessing,
        class_names=old.class_names,
    )


def batch_of(model: SplitModel, teacher: SplitModel | None = None) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(32, 1, 8, 8, generator=generator)
    labels = torch.randint(10, (32,), generator=generator)
    outputs = model(images)
    cuts = {1: model.head(images, 1)}
    taught = None if teacher is None else batch_of(teacher.eval())
    moment = Moment(0, 1, 0, 1)
    return Batch(images, labels, outputs[:1], outputs[1:], {1: flat(cuts[1])}, model, moment, taught)


def layers_that_learn(model: SplitModel, loss: Tensor) -> set[int]:
    """Of the tail: 0 to the first activation, 1 to the second, 2 to the logits; -1 is the head."""
    model.zero_grad()
    torch.autograd.backward(loss)
    first = {"1": 0, "2": 0, "4": 1, "6": 2}
    found = set[int]()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found.add(first[name.split(".")[2]] if name.startswith("tails.") else -1)
    return found


def test_one_layer_learns_and_the_others_are_left_alone() -> None:
    teacher, student = build(nn.ReLU), build(Square, seed=1)
    for layer in (0, 1):
        batch = batch_of(student, teacher)
        assert layers_that_learn(student, LayerFromTeacher(1, layer)(batch)) == {layer}
    for layer in (0, 1, 2):
        assert layers_that_learn(student, TailFrom(1, layer)(batch_of(student))) == set(range(layer, 3))


def test_the_loss_by_hand() -> None:
    teacher, student = build(nn.ReLU), build(Square, seed=1)
    student.eval()
    batch = batch_of(student, teacher)
    ours: Any = student.tails["1"]
    theirs: Any = teacher.tails["1"]
    x, y = batch.cuts[1], batch.taught.cuts[1]
    for layer, upto in ((0, 4), (1, 6)):
        wanted = (ours[:upto](x) - theirs[:upto](y)).square().mean()
        torch.testing.assert_close(LayerFromTeacher(1, layer)(batch), wanted)
    torch.testing.assert_close(TailFrom(1, 0)(batch), F.cross_entropy(batch.tails[0], batch.labels))
    same = batch_of(build(nn.ReLU).eval(), teacher)
    assert float(LayerFromTeacher(1, 1)(same).detach()) == 0.0


def test_running_statistics_are_moved_by_the_loop_alone() -> None:
    teacher, student = build(nn.ReLU), build(Square, seed=1)
    assert len(bound_activations(student)) == 2
    student.train()
    batch = batch_of(student, teacher)
    before = copy.deepcopy(dict(student.named_buffers()))
    LayerFromTeacher(1, 1)(batch)
    assert all(torch.equal(before[k], v) for k, v in student.named_buffers())
    student(batch.images)
    assert not all(torch.equal(before[k], v) for k, v in student.named_buffers())


def test_a_layer_comes_closer_to_its_teacher() -> None:
    teacher, student = build(nn.ReLU), build(Square, seed=1)
    student.train()
    optimizer = torch.optim.AdamW(student.tails.parameters(), lr=0.02)
    frozen: Any = student.tails["1"]
    kept = frozen[4].weight.detach().clone()
    values = []
    for _ in range(25):
        loss = LayerFromTeacher(1, 0)(batch_of(student, teacher))
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
        values.append(float(loss.detach()))
    assert values[-1] < 0.5 * values[0]
    assert torch.equal(frozen[4].weight, kept)


def test_mistakes_are_told() -> None:
    teacher, student = build(nn.ReLU), build(Square)
    with pytest.raises(ConfigError, match="has 2 activations"):
        LayerFromTeacher(1, 2)(batch_of(student, teacher))
    with pytest.raises(ConfigError, match="no layer 3"):
        TailFrom(1, 3)(batch_of(student))
    with pytest.raises(ConfigError, match="no cut 0"):
        TailFrom(0, 0)(batch_of(student))
    with pytest.raises(ConfigError, match="teacher"):
        LayerFromTeacher(1, 0)(batch_of(student))
    wider: Any = teacher.tails["1"]
    wider[4], wider[6] = nn.Linear(12, 9), nn.Linear(9, 10)
    with pytest.raises(ConfigError, match="the same shapes"):
        LayerFromTeacher(1, 1)(batch_of(student, teacher))
