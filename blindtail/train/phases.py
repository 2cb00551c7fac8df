"""What a recipe is put together from: phases, and in each a loss, a teacher and schedules.

A phase trains parts of a network for some epochs with one loss. Losses are functions of a
`Batch` and add up; schedules change the network as the phase goes on (an activation that turns
from ReLU into a polynomial, say). The loop that runs phases is `blindtail.train.fit`: none has
its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor, nn

from blindtail.errors import ConfigError
from blindtail.models.split import SplitModel

#: Parts of a `SplitModel` that a phase may train; the rest keeps its weights and running statistics.
Part = Literal["all", "head", "exits", "tails"]


@dataclass(frozen=True, slots=True)
class Moment:
    """Where a phase is: step number `step` of `steps`, in epoch `epoch` of `epochs`, from 0."""

    step: int
    steps: int
    epoch: int
    epochs: int

    @property
    def share(self) -> float:
        """Of the phase that is done, 0 <= share < 1."""
        return self.step / self.steps

    @property
    def passed(self) -> float:
        """Epochs that are done, fractions of one included."""
        return self.share * self.epochs


@dataclass(frozen=True)
class Batch:
    """One batch through a network, with gradients, and through its teacher, without.

    images   preprocessed, (B, C, H, W)
    labels   classes (B,), int64
    exits, tails  logits (B, classes) of every exit and of every tail
    cuts     by cut, what its tail was given: (B, ...), flat where it was several tensors
    model    the network that gave them
    teacher  the same images through the teacher; None without one
    """

    images: Tensor
    labels: Tensor
    exits: Sequence[Tensor]
    tails: Sequence[Tensor]
    cuts: Mapping[int, Tensor]
    model: SplitModel
    moment: Moment
    teacher: Batch | None = None

    @property
    def taught(self) -> Batch:
        """The teacher's. Raises `ConfigError` where the phase has none."""
        if self.teacher is None:
            raise ConfigError("this loss learns from a teacher: give its phase one")
        return self.teacher


class Loss(Protocol):
    """A scalar to be made small; it may depend on the moment, and on the model's parameters."""

    def __call__(self, batch: Batch, /) -> Tensor: ...


class Schedule(Protocol):
    """What changes in a network while a phase runs, other than by gradients."""

    def begin(self, model: SplitModel, /) -> None:
        """Before the first step. Where a run goes on after a break, again, before its weights are loaded:
        what it puts in is told by the network's structure, and what it measures lies in buffers."""

    def step(self, model: SplitModel, moment: Moment, /) -> None:
        """Before each step. Depends on the moment alone, so that a run can go on anywhere."""

    def end(self, model: SplitModel, /) -> None:
        """After the last step: what was in between is taken out."""


@dataclass(frozen=True)
class Sum:
    """Losses with their weights, added. A weight of 0 leaves a loss out, and it is not computed."""

    parts: Sequence[tuple[float, Loss]]

    def __post_init__(self) -> None:
        if not any(weight for weight, _ in self.parts):
            raise ConfigError("a loss needs a part with a weight other than 0")

    def __call__(self, batch: Batch) -> Tensor:
        terms = [weight * loss(batch) for weight, loss in self.parts if weight]
        return sum(terms[1:], terms[0])


@dataclass(frozen=True)
class Phase:
    """Some epochs of training with one loss.

    trains      the parts that learn
    teacher     name of an earlier network (`blindtail.train.recipe`), frozen; None without
    schedules   in their order
    rates       learning rates of parameters whose name ends so, over `peak_rate`: slow coefficients, say
    peak_rate, warm_up, weight_decay, clip_norm  as of a `Recipe`; AdamW with a one-cycle schedule
    """

    name: str
    epochs: int
    loss: Loss
    trains: Part = "all"
    teacher: str | None = None
    schedules: Sequence[Schedule] = ()
    peak_rate: float = 3e-3
    warm_up: float = 0.2
    weight_decay: float = 0.02
    clip_norm: float = 5.0
    rates: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 1 <= self.epochs <= 10_000:
            raise ConfigError(f"phase {self.name!r}: 1 to 10,000 epochs, not {self.epochs}")
        if not self.peak_rate > 0 or not self.clip_norm > 0 or self.weight_decay < 0:
            raise ConfigError(f"phase {self.name!r}: rates and norms are above zero, decay is not below it")


def parts_of(model: SplitModel, part: Part) -> list[nn.Module]:
    """The modules that make up a part."""
    found: dict[Part, list[nn.Module]] = {
        "all": [model],
        "head": [model.stages],
        "exits": [model.exits],
        "tails": [model.tails],
    }
    return found[part]


__all__ = ["Batch", "Loss", "Moment", "Part", "Phase", "Schedule", "Sum", "parts_of"]
