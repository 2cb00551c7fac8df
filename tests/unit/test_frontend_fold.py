"""Folding a tail: equal to torch on random networks, and errors that name layer and rewrite."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from blindtail.errors import ModelError
from blindtail.he.frontend import fold_tail
from blindtail.he.layers import Affine
from blindtail.he.layers import Quadratic as Folded
from blindtail.models.layers import Quadratic, Square


def evaluate(layers: list, x: Tensor) -> np.ndarray:
    value = x.double().numpy().reshape(len(x), -1)
    for layer in layers:
        value = layer(value)
    return value


def assert_folds(tail: nn.Module, shape: tuple[int, ...], seed: int = 0) -> list:
    torch.manual_seed(seed)
    tail.eval()
    layers = fold_tail(tail, shape)
    for position, layer in enumerate(layers):
        assert isinstance(layer, Affine if position % 2 == 0 else Folded)
    assert len(layers) % 2 == 1
    x = torch.randn(5, *shape)
    with torch.no_grad():
        wanted = tail(x).numpy().reshape(5, -1)
    scale = max(1.0, float(np.abs(wanted).max()))
    np.testing.assert_allclose(evaluate(layers, x), wanted, atol=1e-4 * scale, rtol=0)
    return layers


@st.composite
def tails(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...], int]:
    """Random chains of everything that folds, on small activations."""
    seed = draw(st.integers(0, 2**31 - 1))
    torch.manual_seed(seed)
    channels, size = draw(st.sampled_from([2, 4])), draw(st.integers(4, 7))
    shape: tuple[int, ...] = (channels, size, size)
    steps: list[nn.Module] = []
    value = torch.zeros(1, *shape)

    def push(module: nn.Module) -> None:
        nonlocal value
        for child in module.modules():
            if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
                child.running_mean = torch.randn(child.num_features)
                child.running_var = torch.rand(child.num_features) + 0.5
        steps.append(module)
        value = module.eval()(value)

    for _ in range(draw(st.integers(0, 4))):
        c, h = value.shape[1], value.shape[2]
        kind = draw(
            st.sampled_from(["conv", "norm", "pool", "adaptive", "square", "quadratic", "other", "nested"])
        )
        if kind == "conv":
            k = draw(st.sampled_from([1, 3]))
            groups = draw(st.sampled_from([1, c])) if c > 1 else 1
            dilation = draw(st.sampled_from([1, 2])) if h >= 5 else 1
            stride, padding = draw(st.integers(1, 2)), draw(st.integers(0, 1))
            if h + 2 * padding >= dilation * (k - 1) + 1:
                push(nn.Conv2d(c, c * draw(st.integers(1, 2)), k, stride, padding, dilation, groups))
        elif kind == "norm":
            push(nn.BatchNorm2d(c))
        elif kind == "pool" and h >= 2:
            push(nn.AvgPool2d(2, stride=draw(st.integers(1, 2)), padding=draw(st.integers(0, 1))))
        elif kind == "adaptive":
            push(nn.AdaptiveAvgPool2d(draw(st.integers(1, min(3, h)))))
        elif kind == "square":
            push(Square())
        elif kind == "quadratic":
            push(
                Quadratic(
                    draw(st.sampled_from([None, c])), a=draw(st.sampled_from([-0.5, 0.25])), b=0.7, c=-0.3
                )
            )
        elif kind == "nested":
            push(nn.Sequential(nn.Identity(), nn.Sequential(nn.BatchNorm2d(c), nn.Dropout2d(0.5))))
        else:
            push(draw(st.sampled_from([nn.Identity(), nn.Dropout(0.5)])))
    push(nn.Flatten())
    width = value.shape[1]
    push(nn.Linear(width, 6, bias=draw(st.booleans())))
    if draw(st.booleans()):
        push(nn.BatchNorm1d(6))
    push(draw(st.sampled_from([Square(), Quadratic(6), nn.Identity()])))
    push(nn.Linear(6, 3))
    return nn.Sequential(*steps), shape, seed


@settings(max_examples=60, deadline=None)
@given(tails())
def test_folded_layers_equal_torch(case: tuple[nn.Module, tuple[int, ...], int]) -> None:
    tail, shape, seed = case
    assert_folds(tail, shape, seed)


def test_runs_of_linear_layers_become_one_map_with_their_names() -> None:
    tail = nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 3, 3, 2, 1), nn.BatchNorm2d(3)), nn.Flatten(), Square(), nn.Linear(12, 4)
    )
    layers = assert_folds(tail, (2, 4, 4))
    assert [layer.name for layer in layers] == ["0.0+0.1+1", "2", "3"]
    assert layers[0].weight.shape == (12, 32)


def test_activations_at_the_ends_and_in_a_row_get_identity_maps() -> None:
    layers = assert_folds(nn.Sequential(Square(), Quadratic(3)), (3,))
    assert [type(layer).__name__ for layer in layers] == [
        "Affine",
        "Quadratic",
        "Affine",
        "Quadratic",
        "Affine",
    ]
    np.testing.assert_array_equal(layers[0].weight, np.eye(3))


def test_an_owners_forward_with_functions_folds() -> None:
    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.mix, self.out = nn.Conv2d(1, 4, 3), nn.Linear(16, 16), nn.Linear(16, 3)
            self.register_buffer("scale", torch.rand(16) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            x = F.avg_pool2d(self.conv(x), 2)
            x = x.view(x.size(0), -1)
            x = x + self.mix(x)  # a skip over linear layers only
            x = x * self.scale / 2.0 - 0.25
            x = x * x
            return self.out(F.dropout(x, 0.5, self.training))

    assert len(assert_folds(Owner(), (1, 6, 6))) == 3


@pytest.mark.parametrize("bias", [True, False])
def test_a_dense_layer_folds_to_its_own_weights(bias: bool) -> None:
    """To the last bit, also behind a layer that only moves; what comes behind another is multiplied."""
    torch.manual_seed(1)
    layer, second = nn.Linear(12, 7, bias=bias), nn.Linear(7, 3)
    (made,) = fold_tail(nn.Sequential(nn.Flatten(), layer), (3, 2, 2))
    assert isinstance(made, Affine)
    assert np.array_equal(np.asarray(made.weight), layer.weight.detach().double().numpy())
    assert np.array_equal(made.bias, layer.bias.detach().double().numpy() if bias else np.zeros(7))
    assert_folds(nn.Sequential(nn.Flatten(), layer, second), (3, 2, 2))
    assert_folds(nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(3, 5)), (3, 2, 2))


def test_a_hook_on_a_dense_layer_is_not_passed_over() -> None:
    layer = nn.Linear(6, 4)
    layer.register_forward_hook(lambda _, __, made: made * 2)
    assert_folds(nn.Sequential(layer), (6,))


def test_a_single_layer_folds() -> None:
    assert len(assert_folds(nn.Linear(4, 2), (4,))) == 1


def test_the_tail_is_left_unchanged() -> None:
    tail = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), Square(), nn.Linear(4, 2)).train()
    before = {k: v.clone() for k, v in tail.state_dict().items()}
    fold_tail(tail, (4,))
    assert tail.training
    assert all(v.dtype == torch.float32 and torch.equal(v, before[k]) for k, v in tail.state_dict().items())


class _Function(nn.Module):
    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)  # type: ignore[operator,no-any-return]


class _Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class _Sly(nn.Linear):
    """A subclass that is not linear: must not pass for its base class."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(super().forward(x))


