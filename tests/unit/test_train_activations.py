"""Activations that turn from ReLU into a polynomial: the function, what it settles into, its fits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from blindtail.errors import ModelError
from blindtail.he.layers import MAX_SHIFT
from blindtail.models.layers import Polynomial, Quadratic
from blindtail.train.activations import IDENTITY, Target, Turning, fit_relu


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_it_is_relu_at_0_and_the_polynomial_at_1_exactly() -> None:
    x, layer = noise(5, 3, 2), Turning()
    assert torch.equal(layer(x), F.relu(x))
    layer.turn_(1.0)
    wanted = 0.1 * x + 0.1 * x * x
    torch.testing.assert_close(layer(x), wanted, rtol=0, atol=1e-7)
    layer.turn_(0.25)
    torch.testing.assert_close(layer(x), 0.25 * wanted + 0.75 * F.relu(x), rtol=0, atol=1e-6)
    assert not torch.equal(layer(x), F.relu(x))


@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize(
    "target", [Target(), IDENTITY, Target.fitted(-3, 4), Target.fitted(-2, 2, degree=4), Target((0, 1, 1, 1))]
)
def test_what_it_settles_into_is_the_same_function(channels: int | None, target: Target) -> None:
    layer = Turning(channels, target)
    with torch.no_grad():
        for i, parameter in enumerate(layer.parameters()):
            parameter.mul_(1 + 0.3 * noise(*parameter.shape, seed=i))
    layer.project_()
    layer.turn_(1.0)
    settled = layer.settled()
    assert type(settled) is (Polynomial if target.degree > 2 else Quadratic)
    for shape in ((5, 3), (5, 3, 4, 4)):
        x = noise(*shape)
        torch.testing.assert_close(settled(x), layer(x), rtol=1e-6, atol=1e-6)
    if isinstance(settled, Quadratic):
        before = [p.clone() for p in settled.parameters()]
        settled.project_()
        assert all(torch.equal(a, b) for a, b in zip(before, settled.parameters(), strict=True))
    with torch.no_grad():
        layer.coefficients.add_(1.0)
    assert not torch.allclose(settled(x), layer(x), atol=1e-3)  # weights of its own


def test_channels_have_coefficients_of_their_own() -> None:
    layer = Turning(2)
    with torch.no_grad():
        layer.coefficients.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    layer.turn_(1.0)
    x = torch.full((1, 2, 1, 1), 2.0)
    torch.testing.assert_close(layer(x).flatten(), torch.tensor([0.2 + 1.2, 0.4 + 1.6]))


def test_gradients_reach_coefficients_only_when_the_polynomial_has_a_part() -> None:
    for r, flows in ((0.0, False), (0.5, True), (1.0, True)):
        layer, first = Turning(3, Target(constant=True)), nn.Linear(3, 3)
        layer.turn_(r)
        torch.autograd.backward(layer(first(noise(4, 3))).pow(2).sum())
        for parameter in layer.parameters():
            assert (parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)) is flows
        assert first.weight.grad is not None


@settings(max_examples=60, deadline=None)
@given(a=st.floats(-2, 2, width=32), b=st.floats(-1000, 1000, width=32), channels=st.sampled_from([None, 2]))
def test_projection_keeps_the_shift_in_bounds_and_moves_as_little_as_it_can(
    a: float, b: float, channels: int | None
) -> None:
    layer = Turning(channels)
    with torch.no_grad():
        layer.coefficients[0].fill_(b)
        layer.coefficients[1].fill_(a)
    before = layer.coefficients.detach().clone()
    layer.project_()
    settled = layer.settled()
    assert isinstance(settled, Quadratic)
    for one_b, one_a in (layer.coefficients.detach(), torch.stack([settled.b, settled.a]).detach()):
        assert bool((one_a != 0).all())
        assert float((one_b / (2 * one_a)).abs().max()) <= MAX_SHIFT
    if abs(a) > 0.01 and abs(b) <= 31 * abs(a):
        assert torch.equal(layer.coefficients.detach(), before)
    elif abs(a) > 0.01:
        # A point of the edge, and the way to it is at a right angle to the edge.
        moved = layer.coefficients.detach() - before
        across = (moved[0] * layer.coefficients[0] + moved[1] * layer.coefficients[1]).detach()
        assert float(across.abs().max()) <= 1e-3 * (1 + b * b)
        assert bool((torch.sign(layer.coefficients[1]) == np.sign(a)).all())


def test_the_identity_as_a_start_stays_next_to_it() -> None:
    layer = Turning(None, IDENTITY)
    layer.project_()
    b, a = layer.coefficients.detach().tolist()
    assert b == pytest.approx(1.0, abs=2e-3)
    assert a == pytest.approx(1 / 32, rel=1e-2)


@pytest.mark.parametrize("weight", ["chebyshev", "uniform"])
@pytest.mark.parametrize(("low", "high"), [(-5.0, 5.0), (-1.0, 7.5), (1.0, 2.0), (-3.0, -1.0)])
@pytest.mark.parametrize("degree", [2, 3, 6])
def test_a_fit_is_what_least_squares_give(weight: str, low: float, high: float, degree: int) -> None:
    n = 20_000
    middles = (np.arange(n) + 0.5) / n
    t = np.cos(np.pi * middles) if weight == "chebyshev" else 2 * middles - 1
    x = (high + low) / 2 + (high - low) / 2 * t
    powers = np.stack([t**k for k in range(degree + 1)], 1)
    fitted = powers @ np.linalg.lstsq(powers, np.maximum(x, 0), rcond=None)[0]
    found = np.polynomial.Polynomial(fit_relu(low, high, degree, weight))(x)  # type: ignore[arg-type]
    np.testing.assert_allclose(found, fitted, atol=1e-5)
    inside = low >= 0 or high <= 0
    assert bool(np.abs(found - np.maximum(x, 0)).max() < 1e-6) is inside


def test_closer_fits_have_smaller_errors() -> None:
    x = np.linspace(-4, 4, 999)
    worst = [np.abs(np.polynomial.Polynomial(fit_relu(-4, 4, d))(x) - np.maximum(x, 0)).max() for d in (2, 4)]
    assert worst[1] < worst[0] < 4 * 0.14
    assert Target.fitted(-4, 4, constant=False).start[0] == 0.0


@pytest.mark.parametrize(
    "make",
    [
        lambda: fit_relu(1.0, 1.0),
        lambda: fit_relu(-1.0, float("inf")),
        lambda: fit_relu(-1.0, 1.0, 0),
        lambda: Target((0.0, 1.0)),
        lambda: Target((0.5, 1.0, 1.0)),
        lambda: Target((0.0, 0.0, 0.0)),
        lambda: Target(scale=0.0),
        lambda: Turning().turn_(1.5),
        lambda: Turning(max_shift=17.0),
    ],
)
def test_impossible_settings_are_refused(make: object) -> None:
    with pytest.raises(ModelError):
        make()  # type: ignore[operator]
