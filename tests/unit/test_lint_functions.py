"""One function between two dense layers: what `lint` says of it is what the compiler's front end does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.lint_nets import Function
from blindtail.errors import ModelError
from blindtail.he.frontend import fold_tail
from blindtail.he.normal import normalised
from blindtail.models.layers import Quadratic, Square
from blindtail.models.lint import lint

pytestmark = pytest.mark.usefixtures("one_torch_thread")

W = torch.linspace(-1, 1, 64).view(8, 8)
ODD = torch.arange(8) % 2 == 1


def _assigned(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0] = 0
    return y


def _polarised(x: Tensor) -> Tensor:
    """The rewrite that lint names for a product, of x + 1 and 2 x."""
    a, b = x + 1, 2 * x
    s = torch.cat([a + b, a - b], 1).square().chunk(2, 1)
    return (s[0] - s[1]) / 4


#: Linear: depth 1.
LINEAR: dict[str, Callable[[Tensor], Tensor]] = {
    "scaled": lambda x: x / 2 - 1 + (1 - x) * 3,
    "mean": lambda x: x - x.mean(1, keepdim=True),
    "sum": lambda x: x.sum(-1, keepdim=True).expand(-1, 8),
    "cat": lambda x: torch.cat([x, 2 * x], 1)[:, ::2],
    "stack": lambda x: torch.stack([x, -x, x], 1).sum(1),
    "chunk": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "split": lambda x: torch.cat(torch.split(x, [3, 5], 1), 1),
    "permute": lambda x: x.view(-1, 2, 4).permute(0, 2, 1).reshape(x.size(0), -1),
    "transpose": lambda x: x.view(x.shape[0], 2, 4).transpose(1, 2).flatten(1),
    "unsqueeze": lambda x: x.unsqueeze(1).squeeze(1),
    "einsum": lambda x: torch.einsum("bi,ij->bj", x, W),
    "matmul": lambda x: (W @ x.unsqueeze(2)).squeeze(2) + x @ W,
    "linear": lambda x: F.linear(x, W) + x,
    "indexed": lambda x: x[:, [1, 0, 3, 2, 5, 4, 7, 6]] + x[..., :1],
    "masked": lambda x: torch.where(ODD, x, -x) + x.masked_fill(ODD, 0.5),
    "zeros": lambda x: x + torch.zeros(x.shape[0], 8) + torch.ones_like(x) + x.new_zeros(8),
    "arange": lambda x: x * torch.arange(1, x.shape[1] + 1),
    "addcmul": lambda x: torch.addcmul(x, x, torch.ones(8)),
    "len": lambda x: x.reshape(len(x), -1),
    "loop": lambda x: torch.stack([x[:, i] * i for i in range(x.shape[1])], 1),
    "in place": lambda x: x.clone().add_(1).mul_(2),
    "cast": lambda x: x.to(torch.float32).float().contiguous().detach(),
    "pad": lambda x: F.pad(x, (1, 1))[:, 1:-1],
    "upsample": lambda x: F.interpolate(x[:, None], scale_factor=2)[:, 0, ::2],
    "roll": lambda x: torch.roll(x, 1, 1) + x.flip(1) + x.cumsum(1),
    "conv": lambda x: F.conv1d(x[:, None], torch.ones(1, 1, 3), padding=1)[:, 0],
    "batch norm": lambda x: F.batch_norm(x, torch.zeros(8), torch.ones(8)),
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
}
#: One square: depth 3.
SQUARES: dict[str, Callable[[Tensor], Tensor]] = {
    "x * x": lambda x: x * x,
    "mul": lambda x: torch.mul(x, x),
    "** 2": lambda x: x**2,
    "** 2.0": lambda x: x**2.0,
    "pow": lambda x: x.pow(2),
    "torch.pow": lambda x: torch.pow(x, 2),
    "square": torch.square,
    "square_": lambda x: x.clone().square_(),
    "polarised": _polarised,
    "Square": Square(),
    "Quadratic": Quadratic(8, a=0.5, b=0.25, c=1.0),
}
#: Refused -> the verdict, and words of its finding.
REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str, str]] = {
    "relu": (F.relu, "rewrite", "self.square = Square()"),
    "relu in place": (lambda x: F.relu(x, inplace=True), "rewrite", "Square()"),
    "relu_": (lambda x: x.relu_(), "rewrite", "Square()"),
    "gelu": (F.gelu, "rewrite", "Quadratic()"),
    "silu": (F.silu, "rewrite", "Quadratic()"),
    "hardswish": (F.hardswish, "rewrite", "Quadratic()"),
    "tanh": (torch.tanh, "rewrite", "Quadratic()"),
    "sigmoid": (lambda x: x.sigmoid(), "rewrite", "Quadratic()"),
    "leaky": (lambda x: F.leaky_relu(x, 0.1), "rewrite", "Square()"),
    "abs": (torch.abs, "rewrite", "Square()"),
    "clamp": (lambda x: x.clamp(0, 6), "rewrite", "Square()"),
    "maximum": (lambda x: torch.maximum(x, torch.zeros(8)), "rewrite", "Square()"),
    "exp": (torch.exp, "rewrite", "Square()"),
    "swish by hand": (lambda x: x * torch.sigmoid(x), "rewrite", "Quadratic"),
    "product": (lambda x: x * (x + 1), "rewrite", "torch.cat"),
    "quotient": (lambda x: x / (x + 10), "edge", "divides by an activation"),
    "reciprocal": (lambda x: 1 / x, "edge", "divides by an activation"),
    "softmax": (lambda x: F.softmax(x, 1), "edge", "exponentials"),
    "layer norm": (lambda x: F.layer_norm(x, (8,)), "rewrite", "BatchNorm1d(8)"),
    "normalize": (F.normalize, "rewrite", "BatchNorm1d(8)"),
    "batch norm": (lambda x: F.batch_norm(x, None, None, training=True), "rewrite", "BatchNorm1d(8)"),
    "glu": (lambda x: F.glu(torch.cat([x, x], 1)), "rewrite", "halve"),
    "max": (lambda x: x - x.max(dim=1, keepdim=True)[0], "rewrite", "x.mean(1, keepdim=True)"),
    "amax": (lambda x: x - x.amax(1, keepdim=True), "rewrite", "x.mean(1, keepdim=True)"),
    "argmax": (lambda x: x + x.argmax(1, keepdim=True), "edge", "compares"),
    "sort": (lambda x: x.sort(1)[0], "edge", "compares"),
    "mask of itself": (lambda x: x * (x > 0), "edge", "compares"),
    "where": (lambda x: torch.where(x > 0, x, -x), "edge", "compar"),
    "std": (lambda x: x - x.std(1, keepdim=True), "edge", "root"),
    "mean of the batch": (lambda x: x - x.mean(0), "rewrite", "images of a batch"),
    "mean of all": (lambda x: x - x.mean(), "rewrite", "name the dimensions"),
    "along the batch": (lambda x: x.cumsum(0), "rewrite", "images of a batch"),
    "transposed": (lambda x: x.t().t(), "rewrite", "dimension 0"),
    "one image": (lambda x: x[0] + torch.zeros(x.shape[0], 8), "rewrite", "whole activations"),
    "assigned": (_assigned, "rewrite", "writes into"),
    "dropout": (lambda x: F.dropout(x), "rewrite", "nn.Dropout(0.5)"),
    "noise": (lambda x: x + torch.randn_like(x), "rewrite", "random"),
    "own noise": (lambda x: x + torch.randn(8), "rewrite", "random"),
    "a number": (lambda x: x * x.abs().max().item(), "rewrite", "Square()"),
    "unknown": (lambda x: torch.fft.fft(x).abs(), "unknown", "not known to this release"),
}


#: What joins values from both sides of an activation, or has a degree above two, and its depth.
JOINED: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "power 3": (lambda x: x**3, 4),
    "power 4": (lambda x: torch.pow(x, 4), 4),
    "skip": (lambda x: x * x + x, 3),
    "long skip": (lambda x: F.linear(x * x, W) + x, 3),
    "beside": (lambda x: torch.cat([x[:, :2] ** 2, x[:, 2:] ** 2], 1), 3),
    "one after the other": (lambda x: (x * x + x) ** 2 - x, 5),
}


def _net(function: object) -> nn.Module:
    torch.manual_seed(0)
    return Function(function).eval()


@pytest.mark.parametrize("name", [*LINEAR, *SQUARES])
def test_what_runs_folds(name: str) -> None:
    net = _net({**LINEAR, **SQUARES}[name])
    depth = 1 if name in LINEAR else 3
    report = lint(net, (4,), plans=False)
    assert report.problems == ()
    assert report.whole is not None
    assert (report.whole.verdict, report.whole.depth) == ("runs", depth)
    assert len(fold_tail(net, (4,))) == depth


@pytest.mark.parametrize("name", JOINED)
def test_what_joins_folds(name: str) -> None:
    function, depth = JOINED[name]
    net = _net(function)
    report = lint(net, (4,), plans=False)
    assert report.problems == ()
    assert report.whole is not None
    assert (report.whole.verdict, report.whole.depth) == ("runs", depth)
    assert normalised(fold_tail(net, (4,))).depth == depth


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_by_both_with_a_way_out(name: str) -> None:
    function, verdict, words = REFUSED[name]
    net = _net(function)
    report = lint(net, (4,), plans=False)
    assert report.whole is not None
    assert report.whole.verdict != "runs"
    assert verdict in {f.verdict for f in report.problems}
    assert any(words in f"{f.reason} {f.rewrite} {f.advice}" for f in report.problems)
    with pytest.raises(ModelError, match=r"test_lint_functions\.py|forward|tail") as error:
        fold_tail(net, (4,))
    assert "Traceback" not in str(error.value)


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...], str]] = {
    "conv transpose": (nn.ConvTranspose2d(2, 2, 2, 2), (2, 4, 4), ""),
    "conv 3d": (nn.Conv3d(1, 2, 2), (1, 3, 3, 3), ""),
    "upsample": (nn.Upsample(scale_factor=2, mode="bilinear"), (1, 3, 3), ""),
    "pixel shuffle": (nn.PixelShuffle(2), (4, 2, 2), ""),
    "pad": (nn.ReflectionPad2d(1), (1, 4, 4), ""),
    "instance norm": (nn.InstanceNorm2d(2), (2, 4, 4), "track_running_stats=True"),
    "instance norm, statistics": (nn.InstanceNorm2d(2, track_running_stats=True), (2, 4, 4), ""),
    "group norm": (nn.GroupNorm(1, 2), (2, 4, 4), "nn.BatchNorm2d(2)"),
    "batch norm": (nn.BatchNorm2d(2, track_running_stats=False), (2, 4, 4), "nn.BatchNorm2d(2)"),
    "rms norm": (nn.RMSNorm(4), (4,), "nn.BatchNorm1d(4)"),
    "local response": (nn.LocalResponseNorm(2), (2, 4, 4), "nn.BatchNorm2d(2)"),
    "adaptive max": (nn.AdaptiveMaxPool2d((2, 2)), (2, 4, 4), "nn.AdaptiveAvgPool2d(2)"),
    "max pool": (
        nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        (2, 8, 8),
        "nn.AvgPool2d(3, 2, padding=1, ceil_mode=True)",
    ),
    "max pool 1d": (nn.MaxPool1d(2), (2, 8), "nn.AvgPool1d(2, 2)"),
    "prelu": (nn.PReLU(), (4,), "Square()"),
    "softplus": (nn.Softplus(), (4,), "Quadratic()"),
    "parametrized": (nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), (4,), ""),
    "gru cell": (nn.GRUCell(4, 4), (4,), "cut the network after"),
    "transformer": (nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), (3, 4), "cut the network after"),
    "steep quadratic": (Quadratic(a=0.01, b=1.0), (4,), "project_()"),
    "alpha dropout": (nn.AlphaDropout(0.5), (4,), ""),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str) -> None:
    layer, shape, rewrite = LAYERS[name]
    torch.manual_seed(0)
    with torch.no_grad():
        width = layer.eval()(torch.zeros(2, *shape)).flatten(1).shape[1]
    net = nn.Sequential(layer, nn.Flatten(), nn.Linear(width, 3)).eval()
    report = lint(net, shape, plans=False)
    assert report.whole is not None
    if not rewrite:
        assert (report.whole.verdict, report.problems) == ("runs", ())
        assert len(fold_tail(net, shape)) == report.whole.depth
        return
    (finding,) = report.problems
    assert (finding.layer, finding.kind) == ("0", type(layer).__name__)
    assert rewrite in finding.rewrite
    assert report.whole.verdict != "runs"
