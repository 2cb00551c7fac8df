"""Activations that turn from ReLU into a polynomial while a network is trained.

    f(x) = r p(x) + (1 - r) ReLU(x),   p(x) = 0.1 c1 x + 0.1 c2 x^2,   r from 0 to 1

Source: Baruch et al., "A methodology for training homomorphic encryption friendly neural networks"
(arXiv 2111.03362). From there: f, p with c1 = c2 = 1 to begin with, and the start p(x) = x (a = 0,
b = 1 of a x^2 + b x). Chosen here: a constant and higher degrees where they are asked for, starts from a
fit to ReLU (Garimella et al., Sisyphus, 2021, fit by least squares on a range), coefficients by channel,
and what keeps |b / 2a| within what the compiler takes.

What sets r as training goes on is in `blindtail.train.turning`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.polynomial import Chebyshev, Legendre
from numpy.polynomial import Polynomial as Powers
from torch import Tensor, nn

from blindtail.errors import ModelError
from blindtail.he.layers import MAX_SHIFT
from blindtail.models.layers import Polynomial, Quadratic

Weight = Literal["chebyshev", "uniform"]
#: Of a quadratic's own start, how small |a| may become.
_SMALLEST = 0.01


def fit_relu(low: float, high: float, degree: int = 2, weight: Weight = "chebyshev") -> tuple[float, ...]:
    """Coefficients of the polynomial next to ReLU on [low, high], the constant first: degree + 1 of them.

    Least squares in closed form: the integral of w(x) (p(x) - ReLU(x))^2 is smallest. "uniform" takes
    w = 1 (the expansion in Legendre polynomials, cut off), "chebyshev" w = 1 / sqrt((x - low)(high - x))
    (the one in Chebyshev polynomials), which is closer at the ends of the range. Where the range does
    not go through 0, ReLU is linear there, and so is the fit. Raises `ModelError`.
    """
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ModelError(f"a fit needs a range from low to high, not from {low} to {high}")
    if not 1 <= degree <= 16:
        raise ModelError(f"a fit has degree 1 to 16, not {degree}")
    middle, half = (high + low) / 2, (high - low) / 2
    kink = float(np.clip(-middle / half, -1.0, 1.0))  # where x is 0, on [-1, 1]
    series: Chebyshev | Legendre
    if weight == "chebyshev":
        end = math.acos(kink)  # x >= 0 for cos(angle), 0 <= angle <= end

        def cosines(k: int) -> float:
            return math.sin(k * end) / k if k else end

        found = [
            2 / math.pi * (middle * cosines(k) + half / 2 * (cosines(abs(k - 1)) + cosines(k + 1)))
            for k in range(degree + 1)
        ]
        found[0] /= 2
        series = Chebyshev(found, domain=[low, high])
    else:
        line, found = Legendre([middle, half]), []
        for k in range(degree + 1):
            area = (line * Legendre.basis(k)).integ()
            found.append((2 * k + 1) / 2 * float(area(1.0) - area(kink)))
        series = Legendre(found, domain=[low, high])
    powers = [float(c) for c in series.convert(kind=Powers).coef]
    return tuple(powers + [0.0] * (degree + 1 - len(powers)))


@dataclass(frozen=True)
class Target:
    """The polynomial that ReLU turns into, as training begins.

    start     its coefficients, the constant first; degree 2 or more
    scale     what is trained is coefficient / scale: 0.1 makes steps on them ten times smaller
    constant  whether the constant is trained too; else it stays out, and `start` has 0 there

    Row 1's default is 0.1 x + 0.1 x^2 without a constant. Raises `ModelError`.
    """

    start: tuple[float, ...] = (0.0, 0.1, 0.1)
    scale: float = 0.1
    constant: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", tuple(float(c) for c in self.start))
        if len(self.start) < 3:
            raise ModelError(f"ReLU turns into a polynomial of degree 2 or more, not {len(self.start) - 1}")
        if not all(map(math.isfinite, self.start)) or not any(self.start[1:]):
            raise ModelError("coefficients are finite, and not all 0 beside the constant")
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ModelError(f"the scale of coefficients lies above 0, not at {self.scale}")
        if self.start[0] and not self.constant:
            raise ModelError("a start with a constant needs constant=True, or 0 in its place")

    @classmethod
    def fitted(
        cls,
        low: float,
        high: float,
        degree: int = 2,
        *,
        weight: Weight = "chebyshev",
        constant: bool = True,
        scale: float = 0.1,
    ) -> Target:
        """From `fit_relu` on a range (`blindtail.train.turning.ranges` measures them)."""
        found = fit_relu(low, high, degree, weight)
        return cls(found if constant else (0.0, *found[1:]), scale, constant)

    @property
    def degree(self) -> int:
        return len(self.start) - 1


#: p(x) = x to begin with: a = 0, b = 1. The first projection moves a to 0.031, the nearest that compiles.
IDENTITY = Target((0.0, 1.0, 0.0), scale=1.0)


class Turning(nn.Module):
    """y = r p(x) + (1 - r) ReLU(x); any shape (B, C, ...) in, the same out. A polynomial at r = 1.

    channels      None trains one polynomial for the layer, a number one per channel (dimension 1)
    r             a buffer, 0 to begin with; `turn_` sets it. At 0 this is ReLU, and at 1 the polynomial,
                  exactly: what has no part in it is not computed and gets no gradient
    coefficients  (degree,) or (degree, channels), of x, x^2, ..., over `target.scale`; row 1's c
    constant      () or (channels,), over the scale; None where it is not trained
    place, places  which activation of its tail it is, from 0, of how many

    In a network it is what `blindtail.train.turning.polynomial_tails` puts in the place of ReLU.
    """

    r: Tensor
    coefficients: Tensor
    constant: Tensor | None

    def __init__(
        self, channels: int | None = None, target: Target | None = None, *, max_shift: float = MAX_SHIFT
    ) -> None:
        super().__init__()
        if not 0.0 < max_shift <= MAX_SHIFT:
            raise ModelError(f"max_shift must lie in (0, {MAX_SHIFT:g}]")
        self.target = target if target is not None else Target()
        self.channels, self.max_shift = channels, max_shift
        self.place, self.places = 0, 1
        start = torch.tensor(self.target.start) / self.target.scale
        if channels is not None:
            start = start[:, None].repeat(1, channels)
        self.coefficients = nn.Parameter(start[1:].clone())
        self.constant = nn.Parameter(start[0].clone()) if self.target.constant else None
        self.register_buffer("r", torch.zeros(()))
        b, a = self.target.start[1:3]
        self.smallest_a = _SMALLEST * max(abs(a), abs(b) / (2.0 * max_shift))

    def forward(self, x: Tensor) -> Tensor:
        r = float(self.r)
        if r <= 0.0:
            return F.relu(x)
        y = self._polynomial(x)
        return y if r >= 1.0 else r * y + (1.0 - r) * F.relu(x)

    def _polynomial(self, x: Tensor) -> Tensor:
        coefficients = self.powers()
        if self.channels is not None:
            coefficients = coefficients.view(-1, 1, self.channels, *([1] * (x.dim() - 2)))
        constant, *rest = coefficients.unbind()
        y = rest[-1]
        for lower in reversed(rest[:-1]):
            y = y * x + lower
        return y * x + constant

    def powers(self) -> Tensor:
        """p's coefficients, the constant first: (degree + 1,) or (degree + 1, channels)."""
        constant = torch.zeros_like(self.coefficients[0]) if self.constant is None else self.constant
        return self.target.scale * torch.cat([constant[None], self.coefficients])

    @torch.no_grad()
    def turn_(self, r: float) -> None:
        """Set r, the share of the polynomial. Raises `ModelError` outside of 0 to 1."""
        if not 0.0 <= r <= 1.0:
            raise ModelError(f"the share of a polynomial lies between 0 and 1, not at {r}")
        self.r.fill_(r)

    @torch.no_grad()
    def project_(self) -> None:
        """Move (a, b) of a x^2 + b x to the nearest with |b / 2a| <= max_shift and a away from zero.

        a keeps its sign. Of a higher degree nothing is moved: the compiler takes it as it is. Chosen here:
        nearest in (a, b), so that a start with a = 0 moves a by 1/32 of b and leaves b as good as it was.
        """
        if self.target.degree > 2:
            return
        scale = self.target.scale
        b, a = (scale * self.coefficients).unbind()
        nearest_a, nearest_b = _nearest(a, b, self.max_shift, self.smallest_a)
        moved = (nearest_a != a) | (nearest_b != b)
        found = torch.stack([nearest_b, nearest_a]) / scale
        self.coefficients.copy_(torch.where(moved, found, self.coefficients))

    @torch.no_grad()
    def settled(self) -> Quadratic | Polynomial:
        """What it is at r = 1, with weights of its own: a `Quadratic`, projected; or a `Polynomial`."""
        powers = self.powers().detach()
        if self.target.degree > 2:
            higher = Polynomial(self.target.start, self.channels)
            higher.coefficients.copy_(powers)
            return higher.train(self.training)
        c, b, a = powers.unbind()
        a, b = _nearest(a, b, self.max_shift, self.smallest_a)
        made = Quadratic(self.channels, max_shift=self.max_shift)
        made.smallest_a = self.smallest_a
        for own, value in ((made.a, a), (made.b, b), (made.c, c)):
            own.copy_(value)
        return made.train(self.training)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, degree={self.target.degree}, r={float(self.r):g}"


def _nearest(a: Tensor, b: Tensor, max_shift: float, smallest_a: float) -> tuple[Tensor, Tensor]:
    """(a, b) of the same shape -> the nearest with |a| >= smallest_a and |b| <= 2 max_shift |a|."""
    slope = 2.0 * max_shift * (1.0 - 1e-6)
    sign, size = torch.where(a < 0, -1.0, 1.0), a.abs().clamp_min(smallest_a)
    outside = b.abs() > slope * size
    on_edge = (size + slope * b.abs()) / (1.0 + slope * slope)
    size = torch.where(outside, on_edge, size)
    return sign * size, torch.where(outside, torch.sign(b) * slope * size, b)


def as_targets(target: Target | Sequence[Target], layers: int) -> list[Target]:
    """One for each of `layers` activations. Raises `ModelError` for another number of them."""
    if isinstance(target, Target):
        return [target] * layers
    if len(target) != layers:
        raise ModelError(f"{len(target)} targets for {layers} activations: give one for each, or one for all")
    return list(target)


__all__ = ["IDENTITY", "Target", "Turning", "Weight", "as_targets", "fit_relu"]
