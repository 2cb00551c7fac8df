"""A recipe: which network, which data, which phases with which losses. One small object each.

The loop that runs a recipe is in `fit.py` and is not copied per recipe: a new
recipe is a new `Recipe`, with its own phases, teachers or augmentation where needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from blindtail.errors import ConfigError
from blindtail.models.split import SplitModel
from blindtail.models.zoo import nets
from blindtail.train.phases import Batch, Phase


class Objective(Protocol):
    """Logits (B, classes) of every exit, then of every tail, and labels (B,) -> a scalar loss."""

    def __call__(self, exits: Sequence[Tensor], tails: Sequence[Tensor], labels: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class OfLogits:
    """An objective as a loss of a phase."""

    objective: Objective

    def __call__(self, batch: Batch) -> Tensor:
        return self.objective(batch.exits, batch.tails, batch.labels)


class Augmentation(Protocol):
    """Preprocessed images (B, C, H, W) -> the same shape; randomness only from `generator`."""

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class JointCrossEntropy:
    """Weighted sum of cross entropies of exits and tails, trained together.

    Source: BranchyNet (Teerapittayanon et al., ICPR 2016). With `distill` > 0
    each exit also learns the last tail's softened answer (Hinton et al., 2015;
    at `softness`, scaled by its square), which the tail does not feel.
    """

    exit_weights: tuple[float, ...]
    tail_weight: float = 1.0
    distill: float = 0.0
    softness: float = 2.0

    def __call__(self, exits: Sequence[Tensor], tails: Sequence[Tensor], labels: Tensor) -> Tensor:
        if len(exits) != len(self.exit_weights):
            raise ConfigError(
                f"the recipe weighs {len(self.exit_weights)} exits, the network has {len(exits)}"
            )
        loss = torch.zeros(())
        for weight, logits in zip(self.exit_weights, exits, strict=True):
            loss = loss + weight * F.cross_entropy(logits, labels)
        for logits in tails:
            loss = loss + self.tail_weight * F.cross_entropy(logits, labels)
        if self.distill and tails:
            t = self.softness
            target = F.softmax(tails[-1].detach() / t, dim=1)
            for weight, logits in zip(self.exit_weights, exits, strict=True):
                divergence = F.kl_div(F.log_softmax(logits / t, dim=1), target, reduction="batchmean")
                loss = loss + weight * self.distill * t * t * divergence
        return loss


def mirror(x: Tensor, generator: torch.Generator) -> Tensor:
    """Flip half of the images left to right."""
    flip = torch.rand(len(x), generator=generator) < 0.5
    return torch.where(flip[:, None, None, None], x.flip(3), x)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run but the data's pixels.

    objective, epochs, peak_rate, warm_up, weight_decay, clip_norm  of the one phase of a recipe without
                   `phases`; a recipe with phases has theirs, and these are of what is retrained later
    phases         run one after the other on one network
    teachers       recipes of networks that phases learn from, by the name that they use; they may have
                   teachers of their own (a teacher's assistant)
    peak_rate      learning rate at the top of a one-cycle schedule, reached after
                   `warm_up` of all steps (Smith and Topin, 2018)
    offload_share  share of validation images that the default thresholds offload, never exceeded there
    """

    name: str
    data: str
    build: Callable[[], SplitModel]
    objective: Objective
    epochs: int
    batch: int = 128
    peak_rate: float = 3e-3
    warm_up: float = 0.2
    weight_decay: float = 0.02
    clip_norm: float = 5.0
    augment: Augmentation | None = None
    seed: int = 0
    offload_share: float = 0.32
    phases: tuple[Phase, ...] = ()
    teachers: Mapping[str, Recipe] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (1 <= self.epochs <= 10_000 and 2 <= self.batch <= 65_536):
            raise ConfigError("a recipe needs 1 to 10,000 epochs and a batch of 2 to 65,536 images")
        if not 0.0 <= self.offload_share <= 1.0:
            raise ConfigError("a recipe's offload_share lies between 0 and 1")

    def finished(self) -> SplitModel:
        """The network as all phases leave it, untrained: what it will be compiled from."""
        model = self.build()
        for phase in self.all_phases:
            for schedule in phase.schedules:
                schedule.begin(model)
                schedule.end(model)
        return model

    @property
    def all_phases(self) -> tuple[Phase, ...]:
        """What runs."""
        alone = Phase(
            name="training",
            epochs=self.epochs,
            loss=OfLogits(self.objective),
            peak_rate=self.peak_rate,
            warm_up=self.warm_up,
            weight_decay=self.weight_decay,
            clip_norm=self.clip_norm,
        )
        return self.phases or (alone,)


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "fashion": Recipe(
            name="fashion",
            data="fashion",
            build=nets.fashion,
            objective=JointCrossEntropy(exit_weights=(0.1, 0.2)),
            epochs=16,
            augment=mirror,
        ),
        "digits": Recipe(
            name="digits",
            data="digits",
            build=nets.digits,
            objective=JointCrossEntropy(exit_weights=(0.3, 0.5)),
            epochs=30,
            batch=64,
            peak_rate=1e-2,
        ),
    }
)
