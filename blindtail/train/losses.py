"""Losses that phases are put together from: labels, a network's own tail, a teacher's answers.

Each is a frozen dataclass that is called with a `Batch`; `Sum` of `blindtail.train.phases` adds them.
Logits are (B, classes) throughout. A teacher's side is never differentiated. What looks inside a
network, at a cut or into its activations, lies in `blindtail.train.inside` and is also named here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from blindtail.errors import ConfigError
from blindtail.train.inside import Features, RangePenalty
from blindtail.train.phases import Batch, Moment

#: Of exits or of tails: one number for each of them, or a number for all. 0 leaves one out.
Weights = float | tuple[float, ...]

#: Which of a network's answers a loss teaches.
Learners = Literal["tails", "exits", "both"]


@dataclass(frozen=True, slots=True)
class CrossEntropy:
    """sum_i w_i CE(z_i, y) over exits and tails, trained together; CE is the mean over the batch, in nats.

    exits, tails  their weights
    smoothing     of labels, s in [0, 1): the target is (1 - s) one-hot + s / classes

    Source: BranchyNet (Teerapittayanon et al., ICPR 2016). The same value, bit for bit, as
    `blindtail.train.recipe.JointCrossEntropy` without its distillation.
    """

    exits: Weights = 1.0
    tails: Weights = 1.0
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        _check_weights(self.exits, self.tails)
        _check(0.0 <= self.smoothing < 1.0, f"label smoothing lies in [0, 1), not {self.smoothing}")

    def __call__(self, batch: Batch) -> Tensor:
        learners = _learners(batch, "both", self.exits, self.tails)
        return _added(
            [w * F.cross_entropy(z, batch.labels, label_smoothing=self.smoothing) for w, z in learners]
        )


@dataclass(frozen=True, slots=True)
class SelfDistillation:
    """sum_i w_i T^2 KL(softmax(z_tail / T) || softmax(z_i / T)): exits learn from the last tail.

    The tail does not feel it. KL is the mean over the batch, in nats; z (B, classes).

    exits        their weights
    temperature  T > 0

    Source: Hinton et al., 2015; within one network Phuong and Lampert, ICCV 2019. `Sum` of
    `CrossEntropy(w, t)` and `d` times `SelfDistillation(w, T)` is `JointCrossEntropy(w, t, d, T)` of
    `blindtail.train.recipe`. Raises `ConfigError` for a network without tails.
    """

    exits: Weights = 1.0
    temperature: float = 2.0

    def __post_init__(self) -> None:
        _check_weights(self.exits)
        _check_temperature(self.temperature)

    def __call__(self, batch: Batch) -> Tensor:
        if not batch.tails:
            raise ConfigError("exits learn from a tail, and this network has none: distil from a teacher")
        learners = _learners(batch, "exits", self.exits, 0.0)
        return _added([w * softened(z, batch.tails[-1], self.temperature) for w, z in learners])


@dataclass(frozen=True, slots=True)
class Distillation:
    """sum_i w_i [(1 - s) CE(z_i, y) + s T^2 KL(softmax(z_T / T) || softmax(z_i / T))].

    temperature  T > 0
    share        s, lambda in the sources, in [0, 1]; with 0 it is `CrossEntropy`, and needs no teacher
    to           the answers i that learn: nothing else feels this loss
    exits, tails  weights w of those that learn

    z_T are the logits of the teacher's last tail, or of its last exit where it has no tails: every
    answer learns from the teacher's best. CE and KL are means over the batch, in nats.

    Source: Hinton et al., 2015; in the form of Mirzadeh et al., AAAI 2020 (eqs. 1-3), whose chains
    over assistants are phases with this loss (`blindtail.train.assistants`). Baruch et al.
    (arXiv 2111.03362) take T = 10 and alpha = 0.1 for a polynomial network with a ReLU teacher: the
    defaults here, alpha read as s.
    """

    temperature: float = 10.0
    share: float = 0.1
    to: Learners = "tails"
    exits: Weights = 1.0
    tails: Weights = 1.0

    def __post_init__(self) -> None:
        _check_weights(self.exits, self.tails)
        _check_temperature(self.temperature)
        _check_share("share of the teacher", self.share)
        _check_learners(self.to)

    def __call__(self, batch: Batch) -> Tensor:
        terms = list[Tensor]()
        for weight, z in _learners(batch, self.to, self.exits, self.tails):
            parts = list[Tensor]()
            if self.share < 1.0:
                parts.append((1.0 - self.share) * F.cross_entropy(z, batch.labels))
            if self.share > 0.0:
                parts.append(self.share * softened(z, answer(batch.taught), self.temperature))
            terms.append(weight * _added(parts))
        return _added(terms)


@dataclass(frozen=True, slots=True)
class ContinuationDistillation:
    """sum_i w_i [psi CE(z_i, y) + (1 - psi) mean_b max(0, ||z_i - phi z_T||^2 - m phi)].

    highest  Tmax >= 1; T falls from it by 1 every floor(n / Tmax) epochs, down to 1, and
             phi = 1 - (T - 1) / Tmax rises from 1 / Tmax to 1
    margin   m >= 0: within it the student owes the teacher nothing
    ends     share of the epochs after which psi is 1, in (0, 1]
    rises    how psi gets there from 0: as a "ramp", psi = min(epoch / (ends * epochs), 1), or in one "step"
    cools    share of the epochs that are the n over which T falls, in (0, 1]
    to, exits, tails  as of `Distillation`; z_T as there

    ||.||^2 is the sum over classes. Epochs count from 0.

    Source: Jafari et al., Continuation-KD (Findings of EMNLP 2022, arXiv 2212.05998). Theirs are the
    loss, phi, the fall of T, and for CIFAR n = 200, Tmax = 20 and psi = min(epoch / 150, 1), which is
    `ends` = 0.75. Chosen here: shares of the epochs in the place of their number; the maximum taken for
    each image b, then the mean; the margin's default; and where n is below Tmax, T falls by 1 every
    floor(n / Tmax) steps with n counted in steps, since its epochs would never bring it to 1.
    """

    highest: int = 20
    margin: float = 1.0
    ends: float = 0.75
    rises: Literal["ramp", "step"] = "ramp"
    cools: float = 1.0
    to: Learners = "tails"
    exits: Weights = 1.0
    tails: Weights = 1.0

    def __post_init__(self) -> None:
        _check_weights(self.exits, self.tails)
        _check_learners(self.to)
        _check(self.highest >= 1, f"the highest temperature is 1 or more, not {self.highest}")
        _check(0.0 <= self.margin < math.inf, f"a margin is not below zero: {self.margin}")
        for name, value in (("ends", self.ends), ("cools", self.cools)):
            _check(0.0 < value <= 1.0, f"{name!r} is a share of the epochs, above 0 and up to 1, not {value}")
        _check(self.rises in ("ramp", "step"), f"psi rises as a 'ramp' or in a 'step', not {self.rises!r}")

    def temperature(self, moment: Moment) -> int:
        """T, between 1 and `highest`."""
        epochs = round(self.cools * moment.epochs)
        if epochs >= self.highest:
            fallen = moment.epoch // (epochs // self.highest)
        else:
            fallen = moment.step // max(1, round(self.cools * moment.steps) // self.highest)
        return max(1, self.highest - fallen)

    def phi(self, moment: Moment) -> float:
        """What the teacher's logits are scaled by, in [1 / highest, 1]."""
        return 1.0 - (self.temperature(moment) - 1) / self.highest

    def psi(self, moment: Moment) -> float:
        """Weight of the labels, in [0, 1]."""
        if self.rises == "step":
            return float(moment.epoch >= max(1, round(self.ends * moment.epochs)))
        return min(moment.epoch / (self.ends * moment.epochs), 1.0)

    def __call__(self, batch: Batch) -> Tensor:
        psi, phi = self.psi(batch.moment), self.phi(batch.moment)
        terms = list[Tensor]()
        for weight, z in _learners(batch, self.to, self.exits, self.tails):
            parts = list[Tensor]()
            if psi > 0.0:
                parts.append(psi * F.cross_entropy(z, batch.labels))
            if psi < 1.0:
                target = phi * _fitting(answer(batch.taught), z)
                distance = (z - target).square().sum(dim=1)  # (B,)
                parts.append((1.0 - psi) * F.relu(distance - self.margin * phi).mean())
            terms.append(weight * _added(parts))
        return _added(terms)


