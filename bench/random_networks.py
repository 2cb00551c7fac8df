"""Random `nn.Module` networks by seed, for `bench networks`, of the layers in `bench.random_layers`.

Some take two tensors, which meet behind a branch each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from bench.random_layers import (
    ACTIVATIONS,
    FAMILIES,
    LINEAR,
    TWO_INPUTS,
    Arithmetic,
    Shape,
    consumed,
)
from blindtail.he.layers import FloatArray
from blindtail.models.several import Flat, Form, of_flat, several

#: Most values that a hidden activation has; inputs may have `WIDEST`, now and then.
HIDDEN, WIDEST = 192, 784
_ROWS = 400  # of calibration data
_MEETINGS = 0.15  # share of networks with two inputs
_APART = 41  # drawn apart: what has one input does not depend on it


@dataclass(frozen=True)
class RandomNetwork:
    """A network with data.

    module       of one tensor; `Flat` around one of two
    shape        of one image, (C, H, W), (C, L) or (n,)
    families     of the layers in it
    levels       that its layers consume: one a map, one or more an activation
    calibration, inputs  (rows, *shape), float64, of one distribution
    """

    module: nn.Module
    shape: Shape
    families: frozenset[str]
    levels: int
    calibration: FloatArray
    inputs: FloatArray

    @property
    def width(self) -> int:
        """Values of one image."""
        return math.prod(self.shape)

    @property
    def given(self) -> Form:
        """The tensors that the network itself takes."""
        flat = of_flat(self.module)
        return Form((self.shape,)) if flat is None else flat[1]

    @torch.no_grad()
    def logits(self, x: FloatArray) -> FloatArray:
        """(rows, *shape) -> (rows, outputs), by PyTorch in float64."""
        exact = self.module.double().eval()
        found: FloatArray = exact(torch.from_numpy(x)).flatten(1).numpy()
        return found


def random_network(
    seed: int, families: Iterable[str] = FAMILIES, *, images: bool = False, inputs: int = 3
) -> RandomNetwork:
    """A network of these families, the same for the same arguments.

    images  its input is (C, H, W), as a `SplitModel` takes it; of two, they are one's channels
    """
    rng, allowed = np.random.default_rng(seed), frozenset(families)
    if unknown := allowed - FAMILIES:
        raise ValueError(f"no families {sorted(unknown)}; there are: {sorted(FAMILIES)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if TWO_INPUTS in allowed and np.random.default_rng((seed, _APART)).random() < _MEETINGS:
            return _met(rng, allowed, _two_shapes(rng, images), inputs)
        return _grown(rng, allowed, _input_shape(rng, images), inputs)


def _input_shape(rng: np.random.Generator, images: bool) -> Shape:
    widest = WIDEST if rng.random() < 0.05 else HIDDEN
    dimensions = 3 if images else int(rng.choice([1, 2, 3], p=[0.2, 0.25, 0.55]))
    if dimensions == 1:
        return (int(rng.integers(2, widest + 1)),)
    channels = int(rng.integers(1, 5))
    if dimensions == 2:
        return channels, int(rng.integers(4, widest // channels + 1))
    most = math.isqrt(widest // channels)
    return channels, int(rng.integers(4, most + 1)), int(rng.integers(4, most + 1))


def _two_shapes(rng: np.random.Generator, images: bool) -> list[Shape]:
    first = _input_shape(rng, images)
    return [first, (int(rng.integers(1, 4)), *first[1:]) if images else _input_shape(rng, images)]


class _Draft:
    """Layers so far, with float64 data running through them."""

    def __init__(self, x: Tensor) -> None:
        self.layers: list[nn.Module] = []
        self.x, self.used = x, set[str]()

    @property
    def shape(self) -> Shape:
        return tuple(self.x.shape[1:])

    def take(self, name: str, layer: nn.Module | None, widest: int) -> bool:
        """Append a layer where it exists, fits and makes at most `widest` values."""
        if layer is None:
            return False
        try:
            y = layer.double().eval()(self.x)
        except (RuntimeError, ValueError):  # a window larger than its image
            return False
        if not 1 <= y[0].numel() <= widest:
            return False
        self.layers.append(layer)
        self.used.add(name)
        self.x = y
        return True

    def module(self) -> nn.Module:
        return nn.Sequential(*self.layers) if self.layers else nn.Sequential(nn.Identity())

    def settle(self) -> None:
        """Keep values near 1 where they have left that: no calibration bounds what explodes."""
        size = float(self.x.square().mean().sqrt())
        if not 0.3 < size < 2.0 and size > 0:
            self.layers.append(Arithmetic("truediv", size))
            self.x = self.x / size


@torch.no_grad()
def _grown(rng: np.random.Generator, allowed: frozenset[str], shape: Shape, inputs: int) -> RandomNetwork:
    data = rng.uniform(-1.0, 1.0, (_ROWS + inputs, *shape))
    draft = _Draft(torch.from_numpy(data))
    levels = 1 + _grow(rng, allowed, draft, (0.1, 0.4, 0.35, 0.15))
    if math.prod(draft.shape) > 10 and rng.random() < 0.95:
        _narrow(rng, draft)
    net, families = draft.module(), frozenset(draft.used)
    return RandomNetwork(net.eval(), shape, families, levels, data[:_ROWS], data[_ROWS:])


def _grow(rng: np.random.Generator, allowed: frozenset[str], draft: _Draft, shares: tuple[float, ...]) -> int:
    """Append layers, 0, 1, ... activations with these shares: levels of those and of the maps before them."""
    linear = [name for name in LINEAR if name in allowed]
    activations = [name for name in ACTIVATIONS if name in allowed]
    levels, squares, wanted = 0, 0, int(rng.choice(len(shares), p=shares)) if activations else 0
    while True:
        for _ in range(int(rng.integers(1, 5))):
            if linear:
                name = str(rng.choice(linear))
                draft.take(name, LINEAR[name](rng, draft.shape), HIDDEN)
        draft.settle()
        if squares >= wanted:
            return levels
        name = str(rng.choice(activations))
        if math.prod(draft.shape) > HIDDEN:  # nothing has made a wide input narrow yet
            _narrow(rng, draft)
        layer = ACTIVATIONS[name](rng, draft.shape)
        squares += 1
        if draft.take(name, layer, HIDDEN):
            assert layer is not None
            levels += 1 + consumed(layer)
        draft.settle()


class Meeting(nn.Module):
    """A branch for each of two tensors, both (B, n) at their ends: their sum, difference or both, and on."""

    def __init__(self, left: nn.Module, right: nn.Module, how: str, after: nn.Module) -> None:
        super().__init__()
        self.left, self.right, self.how, self.after = left, right, how, after

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z: Tensor = self.after(joined(self.left(x), self.right(y), self.how))
        return z


def joined(x: Tensor, y: Tensor, how: str) -> Tensor:
    """ "add", "sub" or "cat" """
    if how == "cat":
        return torch.cat([x, y], 1)
    return x + y if how == "add" else x - y


@torch.no_grad()
def _met(
    rng: np.random.Generator, allowed: frozenset[str], shapes: list[Shape], inputs: int
) -> RandomNetwork:
    data = [rng.uniform(-1.0, 1.0, (_ROWS + inputs, *shape)) for shape in shapes]
    branches = [_Draft(torch.from_numpy(x)) for x in data]
    before = [_grow(rng, allowed, branch, (0.4, 0.45, 0.15)) for branch in branches]
    how, width = str(rng.choice(["add", "sub", "cat"])), int(rng.integers(2, 25))
    for branch in branches:
        _flattened(branch)
        if how != "cat":
            branch.take("linear", nn.Linear(branch.shape[0], width), WIDEST)
    left, right = branches
    after = _Draft(joined(left.x, right.x, how))
    levels = 1 + max(before) + _grow(rng, allowed, after, (0.5, 0.5))
    if math.prod(after.shape) > 10:
        _narrow(rng, after)
    families = frozenset(left.used | right.used | after.used | {TWO_INPUTS})
    meeting, given = Meeting(left.module(), right.module(), how, after.module()), several(shapes)
    rows = np.concatenate([x.reshape(len(x), -1) for x in data], axis=1)
    return RandomNetwork(
        Flat(meeting, given).eval(), given.shape, families, levels, rows[:_ROWS], rows[_ROWS:]
    )


def _narrow(rng: np.random.Generator, draft: _Draft) -> None:
    """What most networks end with, whichever families are on: a dense layer."""
    _flattened(draft)
    draft.take("linear", nn.Linear(draft.shape[0], int(rng.integers(2, 11))), WIDEST)


def _flattened(draft: _Draft) -> None:
    if len(draft.shape) > 1:
        draft.take("flatten", nn.Flatten(), WIDEST)


__all__ = ["ACTIVATIONS", "FAMILIES", "LINEAR", "TWO_INPUTS", "RandomNetwork", "consumed", "random_network"]
