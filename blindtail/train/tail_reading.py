"""Which modules of a tail turn into others while it is trained, and what stands in the way of it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from blindtail.errors import ModelError
from blindtail.models.network import Network
from blindtail.models.operation_names import name_of
from blindtail.models.reading import read
from blindtail.models.rewrites import Rewrite
from blindtail.models.rulings import Effect
from blindtail.models.split import SplitModel
from blindtail.models.tracing import Untraceable
from blindtail.train.activations import Turning
from blindtail.train.swaps import swap

#: Pooling that lint has an average for (`blindtail.models.rewrites.average_pool`).
MAX_POOLS: tuple[type[nn.Module], ...] = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)


@dataclass
class Found:
    """A ReLU or `Turning`: its path in the model, and channels; None where it runs on several widths."""

    module: nn.Module
    path: str
    channels: int | None


@dataclass
class TailReading:
    """Of one tail: activations in the order they first run in, and the average for each max pooling."""

    activations: list[Found] = field(default_factory=list)
    pools: dict[nn.Module, Rewrite] = field(default_factory=dict)


class _Tail(nn.Module):
    """A tail under its own name, so that paths are the model's. Takes what its cut gives."""

    def __init__(self, cut: int, tail: nn.Module) -> None:
        super().__init__()
        self.add_module(str(cut), tail)

    def forward(self, *given: Tensor) -> Tensor:
        (tail,) = self.children()
        return tail(*given)  # type: ignore[no-any-return]


def read_tail(model: SplitModel, cut: int) -> TailReading:
    """Raises `ModelError` naming the layer when something has no replacement by which the tail folds."""
    original = _Tail(cut, model.tails[str(cut)])
    network = _network(original, model, cut)
    found, at = TailReading(), dict[nn.Module, Found]()
    for node in network.nodes:
        if node not in network.rulings or network.unused(node) or network.only_decides(node):
            continue
        module = original.get_submodule(str(node.target)) if node.op == "call_module" else None
        ruling, one = network.rulings[node], isinstance(node.meta["value"], torch.Size)
        if isinstance(module, Turning) or type(module) is nn.ReLU:
            channels = int(node.meta["value"][1])
            if module not in at:
                at[module] = Found(module, f"tails.{node.target}", channels)
                found.activations.append(at[module])
            elif at[module].channels != channels:
                at[module].channels = None
        elif module is not None and type(module) in MAX_POOLS and one and ruling.rewrite is not None:
            found.pools[module] = ruling.rewrite
        elif ruling.effect is Effect.REFUSED:
            raise ModelError(_refusal(network, node, cut))
    return found


def _network(original: _Tail, model: SplitModel, cut: int) -> Network:
    """A copy, read as lint does, with what activations turn into in their place."""
    tail = copy.deepcopy(original).cpu().float()
    swap(tail, {m: m.settled() for m in tail.modules() if isinstance(m, Turning)})
    generator = torch.Generator().manual_seed(0)
    two, three = (
        [torch.randn(images, *shape, generator=generator) for shape in model.forms[cut].shapes]
        for images in (2, 3)
    )
    try:
        return read(tail.eval(), two, three)
    except Untraceable as error:
        at = f" ({error.line})" if error.line else ""
        raise ModelError(f"tail at cut {cut} cannot be traced{at}: {error.reason}") from error


def _refusal(network: Network, node: fx.Node, cut: int) -> str:
    ruling, name = network.rulings[node], name_of(node)
    advice = ruling.advice
    if node.op != "call_module" and name in ("relu", "clamp_min", "max_pool1d", "max_pool2d", "max_pool3d"):
        layer = "nn.ReLU()" if "pool" not in name else f"nn.MaxPool{name[-2]}d(...)"
        advice = (
            f"only modules can be replaced: make self.layer = {layer} in its __init__, "
            "and call that in its forward"
        )
    where = f"tails.{node.target}" if node.op == "call_module" else node.name
    inside = ", ".join(
        part for part in (node.meta["module"] and f"tails.{node.meta['module']}", node.meta["line"]) if part
    )
    at = f" [in {inside}]" if inside and node.op != "call_module" else ""
    return (
        f"tail at cut {cut}: {where} ({ruling.kind}){at} has no polynomial to turn into: "
        f"it {ruling.reason}; {advice}"
    )


__all__ = ["MAX_POOLS", "Found", "TailReading", "read_tail"]
