"""Losses of phases: their identities with each other and with formulas written out again here."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax, rel_entr, softmax

from blindtail.errors import ConfigError
from blindtail.train.losses import (
    ContinuationDistillation,
    CrossEntropy,
    Distillation,
    Features,
    Learners,
    RangePenalty,
    SelfDistillation,
    annealing,
)
from blindtail.train.phases import Loss, Moment, Sum
from blindtail.train.recipe import JointCrossEntropy
from tests.loss_cases import (
    CLASSES,
    IMAGES,
    LABELS,
    at,
    batch,
    gradient,
    random,
    seeds,
    some,
    taught,
)

# ---- Cross entropy


@some
@given(seed=seeds, weights=st.tuples(*[st.floats(0, 2)] * 2), tail=st.floats(0.1, 2))
def test_cross_entropy_is_that_of_recipes_bit_for_bit(
    seed: int, weights: tuple[float, float], tail: float
) -> None:
    b = batch(seed)
    expected = JointCrossEntropy(exit_weights=weights, tail_weight=tail)(b.exits, b.tails, b.labels)
    assert torch.equal(CrossEntropy(exits=weights, tails=tail)(b), expected)


@some
@given(seed=seeds, distil=st.floats(0.01, 2), temperature=st.floats(0.5, 10))
def test_self_distillation_is_that_of_recipes(seed: int, distil: float, temperature: float) -> None:
    b = batch(seed)
    weights = (0.3, 0.5)
    joint = JointCrossEntropy(weights, tail_weight=0.7, distill=distil, softness=temperature)
    parts = Sum([(1.0, CrossEntropy(weights, 0.7)), (distil, SelfDistillation(weights, temperature))])
    torch.testing.assert_close(parts(b), joint(b.exits, b.tails, b.labels))
    alone = SelfDistillation(weights, temperature)(b)
    assert gradient(alone, b.exits[0]).abs().max() > 0
    assert gradient(alone, b.tails[0]).abs().max() == 0, "the tail feels what exits learn from it"


def test_weights_for_all_and_for_each() -> None:
    b = batch(tails=2)
    assert torch.equal(CrossEntropy(0.5, 2.0)(b), CrossEntropy((0.5, 0.5), (2.0, 2.0))(b))
    only_second = CrossEntropy((0.0, 1.0), 0.0)(b)
    assert torch.equal(only_second, F.cross_entropy(b.exits[1], LABELS))
    assert not gradient(only_second, b.exits[0]).any()


def test_label_smoothing_mixes_the_labels_with_all_classes() -> None:
    b = batch()
    target = 0.9 * np.eye(CLASSES)[LABELS.numpy()] + 0.1 / CLASSES
    logs = log_softmax(b.tails[0].detach().double().numpy(), axis=1)
    found = CrossEntropy(0.0, smoothing=0.1)(b).item()
    assert found == pytest.approx(-(target * logs).sum(1).mean(), rel=1e-5)


# ---- A teacher's answers


@some
@given(seed=seeds, to=st.sampled_from(["tails", "exits", "both"]), temperature=st.floats(0.5, 20))
def test_without_a_share_of_the_teacher_it_is_cross_entropy(
    seed: int, to: Learners, temperature: float
) -> None:
    b = batch(seed)  # no teacher is needed either
    weights = ((0.3, 0.5), 0.7)
    expected = CrossEntropy(weights[0] if to != "tails" else 0.0, weights[1] if to != "exits" else 0.0)
    assert torch.equal(Distillation(temperature, 0.0, to, *weights)(b), expected(b))


@some
@given(seed=seeds, share=st.floats(0, 1), temperature=st.floats(0.5, 20))
def test_distillation_by_its_formula(seed: int, share: float, temperature: float) -> None:
    b = taught(seed)
    t = temperature
    student = b.tails[0].detach().double().numpy()
    teacher = b.taught.tails[0].detach().double().numpy()
    labels = -log_softmax(student, axis=1)[np.arange(IMAGES), LABELS.numpy()].mean()
    divergence = rel_entr(softmax(teacher / t, axis=1), softmax(student / t, axis=1)).sum(1).mean()
    expected = (1 - share) * labels + share * t * t * divergence
    assert Distillation(t, share)(b).item() == pytest.approx(expected, rel=1e-4, abs=1e-4)


@some
@given(seed=seeds, share=st.floats(0.1, 1), temperature=st.floats(0.5, 20))
def test_gradient_of_distillation(seed: int, share: float, temperature: float) -> None:
    b = taught(seed)
    student, teacher = b.tails[0], b.taught.tails[0]
    soft = F.softmax(student / temperature, 1) - F.softmax(teacher / temperature, 1)
    hard = F.softmax(student, 1) - F.one_hot(LABELS, CLASSES)
    expected = (share * temperature * soft + (1 - share) * hard) / IMAGES
    loss = Distillation(temperature, share)(b)
    torch.testing.assert_close(gradient(loss, student), expected.detach(), atol=1e-5, rtol=1e-4)
    assert not gradient(loss, teacher).any(), "the teacher learns"


def test_every_answer_learns_from_the_teachers_last() -> None:
    teacher = batch(3, tails=2)
    b = batch(1, teacher=teacher)
    alone = replace(b, teacher=batch(9))
    last = replace(alone, teacher=replace(teacher, exits=[], tails=[teacher.tails[-1]]))
    headless = replace(alone, teacher=replace(teacher, exits=[teacher.tails[-1]], tails=[]))
    loss = Distillation(2.0, 0.5, "both")
    assert torch.equal(loss(b), loss(last))
    assert torch.equal(loss(b), loss(headless)), "without tails the last exit teaches"
    assert not torch.equal(loss(b), loss(alone))


# ---- Continuation-KD and Annealing-KD


def test_schedules_of_the_paper() -> None:
    """CIFAR: n = 200, Tmax = 20, psi = min(i / 150, 1); T falls every 10 epochs. By hand."""
    loss = ContinuationDistillation(20)
    rows = {
        0: (20, 0.05, 0.0),
        9: (20, 0.05, 0.06),
        10: (19, 0.1, 10 / 150),
        75: (13, 0.4, 0.5),
        149: (6, 0.75, 149 / 150),
        150: (5, 0.8, 1.0),
        190: (1, 1.0, 1.0),
        199: (1, 1.0, 1.0),
    }
    for epoch, (temperature, phi, psi) in rows.items():
        moment = at(epoch)
        assert loss.temperature(moment) == temperature, epoch
        assert loss.phi(moment) == pytest.approx(phi), epoch
        assert loss.psi(moment) == pytest.approx(psi), epoch


def test_schedules_of_other_lengths() -> None:
    # 7 epochs, Tmax 3: by 1 every 2 epochs, and not below 1.
    temperatures = [ContinuationDistillation(3).temperature(at(e, 7)) for e in range(7)]
    assert temperatures == [3, 3, 2, 2, 1, 1, 1]
    # Fewer epochs than Tmax: 2 epochs of 6 steps, Tmax 4: by 1 every 3 steps.
    moments = [Moment(step, 12, step // 6, 2) for step in range(12)]
    found = [ContinuationDistillation(4).temperature(m) for m in moments]
    assert found == [4, 4, 4, 3, 3, 3, 2, 2, 2, 1, 1, 1]
    # Annealing over the first half of 8 epochs, Tmax 2; labels after it.
    loss = annealing(2, first=0.5)
    assert [loss.temperature(at(e, 8)) for e in range(8)] == [2, 2, 1, 1, 1, 1, 1, 1]
    assert [loss.psi(at(e, 8)) for e in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]


@some
@given(
    highest=st.integers(1, 30),
    epochs=st.integers(1, 60),
    per_epoch=st.integers(1, 9),
    cools=st.floats(0.1, 1),
)
def test_temperature_only_falls(highest: int, epochs: int, per_epoch: int, cools: float) -> None:
    loss = ContinuationDistillation(highest, cools=cools)
    moments = [Moment(s, epochs * per_epoch, s // per_epoch, epochs) for s in range(epochs * per_epoch)]
    falls = [loss.temperature(m) for m in moments]
    assert falls[0] == highest
    assert all(0 <= a - b <= 1 and b >= 1 for a, b in pairwise(falls))
    if cools * len(moments) >= highest + 1:
        assert falls[-1] == 1
    assert all(1 / highest - 1e-9 <= loss.phi(m) <= 1 for m in moments)


@some
@given(seed=seeds, epoch=st.integers(0, 199))
def test_annealing_is_its_two_stages(seed: int, epoch: int) -> None:
    """Independently: first (z_S - phi z_T)^2 summed over classes, T down from 10 in 100 epochs; then CE."""
    moment = at(epoch)
    b = taught(seed, moment=moment)
    b = replace(b, tails=[b.tails[0].double()], teacher=replace(b.taught, tails=[b.taught.tails[0].double()]))
    student, teacher = b.tails[0].detach().numpy(), b.taught.tails[0].detach().numpy()
    if epoch < 100:
        phi = 1 - (max(1, 10 - epoch // 10) - 1) / 10
        expected = np.square(np.linalg.norm(student - phi * teacher, axis=1)).mean()
    else:
        expected = -log_softmax(student, axis=1)[np.arange(IMAGES), LABELS.numpy()].mean()
    assert annealing(10, first=0.5)(b).item() == pytest.approx(expected, rel=1e-6)


@some
@given(seed=seeds, epoch=st.integers(0, 199), margin=st.floats(0, 60))
def test_continuation_by_its_formula(seed: int, epoch: int, margin: float) -> None:
    b = taught(seed, moment=at(epoch))
    loss = ContinuationDistillation(20, margin)
    psi, phi = min(epoch / 150, 1), 1 - (max(1, 20 - epoch // 10) - 1) / 20
    student, teacher = b.tails[0].detach().double(), b.taught.tails[0].detach().double()
    hinge = ((student - phi * teacher) ** 2).sum(1) - margin * phi
    expected = psi * F.cross_entropy(student, LABELS) + (1 - psi) * hinge.clamp_min(0).mean()
    assert loss(b).item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-5)
    assert not gradient(loss(b), b.taught.tails[0]).any(), "the teacher learns"


def test_no_gradient_inside_the_margin() -> None:
    """Images 0-3 lie inside, the others outside; psi is 0 in the first epoch, phi 1 / 4."""
    loss = ContinuationDistillation(4, margin=1.0)
    teacher = batch(1)
    near = 0.25 * teacher.tails[0].detach()
    near[:, 0] += torch.tensor([0.0, 0.1, -0.3, 0.49, 0.51, -0.6, 3.0])  # the limit is sqrt(1 / 4)
    student = near.requires_grad_()
    found = gradient(loss(replace(batch(0, teacher=teacher), tails=[student])), student)
    assert not found[:4].any()
    assert (found[4:, 0].abs() > 0).all()


# ---- What a loss cannot do


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        (CrossEntropy((0.1, 0.2, 0.3)), "weighs 3 exits, the network has 2"),
        (CrossEntropy(0.0, 0.0), "nothing learns"),
        (Distillation(2.0, 0.5), "teacher"),
        (ContinuationDistillation(), "teacher"),
        (Features(1), "has no cut 1"),
    ],
)
def test_refused_for_this_batch(loss: Loss, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        loss(batch())


def test_teachers_of_other_classes_and_tails_that_are_missing() -> None:
    b = batch(teacher=replace(batch(), tails=[random(0, IMAGES, CLASSES + 1)]))
    for loss in (Distillation(2.0, 0.5), ContinuationDistillation()):
        with pytest.raises(ConfigError, match="same classes"):
            loss(b)
    with pytest.raises(ConfigError, match="distil from a teacher"):
        SelfDistillation()(batch(tails=0))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: CrossEntropy(-1.0),
        lambda: CrossEntropy((0.1, float("nan"))),
        lambda: CrossEntropy(smoothing=1.0),
        lambda: SelfDistillation(temperature=0.0),
        lambda: Distillation(0.0),
        lambda: Distillation(share=1.5),
        lambda: Distillation(to="heads"),  # type: ignore[arg-type]
        lambda: ContinuationDistillation(0),
        lambda: ContinuationDistillation(margin=-1.0),
        lambda: ContinuationDistillation(ends=0.0),
        lambda: ContinuationDistillation(cools=1.1),
        lambda: ContinuationDistillation(rises="slowly"),  # type: ignore[arg-type]
        lambda: RangePenalty(-1.0),
    ],
)
def test_settings_that_make_no_sense(wrong: object) -> None:
    with pytest.raises(ConfigError):
        wrong()  # type: ignore[operator]
