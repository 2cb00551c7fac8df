"""`lint`: right verdicts, the layer's name and a rewrite that works; depth as compiled; no unsafe plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from blindtail.errors import ModelError
from blindtail.he.compiler import compile_tail
from blindtail.he.frontend import fold_tail
from blindtail.he.params import MAX_LOG2_Q_128
from blindtail.models.layers import Quadratic, Square
from blindtail.models.lint import LintReport, lint, split
from blindtail.models.pack import pack
from blindtail.models.split import SplitModel
from blindtail.preprocessing import Preprocessing
from tests import lint_nets as nets
from tests.lint_nets import mlp

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def _agrees(net: nn.Module, shape: tuple[int, ...], report: LintReport) -> None:
    """What lint says of the whole network and of each cut is what the compiler does."""
    if report.whole is None:
        return
    try:
        layers = fold_tail(net, shape)
        assert report.whole.verdict == ("runs" if len(layers) < 27 else "edge"), report.whole.problems
        assert report.whole.depth == len(layers)
    except ModelError:
        assert report.whole.verdict != "runs"
    for cut in report.cuts:
        assert cut.depth % 2 == 1
        assert (cut.verdict == "edge") == bool(cut.problems)
        if cut.plan is not None:
            assert cut.plan.depth == cut.depth <= cut.plan.ring_levels
            assert cut.plan.log2_key_modulus <= cut.plan.security_bound_log2
            assert cut.plan.security_bound_log2 == MAX_LOG2_Q_128[cut.plan.ring_degree]
        if cut.verdict == "runs":
            _, tail = split(net, shape, after=cut.name)
            assert len(fold_tail(tail, cut.shape)) == cut.depth, cut.name


@dataclass(frozen=True)
class Case:
    """A network and what must be said of it."""

    net: Callable[[], nn.Module]
    shape: tuple[int, ...]
    whole: str
    depth: int  # of the whole, rewrites made
    findings: dict[str, str] = field(default_factory=dict)  # layer -> verdict; no others
    words: tuple[str, ...] = ()  # in the reasons and rewrites
    first: str = ""  # the first cut that runs as it is, "" for none


#: Twelve networks made by hand, twelve verdicts.
TWELVE: dict[str, Case] = {
    "squares": Case(lambda: mlp(16, 8, 8, 4), (16,), "runs", 5, first="input"),
    "relu and max pooling": Case(
        lambda: nn.Sequential(
            *(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 3)),
        ),
        (1, 8, 8),
        "rewrite",
        3,
        {"2": "rewrite", "3": "rewrite"},
        ("self[2] = Square()  # was ReLU", "self[3] = nn.AvgPool2d(2, 2)  # was MaxPool2d"),
        "3",
    ),
    "functions in the forward": Case(
        nets.LeNet,
        (1, 28, 28),
        "rewrite",
        9,
        {"relu": "rewrite", "max_pool2d": "rewrite"},
        ("Square()", "nn.AvgPool2d(2, 2)", "lint_nets.py:"),
        "relu@4",
    ),
    "softmax at the end": Case(
        lambda: nn.Sequential(nn.Linear(8, 4), nn.Softmax(dim=-1)),
        (8,),
        "rewrite",
        1,
        {"1": "rewrite"},
        ("self[1] = nn.Identity()", "plain logits"),
    ),
    "layer norm": Case(
        lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), Square(), nn.Linear(8, 2)),
        (8,),
        "rewrite",
        3,
        {"1": "rewrite"},
        ("self[1] = nn.BatchNorm1d(8)  # was LayerNorm", "statistics"),
        "1",
    ),
    "a skip around activations": Case(
        lambda: nn.Sequential(nets.BasicBlock(2, 2, act=Square()), nn.Flatten(), nn.Linear(32, 3)),
        (2, 4, 4),
        "rewrite",
        5,
        {"0.add": "rewrite"},
        ("skip connection", "this release", "without the shortcut"),
        "0.add",
    ),
    "attention": Case(
        nets.Vit,
        (3, 32, 32),
        "edge",
        5,
        {
            **{
                f"blocks.{i}.{name}": "rewrite" for i in (0, 1) for name in ("norm1", "norm2", "mlp.1", "add")
            },
            "blocks.0.attn": "edge",
            "blocks.1.attn": "edge",
            "norm": "rewrite",
        },
        ("multiplies activations with each other", "self.blocks[0].mlp[1] = Quadratic()  # was GELU"),
        "norm",
    ),
    "recurrent": Case(
        nets.Lstm, (7,), "edge", 1, {"embed": "edge", "lstm": "edge"}, ("cut the network after",), "lstm"
    ),
    "a product of activations": Case(
        nets.Gate, (4,), "edge", 1, {"mul": "rewrite"}, ("two different activations", "torch.cat"), "mul"
    ),
    "a branch on values": Case(
        nets.Branching,
        (4,),
        "edge",
        3,
        {"forward": "edge"},
        ("lint_nets.py:", "branches on the values"),
        "mul",
    ),
    "too deep": Case(
        lambda: mlp(*[4] * 15, 2), (4,), "edge", 29, {"3": "edge"}, ("29 levels", "cut after 3"), "3"
    ),
    "weights with NaN": Case(
        lambda: _poisoned(mlp(8, 8, 2), "0.weight"),
        (8,),
        "edge",
        3,
        {"0": "rewrite"},
        ("0.weight holds NaN", "checkpoint"),
        "0",
    ),
}


def _poisoned(net: nn.Module, path: str) -> nn.Module:
    with torch.no_grad():
        net.get_parameter(path).view(-1)[0] = float("nan")
    return net


@pytest.mark.parametrize("name", TWELVE)
def test_twelve_networks_twelve_verdicts(name: str) -> None:
    case = TWELVE[name]
    torch.manual_seed(0)
    net = case.net()
    report = lint(net, case.shape, plans=name not in ("functions in the forward", "too deep"))
    assert report.whole is not None
    assert (report.whole.verdict, report.whole.depth) == (case.whole, case.depth)
    told = report.problems
    assert {f.layer: f.verdict for f in told} == case.findings
    text = "\n".join(f"{f.line} {f.reason} | {f.rewrite} | {f.advice}" for f in told)
    for word in case.words:
        assert word in text
    assert all(f.reason and f.rewrite for f in told)
    assert next((c.name for c in report.cuts if c.verdict == "runs"), "") == case.first
    _agrees(net, case.shape, report)


@pytest.mark.parametrize("name", ["relu and max pooling", "softmax at the end", "layer norm"])
def test_rewrites_that_are_pasted_run(name: str) -> None:
    case = TWELVE[name]
    net = case.net()
    before = lint(net, case.shape, plans=False)
    assert before.whole is not None
    assert before.whole.verdict == "rewrite"
    for finding in before.problems:
        exec(finding.rewrite, {"self": net, "nn": nn, "Square": Square, "Quadratic": Quadratic})  # noqa: S102
    after = lint(net, case.shape)
    assert after.problems == ()
    assert after.whole is not None
    assert (after.whole.verdict, after.whole.depth) == ("runs", before.whole.depth)
    assert lint(case.net(), case.shape, cut="input").cuts[0].plan is not None
    _agrees(net, case.shape, after)


@pytest.mark.parametrize(
    ("net", "shape", "verdicts", "first"),
    [
        (nets.Inception(), (2, 4, 4), {"act_b": "rewrite"}, "cat"),
        (nets.Shapes(), (1, 8, 8), {}, "input"),
        (nn.Sequential(nets.Branching(), nn.Linear(2, 2)), (4,), {"0": "edge"}, "0"),
        (
            nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (-1, 8)), nn.Linear(8, 2)),
            (8,),
            {"0": "rewrite"},
            "1",
        ),
        (nn.LSTM(4, 3, batch_first=True), (5, 4), {"0": "edge", "output": "rewrite"}, ""),
        (
            nn.Sequential(nets.InvertedResidual(4, 4, 1), nn.Flatten(), nn.Linear(64, 2)),
            (4, 4, 4),
            {"0.block.2": "rewrite", "0.block.5": "rewrite", "0.add": "rewrite"},
            "0",
        ),
        (
            nn.Sequential(nets.OwnAttention(8), nn.Flatten(), nn.Linear(32, 2)),
            (4, 8),
            {"0.permute": "rewrite", "0.matmul": "edge", "0.softmax": "edge"},
            "0.matmul@2",
        ),
    ],
    ids=["inception", "shapes", "wrapped branch", "flatten", "tuple", "mobile", "own attention"],
)
def test_networks_as_people_write_them(
    net: nn.Module, shape: tuple[int, ...], verdicts: dict[str, str], first: str
) -> None:
    report = lint(net.eval(), shape, plans=False)
    assert {f.layer: f.verdict for f in report.problems} == verdicts
    assert next((c.name for c in report.cuts if c.verdict == "runs"), "") == first
    _agrees(net, shape, report)


def test_a_resnet_is_told_where_to_cut_and_what_it_costs_after_rewrites() -> None:
    torch.manual_seed(0)
    net = nets.ResNet(width=4).eval()
    report = lint(net, (3, 16, 16), cut="layer1")
    (cut,) = report.cuts
    assert (cut.verdict, cut.depth, cut.shape) == ("rewrite", 9, (4, 8, 8))
    assert cut.plan is not None
    assert not cut.plan.own_weights
    assert [name for name in cut.rewrites if "x + y" in name]
    layers = {f.layer: f for f in report.findings}
    assert layers["layer2.0.relu"].calls == 2  # one module, used twice
    assert layers["layer2.0.relu"].rewrite == "self.layer2[0].relu = Square()  # was ReLU"
    assert layers["layer2.0.add"].verdict == "rewrite"
    assert layers["maxpool"].rewrite == "self.maxpool = nn.AvgPool2d(3, 2, padding=1)  # was MaxPool2d"
    assert layers["fc"].verdict == "runs"


def test_levels_of_layers_add_up_to_the_depth() -> None:
    net = nn.Sequential(
        *(Square(), nn.Linear(8, 8), nn.BatchNorm1d(8), Quadratic(), Square(), nn.Linear(8, 8), Square()),
    )
    report = lint(net, (8,))
    assert report.whole is not None
    assert report.whole.plan is not None
    assert sum(f.levels for f in report.findings) == report.whole.depth == report.whole.plan.depth == 9


def test_two_inputs_can_be_cut_where_they_have_met() -> None:
    report = lint(nets.TwoInputs(), [(4,), (3,)])
    assert report.whole is None
    assert [(c.name, c.verdict) for c in report.cuts] == [("add", "runs"), ("mul", "runs")]
    with pytest.raises(ModelError, match="missing 1 required positional argument"):
        lint(nets.TwoInputs(), (4,))


def test_a_network_that_cannot_be_traced_is_one_finding() -> None:
    report = lint(nets.InList(), (4,))
    (finding,) = report.findings
    assert (finding.layer, finding.verdict, report.cuts) == ("forward", "rewrite", ())
    assert "nn.ModuleList" in finding.rewrite
    assert "lint_nets.py:" in finding.reason

    class Numpy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.fc = nn.ReLU(), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(torch.from_numpy(self.act(x).numpy()))

    first, *layers = lint(Numpy(), (4,)).findings
    assert (first.layer, first.verdict) == ("forward", "unknown")
    assert "test_lint.py:" in first.reason
    assert {f.layer: f.verdict for f in layers} == {"act": "rewrite", "fc": "runs"}


def test_a_tail_cut_off_computes_what_the_network_computes() -> None:
    torch.manual_seed(0)
    for net, shape, after in (
        (nets.LeNet(), (1, 28, 28), "max_pool2d@2"),
        (nets.Shapes(), (1, 8, 8), "square"),
        (nets.ResNet(4), (3, 16, 16), "layer2.0"),
        (nets.Vit(), (3, 32, 32), "blocks.0"),
    ):
        net.eval()
        head, tail = split(net, shape, after=after)
        x = torch.randn(5, *shape)
        with torch.no_grad():
            torch.testing.assert_close(tail(head(x)), net(x))
    with pytest.raises(ModelError, match=r"no cut after 'layer9'.*there are: input, conv1"):
        split(nets.ResNet(4), (3, 16, 16), after="layer9")


def test_the_two_halves_of_a_cut_make_a_model() -> None:
    torch.manual_seed(0)
    net = nets.LeNet(out=3).eval()
    assert lint(net, (1, 28, 28), plans=False).cut("relu@3").verdict == "rewrite"
    head, tail = split(net, (1, 28, 28), after="relu@4")
    model = SplitModel.from_parts(
        name="cut",
        stages=[head],
        exits={0: nn.Linear(84, 3)},
        tails={0: tail},
        preprocessing=Preprocessing(input_shape=(1, 28, 28), mean=(0.0,), std=(1.0,)),
        class_names=("a", "b", "c"),
    )
    images = np.random.default_rng(0).integers(0, 255, (12, 1, 28, 28), dtype=np.uint8)
    _, cloud = pack(model, images, temperatures=[1.0], thresholds=[0.5], metrics={})
    assert cloud.programs[0].depth == lint(net, (1, 28, 28), cut="relu@4").cuts[0].depth == 1
    model.tails["0"] = nn.Sequential(nn.Linear(84, 8), nn.ReLU(), nn.Linear(8, 3))
    words = r"tail at cut 0: tail layer 1 \(ReLU\): .*Square or Quadratic.*blindtail lint"
    with pytest.raises(ModelError, match=words):
        pack(model, images, temperatures=[1.0], thresholds=[0.5], metrics={})


def test_what_is_computed_for_nothing_is_told() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.a(x)
            torch.relu(h)
            return self.b(h * h)

    report = lint(Unused(), (4,))
    assert [(f.kind, f.reason, f.rewrite) for f in report.problems] == [
        ("torch.relu", "its result is not used", "leave the call out")
    ]
    assert report.whole is not None
    assert (report.whole.verdict, len(report.whole.rewrites)) == ("rewrite", 1)
    _agrees(Unused(), (4,), report)


def test_calibration_data_bounds_values_and_is_checked() -> None:
    torch.manual_seed(0)
    net = mlp(8, 8, 8, 2).eval()
    data = np.random.default_rng(0).normal(size=(20, 8))
    report = lint(net, (8,), data)
    assert report.calibration == "20 calibration inputs"
    assert report.whole is not None
    assert report.whole.plan is not None
    assert report.whole.plan.own_weights
    layers = fold_tail(net, (8,))
    assert compile_tail(layers, data).depth == report.whole.depth
    for wrong, words in ((data[:, :5], r"shape \(20, 5\)"), (data[:0], r"n of 1"), (data * np.nan, "NaN")):
        with pytest.raises(ModelError, match=words):
            lint(net, (8,), wrong)
    with torch.no_grad():
        net.get_parameter("0.weight").mul_(1e6)
    loud = lint(net, (8,), data)
    assert loud.whole is not None
    assert (loud.whole.verdict, loud.whole.depth) == ("rewrite", 5)
    assert "too large" in loud.whole.note
    told = {f.layer: f for f in loud.problems}
    assert "range penalty" in told["4"].rewrite
    assert lint(net, (8,)).whole.verdict == "runs"  # type: ignore[union-attr]


def test_what_does_not_run_at_all_is_an_error_with_the_layer() -> None:
    with pytest.raises(ModelError, match=r"layer 0: mat1 and mat2"):
        lint(mlp(8, 4), (9,))
    with pytest.raises(ModelError, match="one image's"):
        lint(mlp(8, 4), (0,))
    with pytest.raises(ModelError, match="there is no cut after 'x'"):
        lint(mlp(8, 8, 4), (8,), cut="x")


def test_a_fixed_batch_is_a_finding() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x.view(1, 8))

    first, layer = lint(One(), (2, 4)).findings
    assert (first.layer, first.verdict, layer.layer, layer.verdict) == ("forward", "rewrite", "fc", "runs")
    assert "one image only" in first.reason
    assert "x.flatten(1)" in first.rewrite


def test_too_wide_names_the_way_out() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), Square(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(588, 2)
    )
    report = lint(net, (1, 56, 56), plans=False)
    assert report.whole is not None
    assert report.whole.verdict == "edge"
    assert report.whole.problems[0].startswith("too wide: 9408 values into 1 (Square), a tail holds 8192")
    assert [(f.layer, f.verdict, f.rewrite) for f in report.problems] == [("1", "edge", "cut after 2")]
    assert next(c.name for c in report.cuts if c.verdict == "runs") == "2"


@st.composite
def chains(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    """Random chains of layers that run, and sometimes one that does not."""
    torch.manual_seed(draw(st.integers(0, 999)))
    channels, size = 2, 4
    steps: list[nn.Module] = []
    for _ in range(draw(st.integers(0, 5))):
        kind = draw(
            st.sampled_from(["conv", "norm", "square", "quadratic", "drop", "nested", "pool", "relu"])
        )
        if kind == "pool" and size == 1:
            continue
        made = {
            "conv": lambda: nn.Conv2d(channels, channels, 3, padding=1),
            "norm": lambda: nn.BatchNorm2d(channels),
            "square": Square,
            "quadratic": lambda: Quadratic(channels),
            "drop": lambda: nn.Dropout(0.3),
            "nested": lambda: nn.Sequential(nn.Identity(), nn.Sequential(Square())),
            "pool": lambda: nn.AvgPool2d(2),
            "relu": nn.ReLU,
        }[kind]()
        size //= 2 if kind == "pool" else 1
        steps.append(made)
    return nn.Sequential(*steps, nn.Flatten(), nn.Linear(channels * size * size, 3)), (2, 4, 4)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(chains())
def test_random_chains_agree_with_the_compiler(case: tuple[nn.Module, tuple[int, ...]]) -> None:
    net, shape = case
    report = lint(net, shape, plans=False)
    _agrees(net, shape, report)
    relus = sum(isinstance(m, nn.ReLU) for m in net.modules())
    assert sum(f.calls for f in report.problems) == relus
    assert report.whole is not None
    assert report.whole.verdict == ("rewrite" if relus else "runs")


def test_the_network_is_left_as_it_was() -> None:
    net = nets.ResNet(4).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    lint(net, (3, 16, 16), plans=False)
    assert net.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.zeros.__name__ == "zeros"  # what was replaced while tracing is back
