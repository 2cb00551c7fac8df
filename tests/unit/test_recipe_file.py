"""Recipes from TOML files: what they become, wrong ones, the command, and a training that was killed."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from blindtail import cli
from blindtail.bundle import CloudBundle, EdgeBundle
from blindtail.errors import ConfigError
from blindtail.train.phases import Sum
from blindtail.train.recipe_file import data_folder, load_recipe
from blindtail.train.run import Splits

pytestmark = pytest.mark.timeout(120)

RECIPE = """
name = "small"
network = "blindtail.models.zoo.nets:digits"
data = "digits"
seed = 4
batch = 64

[[phase]]
name = "together"
epochs = 3
peak_rate = 1e-2

  [[phase.loss]]
  kind = "cross-entropy"
  exits = [0.3, 0.5]

[[phase]]
name = "the tail"
epochs = 2
trains = "tails"
rates = { bias = 0.5 }

  [[phase.loss]]
  kind = "cross-entropy"
  weight = 2
  exits = [0.0, 0.0]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(RECIPE)
    return path


def test_a_file_becomes_a_recipe(file: Path) -> None:
    recipe = load_recipe(file)
    assert (recipe.name, recipe.data, recipe.seed, recipe.batch, recipe.epochs) == (
        "small",
        "digits",
        4,
        64,
        5,
    )
    first, second = recipe.phases
    assert (first.name, first.epochs, first.peak_rate, first.trains) == ("together", 3, 1e-2, "all")
    assert (second.trains, dict(second.rates)) == ("tails", {"bias": 0.5})
    assert isinstance(second.loss, Sum)
    assert recipe.build().name == "digits"
    assert load_recipe(file, seed=9).seed == 9
    assert repr(load_recipe(file)) == repr(recipe), "a kept run is known by this"


def test_names_and_data_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "ward.toml"
    path.write_text(RECIPE.replace('name = "small"\n', "").replace('data = "digits"', 'data = "images"'))
    recipe = load_recipe(path)
    assert recipe.name == "ward"
    assert data_folder(recipe, path) == tmp_path / "images"
    path.write_text(RECIPE)
    assert data_folder(load_recipe(path), path) is None


TAUGHT = """
[teacher.big]
network = "blindtail.models.zoo.nets:digits"
seed = 1
  [[teacher.big.phase]]
  name = "alone"
  epochs = 1
    [[teacher.big.phase.loss]]
    kind = "cross-entropy"
    exits = [0.3, 0.5]
"""


def test_teachers_are_recipes_in_the_same_file(file: Path) -> None:
    file.write_text(RECIPE.replace('trains = "tails"', 'trains = "tails"\nteacher = "big"') + TAUGHT)
    recipe = load_recipe(file)
    assert recipe.phases[1].teacher == "big"
    assert (recipe.teachers["big"].name, recipe.teachers["big"].seed) == ("big", 1)
    assert recipe.teachers["big"].phases[0].name == "alone"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("epochs = 3", "epochs = 0"), r"small.toml: phase 1 \('together'\): .*1 to 10,000 epochs"),
        (("epochs = 3", 'epochs = "3"'), r"'phase 1.epochs' must be a whole number"),
        (("epochs = 3\n", ""), r"'phase 1.epochs' is missing"),
        (("peak_rate", "peak_rat"), r"unknown setting 'phase 1.peak_rat'; did you mean 'phase 1.peak_rate'"),
        (('"tails"', '"tail"'), r"'phase 2.trains' must be one of 'all', 'head', 'exits', 'tails'"),
        (
            ('kind = "cross-entropy"', 'kind = "cross"'),
            r"phase 1 \('together'\), loss 1: there is no kind 'cross'; there are",
        ),
        (
            ('  kind = "cross-entropy"\n', ""),
            r"phase 1 \('together'\), loss 1: its kind is missing; there are .*cross-entropy",
        ),
        (("exits = [0.3, 0.5]", "exit = [0.3]"), r"unknown setting .*loss 1: exit\W; did you mean .*exits"),
        (("exits = [0.3, 0.5]", "exits = [true]"), r"loss 1: exits\[0\]\W must be a finite number"),
        (("weight = 2", 'weight = "2"'), r"loss 1: its weight is a number"),
        (("weight = 2", "weight = 0"), r"phase 2 .*a weight other than 0"),
        (('data = "digits"\n', ""), r"setting 'data' is missing: fashion, digits, or a folder"),
        (("batch = 64", "batch = 1"), r"a batch of 2 to 65,536"),
        (("batch = 64", 'augment = "spin"'), r"augment: there is no 'spin', only mirror"),
        (('trains = "tails"', 'teacher = "big"'), r"has a teacher 'big' and there is no \[teacher.big\]"),
        (("[[phase]]", "[phas]"), r"unknown setting 'phas'|not valid TOML|needs phases"),
        (("network", "net_work"), r"unknown setting 'net_work'"),
        (("seed = 4", "seed = "), r"is not valid TOML"),
    ],
)
def test_a_wrong_file_is_told_with_the_place(file: Path, change: tuple[str, str], words: str) -> None:
    assert change[0] in RECIPE
    file.write_text(RECIPE.replace(*change, 1))
    with pytest.raises(ConfigError, match=words) as found:
        load_recipe(file)
    assert str(file) in str(found.value)


