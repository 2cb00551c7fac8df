"""`blindtail plan` on a network that no file holds yet: its tails, their fronts, and wrong requests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from blindtail import cli
from blindtail.bundle import CloudBundle
from blindtail.he.compiler import compile_tail
from blindtail.he.frontend import fold_tail
from blindtail.he.objective import METRICS
from blindtail.he.plan import costs_of
from blindtail.models import named, plan_network

pytestmark = pytest.mark.usefixtures("one_torch_thread")

NETS = """
import torch
from torch import nn
from blindtail.models.layers import Square
from blindtail.models.split import SplitModel
from blindtail.preprocessing import Preprocessing

class Ward(nn.Module):
    def __init__(self, act=nn.ReLU):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), act(), nn.MaxPool2d(2))
        self.fc = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), act(), nn.Linear(12, 3))
    def forward(self, x):
        return self.fc(self.features(x))

class Sorted(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
    def forward(self, x):
        return self.b(self.a(x).sort()[0]).sort()[0]

def squares():
    return nn.Sequential(nn.Linear(20, 16), Square(), nn.Linear(16, 3))

def wide():  # N = 4096 has 2048 slots, each for two values
    return nn.Sequential(nn.Linear(9000, 10))

def parts():
    tails = {0: nn.Linear(16, 2), 1: nn.Sequential(nn.Linear(16, 8), Square(), nn.Linear(8, 2))}
    return SplitModel.from_parts(
        name="toy", stages=[nn.Flatten(), nn.Identity()], exits={0: nn.Linear(16, 2)}, tails=tails,
        preprocessing=Preprocessing(input_shape=(1, 4, 4), mean=(0.0,), std=(1.0,)), class_names=("a", "b"))

from tests.meeting_cases import model as meeting
"""

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    (tmp_path / "nets_to_plan.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*argv: object) -> tuple[int, str, str]:
        code = 0
        try:
            cli.main(["plan", *map(str, argv)])
        except SystemExit as left:
            code = int(left.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_a_network_has_the_front_of_its_tail(run: Run) -> None:
    code, out, _ = run("nets_to_plan.py:squares", "--input", "20", "--cut", "input", "--json")
    report = json.loads(out)
    found = report["cuts"]["input"]
    assert (code, report["model"], report["rewrites"], found["present"]) == (0, "Sequential", [], None)
    # What `compile_tail` makes of the same layers, weights and all, lies among the plans.
    net = named.module("nets_to_plan.py:squares")
    x = np.random.default_rng(0).normal(size=(20, 20))
    costs = costs_of(compile_tail(fold_tail(net, (20,)), x))
    assert any(row["key_bytes"] == costs.key_bytes for row in found["front"])
    assert found["chosen"]["uplink_bytes"] == costs.uplink_bytes
    for name in METRICS:
        assert min(row[name] for row in found["front"]) <= found["chosen"][name]


def test_a_network_to_rewrite_is_planned_as_it_will_be(run: Run) -> None:
    code, out, _ = run("nets_to_plan.py:Ward", "--input", "1,8,8", "--cut", "features", "--json")
    report = json.loads(out)
    assert (code, list(report["cuts"]), report["rewrites"]) == (0, ["features"], ["fc.2 (ReLU)"])
    assert report["cuts"]["features"]["chosen"]["ring_degree"] == 8192  # three levels
    code, out, _ = run("nets_to_plan.py:Ward", "--input", "1,8,8")
    assert code == 0
    assert "Plans for the tail after fc.2" in out  # what runs as it is


def test_bounds_and_a_picture(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    given = ("nets_to_plan.py:squares", "--input", "20", "--cut", "input", "--plot", "front.svg", "--json")
    loose = json.loads(run(*given)[1])["cuts"]["input"]["chosen"]["key_bytes"]
    assert (tmp_path / "front.svg").read_text().count("cut after input") == 1
    code, out, _ = run(*given, "--at-most", f"key_bytes={0.7 * loose}")
    assert (code, json.loads(out)["cuts"]["input"]["chosen"]["key_bytes"] <= 0.7 * loose) == (0, True)


def test_plans_over_several_ciphertexts_are_marked(run: Run, tmp_path: Path) -> None:
    given = ("nets_to_plan.py:wide", "--input", "9000", "--cut", "input")
    found = json.loads(run(*given, "--json")[1])["cuts"]["input"]
    several = [row for row in found["front"] if "ciphertexts" in row]
    assert 0 < len(several) < len(found["front"])
    assert (found["chosen"]["ring_degree"], found["chosen"]["ciphertexts"]) == (4096, [3, 1])
    assert found["chosen"]["values"][0] == "[4500/2048] complex"
    out = run(*given)[1]
    for row in several:  # all of them, though the table leaves others out
        assert f"4,096x{row['ciphertexts'][0]} " in out
    assert out.count("4,096x") == len(several) + 1
    assert "values are cut into tiles" in out
    pytest.importorskip("matplotlib")
    assert run(*given, "--plot", "front.svg", "--json")[0] == 0
    assert "over several ciphertexts" in (tmp_path / "front.svg").read_text()
    # The control: all values of a small tail fit one.
    given = ("nets_to_plan.py:squares", "--input", "20", "--cut", "input")
    assert "ciphertexts" not in run(*given, "--json")[1]
    assert "tiles" not in run(*given)[1]
    assert run(*given, "--plot", "front.svg", "--json")[0] == 0
    assert "over several ciphertexts" not in (tmp_path / "front.svg").read_text()


def test_a_file_with_a_program_over_several_ciphertexts(run: Run, tmp_path: Path) -> None:
    net = named.module("nets_to_plan.py:wide")
    program = compile_tail(fold_tail(net, (9000,)), np.random.default_rng(0).normal(size=(4, 9000)))
    assert program.spec.input_ciphertexts == 3
    CloudBundle("m", "1", {0: program}).save(tmp_path / "cloud.bt")
    code, out, _ = run("cloud.bt", "--json")
    of_file = json.loads(out)["cuts"]["0"]
    of_net = json.loads(run("nets_to_plan.py:wide", "--input", "9000", "--cut", "input", "--json")[1])
    assert code == 0
    assert of_file["present"] == pytest.approx({name: of_file["chosen"][name] for name in METRICS})
    assert of_file["front"] == of_net["cuts"]["input"]["front"]


def test_a_split_model_has_tails_of_its_own(run: Run) -> None:
    code, out, _ = run("nets_to_plan.py:parts", "--json")
    assert (code, list(json.loads(out)["cuts"])) == (0, ["stage 0", "stage 1"])
    code, out, _ = run("nets_to_plan.py:parts", "--cut", "1", "--json")
    assert (code, list(json.loads(out)["cuts"])) == (0, ["stage 1"])
    assert plan_network.tails("nets_to_plan.py:parts", (), None).model == "toy"


def test_a_tail_in_which_tensors_meet(run: Run) -> None:
    code, out, _ = run("nets_to_plan.py:meeting", "--json")
    assert (code, list(json.loads(out)["cuts"])) == (0, ["stage 0"])
    layers = plan_network.tails("nets_to_plan.py:meeting", (), "0").layers["stage 0"]
    assert [layer.name for layer in layers] == ["conv", "act", "down+add+fc"]


def test_one_tail_of_a_file(run: Run, tmp_path: Path) -> None:
    net = named.module("nets_to_plan.py:squares")
    program = compile_tail(fold_tail(net, (20,)), np.ones((2, 20)))
    CloudBundle("m", "1", {0: program, 2: program}).save(tmp_path / "cloud.bt")
    code, out, _ = run("cloud.bt", "--cut", "2", "--json")
    assert (code, list(json.loads(out)["cuts"])) == (0, ["2"])
    assert json.loads(out)["cuts"]["2"]["present"]["key_bytes"] == program.spec.key_bytes
    assert "cut after stages 0, 2" in run("cloud.bt", "--cut", "1")[2]
    assert "--input is for a network" in run("cloud.bt", "--input", "3")[2]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nets_to_plan.py"], "nets_to_plan.py:NAME"),
        (["nets_to_plan.py:Ward"], "--input with one image's shape"),
        (["nets_to_plan.py:Ward", "--input", "1,8,x"], "give one image's shape"),
        (["nets_to_plan.py:Ward", "--input", "1,8,8", "--cut", "fc9"], "no cut after 'fc9'"),
        (["nets_to_plan.py:Ward", "--input", "1,2,2"], "features.2"),
        (["nets_to_plan.py:Ward", "--input", "1,8,8", "--at-most", "key_bytes=1"], "the least is"),
        (["nets_to_plan.py:Sorted", "--input", "4"], "sort"),
        (["nets_to_plan.py:Sorted", "--input", "4", "--cut", "input"], "blindtail lint"),
        (["nets_to_plan.py:parts", "--cut", "7"], "cut after stages 0, 1"),
        (["nowhere.py:Net", "--input", "4"], "no file nowhere.py"),
        (["nowhere.bt"], "no such file"),
    ],
)
def test_a_wrong_request_is_one_line(run: Run, argv: list[str], words: str) -> None:
    code, out, err = run(*argv)
    lines = [line for line in err.splitlines() if line.startswith("blindtail:")]
    assert (code != 0, out, len(lines)) == (True, "", 1)
    assert words in lines[0]
    assert "Traceback" not in err
