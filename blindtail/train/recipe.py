"""A recipe: which network, which data, which loss, which schedule. One small object each.

The loop that runs a recipe is in `fit.py` and is not copied per recipe: a new
recipe is a new `Recipe`, with its own objective or augmentation where needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from blindtail.errors import ConfigError
from blindtail.models.split import SplitModel
from blindtail.models.zoo import nets


class Objective(Protocol):
    """Logits (B, classes) of every exit, then of every tail, and labels (B,) -> a scalar loss."""

    def __call__(self, exits: Sequence[Tensor], tails: Sequence[Tensor], labels: Tensor) -> Tensor: ...


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

    def __post_init__(self) -> None:
        if not (1 <= self.epochs <= 10_000 and 2 <= self.batch <= 65_536):
            raise ConfigError("a recipe needs 1 to 10,000 epochs and a batch of 2 to 65,536 images")
        if not 0.0 <= self.offload_share <= 1.0:
            raise ConfigError("a recipe's offload_share lies between 0 and 1")


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
