"""Losses that look inside a network: at what is given to a cut, and to its activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blindtail.errors import ConfigError
from blindtail.models.layers import Polynomial, Quadratic, Square
from blindtail.models.split import SplitModel
from blindtail.train.activations import Turning
from blindtail.train.phases import Batch

#: Activations that leave their range fast: what `RangePenalty` watches unless told otherwise.
POLYNOMIALS: tuple[type[nn.Module], ...] = (Square, Quadratic, Polynomial, Turning)


@dataclass(frozen=True, slots=True)
class Features:
    """mean over b, j of (s_bj - t_bj)^2 / v_j: the student's activation s at a cut matches the teacher's t.

    cut          of the student, after stage `cut`; s and t are (B, ...) of one shape
    teacher_cut  of the teacher; by default the same
    normalise    v_j is the variance of t_j over the batch plus 1% of its mean over j, so that no element
                 counts for its size and one that never moves does not rule. False: v_j = 1
    project      applied to s and to t before they are compared, (B, ...) -> (B, ...): what makes networks
                 of different widths comparable, such as `attention`. It learns nothing

    Source: hints of FitNets (Romero et al., ICLR 2015), whose projection is a layer that is trained
    along; here it is a fixed function, of both sides. The normalisation is chosen here.
    Raises `ConfigError` when a network has no such cut, or the shapes differ.
    """

    cut: int
    project: Callable[[Tensor], Tensor] | None = None
    normalise: bool = True
    teacher_cut: int | None = None

    def __call__(self, batch: Batch) -> Tensor:
        teacher_cut = self.cut if self.teacher_cut is None else self.teacher_cut
        student = _at(batch, self.cut, "the network")
        target = _at(batch.taught, teacher_cut, "its teacher").detach()
        if self.project is not None:
            student, target = self.project(student), self.project(target)
        if student.shape != target.shape:
            raise ConfigError(
                f"activations at the cut do not match: {tuple(student.shape)} of the network at {self.cut}, "
                f"{tuple(target.shape)} of its teacher at {teacher_cut}. Choose another cut, or a projection "
                "that makes them comparable (blindtail.train.inside.attention)"
            )
        squares = (student - target).square()
        return (squares / _variance(target) if self.normalise else squares).mean()


def attention(x: Tensor) -> Tensor:
    """(B, C, ...) -> (B, places): where a network looks, sum over channels of x^2, of length 1 per image.

    Source: Zagoruyko and Komodakis, Attention Transfer, ICLR 2017. It compares networks with any
    numbers of channels. Raises `ConfigError` for an activation without places, (B, features).
    """
    if x.dim() < 3:
        raise ConfigError(f"an attention map needs (B, C, ...), not {tuple(x.shape)}: give no projection")
    return F.normalize(x.square().sum(dim=1).flatten(1), dim=1)


def _at(batch: Batch, cut: int, whose: str) -> Tensor:
    if cut not in batch.cuts:
        raise ConfigError(f"{whose} has no cut {cut}: its cuts are {sorted(batch.cuts)}")
    return batch.cuts[cut]


def _variance(target: Tensor) -> Tensor:
    """Of each element over the batch, (1, ...), and never near zero beside the others."""
    each = target.var(dim=0, unbiased=False, keepdim=True)
    mean = each.mean()
    return torch.where(mean > 0.0, each + 0.01 * mean, torch.ones_like(each))


@dataclass(frozen=True, slots=True)
class RangePenalty:
    """mean over layers of mean(max(0, |x| - limit)^2), x what is given to polynomial activations.

    limit   >= 0: values within are free. Outside, a polynomial grows faster than the range that its
            encrypted evaluation was planned for
    layers  patterns of module names ("tails.1.*"; `*` matches dots too); by default every
            activation of `POLYNOMIALS`

    The values come from one more pass, in the mode that the network is in, through its tails alone where
    all layers are there: that is what the penalty costs. The pass leaves no trace: hooks are removed,
    running statistics keep their values, and the random state (of dropout) is what it was before.
    Layers that the pass does not reach count as nothing. Raises `ConfigError` when no layer is found.

    Source: the escaping activations of Garimella et al., Sisyphus, 2021. The penalty is chosen here.
    """

    limit: float
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0.0 <= self.limit < math.inf:
            raise ConfigError(f"the limit of a range is a number from 0 on, not {self.limit}")

    def __call__(self, batch: Batch) -> Tensor:
        watched = self.watched(batch.model)
        tails_alone = bool(batch.cuts) and all(name.startswith("tails.") for name in watched)
        run = _Again(batch.model, tails_alone)
        buffers = {name: buffer.clone() for name, buffer in run.named_buffers()}
        devices = [batch.images.device] if batch.images.is_cuda else []
        with torch.random.fork_rng(devices=devices), _inputs(watched.values()) as inputs:
            torch.func.functional_call(run, buffers, (batch,))
        if not inputs:
            return batch.images.new_zeros(())
        return torch.stack([F.relu(x.abs() - self.limit).square().mean() for x in inputs]).mean()

    def watched(self, model: SplitModel) -> dict[str, nn.Module]:
        """By name, the modules whose inputs are penalised."""
        found = {
            name: module
            for name, module in model.named_modules()
            if name
            and (
                any(fnmatchcase(name, pattern) for pattern in self.layers)
                if self.layers
                else isinstance(module, POLYNOMIALS)
            )
        }
        if not found:
            wanted = f"layer named {' or '.join(self.layers)}" if self.layers else "polynomial activation"
            raise ConfigError(f"model {model.name!r} has no {wanted}: there is no range to penalise")
        return found


class _Again(nn.Module):
    """A batch once more through a model, or through its tails alone."""

    def __init__(self, model: SplitModel, tails_alone: bool) -> None:
        super().__init__()
        self.model = model
        self.tails_alone = tails_alone

    def forward(self, batch: Batch) -> None:
        if not self.tails_alone:
            self.model(batch.images)
            return
        for cut, given in batch.cuts.items():
            self.model.tail(cut)(given)


@contextmanager
def _inputs(modules: Any) -> Iterator[list[Tensor]]:
    """What these modules are called with while the context is open; their hooks are then removed."""
    seen = list[Tensor]()

    def note(_: nn.Module, given: tuple[Any, ...]) -> None:
        seen.extend(x for x in given if isinstance(x, Tensor))

    hooks = [module.register_forward_pre_hook(note) for module in modules]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


__all__ = ["POLYNOMIALS", "Features", "RangePenalty", "attention"]