def annealing(
    highest: int = 10,
    *,
    first: float = 0.75,
    to: Learners = "tails",
    exits: Weights = 1.0,
    tails: Weights = 1.0,
) -> ContinuationDistillation:
    """Annealing-KD: mean_b ||z_i - phi z_T||^2 for a `first` share of the epochs, then CE(z_i, y) alone.

    T falls from `highest` to 1 over the first share. The special case of Continuation-KD with no margin
    and psi as a step. Source: Jafari et al., Annealing-KD (EACL 2021): both stages, phi, and the
    fall of T. Chosen here: the length of the first stage, and `highest`, which the paper tunes per task.
    """
    return ContinuationDistillation(
        highest, margin=0.0, ends=first, rises="step", cools=first, to=to, exits=exits, tails=tails
    )


def softened(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(target / T) || softmax(logits / T)), (B, classes) both; the mean over the batch.

    T^2 keeps gradients in size: that by a row of logits is T (softmax(logits / T) - softmax(target / T)) / B.
    The target gets none. Source: Hinton et al., 2015.
    """
    t = temperature
    soft = F.softmax(_fitting(target, logits) / t, dim=1)
    return t * t * F.kl_div(F.log_softmax(logits / t, dim=1), soft, reduction="batchmean")


def answer(batch: Batch) -> Tensor:
    """Logits (B, classes) of the network's last tail, or of its last exit where it has no tails."""
    return (batch.tails or batch.exits)[-1]


