"""Convolutions folded from few images: the same matrix as from every pixel, or none."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from blindtail.he.layers import FloatArray
from blindtail.he.probes import Image, fold_local
from blindtail.he.sparse import Sparse


class Flat(nn.Module):
    """A module of images on flat ones, as `fold_local` wants it; counts the images it is given."""

    def __init__(self, inner: nn.Module, shape: Image) -> None:
        super().__init__()
        self.inner, self.shape, self.images = inner.double().eval(), shape, 0

    def forward(self, x: Tensor) -> Tensor:
        self.images += len(x)
        made: Tensor = self.inner(x.reshape(-1, *self.shape))
        return made.flatten(1)

    @property
    def made(self) -> Image:
        with torch.no_grad():
            channels, height, width = self.inner(torch.zeros(1, *self.shape, dtype=torch.float64)).shape[1:]
        return channels, height, width


@torch.no_grad()
def dense(module: nn.Module, features: int) -> tuple[FloatArray, FloatArray]:
    """Weight (out, in) and bias (out,), pixel by pixel."""
    bias = module(torch.zeros(1, features, dtype=torch.float64))[0]
    columns = module(torch.eye(features, dtype=torch.float64)) - bias
    return columns.T.numpy(), bias.numpy()


def agrees(module: Flat) -> bool:
    """False where there is none; otherwise it must be the matrix."""
    shape = module.shape
    found = fold_local(module, shape, module.made, "layer")
    if found is None:
        return False
    weight, bias = dense(module, math.prod(shape))
    got = found.weight.dense() if isinstance(found.weight, Sparse) else found.weight
    np.testing.assert_allclose(got, weight, rtol=0, atol=1e-9)
    np.testing.assert_allclose(found.bias, bias, rtol=0, atol=1e-9)
    assert found.shapes == (shape, module.made)
    assert found.name == "layer"
    return True


def _norm(channels: int) -> nn.BatchNorm2d:
    """As it is after training."""
    made = nn.BatchNorm2d(channels)
    with torch.no_grad():
        for values in (made.weight, made.bias, made.running_mean):
            assert values is not None
            values.normal_()
        assert made.running_var is not None
        made.running_var.uniform_(0.5, 2)
    return made


def _local() -> dict[str, tuple[nn.Module, Image]]:
    torch.manual_seed(0)
    return {
        "3 x 3": (nn.Conv2d(2, 3, 3, padding=1), (2, 9, 9)),
        "5 x 5, no padding": (nn.Conv2d(1, 2, 5), (1, 12, 11)),
        "1 x 1": (nn.Conv2d(3, 2, 1), (3, 5, 6)),
        "1 x 1 with a stride": (nn.Conv2d(3, 2, 1, stride=2), (3, 6, 7)),
        "a stride": (nn.Conv2d(2, 2, 3, stride=2, padding=1), (2, 10, 10)),
        "strides that do not fit": (nn.Conv2d(2, 2, 3, stride=3, padding=1), (2, 11, 13)),
        "two strides": (nn.Conv2d(1, 2, 3, stride=(2, 1), padding=1), (1, 8, 8)),
        "groups": (nn.Conv2d(4, 4, 3, padding=1, groups=2), (4, 6, 6)),
        "depthwise": (nn.Conv2d(3, 3, 3, padding=1, groups=3), (3, 6, 6)),
        "dilation": (nn.Conv2d(1, 2, 3, padding=2, dilation=2), (1, 9, 9)),
        "rows alone": (nn.Conv2d(1, 1, (3, 1), padding=(1, 0)), (1, 7, 4)),
        "batch norm": (nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), _norm(3)), (2, 6, 6)),
        "batch norm alone": (_norm(3), (3, 4, 4)),
        "average pool": (nn.AvgPool2d(2), (2, 8, 8)),
        "padded average pool": (nn.AvgPool2d(3, 2, 1), (1, 9, 9)),
        "two convolutions": (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 1, 3, padding=1)), (1, 9, 9)),
        "reflected": (nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"), (1, 8, 8)),
        "one pixel": (nn.Conv2d(2, 3, 1), (2, 1, 1)),
        "a mean over all": (nn.AdaptiveAvgPool2d(1), (2, 8, 8)),
        "an image as large as the kernel": (nn.Conv2d(1, 2, 4), (1, 4, 4)),
    }


@pytest.mark.parametrize("name", _local())
def test_what_is_local_is_folded(name: str) -> None:
    inner, shape = _local()[name]
    assert agrees(Flat(inner, shape))


def _other() -> dict[str, tuple[nn.Module, Image]]:
    torch.manual_seed(0)
    return {
        "relu": (nn.ReLU(), (2, 6, 6)),
        "relu after a convolution": (nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU()), (1, 6, 6)),
        "max pool": (nn.MaxPool2d(2), (1, 8, 8)),
        "upsampling": (nn.Upsample(scale_factor=2), (1, 4, 4)),
        "transposed": (nn.ConvTranspose2d(1, 1, 2, stride=2), (1, 4, 4)),
        "mixing": (nn.Sequential(nn.Flatten(), nn.Linear(36, 36), nn.Unflatten(1, (1, 6, 6))), (1, 6, 6)),
        "circular": (nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular"), (1, 8, 8)),
        "shuffled": (nn.PixelShuffle(2), (4, 3, 3)),
        "nothing": (nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Threshold(1e9, 0.0)), (1, 6, 6)),
    }


@pytest.mark.parametrize("name", _other())
def test_what_is_not_local_gives_no_matrix(name: str) -> None:
    inner, shape = _other()[name]
    assert fold_local(Flat(inner, shape), shape, Flat(inner, shape).made, name) is None


@settings(max_examples=16, deadline=None)
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 8), st.integers(1, 8)),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(0, 3), st.integers(0, 3)),
    st.integers(1, 2),
    st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    st.booleans(),
)
def test_never_a_wrong_matrix(
    shape: Image,
    size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: int,
    mode: Literal["zeros", "reflect", "replicate", "circular"],
    pooled: bool,
) -> None:
    """Whatever the sizes, also where an image's middle does not show how far a kernel reaches."""
    torch.manual_seed(0)
    layer = nn.Conv2d(shape[0], 2, size, stride, padding, dilation, padding_mode=mode)
    module = Flat(nn.Sequential(layer, nn.AvgPool2d(2)) if pooled else layer, shape)
    try:
        made = module.made
    except RuntimeError:
        return  # the image is smaller than the kernel, or than its padding
    if math.prod(made):
        agrees(module)


def test_a_large_image_takes_few_images() -> None:
    shape = (2, 32, 32)
    module = Flat(nn.Conv2d(2, 2, 3, padding=1), shape)
    made = module.made
    module.images = 0
    assert fold_local(module, shape, made, "layer") is not None
    assert module.images < 2 * (3 * 3 + 1) + 10  # of 2048 pixels


def test_kernels_with_zeros_are_whole() -> None:
    """Taps that are zero at an end, and one that only another channel has."""
    layer = nn.Conv2d(2, 1, 5, padding=2)
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[0, 0, 1, 1], layer.weight[0, 1, 4, 0] = 1.0, 2.0
    assert agrees(Flat(layer, (2, 12, 12)))


def test_a_large_bias_costs_no_weight() -> None:
    layer = nn.Conv2d(1, 1, 3, padding=1)
    with torch.no_grad():
        layer.bias.fill_(1e4)  # type: ignore[union-attr]
    assert agrees(Flat(layer, (1, 8, 8)))
