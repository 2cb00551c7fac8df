"""Matrices of layers that are local, from few images: convolutions of images too large to try every pixel.

A convolution's output pixel depends on input pixels near it alone, so one image with a grid of
ones shows many columns of the matrix at once (Curtis, Powell and Reid, J. Inst. Maths Applics
1974). How far apart the ones must be is read off a few single ones. Nothing is assumed beyond that:
the result is compared with the layers themselves on random images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from blindtail.he.layers import Affine, FloatArray
from blindtail.he.sparse import Sparse, applied_to, compact

Image = tuple[int, int, int]
IntArray = NDArray[np.int64]
#: Values of all images that run together, and images that are compared.
_PART_VALUES, _COMPARED = 1 << 24, 4
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class _Side:
    """Rows, or columns: output places that an input place reaches.

    ratio    input places to one output place
    low      the first that place p reaches is p // ratio + low, at least
    reach    at most so many
    """

    size: int
    out: int
    ratio: int
    low: int
    reach: int

    @property
    def spacing(self) -> int:
        """Places so far apart reach nothing together."""
        return min(self.reach * self.ratio, -(-self.size // self.ratio) * self.ratio)

    def owner(self, first: int) -> IntArray:
        """(out,): which of the places first, first + spacing, ... reaches each output place, or -1."""
        step = self.spacing // self.ratio
        k = (np.arange(self.out) - self.low - first // self.ratio) // step
        place = first + np.clip(k, 0, None) * self.spacing
        return np.where((k >= 0) & (place < self.size), place, -1)


@torch.no_grad()
def fold_local(module: nn.Module, given: Image, made: Image, name: str) -> Affine | None:
    """The affine map of a module (B, C H W) -> (B, C' H' W'), or None where it is none that is local.

    module       in float64 and evaluation mode
    given, made  (C, H, W) of one image before and after
    """
    zero = torch.zeros(1, math.prod(given), dtype=torch.float64)
    bias = module(zero)[0]
    if bias.shape != (math.prod(made),):
        return None
    # Without padding, less comes out than a stride alone would leave.
    sizes = [before / after for before, after in zip(given[1:], made[1:], strict=True)]
    for ratios in dict.fromkeys(tuple(max(1, how(size)) for size in sizes) for how in (round, math.floor)):
        found = _folded(module, bias, given, made, ratios, name)
        if found is not None:
            return found
    return None


@contextmanager
def _sparing(module: nn.Module) -> Iterator[None]:
    """Convolutions in it multiply images of one channel with that channel's weights alone."""
    convolutions = [one for one in module.modules() if type(one) is nn.Conv2d and one.groups == 1]
    for one in convolutions:
        one.forward = partial(_one_channel, one, one.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for one in convolutions:
            del one.forward


def _one_channel(conv: nn.Conv2d, usual: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What a convolution gives, for a fraction of the work where each image has the same picture in one
    channel, and zeros in the others: a sum of zeros and one product is the same in any order."""
    if x.dim() != 4 or not len(x):
        return usual(x)
    lit = x.ne(0).flatten(2).any(2)
    channel = lit.int().argmax(1)
    picture = x[torch.arange(len(x)), channel]
    if not bool((lit.sum(1) == 1).all()) or not bool((picture == picture[:1]).all()):
        return usual(x)
    weight = conv.weight[:, channel].transpose(0, 1).flatten(0, 1)[:, None]  # of image after image
    bias = None if conv.bias is None else conv.bias.repeat(len(x))
    out: Tensor = conv._conv_forward(picture[:1, None], weight, bias)
    return out.reshape(len(x), conv.out_channels, *out.shape[2:])


def _folded(
    module: nn.Module, bias: Tensor, given: Image, made: Image, ratios: tuple[int, ...], name: str
) -> Affine | None:
    """With so many input places, down and across, to one output place."""
    with _sparing(module):
        sides = _sides(module, bias, given, made, ratios)
        if sides is None:
            return None
        weight = _columns(module, bias, given, made, *sides)
    found = Affine(compact(weight), bias.numpy().copy(), name, (given, made))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_COMPARED, math.prod(given), dtype=torch.float64, generator=generator)
    wanted = module(x).numpy()
    got = applied_to(weight, x.numpy()) + found.bias
    close = np.allclose(got, wanted, rtol=0.0, atol=_TOLERANCE * max(1.0, float(np.abs(wanted).max())))
    return found if close else None


def _sides(
    module: nn.Module, bias: Tensor, given: Image, made: Image, ratios: tuple[int, ...]
) -> tuple[_Side, _Side] | None:
    """From single ones in the middle, at every place within a step of the output."""
    middle = [n // 2 // ratio * ratio for n, ratio in zip(given[1:], ratios, strict=True)]
    ends: list[list[int]] = [[], []]
    for y in range(middle[0], min(middle[0] + ratios[0], given[1])):
        for x in range(middle[1], min(middle[1] + ratios[1], given[2])):
            probe = torch.zeros(given[0], *given, dtype=torch.float64)
            probe[torch.arange(given[0]), torch.arange(given[0]), y, x] = 1.0
            seen = (module(probe.reshape(given[0], -1)) - bias).reshape(-1, *made).abs().amax((0, 1))
            for axis, place in enumerate((y, x)):
                reached = torch.nonzero(seen.amax(1 - axis)).reshape(-1)
                ends[axis] += [int(r) - place // ratios[axis] for r in reached]
    if not ends[0] or not ends[1]:
        return None
    first, second = (
        _Side(given[1 + a], made[1 + a], ratios[a], min(ends[a]), max(ends[a]) - min(ends[a]) + 1)
        for a in range(2)
    )
    return first, second


def _columns(
    module: nn.Module, bias: Tensor, given: Image, made: Image, rows: _Side, across: _Side
) -> Sparse:
    channels, height, width = given
    kept: list[tuple[IntArray, IntArray, FloatArray]] = []
    size, picture = math.prod(made), made[1] * made[2]
    each = max(1, _PART_VALUES // max(math.prod(given), size))
    for a in range(rows.spacing):
        for b in range(across.spacing):
            own_y, own_x = rows.owner(a)[:, None], across.owner(b)
            owner = np.where((own_y >= 0) & (own_x >= 0), own_y * width + own_x, -1).reshape(-1)
            for start in range(0, channels, each):
                many = min(each, channels - start)
                probe = torch.zeros(many, *given, dtype=torch.float64)
                index = torch.arange(many)
                probe[index, index + start, a :: rows.spacing, b :: across.spacing] = 1.0
                seen = (module(probe.reshape(many, -1)) - bias).numpy().reshape(-1)
                at = np.flatnonzero(seen)
                channel, out = np.divmod(at, size)
                source = owner[out % picture]
                inside = source >= 0
                if not inside.all():
                    at, channel, out, source = at[inside], channel[inside], out[inside], source[inside]
                column = (start + channel) * (height * width) + source
                kept.append((out.astype(np.int32), column.astype(np.int32), seen[at]))
    out, columns, values = (np.concatenate(part) for part in zip(*kept, strict=True))
    return Sparse.unordered((size, math.prod(given)), out, columns, values)


__all__ = ["Image", "fold_local"]
