"""A ReLU network in, a tail that CKKS can run out: teacher, turning activations and a penalty in one file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from blindtail.bundle import CloudBundle, EdgeBundle
from blindtail.errors import ConfigError
from blindtail.he.clear import ClearEvaluator
from blindtail.models.layers import Quadratic
from blindtail.models.split import SplitModel
from blindtail.train.fit import fit
from blindtail.train.pruning.policy import Policy
from blindtail.train.recipe import Recipe
from blindtail.train.recipe_file import described, load_recipe
from blindtail.train.run import Splits, train
from blindtail.train.tail import train_tail

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("one_torch_thread")]

NET = """
from torch import nn
from blindtail.models.split import SplitModel
from blindtail.preprocessing import Preprocessing

def relu():
    \"\"\"Digits, three ReLUs and a max pooling behind the cut.\"\"\"
    return SplitModel.from_parts(
        name="ward",
        stages=[nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())],
        exits={0: nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(128, 10))},
        tails={0: nn.Sequential(
            nn.Conv2d(8, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))},
        preprocessing=Preprocessing(input_shape=(1, 8, 8), mean=(0.305,), std=(0.376,)),
        class_names=tuple(str(d) for d in range(10)))
"""
RECIPE = """
network = "net.py:relu"
data = "digits"
seed = 2
batch = 64

[teacher.relu]
network = "net.py:relu"
batch = 64
  [[teacher.relu.phase]]
  name = "labels"
  epochs = 12
  peak_rate = 1e-2
    [[teacher.relu.phase.loss]]
    kind = "cross-entropy"

[[phase]]
name = "turning"
epochs = 20
teacher = "relu"
peak_rate = 1e-2
rates = { coefficients = 0.2 }
  [[phase.loss]]
  kind = "distillation"
  temperature = 10
  share = 0.1
  [[phase.loss]]
  kind = "cross-entropy"
  tails = 0.0
  weight = 0.3
  [[phase.loss]]
  kind = "range-penalty"
  limit = 6.0
  weight = 0.01
  [[phase.schedule]]
  kind = "layer-by-layer"
  per_channel = true
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(NET)
    path = tmp_path / "ward.toml"
    path.write_text(RECIPE)
    return path


def _digest(model: SplitModel) -> str:
    held = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        held.update(name.encode() + tensor.numpy().tobytes())
    return held.hexdigest()


def _short(recipe: Recipe, epochs: int = 4) -> Recipe:
    from dataclasses import replace

    phases = tuple(replace(phase, epochs=epochs) for phase in recipe.phases)
    taught = {name: _short(one, 1) for name, one in recipe.teachers.items()}
    return replace(recipe, phases=phases, teachers=taught)


