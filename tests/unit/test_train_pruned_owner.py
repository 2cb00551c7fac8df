"""A pruned tail with one option: command, report, checkpoint, `compile_model`; and the bench's slice."""

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

from bench import prune as bench_prune
from bench.rows import check
from blindtail.bundle import CloudBundle, EdgeBundle
from blindtail.errors import ConfigError, DataError
from blindtail.he.clear import ClearEvaluator
from blindtail.models.pack import activations
from blindtail.train.cli import register
from blindtail.train.compiled import compile_model
from blindtail.train.pruning import Policy, Pruning
from blindtail.train.pruning.owner import restored
from blindtail.train.recipe import RECIPES
from blindtail.train.run import Splits, Trained, from_checkpoint, train

pytestmark = pytest.mark.timeout(120)
SHORT = replace(RECIPES["digits"], epochs=2)
HALF = Policy(fraction=0.0, layers={"6": 0.5})


@pytest.fixture(scope="module")
def splits() -> Splits:
    return Splits.load("digits", seed=0)


@pytest.fixture(scope="module")
def pruned(splits: Splits, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trained, Path]:
    folder = tmp_path_factory.mktemp("pruned")
    made = train(SHORT, splits, prune=HALF)
    made.save(folder)
    return made, folder


def test_the_report_says_what_pruning_saves(pruned: tuple[Trained, Path]) -> None:
    made, folder = pruned
    found = json.loads((folder / "report.json").read_text())["pruning"]
    assert found["policy"]["layers"] == {"6": 0.5}
    tail = found["tails"]["1"]
    assert [layer["name"] for layer in tail["layers"]] == ["2", "6"]
    assert [layer["zero_groups"] for layer in tail["layers"]] == [0.0, 0.5]
    before, after = tail["before"], tail["after"]
    assert after["diagonals"] == sum(len(op.diagonals) for op in made.cloud.programs[1].ops[::2])
    for cost in ("diagonals", "rotations", "keys", "key_bytes", "memory_bytes", "predicted_s"):
        assert after[cost] < before[cost]
    # Stages and exits did not move, and the tail was trained on.
    exact = {k: v["exit2"] for k, v in found["accuracy_before"].items()}
    assert exact == {k: made.report["metrics"][k]["exit2"] for k in exact}
    assert made.report["metrics"]["test"]["tail"] >= found["accuracy_before"]["test"]["tail"] - 0.1


def test_the_files_answer_as_the_pruned_network(pruned: tuple[Trained, Path], splits: Splits) -> None:
    made, folder = pruned
    pixels = splits.test.pixels[:8]
    (cut,) = EdgeBundle.open(folder / "edge.bt").cuts
    program = CloudBundle.open(folder / "cloud.bt").programs[cut]
    logits = ClearEvaluator(program).logits(activations(made.model, pixels, cut))
    assert np.allclose(logits, made.model.logits(pixels)[-1].numpy(), atol=1e-3)
    last = made.model.tails[str(cut)][6]  # type: ignore[index]
    assert float((last.weight == 0).float().mean()) == 0.5


def test_a_checkpoint_keeps_what_was_pruned(pruned: tuple[Trained, Path], splits: Splits) -> None:
    made, folder = pruned
    again = train(SHORT, splits, checkpoint=folder / "model.safetensors")
    assert again.cloud.programs[1].spec.program_id == made.cloud.programs[1].spec.program_id
    assert again.orders == made.orders
    model = from_checkpoint(SHORT, folder / "model.safetensors")
    without = compile_model(model, splits.validation).cloud.programs[1]
    assert len(without.spec.keys) > len(again.cloud.programs[1].spec.keys), "the orders are what saves"
    with pytest.raises(DataError, match="prune again"):
        restored(model, made.orders.replace("[", "[7, ", 1))
    assert '"lanes": 1,' in made.orders
    for lanes in (0, 3, -2, 1 << 20):
        with pytest.raises(DataError, match="prune again"):
            restored(model, made.orders.replace('"lanes": 1,', f'"lanes": {lanes},'))
    assert restored(model, made.orders)  # the control


def test_compile_model_with_one_option(splits: Splits) -> None:
    model = SHORT.build().eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    how = Pruning(Policy(fraction=0.8), splits.train, epochs=1)
    made = compile_model(model, splits.validation, lanes=16, prune=how)
    tail = made.pruning["tails"]["1"]
    assert tail["after"]["predicted_s"] < tail["before"]["predicted_s"]
    assert made.cloud.programs[1].spec.lanes == 16
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert made.pruned is not None
    assert any(float((p == 0).float().mean()) > 0.7 for p in made.pruned.model.tails.parameters())
    assert compile_model(model, splits.validation).pruning == {}


def test_the_command(pruned: tuple[Trained, Path], tmp_path: Path) -> None:
    _, folder = pruned
    app = typer.Typer()
    register(app)
    checkpoint = ["--checkpoint", str(folder / "model.safetensors")]
    run = CliRunner()
    arguments = ["digits", *checkpoint, "--epochs", "1", "--prune", "0.7", "--out", str(tmp_path)]
    done = run.invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "pruned: zero diagonals of layers 2" in done.output.replace("\n", " ")
    assert (
        "--prune 0.7 --prune-method p4e" in json.loads((tmp_path / "report.json").read_text())["compiled_by"]
    )
    for wrong, says in (
        (["--prune", "1.5"], "between 0 and 1"),
        (["--prune", "9=0.5"], "no tail has a layer '9'"),
        (["--prune-method", "random"], "needs --prune"),
        (["--prune", "0.5", "--like", str(folder / "edge.bt"), *checkpoint], "without it"),
    ):
        failed = run.invoke(app, ["digits", *wrong])
        assert isinstance(failed.exception, ConfigError)
        assert says in str(failed.exception)


def test_a_slice_of_the_bench() -> None:
    trainer = bench_prune.Trainer.of(images=320, epochs=1)
    found = bench_prune.trained(trainer, 0)
    for method in ("p4e", "magnitude", "random"):
        policy = Policy(groups="tile", method=method)  # type: ignore[arg-type]
        bench_prune.pruned(trainer, found, method, policy, 0)
    rows = list(bench_prune._tile_rows([found]))
    for made in rows:
        check(made)
    zero = {made["name"].split(",")[1].split()[0]: made["value"] for made in rows[::2]}
    assert zero["p4e"] > 10 * zero["random"]
    assert 0.02 < zero["random"] < 0.05
    net = found.nets["p4e"][0]
    assert isinstance(net, nn.Sequential)
    assert trainer.error(net) == found.errors["p4e"]
