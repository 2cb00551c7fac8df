"""Heads that are trained with smooth activations and run with ReLU alone.

    f(x) = alpha(t) ReLU(x) + (1 - alpha(t)) g(x),   g one of GELU, Swish, Mish;  alpha = 1 at the end

A head runs in plaintext on a small device, where ReLU costs least; smooth activations train better. As
training goes on each blend becomes ReLU, and in the end g is taken out: the network is then what it was
trained as, to the last bit.

Source: Utasi, "PEA: Improving the Performance of ReLU Networks for Free by Using Progressive Ensemble
Activations" (arXiv 2207.14074). From there: f, the three g, alpha = 1 at the end. Its schedule could not be
found; chosen here: alpha by steps, linear, along half a cosine, or layer after layer, from 0 at the
first step to 1 at nine tenths of the phase.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import activation

from blindtail.errors import ConfigError, ModelError
from blindtail.models.split import SplitModel
from blindtail.train.phases import Moment
from blindtail.train.swaps import executed, leave_inputs_alone, make_own, swap

Smooth = Literal["gelu", "swish", "mish"]
Course = Literal["linear", "cosine", "layers"]
#: What ReLU is blended with; Swish is x sigmoid(x).
SMOOTH: Mapping[Smooth, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"gelu": F.gelu, "swish": F.silu, "mish": F.mish}
)


class Blend(nn.Module):
    """y = alpha ReLU(x) + (1 - alpha) g(x); any shape in, the same out.

    alpha   a buffer, 0 to begin with; `blend_` sets it. At 1 this is ReLU, and at 0 g, exactly
    place, places  which blend of the head it is in the order they run in, from 0, of how many
    """

    alpha: Tensor

    def __init__(self, smooth: Smooth = "gelu") -> None:
        super().__init__()
        if smooth not in SMOOTH:
            raise ModelError(f"ReLU is blended with one of {', '.join(SMOOTH)}, not with {smooth!r}")
        self.smooth = smooth
        self.place, self.places = 0, 1
        self.register_buffer("alpha", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        alpha = float(self.alpha)
        if alpha >= 1.0:
            return F.relu(x)
        y = SMOOTH[self.smooth](x)
        return y if alpha <= 0.0 else alpha * F.relu(x) + (1.0 - alpha) * y

    @torch.no_grad()
    def blend_(self, alpha: float) -> None:
        """Set alpha, the share of ReLU. Raises `ModelError` outside of 0 to 1."""
        if not 0.0 <= alpha <= 1.0:
            raise ModelError(f"the share of ReLU lies between 0 and 1, not at {alpha}")
        self.alpha.fill_(alpha)

    def extra_repr(self) -> str:
        return f"{self.smooth}, alpha={float(self.alpha):g}"


def blend_head(model: SplitModel, smooth: Smooth = "gelu") -> tuple[Blend, ...]:
    """Put `Blend` in the place of every nn.ReLU of the stages; those that were there already stay.

    In place. Returns the blends in the order they run in. Exits and tails stay as they are, and so do ReLUs
    that a forward calls as functions, which are ReLUs all the time. Raises `ModelError` when the stages
    have no ReLU that could be replaced, or one writes over an activation that is read again.
    """
    make_own(model.stages, {nn.ReLU: lambda _: nn.ReLU()})
    leave_inputs_alone(model, "stages")
    found = [module for module, _ in executed(model, "stages", (nn.ReLU, Blend))]
    if not found:
        raise ModelError(
            "the stages have no nn.ReLU to blend: make ReLUs that a forward calls as functions modules, "
            "self.act = nn.ReLU(), or leave this schedule out"
        )
    swap(model.stages, {module: Blend(smooth) for module in found if type(module) is nn.ReLU})
    blends = [cast(Blend, module) for module, _ in executed(model, "stages", (Blend,))]
    for place, blend in enumerate(blends):
        blend.place, blend.places = place, len(blends)
    return tuple(blends)


def strip(model: SplitModel) -> None:
    """Put nn.ReLU in the place of every `Blend` of the stages; it is the same function as at alpha = 1."""
    swap(model.stages, {blend: nn.ReLU() for blend in _blends(model)})


def other_activations(module: nn.Module) -> tuple[str, ...]:
    """Paths of activation modules that are not ReLU: PyTorch's, and blends."""
    kinds = tuple(getattr(activation, name) for name in activation.__all__)
    found = [(path, m) for path, m in module.named_modules() if isinstance(m, (Blend, *kinds))]
    return tuple(path for path, m in found if type(m) is not nn.ReLU)


def _blends(model: SplitModel) -> list[Blend]:
    return [m for m in model.stages.modules() if isinstance(m, Blend)]


@dataclass(frozen=True)
class Progressive:
    """A `Schedule`: the head's ReLUs are blends for a phase, and ReLU again after it.

    smooth  what they are blended with
    course  of alpha: "linear" in time, "cosine" (1 - cos(pi t)) / 2, slow at both ends, or "layers",
            one after the other, linear each
    by      share of the phase after which all are ReLU
    """

    smooth: Smooth = "gelu"
    course: Course = "linear"
    by: float = 0.9

    def __post_init__(self) -> None:
        if self.smooth not in SMOOTH:
            raise ConfigError(f"ReLU is blended with one of {', '.join(SMOOTH)}, not with {self.smooth!r}")
        if self.course not in ("linear", "cosine", "layers"):
            raise ConfigError(f'a course is "linear", "cosine" or "layers", not {self.course!r}')
        if not 0.0 < self.by <= 1.0:
            raise ConfigError(f"blends are ReLU by a share of the phase in (0, 1], not {self.by}")

    def reached(self, moment: Moment, place: int, places: int) -> float:
        """alpha of blend `place` of `places`, from 0."""
        t = min(1.0, moment.share / self.by)
        if self.course == "cosine":
            return (1.0 - math.cos(math.pi * t)) / 2.0
        return t if self.course == "linear" else min(1.0, max(0.0, t * places - place))

    def begin(self, model: SplitModel) -> None:
        """As `blend_head`; blends that are there already stay as they are."""
        blend_head(model, self.smooth)

    def step(self, model: SplitModel, moment: Moment) -> None:
        for blend in _blends(model):
            blend.blend_(self.reached(moment, blend.place, blend.places))

    def end(self, model: SplitModel) -> None:
        """As `strip`."""
        strip(model)


__all__ = ["SMOOTH", "Blend", "Course", "Progressive", "Smooth", "blend_head", "other_activations", "strip"]
