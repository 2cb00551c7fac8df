"""Modules of a network that others take the place of: found in the order they run in, and exchanged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from blindtail.errors import ModelError
from blindtail.models.split import SplitModel

Kinds = tuple[type[nn.Module], ...]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode without gradients; each module's own mode comes back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def children(root: nn.Module, kinds: Kinds) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(owner, name, child) of every place that holds a module of exactly one of these types."""
    for owner in root.modules():
        for name, child in owner._modules.items():
            if child is not None and type(child) in kinds:
                yield owner, name, child


def swap(root: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put each value where its key is, at every place; its training mode becomes the key's."""
    for owner in list(root.modules()):
        for name, child in owner._modules.items():
            if child is not None and child in new:
                owner._modules[name] = new[child].train(child.training)


def make_own(root: nn.Module, makers: Mapping[type[nn.Module], Any]) -> None:
    """Where one module without weights stands at several places, each gets a copy of its own.

    makers  by type, what makes the copy
    """
    seen = set[nn.Module]()
    for owner, name, child in list(children(root, tuple(makers))):
        if child in seen:
            owner._modules[name] = makers[type(child)](child).train(child.training)
        seen.add(child)


def _noise(model: SplitModel) -> Tensor:
    """Two images of standard normal values, (2, C, H, W)."""
    shape = model.preprocessing.input_shape
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))


def executed(
    model: SplitModel, part: Literal["stages", "tails"], kinds: Kinds
) -> list[tuple[nn.Module, tuple[int, ...]]]:
    """Modules of these types in stages or tails, in the order they run in, and the shape (C, ...) of one
    image's activation at each. One that runs twice is told of once, one that never runs not at all.
    """
    found: dict[nn.Module, tuple[int, ...]] = {}

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        found.setdefault(module, tuple(args[0].shape[1:]))

    chosen = [m for m in getattr(model, part).modules() if type(m) in kinds]
    handles = [m.register_forward_pre_hook(hook) for m in chosen]
    try:
        with evaluating(model):
            model(_noise(model))
    finally:
        for handle in handles:
            handle.remove()
    return list(found.items())


def leave_inputs_alone(model: SplitModel, part: Literal["stages", "tails"]) -> None:
    """Let no ReLU write over its input, which what takes its place does not do either.

    Raises `ModelError` where the network counts on it: what was written over is read again.
    """
    writing = [m for m in getattr(model, part).modules() if type(m) is nn.ReLU and m.inplace]
    if not writing:
        return
    with evaluating(model):
        before = model(_noise(model))
        for module in writing:
            module.inplace = False
        after = model(_noise(model))
    if not all(torch.equal(a, b) for a, b in zip(before, after, strict=True)):
        for module in writing:
            module.inplace = True
        raise ModelError(
            f"an nn.ReLU(inplace=True) of the {part} writes over an activation that is read again: "
            "use what it returns in both places, and leave inplace out"
        )


__all__ = ["Kinds", "children", "evaluating", "executed", "leave_inputs_alone", "make_own", "swap"]