def test_no_phases_losses_or_network(file: Path, tmp_path: Path) -> None:
    head = RECIPE[: RECIPE.index("[[phase]]")]
    for text, words in (
        (head, "needs phases"),
        (head + '[[phase]]\nname = "p"\nepochs = 1\n', r"phase 1 \('p'\) has nothing to learn"),
        (head + "phase = 3\n", r"write \[\[phase\]\] tables"),
        (head + "teacher = 3\n" + RECIPE[len(head) :], r"write \[teacher.NAME\] tables"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=words):
            load_recipe(file)
    file.write_text(RECIPE.replace("blindtail.models.zoo.nets:digits", "net.py:make"))
    (tmp_path / "net.py").write_text("from torch import nn\ndef make():\n    return nn.Linear(2, 2)\n")
    with pytest.raises(ConfigError, match=r"net.py:make gives a Linear, not a SplitModel"):
        load_recipe(file).build()
    with pytest.raises(ConfigError, match="there is no settings file"):
        load_recipe(tmp_path / "nowhere.toml")


def _files(folder: Path) -> dict[str, str]:
    found = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("edge.bt", "cloud.bt")
    }
    assert EdgeBundle.open(folder / "edge.bt").model == CloudBundle.open(folder / "cloud.bt").model
    return found


def _command(file: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "blindtail", "train", str(file), "--out", str(out)]


def test_a_training_that_is_killed_goes_on_with_the_same_command(file: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle: the files are those of a run that was left alone."""
    file.write_text(RECIPE.replace("epochs = 3", "epochs = 25").replace("epochs = 2\n", "epochs = 5\n"))
    out = tmp_path / "out"
    metrics = out / "training" / "metrics.json"
    with subprocess.Popen(_command(file, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        end_s = time.monotonic() + 60
        while not metrics.exists() or len(json.loads(metrics.read_text())) < 3:
            assert run.poll() is None
            assert time.monotonic() < end_s
            time.sleep(0.005)
        run.send_signal(signal.SIGKILL)
    assert (out / "training" / "training.state").exists()
    assert not (out / "edge.bt").exists()
    done = len(json.loads(metrics.read_text()))
    assert 3 <= done < 30, "it was killed within its run"
    subprocess.run(_command(file, out), check=True, capture_output=True)
    assert not (out / "training").exists()
    subprocess.run(_command(file, tmp_path / "whole"), check=True, capture_output=True)
    assert _files(out) == _files(tmp_path / "whole")
    report = json.loads((out / "report.json").read_text())
    assert (report["recipe"]["name"], report["metrics"]["test"]["tail"] >= 0.9) == ("small", True)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nowhere"], "there is no recipe 'nowhere': use fashion, digits, or a file that ends in .toml"),
        (["FILE", "--epochs", "2"], "says its phases' epochs itself"),
        (["FILE", "--prune", "0.5"], "neither pruned nor"),
        (["nowhere.toml"], "there is no settings file nowhere.toml"),
    ],
)
def test_a_wrong_request_is_one_line(
    file: Path, argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["train", *(str(file) if word == "FILE" else word for word in argv)])
    assert left.value.code != 0
    told = capsys.readouterr().err
    assert words in " ".join(told.split())
    assert "Traceback" not in told


def test_splits_of_known_data_follow_the_seed(file: Path) -> None:
    recipe = load_recipe(file)
    one, two = (Splits.load(recipe.data, seed=seed) for seed in (recipe.seed, 5))
    assert (one.validation.labels != two.validation.labels).any()
