"""QuaIL: a tail with polynomial activations learns each layer from a ReLU network's, one after the other.

    layers first to last:  mean (student_l - teacher_l)^2, all other layers frozen       `LayerFromTeacher`
    then last to first:    cross entropy, with more and more layers free                 `TailFrom`

    relu = Phase("relu", 20, ...)            # a network with the same shapes, ReLU in its tail
    phases = [Phase(f"layer {l}", 50, LayerFromTeacher(cut, l), "tails", teacher="relu") for l in range(n)]
    phases += [Phase(f"from {l}", 5, TailFrom(cut, l), "tails") for l in reversed(range(n + 1))]

Layer l is everything between activation l - 1 and activation l, activation l included; layer n ends
in the logits. Source: Garimella et al., Sisyphus (2021). From there: the two objectives and their order, 50
epochs of SGD at 0.1 with Nesterov momentum 0.5, by half a cosine to 1e-3. Chosen here: phases run with the
optimizer and the schedule of all phases, and freezing is done by the losses, which let no gradient past the
activation before: what no gradient reaches is not moved. Where connections skip activations, gradients pass
along them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blindtail.errors import ConfigError
from blindtail.models.layers import Polynomial, Quadratic, Square
from blindtail.models.split import SplitModel
from blindtail.train.activations import Turning
from blindtail.train.phases import Batch

_ACTIVATIONS = (nn.ReLU, Square, Quadratic, Polynomial, Turning)


@dataclass(frozen=True)
class LayerFromTeacher:
    """A `Loss`: mean of (student_l - teacher_l)^2 over the outputs of activation `layer` of a tail, from 0.

    The phase needs a teacher whose tail at this cut has an activation of the same shape there, and it
    trains "tails". Raises `ConfigError` where it has none.
    """

    cut: int
    layer: int

    def __call__(self, batch: Batch) -> Tensor:
        ours = _activation(batch, self.cut, self.layer)
        with torch.no_grad():
            theirs = _activation(batch.taught, self.cut, self.layer)
        if ours.shape != theirs.shape:
            raise ConfigError(
                f"activation {self.layer} of the tail at cut {self.cut} gives {tuple(ours.shape[1:])}, its "
                f"teacher's {tuple(theirs.shape[1:])}: layers learn from a teacher of the same shapes"
            )
        return F.mse_loss(ours, theirs)


@dataclass(frozen=True)
class TailFrom:
    """A `Loss`: cross entropy of a tail in which layer `layer` and those after it learn, no others."""

    cut: int
    layer: int

    def __call__(self, batch: Batch) -> Tensor:
        run = _Run(batch, self.cut, self.layer)
        if self.layer > run.calls:
            raise ConfigError(_beyond(batch, self.cut, self.layer, run.calls))
        return F.cross_entropy(run.logits, batch.labels)


def _activation(batch: Batch, cut: int, layer: int) -> Tensor:
    run = _Run(batch, cut, layer)
    if run.given is None:
        raise ConfigError(_beyond(batch, cut, layer, run.calls))
    return run.given


def _beyond(batch: Batch, cut: int, layer: int, calls: int) -> str:
    return (
        f"the tail at cut {cut} of model {batch.model.name!r} has {calls} activations that are modules "
        f"(ReLU or polynomial); there is no layer {layer}, counted from 0"
    )


class _Run:
    """A tail once more, without moving its running statistics: no gradient goes further back than `layer`."""

    def __init__(self, batch: Batch, cut: int, layer: int) -> None:
        model: SplitModel = batch.model
        if cut not in model.cuts or cut not in batch.cuts:
            raise ConfigError(f"model {model.name!r} has no cut {cut}: its cuts are {list(model.cuts)}")
        self.calls, self.layer, self.given = 0, layer, None
        tail = model.tail(cut)
        handles = [m.register_forward_hook(self._seen) for m in tail.modules() if isinstance(m, _ACTIVATIONS)]
        held = {name: buffer.clone() for name, buffer in tail.named_buffers()}
        try:
            self.logits: Tensor = torch.func.functional_call(tail, held, (batch.cuts[cut].detach(),))
        finally:
            for handle in handles:
                handle.remove()

    given: Tensor | None

    def _seen(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        place, self.calls = self.calls, self.calls + 1
        if place == self.layer:
            self.given = output
        return output.detach() if place < self.layer else output


__all__ = ["LayerFromTeacher", "TailFrom"]
