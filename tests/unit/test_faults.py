"""What an owner can get wrong, at every door: one clear error with the layer's name and the way out.

Doors are `compile_model`, `pack` and the commands `train`, `lint` and `plan`; a
command says it in one line, or in its report where finding faults is its task.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from blindtail import cli
from blindtail.errors import BlindtailError
from blindtail.models import named
from blindtail.models.data import Images
from blindtail.models.pack import pack
from blindtail.models.split import SplitModel
from blindtail.train import recipe
from blindtail.train.compiled import compile_model

pytestmark = pytest.mark.usefixtures("one_torch_thread")

NETS = """
import torch
from torch import nn
from blindtail.models.layers import Square
from blindtail.models.split import SplitModel
from blindtail.preprocessing import Preprocessing

class Reshaped(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 10)
    def forward(self, x):
        x = x.flatten(1)
        return self.fc(x[x > -100.0].reshape(len(x), -1))

class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 10)
    def forward(self, x):
        x = x.flatten(1)
        if x.sum() > 0:
            x = -x
        return self.fc(x)

def relu():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))

def reshape():
    return nn.Sequential(Reshaped())

def branch():
    return nn.Sequential(Branching())

def deep():
    layers = [nn.Flatten(), nn.Linear(64, 16)]
    for _ in range(15):
        layers += [Square(), nn.Linear(16, 16)]
    return nn.Sequential(*layers, nn.Linear(16, 10))

def nan():
    net = good()
    with torch.no_grad():
        net[1].weight[0, 0] = float("nan")
    return net

def good():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), Square(), nn.Linear(8, 10))

def parts(tail, side=8, dtype="uint8"):
    preprocessing = Preprocessing((1, side, side), (0.5,), (0.5,), dtype)
    exit_ = nn.Sequential(nn.Flatten(), nn.Linear(side * side, 10))
    tails = {0: nn.Sequential(nn.AdaptiveAvgPool2d(8), tail)}
    names = tuple("0123456789")
    return SplitModel.from_parts(name="toy", stages=[nn.Conv2d(1, 1, 1)], exits={0: exit_}, tails=tails,
                                 preprocessing=preprocessing, class_names=names)
