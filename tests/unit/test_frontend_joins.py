"""Tails that branch: connections around activations, activations side by side, polynomials."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from blindtail.he.clear import ClearEvaluator
from blindtail.he.compiler import compile_tail
from blindtail.he.frontend import fold_tail
from blindtail.he.layers import Affine, Polynomial, outputs
from blindtail.he.normal import normalised
from blindtail.models import layers
from blindtail.models.layers import Quadratic, Square
from blindtail.models.lint import lint


class _Residual(nn.Module):
    """Two blocks with shortcuts, the second with weights on it, as in ResNets."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)
        self.act1, self.act2 = Square(), Quadratic(3, a=0.3, b=0.2, c=0.1)
        self.conv2 = nn.Conv2d(2, 3, 3, stride=2, padding=1)
        self.short = nn.Conv2d(2, 3, 1, stride=2)
        self.head = nn.Linear(12, 5)
        self.norm1.running_mean = torch.tensor([0.1, -0.2])
        self.norm1.running_var = torch.tensor([0.5, 1.5])

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.act1(self.norm1(self.conv1(x)))
        h = self.short(h) + self.act2(self.conv2(h))
        return self.head(h.flatten(1))  # type: ignore[no-any-return]


class _Beside(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        return torch.cat([left**2, right**3 - 2 * left], 1)


class _Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.square = nn.Linear(4, 3), Square()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        self.square(h)
        return self.square(h) + h + 1  # type: ignore[no-any-return]


class _Older(nn.Module):
    """The second activation does not read the first, the output reads the input, both and neither's sum."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(6, 5, bias=False)
        self.cube = layers.Polynomial([0.1, 0.2, -0.3, 0.4], channels=5)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.cube(self.a(x)), self.b(x) ** 2
        return torch.stack([left, right], 1).sum(1) + x[:, :5] + 0.5  # type: ignore[no-any-return]


TAILS = {
    "residual blocks": (_Residual(), (2, 4, 4), 5),
    "side by side": (_Beside(), (6,), 4),
    "unused": (_Unused(), (4,), 3),
    "older values": (_Older(), (6,), 4),
    "cube": (nn.Sequential(nn.Linear(5, 4), layers.Polynomial([0.0, 1.0, 0.0, -0.2])), (5,), 4),
    "degree 5": (
        nn.Sequential(nn.Flatten(), layers.Polynomial([0.5, 1, 0, 0, 0, 0.2], 2), nn.Linear(2, 3)),
        (2, 1),
        5,
    ),
}


@pytest.mark.parametrize("name", TAILS)
def test_a_tail_that_branches_compiles(name: str) -> None:
    tail, shape, depth = TAILS[name]
    tail.eval()
    folded = fold_tail(tail, shape)
    x = torch.rand(40, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        want = tail.double()(x).flatten(1).numpy()
    tail.float()
    flat = x.flatten(1).numpy()
    assert np.allclose(outputs(folded, flat)[-1], want, atol=1e-9)
    assert normalised(folded).depth == depth
    program = compile_tail(folded, flat)
    assert program.depth == depth
    assert np.allclose(ClearEvaluator(program).logits(flat[:5]), want[:5], atol=1e-9)
    report = lint(tail, shape)
    assert report.whole is not None
    assert (report.whole.verdict, report.whole.depth) == ("runs", depth)
    assert report.whole.plan is not None
    assert report.whole.plan.depth == depth


def test_what_nobody_reads_is_left_out() -> None:
    folded = fold_tail(_Unused(), (4,))
    assert [isinstance(layer, Affine) for layer in folded] == [True, False, True]
    last = folded[-1]
    assert isinstance(last, Affine)
    assert [skip.back for skip in last.skips] == [1]


def test_polynomials_by_channel_and_powers() -> None:
    module = layers.Polynomial([1.0, 2.0, 0.0, 3.0], channels=2)
    with torch.no_grad():
        module.coefficients[3] = torch.tensor([3.0, -1.0])
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    c = module.double().coefficients[:, None, :, None, None]
    assert torch.allclose(module(x), c[0] + c[1] * x + c[3] * x**3)
    _, layer, _ = fold_tail(nn.Sequential(module.float(), nn.Flatten()), (2, 4, 4))
    assert isinstance(layer, Polynomial)
    assert layer.coefficients.shape == (4, 32)
    assert layer.coefficients[3].tolist() == [3.0] * 16 + [-1.0] * 16