class _OfTheBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.size(0) > 2 else x


class _InList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(4, 2)]

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)  # type: ignore[no-any-return]


class _Pair(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


@pytest.mark.parametrize(
    ("tail", "shape", "words"),
    [
        (
            nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)),
            (4,),
            r"layer 1 \(ReLU\).*Square or Quadratic",
        ),
        (
            nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.GELU())),
            (4,),
            r"layer 0\.1 \(GELU\).*blindtail train",
        ),
        (nn.Sequential(nn.MaxPool2d(2), nn.Flatten()), (1, 4, 4), r"0 \(MaxPool2d\).*AvgPool2d"),
        (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), (4,), r"1 \(LayerNorm\).*BatchNorm"),
        (nn.Sequential(nn.Linear(4, 4), nn.Softmax(1)), (4,), r"1 \(Softmax\).*plain logits"),
        (nn.Sequential(nn.Linear(4, 4), _Function(F.relu)), (4,), r"relu.*Square or Quadratic"),
        (nn.Sequential(nn.Linear(4, 4), _Function(torch.tanh)), (4,), r"tanh.*Square or Quadratic"),
        (nn.Sequential(_Function(lambda x: F.max_pool2d(x, 2))), (1, 4, 4), r"max_pool2d.*AvgPool2d"),
        (nn.Sequential(_Function(lambda x: x[0])), (4,), "whole activations"),
        (_Branching(), (4,), r"test_frontend_fold\.py:\d+ depends on its input's values.*plain chain"),
        (nn.Sequential(_Branching()), (4,), r"tail layer 0 at test_frontend_fold\.py:\d+ depends"),
        (_OfTheBatch(), (4,), r"for other numbers of images \(test_frontend_fold\.py:\d+\).*flatten\(1\)"),
        (_InList(), (4,), r"calls a module that it does not own.*nn\.ModuleList"),
        (_Pair(), (4,), "takes one input.*takes x, y"),
        (nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4)), (4,), r"layer 1 \(LSTM\).*cut the network after it"),
        (nn.LazyLinear(3), (4,), "no weights yet"),
        (nn.Sequential(_Sly(4, 2)), (4,), "Sly|relu"),
        (nn.Sequential(nn.Flatten(0)), (4,), "everything but the batch"),
        (nn.Sequential(nn.Linear(5, 2)), (4,), "layer 0: does not fit"),
        (nn.Sequential(nn.Flatten(), nn.Linear(65536, 2)), (64, 32, 32), "cut the network later"),
        (nn.BatchNorm1d(4, track_running_stats=False), (4,), "running statistics"),
    ],
)
def test_what_cannot_run_encrypted_is_named_with_its_rewrite(
    tail: nn.Module, shape: tuple[int, ...], words: str
) -> None:
    with pytest.raises(ModelError, match=words):
        fold_tail(tail, shape)


