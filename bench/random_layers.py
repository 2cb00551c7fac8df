"""Layers of random networks (`bench.random_networks`), with a switch for each family.

A maker takes a generator and the shape of one image (without the batch) and
returns a module, or None where it does not fit that shape. Adding a kind of
layer is a maker and a line in `LINEAR` or `ACTIVATIONS`; `consumed` says what
an activation takes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from blindtail.models.layers import Polynomial, Quadratic, Square

Shape = tuple[int, ...]
Maker = Callable[[np.random.Generator, Shape], nn.Module | None]


class Skip(nn.Module):
    """x joined with what `inner` makes of it: a skip connection, by "add", "sub", "cat" or a mean."""

    def __init__(self, inner: nn.Module, how: str) -> None:
        super().__init__()
        self.inner, self.how = inner, how

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) -> the same shape; "cat" doubles C."""
        y: Tensor = self.inner(x)
        if self.how == "cat":
            return torch.cat([x, y], dim=1)
        if self.how == "mean":
            return torch.stack([x, y], dim=1).mean(1)
        return x + y if self.how == "add" else x - y


class Around(nn.Module):
    """x + after(activation(before(x))): a connection around an activation."""

    def __init__(self, before: nn.Module, activation: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.before, self.activation, self.after = before, activation, after

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.after(self.activation(self.before(x)))
        return y


class Beside(nn.Module):
    """One activation for the first channels, another for the rest."""

    def __init__(self, first: int, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.first, self.left, self.right = first, left, right

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x[:, : self.first]), self.right(x[:, self.first :])], 1)


class Arithmetic(nn.Module):
    """x (+, -, *, /) a constant: a number, or one per channel; `turned` puts the constant on the left."""

    def __init__(self, how: str, constant: float | Tensor, turned: bool = False) -> None:
        super().__init__()
        self.how, self.turned = how, turned
        self.number = constant if isinstance(constant, float) else None
        self.register_buffer("constant", constant if isinstance(constant, Tensor) else None)

    def forward(self, x: Tensor) -> Tensor:
        c: Any = self.number if self.number is not None else self.constant
        function = getattr(operator, self.how)
        result: Tensor = function(c, x) if self.turned else function(x, c)
        return result