def _learners(batch: Batch, to: Learners, exits: Weights, tails: Weights) -> list[tuple[float, Tensor]]:
    """Weights, none 0, with logits: of exits, then of tails. Raises `ConfigError` when numbers differ."""
    found = list[tuple[float, Tensor]]()
    if to != "tails":
        found += zip(_each("exits", exits, batch.exits), batch.exits, strict=True)
    if to != "exits":
        found += zip(_each("tails", tails, batch.tails), batch.tails, strict=True)
    found = [(weight, logits) for weight, logits in found if weight]
    _check(bool(found), f"nothing learns: the weights of {to} are 0, or the network has no such answers")
    return found


def _each(what: str, weights: Weights, logits: Sequence[Tensor]) -> Sequence[float]:
    if not isinstance(weights, Sequence):
        return [float(weights)] * len(logits)
    if len(weights) != len(logits):
        raise ConfigError(f"the loss weighs {len(weights)} {what}, the network has {len(logits)}")
    return weights


def _fitting(target: Tensor, logits: Tensor) -> Tensor:
    """A teacher's logits without gradient. Raises `ConfigError` where its classes are others."""
    if target.shape != logits.shape:
        raise ConfigError(
            f"the teacher's logits are {tuple(target.shape)}, the student's {tuple(logits.shape)}: "
            "take a teacher of the same classes"
        )
    return target.detach()


def _added(terms: Sequence[Tensor]) -> Tensor:
    return sum(terms[1:], terms[0])


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


def _check_weights(*given: Weights) -> None:
    for weights in given:
        for weight in weights if isinstance(weights, Sequence) else (weights,):
            _check(0.0 <= weight < math.inf, f"weights are numbers from 0 on, not {weight}")


def _check_temperature(value: float) -> None:
    _check(0.0 < value < math.inf, f"a temperature lies above zero, not {value}")


def _check_share(what: str, value: float) -> None:
    _check(0.0 <= value <= 1.0, f"the {what} lies between 0 and 1, not {value}")


def _check_learners(to: str) -> None:
    _check(to in ("tails", "exits", "both"), f"'tails', 'exits' or 'both' learn, not {to!r}")


__all__ = [
    "ContinuationDistillation",
    "CrossEntropy",
    "Distillation",
    "Features",
    "Learners",
    "RangePenalty",
    "SelfDistillation",
    "Weights",
    "annealing",
    "answer",
    "softened",
]
