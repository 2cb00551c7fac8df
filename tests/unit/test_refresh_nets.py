"""Refreshed tails of whole networks give what PyTorch gives; what cannot be refreshed is told."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from bench.refresh_nets import Gated, PreActivation, alexnet, lenet5, lively, resnet20
from blindtail.errors import ConfigError, ModelError
from blindtail.he.clear import ClearEvaluator
from blindtail.he.stability import Verdict
from blindtail.models.layers import Quadratic, Square
from blindtail.models.lint import lint_refreshed
from blindtail.models.pack import judge_tails, pack, pack_tail
from blindtail.models.refresh import (
    Refresh,
    RefreshedProgram,
    _values,
    refresh_costs,
    refresh_tail,
    split_tail,
)
from tests.refresh_cases import TRIPS, expected, images, model, packed

Shape = tuple[int, ...]


def _chain(made: RefreshedProgram, x: NDArray[np.float64], noise: int | None = None) -> NDArray[np.float64]:
    """What an edge gets, (classes,), without a cloud: programs in the clear, graphs as they were exported."""
    known, last = {"x0": x}, len(made.programs) - 1
    for k, program in enumerate(made.programs):
        known[f"y{k}"] = found = ClearEvaluator(program, noise).logits(known[f"x{k}"])[0]
        if k < len(made.interludes):
            step = made.interludes[k]
            session = onnxruntime.InferenceSession(step.onnx, providers=["CPUExecutionProvider"])
            given = {name: known[name].astype(np.float32)[None] for name in step.inputs}
            found = session.run(None, given)[0][0].astype(np.float64)
        known[f"x{k + 1}" if k < last else "logits"] = found
    return known["logits"]


def _wanted(net: nn.Module, shape: Shape, x: NDArray[np.float64]) -> NDArray[np.float64]:
    with torch.no_grad():
        return net(torch.from_numpy(x).float().reshape(1, *shape))[0].double().numpy()


NETS: dict[str, tuple[Callable[[], nn.Module], Shape, int]] = {
    "LeNet-5": (lambda: lenet5(side=12), (1, 12, 12), 5),
    "AlexNet, narrow": (lambda: alexnet(1, side=16), (3, 16, 16), 8),
    "ResNet-20, narrow": (lambda: resnet20((1, 2, 4)), (3, 4, 4), 20),
    "ResNet-8, projections": (lambda: resnet20((2, 4, 4), 1, "projection"), (3, 4, 4), 8),
    "norm before activation": (PreActivation, (1, 6, 6), 3),
    "gates and attention": (Gated, (3, 2, 2), 3),
}


@pytest.mark.parametrize("name", NETS)
def test_a_network_is_refreshed_and_answers_as_pytorch_does(name: str) -> None:
    build, shape, trips = NETS[name]
    torch.manual_seed(1)
    net = lively(build())
    x = np.random.default_rng(0).uniform(-1, 1, (24, math.prod(shape)))
    made = refresh_tail(net, shape, x, Refresh())
    assert len(made.programs) == trips
    want = _wanted(net, shape, x[0])
    largest = float(np.abs(want).max())
    np.testing.assert_allclose(_chain(made, x[0]), want, rtol=0, atol=1e-5 * largest)
    # With CKKS's own noise as well.
    np.testing.assert_allclose(
        _chain(made, x[1], noise=0), _wanted(net, shape, x[1]), rtol=0, atol=0.02 * largest
    )
    costs = made.costs()
    assert costs.round_trips == trips
    if trips == 3:
        assert costs == refresh_costs(net, shape, x, Refresh())
    assert costs.uplink_bytes == sum(p.spec.uplink_bytes for p in made.programs)
    assert costs.predicted_s == pytest.approx(made.predicted_s)


def test_a_residual_costs_no_ciphertext_and_a_projection_no_round_trip() -> None:
    identity = split_tail(lively(resnet20((2, 4, 4), 1)), (3, 4, 4))
    projected = split_tail(lively(resnet20((2, 4, 4), 1, "projection")), (3, 4, 4))

    def outputs(steps: list[Any]) -> list[int]:
        return [len(step.layers[-1].bias) for step in steps]

    assert len(identity) == len(projected) == 8
    # The first block adds what went into it, which the edge has; then as wide as a block's output.
    assert identity[2].taken == ("y2", "x1")
    assert outputs(identity)[3:5] == [16, 16]
    # A projection comes out beside the block's first convolution.
    assert outputs(projected)[3:5] == [32, 16]
    assert projected[4].taken == ("y4", "y3")


@st.composite
def _layers(draw: st.DrawFn) -> tuple[nn.Module, int]:
    """A chain with residual sums, and how many segments it must come to."""
    kinds = draw(st.lists(st.sampled_from(["linear", "relu", "square", "residual", "drop"]), max_size=5))
    torch.manual_seed(draw(st.integers(0, 9)))
    layers: list[nn.Module] = [nn.Linear(6, 6)]
    segments, known = 1, False  # whether the edge knows the value here
    for kind in kinds:
        if kind == "linear":
            layers.append(nn.Linear(6, 6))
            segments, known = segments + known, False
        elif kind == "residual":
            layers.append(_Residual())
            # Its inner layer, after an activation of its own, and a sum that the edge does.
            segments, known = segments + 1, True
        elif kind == "relu":
            layers.append(nn.ReLU())
            known = True
        else:
            layers.append(Square() if kind == "square" else nn.Dropout())
    segments += known
    return nn.Sequential(*layers, nn.Linear(6, 3)).eval(), segments


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.inner(torch.tanh(x)))


@settings(max_examples=25, deadline=None)
@given(_layers())
def test_any_chain_is_cut_where_it_must_be_and_computes_the_same(made: tuple[nn.Module, int]) -> None:
    net, segments = made
    steps = split_tail(net, (6,))
    assert len(steps) == segments
    x = np.random.default_rng(0).uniform(-1, 1, (4, 6))
    with torch.no_grad():
        want = net(torch.from_numpy(x).float()).double().numpy()
    np.testing.assert_allclose(_values(steps, x)["logits"], want, atol=1e-4 * max(1, np.abs(want).max()))


def test_what_only_adds_zeros_or_copies_is_not_encrypted() -> None:
    net = nn.Sequential(
        *(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.ZeroPad2d(2), nn.Conv2d(2, 2, 5), nn.Tanh()),
        *(nn.MaxPool2d(2), nn.Upsample(scale_factor=2), nn.Conv2d(2, 1, 3), nn.Flatten()),
    ).eval()
    x = np.random.default_rng(0).uniform(-1, 1, (8, 36))
    made = refresh_tail(net, (1, 6, 6), x, Refresh())
    assert [p.spec.features for p in made.programs] == [36, 72, 18]
    np.testing.assert_allclose(_chain(made, x[0]), _wanted(net, (1, 6, 6), x[0]), atol=1e-5)


def test_polynomial_tails_stay_whole_and_the_owner_may_cut_them() -> None:
    net = nn.Sequential(nn.Linear(16, 8), Square(), nn.Linear(8, 8), Quadratic(8), nn.Linear(8, 3)).eval()
    x = np.random.default_rng(0).uniform(-1, 1, (16, 16))
    whole = refresh_tail(net, (16,), x, Refresh())
    assert (len(whole.programs), whole.interludes) == (1, ())
    assert whole.programs[0].spec.segment is None
    cut = refresh_tail(net, (16,), x, Refresh(at=("2",)))
    assert [p.spec.input_level for p in cut.programs] == [3, 3]
    # Too deep for the ring: a plain square is the edge's, a quadratic's numbers stay in the cloud.
    deep = refresh_tail(net, (16,), x, Refresh(ring_degree=4096))
    assert [p.spec.input_level for p in deep.programs] == [1, 1, 1]
    for made in (whole, cut, deep):
        np.testing.assert_allclose(_chain(made, x[0]), _wanted(net, (16,), x[0]), atol=1e-5)
    with pytest.raises(ModelError, match="no encrypted layer nine"):
        refresh_tail(net, (16,), x, Refresh(at=("nine",)))


class _Layered(nn.Module):
    def __init__(self, inner: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = inner
        self.first, self.last = nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(self.first(x)))


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (nn.Sequential(nn.Linear(12, 8), nn.PReLU(), nn.Linear(8, 3)), "1 .PReLU.*holds weights of its own"),
        (nn.Sequential(nn.Linear(12, 8), nn.LayerNorm(8), nn.Linear(8, 3)), "LayerNorm.*weights"),
        (nn.Sequential(nn.ReLU(), nn.Linear(12, 3)), "before any layer with weights: cut the network after"),
        (_Layered(lambda x: F.relu(x) + torch.rand_like(x)), "random"),
        (_Layered(lambda x: F.relu(x - x.mean(0))), "batch"),
        (nn.Sequential(nn.Flatten(), nn.ReLU()), "before any layer with weights|nothing of this tail"),
    ],
)
def test_what_cannot_be_refreshed_is_told(net: nn.Module, words: str) -> None:
    x = np.random.default_rng(0).uniform(-1, 1, (8, 12))
    with pytest.raises(ModelError, match=words):
        refresh_tail(net.eval(), (12,), x, Refresh())


class _Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x) if x.sum() > -1e9 else F.relu(-x)


class _Rectified(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x)


def test_a_branch_on_values_is_refused_whichever_way_the_data_fall() -> None:
    x = np.random.default_rng(0).uniform(-1, 1, (8, 12))
    for inner, where in (
        (
            _Layered(lambda x: F.relu(x if x.sum() > -1e9 else -x)),
            "the tail's own forward at test_refresh_nets",
        ),
        (nn.Sequential(nn.Linear(12, 8), _Branching(), nn.Linear(8, 3)), "1 .*test_refresh_nets.py:"),
        (nn.Sequential(_Layered(_Branching())), "test_refresh_nets.py:"),
    ):
        with pytest.raises(ModelError, match=rf"(?s){where}.*\d") as caught:
            refresh_tail(inner.eval(), (12,), x, Refresh())
        assert "values" in str(caught.value)
    # The same without a branch.
    for plain in (
        _Layered(F.relu),
        nn.Sequential(nn.Linear(12, 8), _Rectified(), nn.Linear(8, 3)),
        nn.Sequential(_Layered(_Rectified())),
    ):
        made = refresh_tail(plain.eval(), (12,), x, Refresh())
        np.testing.assert_allclose(_chain(made, x[0]), _wanted(plain, (12,), x[0]), atol=1e-4)


def test_refreshing_is_never_a_default() -> None:
    fields = {"temperatures": (1.0,), "thresholds": (0.9,), "metrics": {}}
    with pytest.raises(ModelError, match="ReLU"):
        pack(model(), images(), **fields)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="one image at a time"):
        pack(model(), images(), lanes=2, refresh=Refresh(), **fields)  # type: ignore[arg-type]


def test_packing_judges_each_segment_and_states_all_of_the_time() -> None:
    edge, cloud = packed()
    assert judge_tails(model(), images(), refresh=Refresh())[0].verdict in (Verdict.OK, Verdict.WARN)
    seconds = sum(p.predicted_s("native") for p in cloud.segments(0))
    assert edge.metrics["predicted_eval_s"]["0"] == pytest.approx(seconds)
    made = RefreshedProgram(cloud.segments(0), ())
    assert len(made.programs) == TRIPS
    with pytest.raises(ModelError, match="refreshed tail"):
        pack_tail(model(), images(), edge)
    assert expected(images(2)).shape == (2, 4)


def test_lint_costs_refreshed_cuts() -> None:
    net = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3)).eval()
    (one,) = lint_refreshed(net, (12,), cut="input", refresh=Refresh(at=("2",)))
    assert one.costs is not None
    assert one.to_json()["costs"]["round_trips"] == 3
    assert [segment.inputs for segment in one.costs.segments] == [12, 8, 8]
    wide = lint_refreshed(
        nn.Sequential(nn.Linear(20000, 2), nn.ReLU(), nn.Linear(2, 2)), (20000,), cut="input"
    )[0]
    assert wide.costs is None
    assert "too wide" in wide.note