class Written(nn.Module):
    """A power as people write it in a forward: "x * x", "torch.square", or "x ** k"."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "torch.square":
            return torch.square(x)
        return x * x if self.how == "x * x" else x ** int(self.how.split()[-1])


def _convolution(rng: np.random.Generator, shape: Shape) -> nn.Module | None:
    if len(shape) < 2:
        return None
    inside, sides = shape[0], shape[1:]
    groups = int(rng.choice([g for g in range(1, inside + 1) if inside % g == 0]))
    outside = groups * int(rng.integers(1, 4))
    size = [int(rng.integers(1, min(side, 3) + 1)) for side in sides]
    stride = [int(rng.integers(1, 3)) for _ in sides]
    padding = [int(rng.integers(0, k)) for k in size]
    dilation = [int(rng.integers(1, 3)) for _ in sides]
    kind: Any = nn.Conv2d if len(sides) == 2 else nn.Conv1d
    layer: nn.Module = kind(
        inside, outside, tuple(size), tuple(stride), tuple(padding), tuple(dilation), groups,
        bias=bool(rng.random() < 0.7),
    )  # fmt: skip
    return layer


def _linear(rng: np.random.Generator, shape: Shape) -> nn.Module | None:
    return nn.Linear(shape[-1], int(rng.integers(1, 33)), bias=bool(rng.random() < 0.8))


def _batch_norm(rng: np.random.Generator, shape: Shape) -> nn.Module | None:
    layer = (nn.BatchNorm2d if len(shape) == 3 else nn.BatchNorm1d)(shape[0], affine=bool(rng.random() < 0.8))
    assert layer.running_mean is not None
    assert layer.running_var is not None
    n = shape[0]
    with torch.no_grad():
        layer.running_mean.copy_(torch.from_numpy(rng.normal(scale=0.3, size=n)))
        layer.running_var.copy_(torch.from_numpy(rng.uniform(0.3, 2.0, n)))
        if layer.affine:
            signs = np.where(rng.random(n) < 0.3, -1.0, 1.0)
            layer.weight.copy_(torch.from_numpy(signs * rng.uniform(0.4, 1.5, n)))
            layer.bias.copy_(torch.from_numpy(rng.normal(scale=0.3, size=n)))
    return layer


def _average(rng: np.random.Generator, shape: Shape) -> nn.Module | None:
    if len(shape) < 2:
        return None
    size = int(rng.integers(2, 4))
    options: dict[str, Any] = {
        "stride": int(rng.integers(1, size + 1)),
        "padding": int(rng.integers(0, size // 2 + 1)),
        "ceil_mode": bool(rng.random() < 0.3),
        "count_include_pad": bool(rng.random() < 0.5),
    }
    return nn.AvgPool2d(size, **options) if len(shape) == 3 else nn.AvgPool1d(size, **options)


def _adaptive(rng: np.random.Generator, shape: Shape) -> nn.Module | None:
    if len(shape) < 2:
        return None
    sides = tuple(int(rng.integers(1, side + 1)) for side in shape[1:])
    return nn.AdaptiveAvgPool2d(sides) if len(sides) == 2 else nn.AdaptiveAvgPool1d(sides[0])


def _flatten(rng: np.random.Generator, shape: Shape) -> nn.Module | None:
    return None if len(shape) < 2 else nn.Flatten(int(rng.integers(1, len(shape))))


def _dropout(rng: np.random.Generator, shape: Shape) -> nn.Module | None:
    return nn.Dropout2d(0.5) if len(shape) == 3 and rng.random() < 0.5 else nn.Dropout(0.5)


def _skip(rng: np.random.Generator, shape: Shape) -> nn.Module | None:
    inner: list[nn.Module] = []
    for _ in range(int(rng.integers(1, 3))):
        inner.append(_keeping(rng, shape))
        if rng.random() < 0.5:
            inner.append(_batch_norm(rng, shape) or nn.Identity())
    return Skip(nn.Sequential(*inner), str(rng.choice(["add", "sub", "cat", "mean"])))


def _keeping(rng: np.random.Generator, shape: Shape) -> nn.Module:
    """A layer with weights that keeps the shape."""
    if len(shape) < 2:
        return nn.Linear(shape[-1], shape[-1])
    size = 1 if rng.random() < 0.3 else 3
    kind: Any = nn.Conv2d if len(shape) == 3 else nn.Conv1d
    layer: nn.Module = kind(shape[0], shape[0], size, padding="same" if rng.random() < 0.5 else size // 2)
    return layer


def _arithmetic(rng: np.random.Generator, shape: Shape) -> nn.Module | None:
    how = str(rng.choice(["add", "sub", "mul", "truediv"]))
    away = float(rng.choice([-1.0, 1.0]) * rng.uniform(0.5, 1.5))
    constant: float | Tensor = away
    if rng.random() < 0.5:
        each = torch.from_numpy(rng.uniform(0.5, 1.5, (shape[0],) + (1,) * (len(shape) - 1)))
        constant = each.float()
    turned = how != "truediv" and bool(rng.random() < 0.4)  # a constant over x is no affine map
    return Arithmetic(how, constant, turned)


def _square(rng: np.random.Generator, shape: Shape) -> nn.Module | None:
    return Square() if rng.random() < 0.6 else Written(str(rng.choice(["x * x", "x ** 2", "torch.square"])))


def _quadratic(rng: np.random.Generator, shape: Shape) -> nn.Module | None:
    layer = Quadratic(shape[0] if rng.random() < 0.6 else None)
    with torch.no_grad():
        for values, scale in ((layer.b, 0.5), (layer.c, 0.5)):
            values.copy_(torch.from_numpy(np.asarray(rng.normal(scale=scale, size=tuple(values.shape)))))
        signs = np.where(rng.random(tuple(layer.a.shape)) < 0.3, -1.0, 1.0)
        layer.a.copy_(torch.from_numpy(np.asarray(signs * rng.uniform(0.2, 1.0, tuple(layer.a.shape)))))
    return layer


def _polynomial(rng: np.random.Generator, shape: Shape) -> nn.Module | None:
    degree = int(rng.choice([2, 3, 4, 5, 6, 7], p=[0.1, 0.35, 0.25, 0.1, 0.1, 0.1]))
    layer = Polynomial([0.0] * (degree + 1), shape[0] if rng.random() < 0.5 else None)
    with torch.no_grad():
        for k, row in enumerate(layer.coefficients):
            size = tuple(row.shape)
            if k == degree:
                values = np.where(rng.random(size) < 0.5, -1.0, 1.0) * rng.uniform(0.2, 0.6, size)
            else:
                values = rng.normal(scale=0.5, size=size) * (rng.random() < 0.8)
            row.copy_(torch.from_numpy(np.asarray(values)))
    return layer


def _power(rng: np.random.Generator, shape: Shape) -> nn.Module | None:
    return Written(f"x ** {rng.integers(3, 6)}")


def _around(rng: np.random.Generator, shape: Shape) -> nn.Module | None:
    activation = (_square, _quadratic, _polynomial)[int(rng.integers(3))](rng, shape)
    assert activation is not None
    after = _keeping(rng, shape) if rng.random() < 0.7 else nn.Identity()
    return Around(_keeping(rng, shape), activation, after)


def _beside(rng: np.random.Generator, shape: Shape) -> nn.Module | None:
    if shape[0] < 2:
        return None
    first = int(rng.integers(1, shape[0]))
    rest = (shape[0] - first, *shape[1:])
    left, right = _square(rng, (first, *shape[1:])), _polynomial(rng, rest)
    assert left is not None
    assert right is not None
    return Beside(first, left, right)


def consumed(layer: nn.Module) -> int:
    """Levels of an activation's own, without its map's."""
    if isinstance(layer, Around):
        return consumed(layer.activation)
    if isinstance(layer, Beside):
        return max(consumed(layer.left), consumed(layer.right))
    degree = 2
    if isinstance(layer, Polynomial):
        degree = layer.degree
    elif isinstance(layer, Written) and layer.how.startswith("x **"):
        degree = int(layer.how.split()[-1])
    return (degree - 1).bit_length() if degree & (degree - 1) == 0 else degree.bit_length()


#: What folds into affine maps.
LINEAR: Mapping[str, Maker] = MappingProxyType(
    {
        "convolution": _convolution,
        "linear": _linear,
        "batch norm": _batch_norm,
        "average pooling": _average,
        "adaptive pooling": _adaptive,
        "flatten": _flatten,
        "dropout": _dropout,
        "skip": _skip,
        "arithmetic": _arithmetic,
    }
)
#: What ends an affine map.
ACTIVATIONS: Mapping[str, Maker] = MappingProxyType(
    {
        "square": _square,
        "quadratic": _quadratic,
        "polynomial": _polynomial,
        "power": _power,
        "around": _around,
        "beside": _beside,
    }
)
#: Two branches that take a tensor each and meet.
TWO_INPUTS = "two inputs"
FAMILIES = frozenset(LINEAR) | frozenset(ACTIVATIONS) | {TWO_INPUTS}

__all__ = ["ACTIVATIONS", "FAMILIES", "LINEAR", "TWO_INPUTS", "Arithmetic", "Shape", "consumed"]
