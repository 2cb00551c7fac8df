"""Activations that CKKS can evaluate: polynomials.

All work on any shape (B, C, ...). ReLU and max pooling have no exact
polynomial form; a tail that is to run encrypted is trained with these instead.
Source: CryptoNets (Gilad-Bachrach et al., ICML 2016) for the square; a
trainable quadratic keeps the linear part that a square loses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from blindtail.errors import ModelError
from blindtail.he.layers import MAX_SHIFT


class Square(nn.Module):
    """y = x^2 per element; any shape in, the same shape out. Consumes one level."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x


class Quadratic(nn.Module):
    """y = a x^2 + b x + c with trainable a, b, c; any shape (B, C, ...). Consumes one level.

    `channels` None trains one (a, b, c) for the layer, a number one per channel
    (dimension 1). After each optimizer step, `project_` keeps |b / 2a| within
    `max_shift`, the range that the compiler accepts.
    """

    a: Tensor
    b: Tensor
    c: Tensor

    def __init__(
        self,
        channels: int | None = None,
        *,
        a: float = 0.25,
        b: float = 0.5,
        c: float = 0.0,
        max_shift: float = MAX_SHIFT,
    ) -> None:
        super().__init__()
        if a == 0.0:
            raise ModelError("a quadratic activation needs a != 0; for a linear map leave it out")
        if not 0.0 < max_shift <= MAX_SHIFT:
            raise ModelError(f"max_shift must lie in (0, {MAX_SHIFT:g}]")
        self.channels = channels
        self.max_shift = max_shift
        self.smallest_a = abs(a) / 100.0
        shape = () if channels is None else (channels,)
        self.a = nn.Parameter(torch.full(shape, float(a)))
        self.b = nn.Parameter(torch.full(shape, float(b)))
        self.c = nn.Parameter(torch.full(shape, float(c)))

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.a, self.b, self.c
        if self.channels is not None:
            shape = (1, self.channels) + (1,) * (x.dim() - 2)
            a, b, c = a.view(shape), b.view(shape), c.view(shape)
        return (a * x + b) * x + c

    @torch.no_grad()
    def project_(self) -> None:
        """Move a away from zero (keeping its sign), then clip b so that |b / 2a| <= max_shift."""
        sign = torch.where(self.a < 0, -1.0, 1.0)
        self.a.copy_(sign * self.a.abs().clamp_min(self.smallest_a))
        bound = 2.0 * self.max_shift * self.a.abs() * (1.0 - 1e-6)
        self.b.copy_(torch.minimum(torch.maximum(self.b, -bound), bound))

    def extra_repr(self) -> str:
        return f"channels={self.channels}, max_shift={self.max_shift:g}"


class Polynomial(nn.Module):
    """y = c_0 + c_1 x + ... + c_d x^d with trainable coefficients; any shape (B, C, ...).

    coefficients  to begin with, c_0 first; degree d = len - 1 >= 1
    channels      None trains one polynomial for the layer, a number one per channel (dimension 1)

    Consumes ceil(log2(d + 1)) levels; where d is a power of two, ceil(log2 d) as long as no
    leading coefficient is small beside the others.
    """

    coefficients: Tensor

    def __init__(self, coefficients: Sequence[float], channels: int | None = None) -> None:
        super().__init__()
        if len(coefficients) < 2:
            raise ModelError("a polynomial activation needs two coefficients or more, the constant first")
        self.channels = channels
        first = torch.tensor([float(c) for c in coefficients])
        self.coefficients = nn.Parameter(first if channels is None else first[:, None].repeat(1, channels))

    @property
    def degree(self) -> int:
        return len(self.coefficients) - 1

    def forward(self, x: Tensor) -> Tensor:
        c = self.coefficients
        if self.channels is not None:
            c = c.view(len(c), 1, self.channels, *([1] * (x.dim() - 2)))
        y = c[-1]
        for lower in reversed(c[:-1].unbind()):
            y = y * x + lower
        return y

    def extra_repr(self) -> str:
        return f"degree={self.degree}, channels={self.channels}"
