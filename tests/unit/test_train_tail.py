"""A tail that is trained on for devices that are out there: nothing changes on them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner

from blindtail.bundle import CloudBundle, EdgeBundle
from blindtail.errors import ConfigError, ModelError
from blindtail.he.clear import ClearEvaluator
from blindtail.he.compatible import differences
from blindtail.models.pack import activations, held_activations, pack_tail
from blindtail.train.cli import register
from blindtail.train.fit import fit
from blindtail.train.recipe import RECIPES
from blindtail.train.run import Splits, Trained, from_checkpoint, train
from blindtail.train.tail import train_tail
from edge.pair import ModelPair

pytestmark = pytest.mark.timeout(120)
SHORT = replace(RECIPES["digits"], epochs=2)


@pytest.fixture(scope="module")
def splits() -> Splits:
    return Splits.load("digits", seed=0)


@pytest.fixture(scope="module")
def held(splits: Splits, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trained, Path]:
    folder = tmp_path_factory.mktemp("held")
    made = train(SHORT, splits)
    made.save(folder)
    return made, folder


def test_only_the_tail_moves_and_the_devices_cannot_tell(
    held: tuple[Trained, Path], splits: Splits, tmp_path: Path
) -> None:
    made, folder = held
    better = train_tail(SHORT, splits, folder / "model.safetensors", made.edge)
    before, after = made.model.state_dict(), better.model.state_dict()
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"tails"}
    for cut, program in better.cloud.programs.items():
        assert differences(program.spec, made.edge.cuts[cut]) == []
        assert program.spec.program_id != made.edge.cuts[cut].program_id
    assert better.report["stability"] == {str(cut): f.to_json() for cut, f in better.stability.items()}
    assert {f.verdict.value for f in better.stability.values()} == {"ok"}
    assert better.report["after"]["test"]["tail"] >= better.report["before"]["test"]["tail"] - 0.02
    better.save(tmp_path)
    assert CloudBundle.open(tmp_path / "cloud.bt").version == better.cloud.version != made.edge.version
    assert json.loads((tmp_path / "report.json").read_text())["for_devices_with"] == made.edge.version
    # The owner can compare the new tail on the devices' own half.
    pair = ModelPair.open(folder / "edge.bt", tmp_path / "cloud.bt")
    assert pair.program.spec.program_id == made.edge.cuts[pair.cut].program_id


def test_the_same_run_gives_the_same_bytes(held: tuple[Trained, Path], splits: Splits) -> None:
    made, folder = held
    one, two = (train_tail(SHORT, splits, folder / "model.safetensors", made.edge).cloud for _ in range(2))
    assert one.version == two.version


def test_held_activations_are_what_the_network_computes(held: tuple[Trained, Path], splits: Splits) -> None:
    made, _ = held
    (cut,) = made.edge.cuts
    images = splits.test.pixels[:5]
    ours, theirs = activations(made.model, images, cut), held_activations(made.edge, images, cut)
    assert np.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_another_head_is_refused(held: tuple[Trained, Path], splits: Splits) -> None:
    made, folder = held
    model = from_checkpoint(SHORT, folder / "model.safetensors")
    with torch.no_grad():
        next(iter(model.stages[0].parameters())).mul_(1.5)
    with pytest.raises(ModelError, match="head differs"):
        pack_tail(model, splits.train.pixels[:200], made.edge, shrink=True)


def test_logits_that_devices_cannot_read_are_refused_or_shrunk(
    held: tuple[Trained, Path], splits: Splits
) -> None:
    made, folder = held
    model = from_checkpoint(SHORT, folder / "model.safetensors")
    (cut,) = made.edge.cuts
    last = [m for m in model.tails[str(cut)].modules() if isinstance(m, nn.Linear)][-1]
    with torch.no_grad():
        last.weight.mul_(3.0)
        last.bias.mul_(3.0)
    images = splits.train.pixels[:300]
    with pytest.raises(ModelError, match="devices read up to"):
        pack_tail(model, images, made.edge)
    program = pack_tail(model, images, made.edge, shrink=True).programs[cut]
    assert differences(program.spec, made.edge.cuts[cut]) == []
    x = activations(model, images[:50], cut)
    got, old = ClearEvaluator(program).logits(x), ClearEvaluator(made.cloud.programs[cut]).logits(x)
    ratio = got / old
    assert np.allclose(ratio, ratio[0, 0])  # all logits alike: no label changes
    assert 0.5 < ratio[0, 0] < 2.0


def test_another_model_is_refused(held: tuple[Trained, Path], splits: Splits) -> None:
    made, _ = held
    with pytest.raises(ModelError, match="devices hold model 'other'"):
        pack_tail(made.model, splits.train.pixels[:200], replace(made.edge, model="other"))


def test_training_everything_still_moves_everything(held: tuple[Trained, Path], splits: Splits) -> None:
    _, folder = held
    model = from_checkpoint(SHORT, folder / "model.safetensors")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fit(replace(SHORT, epochs=1), splits.train, model=model)
    after = model.state_dict()
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"stages", "exits", "tails"}


def test_the_command(held: tuple[Trained, Path], tmp_path: Path) -> None:
    _, folder = held
    app = typer.Typer()
    register(app)
    edge = str(folder / "edge.bt")
    missing = CliRunner().invoke(app, ["digits", "--like", edge])
    assert isinstance(missing.exception, ConfigError)
    assert "--checkpoint" in str(missing.exception)
    arguments = ["digits", "--like", edge, "--checkpoint", str(folder / "model.safetensors")]
    done = CliRunner().invoke(app, [*arguments, "--epochs", "1", "--out", str(tmp_path), "--json"])
    assert done.exit_code == 0, done.output
    assert {p.name for p in tmp_path.iterdir()} == {"cloud.bt", "model.safetensors", "report.json"}
    assert EdgeBundle.open(folder / "edge.bt").version == json.loads(done.stdout)["for_devices_with"]