"""
FILE = "faulty_nets.py"

#: What every door says of a faulty network: the layer, then the way out.
NETWORKS = {
    "relu": (r"\b2\b[^\n]*ReLU", r"Square"),
    "reshape": (r"faulty_nets\.py:14", r"plain chain|at the edge"),
    "branch": (r"faulty_nets\.py:22", r"plain chain|at the edge"),
    "deep": (r"levels", r"cut (the network )?(later|after)"),
    "nan": (r"1\.weight[^\n]*NaN", r"train|load"),
}
#: Images that do not fit, whose they are, and the way out.
IMAGES: dict[str, tuple[Callable[[], object], str]] = {
    "another size": (lambda: _pixels(9), r"\(60, 1, 9, 9\): resize or transpose"),
    "flat": (lambda: _pixels(8).reshape(60, 64), r"\(60, 64\): resize or transpose"),
    "floats": (lambda: _pixels(8) / 255.0, r"float64: convert"),
    "NaN": (lambda: np.full((60, 1, 8, 8), np.nan, np.float32), r"NaN or infinite pixels: leave it out"),
    "ragged": (lambda: [[1, 2], [3]], r"np\.stack"),
    "nothing": (lambda: _pixels(8)[:0], r"some hundred are enough"),
}


def _pixels(side: int, count: int = 60) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (count, 1, side, side), dtype=np.uint8)


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / FILE).write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    return tmp_path


def _network(name: str) -> torch.nn.Module:
    return named.module(f"{FILE}:{name}")


def _model(name: str, **options: object) -> SplitModel:
    made: SplitModel = named._named(f"{FILE}:parts")(_network(name), **options)
    return made


def _packed(model: SplitModel, images: object) -> None:
    pack(model, images, temperatures=[1.0], thresholds=[0.5], metrics={})  # type: ignore[arg-type]


def _compiled(model: SplitModel, images: object) -> None:
    labels = np.arange(60) % 10
    pixels = _pixels(model.preprocessing.input_shape[1])
    validation = Images(pixels, labels, model.class_names)
    compile_model(model, validation, calibration_images=images)  # type: ignore[arg-type]


def _command(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = 0
    try:
        cli.main(list(argv))
    except SystemExit as left:
        code = int(left.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def _one_line(error: str) -> str:
    """What the command says. Progress is cleared, a warning may stand before it."""
    lines = [line for line in error.splitlines() if line.startswith("blindtail:")]
    assert len(lines) == 1
    assert "Traceback" not in error
    assert "internal error" not in error
    return lines[0]


@pytest.mark.parametrize("door", [_packed, _compiled], ids=["pack", "compile_model"])
@pytest.mark.parametrize("fault", NETWORKS)
def test_a_faulty_network_in_python(nets: Path, door: Callable[..., None], fault: str) -> None:
    with pytest.raises(BlindtailError) as raised:
        door(_model(fault), _pixels(8))
    for words in NETWORKS[fault]:
        assert re.search(words, str(raised.value)), words
    assert re.search(r"tail at cut 0|tails\.0", str(raised.value))


@pytest.mark.parametrize("door", [_packed, _compiled], ids=["pack", "compile_model"])
def test_a_sound_network_passes(nets: Path, door: Callable[..., None]) -> None:
    door(_model("good"), _pixels(8))


@pytest.mark.parametrize(
    ("door", "fault"),
    # A labelled set holds uint8 pixels, so that a model of floats is packed alone.
    [(_packed, fault) for fault in IMAGES] + [(_compiled, fault) for fault in IMAGES if fault != "NaN"],
)
def test_images_that_do_not_fit(nets: Path, door: Callable[..., None], fault: str) -> None:
    images, words = IMAGES[fault]
    with pytest.raises(BlindtailError, match=r"calibration images.*" + words):
        door(_model("good", dtype="float32" if fault == "NaN" else "uint8"), images())


def test_held_out_and_validation_images_are_told_apart(nets: Path) -> None:
    model = _model("good")
    options = {"temperatures": [1.0], "thresholds": [0.5], "metrics": {}}
    with pytest.raises(BlindtailError, match=r"held-out images: .*resize"):
        pack(model, _pixels(8), held_out_images=_pixels(9), **options)
    with pytest.raises(BlindtailError, match=r"validation images: .*resize"):
        compile_model(model, Images(_pixels(9), np.arange(60) % 10, model.class_names))
    with pytest.raises(BlindtailError, match=r"labels go up to 11, .* classes 0 to 9: number them"):
        compile_model(model, Images(_pixels(8), np.arange(60) % 12, tuple("0123456789ab")))


@pytest.mark.parametrize("fault", NETWORKS)
def test_a_faulty_network_by_lint(nets: Path, capsys: pytest.CaptureFixture[str], fault: str) -> None:
    code, out, err = _command(capsys, "lint", f"{FILE}:{fault}", "--input", "1,8,8", "--cut", "input")
    assert (code, "Traceback" in err) == (1, False)
    for words in NETWORKS[fault]:
        assert re.search(words, out), words


@pytest.mark.parametrize("fault", sorted(NETWORKS.keys() - {"relu"}))
def test_a_faulty_network_by_plan(nets: Path, capsys: pytest.CaptureFixture[str], fault: str) -> None:
    code, out, err = _command(capsys, "plan", f"{FILE}:{fault}", "--input", "1,8,8", "--cut", "input")
    assert (code, out) == (2, "")
    said = _one_line(err)
    for words in NETWORKS[fault]:
        assert re.search(words, said), words


def test_plan_rewrites_and_refuses_the_tails_of_a_split_model(
    nets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = _command(capsys, "plan", f"{FILE}:relu", "--input", "1,8,8", "--cut", "input")
    assert (code, "2 (ReLU)" in out) == (0, True)
    for fault, expected in NETWORKS.items():
        (nets / "split.py").write_text(
            f"from faulty_nets import *\ndef model():\n    return parts({fault}())\n"
        )
        code, _, err = _command(capsys, "plan", "split.py:model")
        assert code == 2
        for words in expected:
            assert re.search(words, _one_line(err)), words


@pytest.mark.parametrize("fault", NETWORKS)
def test_a_faulty_network_by_train(
    nets: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Before an image is trained on, and no file is left."""
    recipes = {"digits": replace(recipe.RECIPES["digits"], build=lambda: _model(fault))}
    monkeypatch.setattr(recipe, "RECIPES", MappingProxyType(recipes))
    monkeypatch.setattr("blindtail.train.run.fit", lambda *_, **__: pytest.fail("trained on"))
    code, out, err = _command(capsys, "train", "digits", "--out", "made")
    assert (code, out, (nets / "made").exists()) == (1, "", False)
    for words in NETWORKS[fault]:
        assert re.search(words, _one_line(err)), words


def test_data_and_checkpoints_that_do_not_fit_by_train(
    nets: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = {"digits": replace(recipe.RECIPES["digits"], build=lambda: _model("good", side=9))}
    monkeypatch.setattr(recipe, "RECIPES", MappingProxyType(recipes))
    code, _, err = _command(capsys, "train", "digits", "--out", "made")
    assert code == 2
    assert re.search(r"training images: .*\(1, 9, 9\).*resize or transpose", _one_line(err))
    state = _model("good", side=9).state_dict()
    state["tails.0.1.1.weight"][0, 0] = float("inf")
    save_file(state, nets / "model.safetensors")
    code, _, err = _command(capsys, "train", "digits", "--out", "made", "--checkpoint", "model.safetensors")
    assert code == 1
    assert re.search(r"tails\.0\.1\.1\.weight holds NaN .*earlier checkpoint", _one_line(err))
    (nets / "model.safetensors").write_bytes(b"no checkpoint")
    code, _, err = _command(capsys, "train", "digits", "--out", "made", "--checkpoint", "model.safetensors")
    assert (code, "no safetensors checkpoint" in _one_line(err)) == (2, True)
    assert not (nets / "made").exists()


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((4, 8, 8)), r"calibration data has shape \(4, 8, 8\).*\(n, 1, 8, 8\)"),
        (np.zeros((0, 1, 8, 8)), r"calibration data has shape \(0, 1, 8, 8\).*n of 1 or more"),
        (np.full((4, 1, 8, 8), np.nan), r"calibration data holds NaN.*check the images"),
        (np.full((4, 1, 8, 8), "x"), r"calibration data.*numbers"),
    ],
    ids=["shape", "none", "NaN", "words"],
)
def test_calibration_data_by_lint(
    nets: Path, capsys: pytest.CaptureFixture[str], array: np.ndarray, words: str
) -> None:
    np.save(nets / "x.npy", array)
    given = ("lint", f"{FILE}:good", "--input", "1,8,8", "--calibration", "x.npy")
    code, out, err = _command(capsys, *given)
    assert (code, out) == (2, "")
    assert re.search(words, _one_line(err))
