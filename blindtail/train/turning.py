"""Tails that turn from ReLU and max pooling into what runs encrypted, while they are trained.

    phase = Phase("turn", epochs=30, loss=..., schedules=[LayerByLayer()])

`begin` puts `Turning` in the place of ReLU and average pooling in that of max pooling, `step` sets how far
each activation has turned, `end` makes them `Quadratic`: then the tails fold and compile.
Source: Baruch et al. (arXiv 2111.03362), see `blindtail.train.activations`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from blindtail.errors import ConfigError, ModelError
from blindtail.models.split import SplitModel
from blindtail.train.activations import Target, Turning, as_targets
from blindtail.train.phases import Moment
from blindtail.train.swaps import evaluating, leave_inputs_alone, make_own, swap
from blindtail.train.tail_reading import MAX_POOLS, Found, read_tail


def polynomial_tails(
    model: SplitModel, *, target: Target | Sequence[Target] = Target(), per_channel: bool = False
) -> tuple[Turning, ...]:
    """Put `Turning` in the place of every nn.ReLU of the tails, and average pooling in that of max pooling.

    In place: `copy.deepcopy(model)` first where the network is needed as it was. Returns the turning
    activations in the order they run in, tail after tail, those that were there already included.

    target       what they turn into: one for all, or one for each in that order
    per_channel  coefficients for each channel (dimension 1) in place of each layer

    The average is over the windows of the maximum, padding included, as `blindtail lint` proposes. A ReLU
    module that stands at several places becomes one activation at each; one that a forward calls twice
    stays one, with one set of coefficients. Only structure is looked at, and new activations begin at r = 0.

    Raises `ModelError` naming tail and layer, and changes nothing that is computed, when something in a tail
    has no such replacement: ReLU or max pooling called as functions, other activations, layer norm, ...
    """
    copies: dict[type[nn.Module], Any] = {nn.ReLU: lambda _: nn.ReLU()}
    make_own(model.tails, copies | dict.fromkeys(MAX_POOLS, _same_pool))
    leave_inputs_alone(model, "tails")
    tails = [read_tail(model, cut) for cut in model.cuts]
    first: dict[nn.Module, Found] = {}
    for tail in tails:
        for found in tail.activations:
            if per_channel and found.channels is None:
                raise ModelError(
                    f"{found.path} runs on activations of several widths: give each place an nn.ReLU of its "
                    "own, or train one polynomial for the layer"
                )
            first.setdefault(found.module, found)
    new: dict[nn.Module, nn.Module] = {}
    for (module, found), one in zip(first.items(), as_targets(target, len(first)), strict=True):
        own = module if isinstance(module, Turning) else None
        new[module] = own or Turning(found.channels if per_channel else None, one)
    result = [new[module] for module in first]
    for tail in reversed(tails):  # one that is in several goes with the first
        for place, found in enumerate(tail.activations):
            turning = new[found.module]
            assert isinstance(turning, Turning)
            turning.place, turning.places = place, len(tail.activations)
        new.update({pool: rewrite.build() for pool, rewrite in tail.pools.items()})
    swap(model.tails, new)
    return tuple(turning for turning in result if isinstance(turning, Turning))


def _same_pool(pool: Any) -> nn.Module:
    fields = ("kernel_size", "stride", "padding", "dilation", "return_indices", "ceil_mode")
    made: nn.Module = type(pool)(**{name: getattr(pool, name) for name in fields if hasattr(pool, name)})
    return made


def turnings(model: SplitModel) -> list[Turning]:
    """Of the tails; each once."""
    return [m for m in model.tails.modules() if isinstance(m, Turning)]


def settle_tails(model: SplitModel) -> None:
    """Put what each `Turning` of the tails is at r = 1 in its place: a `Quadratic` or a `Polynomial`."""
    swap(model.tails, {turning: turning.settled() for turning in turnings(model)})


def ranges(model: SplitModel, images: Tensor, batch: int = 500) -> list[tuple[float, float]]:
    """(lowest, highest) value that goes into each ReLU or `Turning` of the tails, in evaluation mode.

    images  preprocessed, (n, C, H, W)

    In the order of `polynomial_tails`, for `Target.fitted`. ReLUs that run as functions are not seen.
    """
    found: dict[nn.Module, tuple[float, float]] = {}

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        low, high = found.get(module, (float("inf"), -float("inf")))
        found[module] = min(low, float(args[0].min())), max(high, float(args[0].max()))

    make_own(model.tails, {nn.ReLU: lambda _: nn.ReLU()})
    chosen = [m for m in model.tails.modules() if type(m) in (nn.ReLU, Turning)]
    handles = [m.register_forward_pre_hook(hook) for m in chosen]
    try:
        with evaluating(model):
            for i in range(0, len(images), batch):
                model(images[i : i + batch])
    finally:
        for handle in handles:
            handle.remove()
    return list(found.values())


@dataclass(frozen=True, kw_only=True)
class TurnTails(ABC):
    """A `Schedule` by which activations of the tails turn; `reached` says how far.

    target, per_channel  as for `polynomial_tails`
    by  share of the phase after which all have turned: a schedule that is longer is sped up until it
        fits. Chosen: the last tenth trains the polynomials as they will run
    """

    target: Target | Sequence[Target] = field(default_factory=Target)
    per_channel: bool = False
    by: float = 0.9

    def __post_init__(self) -> None:
        if not 0.0 < self.by <= 1.0:
            raise ConfigError(f"activations turn by a share of the phase in (0, 1], not {self.by}")

    @abstractmethod
    def reached(self, moment: Moment, place: int, places: int) -> float:
        """r of activation `place` of `places` in its tail, from 0."""

    def begin(self, model: SplitModel) -> None:
        """As `polynomial_tails`; where activations are there already they stay as they are."""
        polynomial_tails(model, target=self.target, per_channel=self.per_channel)

    def step(self, model: SplitModel, moment: Moment) -> None:
        for turning in turnings(model):
            turning.turn_(self.reached(moment, turning.place, turning.places))

    def end(self, model: SplitModel) -> None:
        """As `settle_tails`: afterwards the tails fold."""
        settle_tails(model)


@dataclass(frozen=True)
class AllAtOnce(TurnTails):
    """r = passed / epochs, the same for all activations.

    epochs  that it takes; None: all of the phase up to `by`. A reference release of the paper's has 50,
            with the start `IDENTITY`. Here r grows with each step, in the paper with each epoch
    """

    epochs: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs is not None and not self.epochs > 0:
            raise ConfigError(f"activations turn in more than 0 epochs, not {self.epochs}")

    def reached(self, moment: Moment, place: int, places: int) -> float:
        longest = self.by * moment.epochs
        return _bounded(moment.passed / min(self.epochs or longest, longest))


@dataclass(frozen=True)
class LayerByLayer(TurnTails):
    """One activation after the other: progress = (passed - start) / each, the first `floor(progress)`
    have turned, the next has r = its fraction, later ones are ReLU. Several tails turn side by side.

    start, each  in epochs, as in a reference release of the paper's; fractions of an epoch count here
    first        where given, in place of both: the share of the phase at which the first begins;
                 each then takes as long as the others until `by`
    """

    start: float = 3.0
    each: float = 3.0
    first: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start < 0 or not self.each > 0:
            raise ConfigError("layers turn from epoch 0 on or later, each in more than 0 epochs")
        if self.first is not None and not 0.0 <= self.first < self.by:
            raise ConfigError(f"the first layer begins at a share of the phase in [0, {self.by}), its `by`")

    def reached(self, moment: Moment, place: int, places: int) -> float:
        longest = self.by * moment.epochs
        if self.first is not None:
            start = self.first * moment.epochs
            each = (longest - start) / places
        else:
            faster = min(1.0, longest / (self.start + self.each * places))
            start, each = faster * self.start, faster * self.each
        return _bounded((moment.passed - start) / each - place)


def _bounded(share: float) -> float:
    return min(1.0, max(0.0, share))


__all__ = [
    "AllAtOnce",
    "LayerByLayer",
    "TurnTails",
    "polynomial_tails",
    "ranges",
    "settle_tails",
    "turnings",
]
