"""HE-friendly activations: values, gradients, and the projection that keeps them compilable."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blindtail.errors import ModelError
from blindtail.he.layers import MAX_SHIFT
from blindtail.models.layers import Quadratic, Square


def test_square_squares_any_shape() -> None:
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Square()(x), x**2)


def test_quadratic_per_channel_uses_dimension_one() -> None:
    layer = Quadratic(3)
    with torch.no_grad():
        layer.a.copy_(torch.tensor([1.0, 2.0, 3.0]))
        layer.b.copy_(torch.tensor([0.0, -1.0, 1.0]))
        layer.c.copy_(torch.tensor([0.5, 0.0, -0.5]))
    x = torch.full((2, 3, 2, 2), 2.0)
    assert layer(x)[0, :, 0, 0].tolist() == [4.5, 6.0, 13.5]
    assert layer(x[:, :, 0, 0]).shape == (2, 3)


@settings(max_examples=50, deadline=None)
@given(
    a=st.floats(-2, 2, width=32),
    b=st.floats(-1000, 1000, width=32),
    per_channel=st.booleans(),
)
def test_projection_keeps_the_shift_in_bounds(a: float, b: float, per_channel: bool) -> None:
    layer = Quadratic(2 if per_channel else None)
    with torch.no_grad():
        layer.a.fill_(a)
        layer.b.fill_(b)
    layer.project_()
    assert bool((layer.a != 0).all())
    assert float((layer.b / (2 * layer.a)).detach().abs().max()) <= MAX_SHIFT
    if abs(a) > 0.01:
        assert bool((torch.sign(layer.a) == (1 if a > 0 else -1)).all())


def test_projection_leaves_what_is_inside_alone() -> None:
    layer = Quadratic(a=0.3, b=0.7)
    layer.project_()
    assert layer.a.item() == pytest.approx(0.3)
    assert layer.b.item() == pytest.approx(0.7)


@pytest.mark.parametrize("kwargs", [{"a": 0.0}, {"max_shift": 17.0}, {"max_shift": 0.0}])
def test_impossible_settings_are_refused(kwargs: dict[str, float]) -> None:
    with pytest.raises(ModelError):
        Quadratic(**kwargs)  # type: ignore[arg-type]
