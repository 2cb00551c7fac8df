"""`blindtail lint`: tables, JSON, exit codes, and one line for what is wrong with the request."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from blindtail import cli

pytestmark = pytest.mark.usefixtures("one_torch_thread")

NETS = """
import torch
from torch import nn
from blindtail.models.layers import Square
from blindtail.models.split import SplitModel
from blindtail.preprocessing import Preprocessing

print("the owner's code prints")

class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.fc1, self.act1, self.fc2 = nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3)
    def forward(self, x):
        return torch.softmax(self.fc2(self.act1(self.fc1(x))), -1)

class Needs(nn.Module):
    def __init__(self, width):
        super().__init__()

def squares():
    return nn.Sequential(nn.Linear(6, 8), Square(), nn.Linear(8, 3))

def parts():
    return SplitModel.from_parts(
        name="toy", stages=[nn.Flatten()], exits={0: nn.Linear(16, 2)}, tails={0: nn.Linear(16, 2)},
        preprocessing=Preprocessing(input_shape=(1, 4, 4), mean=(0.0,), std=(1.0,)), class_names=("a", "b"))

number = 3

from tests.meeting_cases import model as meeting
"""

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    (tmp_path / "nets_to_lint.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*argv: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            cli.main(["lint", *map(str, argv)])
        captured = capsys.readouterr()
        assert isinstance(left.value.code, int)
        return left.value.code, captured.out, captured.err

    return call


def test_a_network_that_runs(run: Run) -> None:
    code, out, err = run("nets_to_lint.py:squares", "--input", "6", "--json")
    assert (code, "owner's code" in err) == (0, True)  # what it prints is not in the JSON
    report = json.loads(out)
    whole = report["cuts"][0]
    assert (whole["name"], whole["verdict"], whole["depth"], whole["plan"]["depth"]) == (
        "input",
        "runs",
        3,
        3,
    )
    for name in ("predicted_s", "uplink_bytes", "reply_bytes", "key_bytes", "ring_degree"):
        assert whole["plan"][name] > 0
    code, out, _ = run("nets_to_lint.py:squares", "--input", "6", "--all")
    assert code == 0
    for words in (
        "Where to cut",
        "1 level",
        "3 of 5",
        "8192",
        "standard normal inputs",
        "encrypting the input",
    ):
        assert words in out


def test_a_network_to_rewrite(run: Run) -> None:
    code, out, _ = run("nets_to_lint:Net", "--input", "6")
    assert code == 1
    for words in ("self.act1 = Square()  # was ReLU", "plain logits", "nets_to_lint.py:15", "rewrite (2)"):
        assert words in out
    assert run("nets_to_lint.py:Net", "--input", "6", "--cut", "act1", "--no-plan")[0] == 1


def test_weights_and_calibration_are_read(run: Run, tmp_path: Path) -> None:
    state = {"0.weight": torch.full((8, 6), 1e6), "0.bias": torch.zeros(8)}
    state |= {"2.weight": torch.ones(3, 8), "2.bias": torch.zeros(3)}
    save_file(state, tmp_path / "loud.safetensors")
    np.save(tmp_path / "x.npy", np.ones((4, 6), np.float32))
    given = ("nets_to_lint.py:squares", "--input", "6", "--cut", "input", "--weights", "loud.safetensors")
    code, out, _ = run(*given, "--calibration", "x.npy", "--json")
    report = json.loads(out)
    assert (code, report["calibration"]) == (1, "4 calibration inputs")
    assert "too large for the modulus" in report["cuts"][0]["note"]
    code, out, _ = run(*given[:3], "--json")  # positive control: not with other weights
    assert (code, json.loads(out)["cuts"][0]["note"]) == (0, "")


def test_a_split_model_brings_its_shape(run: Run) -> None:
    code, out, _ = run("nets_to_lint.py:parts", "--json")
    report = json.loads(out)
    assert (code, report["input_shapes"], report["verdict"]) == (0, [[1, 4, 4]], "runs")


def test_a_split_model_in_whose_tail_tensors_meet(run: Run) -> None:
    code, out, _ = run("nets_to_lint.py:meeting", "--json")
    cuts = {cut["name"]: cut for cut in json.loads(out)["cuts"]}
    assert (code, cuts["0"]["values"], cuts["0"]["depth"], cuts["0"]["verdict"]) == (0, 44, 3, "runs")
    code, out, _ = run("nets_to_lint.py:meeting", "--refresh", "--json")
    refreshed = {cut["name"]: cut["costs"]["round_trips"] for cut in json.loads(out)["refreshed"]}
    assert (code, refreshed["0"]) == (0, 1)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nets_to_lint.py:Missing", "--input", "6"], "has no Missing; networks there: Net, Needs"),
        (["nets_to_lint.py", "--input", "6"], "nets_to_lint.py: write file.py:NAME"),
        (["nowhere.py:Net", "--input", "6"], "no file nowhere.py"),
        (["no_such_package:Net", "--input", "6"], "No module named 'no_such_package'"),
        (["nets_to_lint.py:number", "--input", "6"], "is a int"),
        (["nets_to_lint.py:Needs", "--input", "6"], "without arguments"),
        (["nets_to_lint.py:Net"], "--input with one image's shape"),
        (["nets_to_lint.py:Net", "--input", "6,x"], "--input 6,x: give one image's shape"),
        (["nets_to_lint.py:Net", "--input", "7"], "layer fc1: mat1 and mat2"),
        (["nets_to_lint.py:Net", "--input", "6", "--cut", "fc9"], "no cut after 'fc9'"),
        (["nets_to_lint.py:Net", "--input", "6", "--weights", "net.pt"], "is a pickle"),
        (["nets_to_lint.py:Net", "--input", "6", "--weights", "no.safetensors"], "no.safetensors"),
        (["nets_to_lint.py:Net", "--input", "6", "--calibration", "nets_to_lint.py"], "numpy.save"),
    ],
)
def test_a_wrong_request_is_one_line(run: Run, argv: list[str], words: str) -> None:
    code, out, err = run(*argv)
    lines = [line for line in err.splitlines() if line.startswith("blindtail:")]
    assert (code, out, len(lines)) == (2, "", 1)
    assert words in lines[0]
    assert "Traceback" not in err
