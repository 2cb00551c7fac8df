"""Approximate min-max normalisation (AMM): what keeps values from escaping through squares.

    y = 2 (x - min) / max(x - min) - 1        by channel, so that a square of it stays within 1

In training the extremes are the batch's own, as batch norm's statistics are; running ones follow them by
an exponential moving average of 0.1, and take their place in evaluation. Then AMM is an affine map by
channel: the compiler's front end folds it into the map before it, and it costs no level.

Source: Garimella et al., "Sisyphus: A Cautionary Tale of Using Low-Degree Polynomial Activations in
Privacy-Preserving Deep Learning" (2021). From there: the formula, the average of 0.1, the folding. Chosen
here: the first batch sets the running extremes (before it there are none), gradients flow through the
batch's extremes, and a channel whose values are all the same is divided by `eps`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from blindtail.errors import ModelError
from blindtail.models.layers import Polynomial, Quadratic, Square
from blindtail.models.split import SplitModel
from blindtail.train.activations import Turning
from blindtail.train.phases import Moment
from blindtail.train.swaps import children, executed

#: Before these a tail's values are brought to [-1, 1].
_POLYNOMIAL = (Square, Quadratic, Polynomial, Turning)
_Layer = TypeVar("_Layer", nn.Linear, nn.Conv1d, nn.Conv2d)


class Amm(nn.Module):
    """y = 2 (x - min) / max(x - min) - 1 by channel (dimension 1): (B, C, ...) -> the same shape.

    momentum   share of a batch's extremes in the running ones after it
    eps        the least that max(x - min) counts as
    low, high  running extremes, (C,), buffers; -1 and 1 before the first batch: then y = x
    batches    seen in training, a buffer

    In training y lies in [-1, 1]. In evaluation values beyond what was seen go beyond that. No levels.
    """

    low: Tensor
    high: Tensor
    batches: Tensor

    def __init__(self, channels: int, *, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        if channels < 1 or not 0.0 < momentum <= 1.0 or not eps > 0.0:
            raise ModelError("AMM takes 1 channel or more, a momentum in (0, 1] and an eps above 0")
        self.channels, self.momentum, self.eps = channels, momentum, eps
        self.register_buffer("low", -torch.ones(channels))
        self.register_buffer("high", torch.ones(channels))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        low, high = self._of_batch(x) if self.training else (self.low, self.high)
        factor, offset = self._affine(low, high)
        shape = (1, self.channels) + (1,) * (x.dim() - 2)
        if not self.training:
            return x * factor.view(shape) + offset.view(shape)
        # The same, but within [-1, 1] whatever rounding does.
        share = (x - low.view(shape)) * (factor / 2).view(shape)
        return 2.0 * share.clamp(0.0, 1.0) - 1.0

    def affine(self) -> tuple[Tensor, Tensor]:
        """(factor, offset), each (C,), of what it is in evaluation: y = factor x + offset."""
        return self._affine(self.low, self.high)

    def _affine(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        factor = 2.0 / (high - low).clamp_min(self.eps)
        return factor, -1.0 - low * factor

    def _of_batch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values = x.transpose(0, 1).flatten(1)  # (C, the rest)
        low, high = values.amin(1), values.amax(1)
        with torch.no_grad():
            share = self.momentum if int(self.batches) else 1.0
            self.low.lerp_(low.to(self.low.dtype), share)
            self.high.lerp_(high.to(self.high.dtype), share)
            self.batches += 1
        return low, high

    def extra_repr(self) -> str:
        return f"{self.channels}, momentum={self.momentum:g}"


class Bounded(nn.Sequential):
    """`Amm`, then the activation whose place the two took."""


@torch.no_grad()
def folded(layer: _Layer, amm: Amm) -> _Layer:
    """A dense layer or convolution that gives what `layer`, then `amm` in evaluation give. Weights are new.

    Raises `ModelError` when their channels differ.
    """
    if layer.weight.shape[0] != amm.channels:
        raise ModelError(f"a layer with {layer.weight.shape[0]} channels, AMM with {amm.channels}")
    factor, offset = amm.affine()
    made = copy.deepcopy(layer)
    made.weight.mul_(factor.view(-1, *([1] * (layer.weight.dim() - 1))))
    if made.bias is None:
        made.bias = nn.Parameter(offset.clone())
    else:
        made.bias.mul_(factor).add_(offset)
    return made


def bound_activations(model: SplitModel, *, momentum: float = 0.1) -> tuple[Amm, ...]:
    """Put `Amm` before every polynomial activation module of the tails, in place, where there is none yet.

    Returns all of them in the order they run in. Activations that are written as x * x are not seen.
    Channels (dimension 1) are those of the activation. Where a `Turning` is to be bounded, turn it first.
    """
    shapes = dict(executed(model, "tails", _POLYNOMIAL))
    for owner, name, child in list(children(model.tails, _POLYNOMIAL)):
        if child in shapes and not isinstance(owner, Bounded):
            amm = Amm(shapes[child][0], momentum=momentum)
            owner._modules[name] = Bounded(amm, child).train(child.training)
    return tuple(m for m, _ in executed(model, "tails", (Amm,)) if isinstance(m, Amm))


@dataclass(frozen=True)
class BoundActivations:
    """A `Schedule`: AMM before every polynomial activation of the tails, and left in: it folds.

    Beside a schedule of `blindtail.train.turning`, it comes after that one.
    """

    momentum: float = 0.1

    def __post_init__(self) -> None:
        Amm(1, momentum=self.momentum)  # checks it

    def begin(self, model: SplitModel) -> None:
        """As `bound_activations`."""
        bound_activations(model, momentum=self.momentum)

    def step(self, model: SplitModel, moment: Moment) -> None:
        """Nothing: running extremes follow the batches."""

    def end(self, model: SplitModel) -> None:
        """Nothing: in evaluation AMM is an affine map."""


__all__ = ["Amm", "BoundActivations", "Bounded", "bound_activations", "folded"]
