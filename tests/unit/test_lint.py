"""`lint`: right verdicts, the layer's name and a rewrite that works; depth as compiled; no unsafe plan."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from bench import lint_nets as nets
from bench.lint import PASTED, TWELVE, UNPLANNED, agreement, right, runs_when_pasted
from bench.lint_nets import mlp
from blindtail.errors import ModelError
from blindtail.he.compiler import compile_tail
from blindtail.he.frontend import fold_tail
from blindtail.models.layers import Quadratic, Square
from blindtail.models.lint import LintReport, lint, split
from blindtail.models.pack import pack
from blindtail.models.split import SplitModel
from blindtail.preprocessing import Preprocessing

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def _agrees(net: nn.Module, shape: tuple[int, ...], report: LintReport) -> None:
    """What lint says of the whole network and of each cut is what the compiler does."""
    found = agreement(net, shape, report)
    assert (found.faults, found.unsafe) == ((), 0)


@pytest.mark.parametrize("name", TWELVE)
def test_twelve_networks_twelve_verdicts(name: str) -> None:
    case = TWELVE[name]
    net = case.made()
    report = lint(net, case.shape, plans=name not in UNPLANNED)
    assert right(case, report) == []
    _agrees(net, case.shape, report)


def test_a_wrong_verdict_is_noticed() -> None:
    """The control: another network's case, each field of its own, and a depth that is not so."""
    case = TWELVE["layer norm"]
    net = case.made()
    report = lint(net, case.shape)
    assert right(case, report) == []
    for change in ({"whole": "runs"}, {"depth": 5}, {"findings": {}}, {"first": "0"}, {"words": ("ReLU",)}):
        assert right(replace(case, **change), report)
    assert report.whole is not None
    deeper = replace(report.whole, depth=7)
    wrong = replace(report, cuts=tuple(deeper if c is report.whole else c for c in report.cuts))
    assert agreement(net, case.shape, wrong).faults
    assert report.whole.plan is not None
    large = replace(report.whole, plan=replace(report.whole.plan, log2_key_modulus=900.0))
    assert agreement(net, case.shape, replace(report, cuts=(large,))).unsafe == 1


@pytest.mark.parametrize("name", PASTED)
def test_rewrites_that_are_pasted_run(name: str) -> None:
    assert runs_when_pasted(TWELVE[name])
    assert lint(TWELVE[name].made(), TWELVE[name].shape, cut="input").cuts[0].plan is not None


@pytest.mark.parametrize(
    ("net", "shape", "verdicts", "first"),
    [
        (nets.Inception(), (2, 4, 4), {}, "input"),
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
            {"0.block.2": "rewrite", "0.block.5": "rewrite"},
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
    layers = {f.layer: f for f in report.findings}
    assert layers["layer2.0.relu"].calls == 2  # one module, used twice
    assert layers["layer2.0.relu"].rewrite == "self.layer2[0].relu = Square()  # was ReLU"
    assert layers["layer2.0.add"].verdict == "runs"
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
    assert report.input_shapes == ((4,), (3,))
    assert [(c.name, c.verdict) for c in report.cuts] == [
        ("input", "runs"),
        ("add", "runs"),
        ("mul", "runs"),
    ]
    assert report.whole is not None
    assert (report.whole.values, report.whole.depth) == (7, 3)
    assert report.whole.plan is not None
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
        nn.Conv2d(1, 3, 3, padding=1), Square(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(1200, 2)
    )
    report = lint(net, (1, 80, 80), plans=False)
    assert report.whole is not None
    assert report.whole.verdict == "edge"
    assert report.whole.problems[0].startswith("too wide: 19200 values into 1 (Square), a tail holds 16384")
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