def test_a_forward_that_makes_tensors_itself_folds() -> None:
    """Constants of the forward, the batch's size, and control flow on shapes; in float64 where it can be."""

    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.out = nn.Conv2d(1, 3, 2), nn.Linear(14, 2)
            self.register_buffer("var", torch.rand(3) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            batch, _, height, _ = x.shape
            assert x.dim() == 4
            x = self.conv(x) * (self.var.view(1, -1, 1, 1) + 1e-5).rsqrt()
            if height > 2:
                x = x.square()
            x = x.mean(dim=(2, 3)).view(batch, -1)  # the batch of another basis
            x = torch.cat([x, torch.zeros(batch, 4), x.repeat(1, 2), torch.ones_like(x)[:, :1]], 1)
            return self.out(x)

    assert len(assert_folds(Owner(), (1, 4, 4))) == 3

    class Float(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ torch.linspace(0, 1, 12).view(4, 3)  # float32, whatever x is

    assert len(assert_folds(Float(), (4,))) == 1


def test_weights_that_are_not_finite_are_named() -> None:
    tail = nn.Sequential(nn.Linear(4, 4), Square(), nn.Linear(4, 2))
    with torch.no_grad():
        tail[2].bias[1] = float("nan")
    with pytest.raises(ModelError, match=r"2\.bias"):
        fold_tail(tail, (4,))