def test_a_relu_network_becomes_two_files(file: Path, tmp_path: Path) -> None:
    recipe, splits = load_recipe(file), Splits.load("digits", seed=2)
    assert any(isinstance(m, nn.ReLU) for m in recipe.build().tails.modules())
    made = train(recipe, splits, folder=tmp_path / "kept")
    tail = list(made.model.tails.modules())
    assert sum(isinstance(m, Quadratic) for m in tail) == 2
    assert not any(isinstance(m, nn.ReLU | nn.MaxPool2d) for m in tail)
    teacher = fit(recipe.teachers["relu"], splits.train)
    verdicts = [
        float((model.logits(splits.test.pixels)[-1].argmax(1).numpy() == splits.test.labels).mean())
        for model in (made.model, teacher)
    ]
    assert verdicts[0] >= verdicts[1] - 0.03 >= 0.9
    assert made.report["metrics"]["test"]["tail"] == pytest.approx(verdicts[0])
    rows = made.report["training"]
    assert [row["epoch"] for row in rows] == [*range(1, 21)]
    assert rows[-1]["loss"] < rows[0]["loss"]
    with pytest.raises(ConfigError, match="are not pruned yet"):
        train(recipe, splits, prune=Policy.parse(["0.5"], method="p4e", seed=0))
    with pytest.raises(ConfigError, match="not trained on yet"):
        train_tail(recipe, splits, tmp_path / "model.safetensors", made.edge)
    assert "layer" in made.report["recipe"]["phases"][0].lower()
    found = made.report["failure_prediction"]["exit1"]
    assert found["entropy"]["auroc"] > 0.8
    assert found["best"]["aurc"] <= found["entropy"]["aurc"]
    made.save(tmp_path / "out")
    edge, cloud = EdgeBundle.open(tmp_path / "out/edge.bt"), CloudBundle.open(tmp_path / "out/cloud.bt")
    assert edge.cuts[0].program_id == cloud.programs[0].spec.program_id
    x = made.model.head(torch.from_numpy(made.model.preprocessing.apply(splits.test.pixels[:4])), 0)
    want = made.model.tail(0)(x).detach().numpy()
    got = ClearEvaluator(cloud.programs[0]).logits(x.detach().numpy().reshape(4, -1).astype(np.float64))
    np.testing.assert_allclose(got, want, atol=1e-3)
    # Its weights compile again without training.
    again = train(recipe, splits, checkpoint=tmp_path / "out" / "model.safetensors")
    assert again.edge.cuts[0].program_id == edge.cuts[0].program_id


@pytest.mark.parametrize("after", [5, 30, 60])
def test_a_turning_run_goes_on_after_a_break(file: Path, tmp_path: Path, after: int) -> None:
    recipe, images = _short(load_recipe(file)), Splits.load("digits", seed=2).train
    whole = fit(recipe, images)
    steps = iter(range(after))

    def broken() -> None:
        if next(steps, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(recipe, images, folder=tmp_path / "kept", after_step=broken)
    assert _digest(fit(recipe, images, folder=tmp_path / "kept")) == _digest(whole)
    rows = json.loads((tmp_path / "kept" / "metrics.json").read_text())
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]


def test_the_guide_tells_of_every_kind_and_setting() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "guide" / "recipes.md").read_text()
    for kinds in described().values():
        for kind, settings in kinds.items():
            (row,) = [line for line in page.splitlines() if line.startswith(f"| `{kind}` |")]
            told = {word.strip("` ") for word in row.split("|")[2].split(",")}
            named = {setting.split(":")[0] for setting in settings} - {"project"}  # a function: not for files
            assert told == named, kind


def test_the_guide_s_recipe_is_one(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "guide" / "recipes.md").read_text()
    (tmp_path / "ward.toml").write_text(page.split("```toml\n")[1].split("```")[0])
    recipe = load_recipe(tmp_path / "ward.toml")
    assert (recipe.name, [phase.name for phase in recipe.phases], list(recipe.teachers)) == (
        "ward",
        ["turning"],
        ["relu"],
    )


def test_every_kind_can_be_named_in_a_file(file: Path) -> None:
    """With its defaults, or with what it cannot do without."""
    needed = {"features": "cut = 0", "range-penalty": "limit = 6.0"}
    needed |= dict.fromkeys(("layer-from-teacher", "tail-from"), "cut = 0\nlayer = 0")
    kinds = described()
    for kind in kinds["losses"]:
        text = f'[[phase]]\nname = "p"\nepochs = 1\n[[phase.loss]]\nkind = "{kind}"\n{needed.get(kind, "")}\n'
        file.write_text(RECIPE[: RECIPE.index("[teacher")] + text)
        assert load_recipe(file).phases[0].loss
    for kind in kinds["schedules"]:
        text = '[[phase]]\nname = "p"\nepochs = 1\n[[phase.loss]]\nkind = "cross-entropy"\n'
        file.write_text(RECIPE[: RECIPE.index("[teacher")] + text + f'[[phase.schedule]]\nkind = "{kind}"\n')
        assert load_recipe(file).phases[0].schedules
