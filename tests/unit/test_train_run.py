"""Training end to end on the digits, its determinism, its command, and the shipped networks."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
import typer
from torch import Tensor, nn
from typer.testing import CliRunner

from blindtail.bundle import CloudBundle, EdgeBundle
from blindtail.errors import ConfigError, DataError, ModelError
from blindtail.he.frontend import fold_tail
from blindtail.he.layers import MAX_SHIFT, Affine
from blindtail.models.data import load
from blindtail.models.export import export_head
from blindtail.models.layers import Quadratic
from blindtail.models.pack import activations, pack
from blindtail.models.split import SplitModel
from blindtail.models.zoo import bundle_paths, nets
from blindtail.train.cli import register
from blindtail.train.fit import bounded, fit
from blindtail.train.measure import Calibration, Verdicts, accuracies, curve, routed
from blindtail.train.recipe import RECIPES, JointCrossEntropy, Recipe, mirror
from blindtail.train.run import Splits, Trained, from_checkpoint, train

pytestmark = pytest.mark.timeout(120)
DIGITS = RECIPES["digits"]


@pytest.fixture(scope="module")
def splits() -> Splits:
    return Splits.load("digits", seed=0)


@pytest.fixture(scope="module")
def trained(splits: Splits) -> Trained:
    return train(DIGITS, splits, command="blindtail train digits")


def test_digits_learn(trained: Trained) -> None:
    test = trained.report["metrics"]["test"]
    assert test["exit1"] >= 0.85
    assert test["exit2"] >= 0.93
    assert test["tail"] >= 0.95


def test_the_report_says_what_the_files_hold(trained: Trained, tmp_path: Path) -> None:
    trained.save(tmp_path)
    edge, cloud = EdgeBundle.open(tmp_path / "edge.bt"), CloudBundle.open(tmp_path / "cloud.bt")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["version"] == edge.version == cloud.version
    assert report["edge_budget"] == dict(edge.edge_budget) == trained.model.edge_budget()
    predicted = edge.metrics["predicted_eval_s"]
    assert set(predicted) == {str(cut) for cut in edge.cuts}
    assert all(0 < seconds < 10 for seconds in predicted.values())
    assert {**report["metrics"], "predicted_eval_s": predicted} == edge.metrics
    assert report["tails"]["1"]["program_id"] == edge.cuts[1].program_id
    assert report["command"] == "blindtail train digits"
    assert {"torch", "numpy", "onnx", "python"} <= set(report["versions"])
    validation = report["metrics"]["routed"]["validation"]
    assert validation["shares"]["tail"] <= 0.33
    assert sum(validation["shares"].values()) == pytest.approx(1.0)


def test_the_exported_head_and_folded_tail_give_the_models_logits(trained: Trained, splits: Splits) -> None:
    pixels = splits.test.pixels[:20]
    wanted = [t.numpy() for t in trained.model.logits(pixels)]
    sessions = {
        n: ort.InferenceSession(g, providers=["CPUExecutionProvider"]) for n, g in trained.edge.onnx.items()
    }
    layers = fold_tail(trained.model.tails["1"], (4, 4, 4))
    for i, image in enumerate(trained.edge.preprocessing.apply(pixels)):
        x = image[None]
        for stage in range(2):
            x = sessions[f"stage{stage}"].run(None, {"input": x})[0]
            logits = sessions[f"exit{stage}"].run(None, {"input": x})[0]
            np.testing.assert_allclose(logits[0], wanted[stage][i], atol=1e-4)
        value = x.reshape(1, -1).astype(np.float64)
        for layer in layers:
            value = layer(value)
        np.testing.assert_allclose(value[0], wanted[2][i], atol=1e-3)


def fingerprint(model: SplitModel) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(splits: Splits) -> None:
    short = replace(DIGITS, epochs=2)
    first = fit(short, splits.train)
    torch.manual_seed(99)  # the caller's random state does not matter
    assert fingerprint(fit(short, splits.train)) == fingerprint(first)
    assert fingerprint(fit(replace(short, seed=1), splits.train)) != fingerprint(first)


def test_training_leaves_the_callers_random_state_and_threads_alone(splits: Splits) -> None:
    before, threads = torch.random.get_rng_state(), torch.get_num_threads()
    fit(replace(DIGITS, epochs=1), splits.train, threads=2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    with bounded(1, 0):
        assert torch.get_num_threads() == 1


def quadratic_digits() -> SplitModel:
    model = nets.digits()
    model.tails["1"][4] = Quadratic(32, max_shift=1.0)  # type: ignore[index]
    return model


def test_quadratics_stay_within_their_bound(splits: Splits) -> None:
    model = fit(replace(DIGITS, epochs=3, build=quadratic_digits, peak_rate=5e-2), splits.train)
    layer = model.tails["1"][4]  # type: ignore[index]
    shift = (layer.b / (2 * layer.a)).detach().abs()
    assert 0.0 < float(shift.max()) <= 1.0 < MAX_SHIFT
    edge, _ = pack(
        model, splits.train.pixels[:100], temperatures=(1.0, 1.0), thresholds=(0.5, 0.5), metrics={}
    )
    assert edge.cuts[1].features == 64


def test_training_goes_on_from_an_owners_model(splits: Splits) -> None:
    model = fit(replace(DIGITS, epochs=2), splits.train)
    before = accuracies(Verdicts.of(model, splits.validation))["tail"]
    again = fit(replace(DIGITS, epochs=6, peak_rate=3e-3), splits.train, model=model)
    assert again is model
    assert accuracies(Verdicts.of(model, splits.validation))["tail"] >= before


def test_progress_reaches_the_end(splits: Splits) -> None:
    seen: list[tuple[int, int]] = []
    fit(
        replace(DIGITS, epochs=3), splits.train, progress=lambda done, steps, loss: seen.append((done, steps))
    )
    assert seen[-1] == (3 * 18, 3 * 18)


def test_a_diverging_run_says_so(splits: Splits) -> None:
    with pytest.raises(ModelError, match="peak_rate"):
        fit(replace(DIGITS, epochs=2, peak_rate=1e30, clip_norm=1e30), splits.train)


def test_too_few_images_are_refused(splits: Splits) -> None:
    with pytest.raises(DataError, match="at least one batch"):
        fit(DIGITS, splits.train.take(slice(0, 10)))


@pytest.mark.parametrize("fields", [{"epochs": 0}, {"batch": 1}, {"offload_share": 1.5}])
def test_impossible_recipes_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        replace(DIGITS, **fields)  # type: ignore[arg-type]


def test_the_joint_objective_by_hand() -> None:
    labels = torch.tensor([0])
    even, sure = torch.zeros(1, 2), torch.tensor([[2.0, 0.0]])
    loss = JointCrossEntropy(exit_weights=(0.5,), tail_weight=2.0)([even], [sure], labels)
    assert loss.item() == pytest.approx(0.5 * np.log(2) + 2.0 * np.log(1 + np.exp(-2.0)))
    with pytest.raises(ConfigError, match="weighs 1 exits"):
        JointCrossEntropy(exit_weights=(0.5,))([even, even], [sure], labels)


def test_distillation_teaches_exits_and_leaves_the_tail_alone() -> None:
    exit_, tail = torch.zeros(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 0])

    def gradients(distill: float) -> tuple[Tensor, Tensor]:
        loss = JointCrossEntropy(exit_weights=(1.0,), distill=distill)([exit_], [tail], labels)
        first, second = torch.autograd.grad(loss, [exit_, tail])
        return first, second

    plain, taught = gradients(0.0), gradients(1.0)
    assert not torch.allclose(plain[0], taught[0])
    assert torch.allclose(plain[1], taught[1])


def test_mirror_flips_some_images_and_repeats_by_seed() -> None:
    x = torch.arange(32.0).view(16, 1, 1, 2)
    one, two = (mirror(x, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one, two)
    flipped = [not torch.equal(a, b) for a, b in zip(one, x, strict=True)]
    assert 0 < sum(flipped) < 16


def test_curve_and_routes(trained: Trained, splits: Splits) -> None:
    verdicts = Verdicts.of(trained.model, splits.test)
    rows = curve(verdicts, trained.calibration.temperatures)
    alone = accuracies(verdicts)
    assert rows[0] == {"share": 0.0, "accuracy": pytest.approx(alone["exit2"])}
    assert rows[-1] == {"share": 1.0, "accuracy": pytest.approx(alone["tail"])}
    everything = Calibration(trained.calibration.temperatures, (1.01, 1.01))
    assert routed(verdicts, everything)["accuracy"] == pytest.approx(alone["tail"])
    assert routed(verdicts, everything)["shares"]["tail"] == 1.0


def test_models_that_cannot_be_packed_say_why(splits: Splits) -> None:
    fields = {"temperatures": (1.0, 1.0), "thresholds": (0.5, 0.5), "metrics": {}}
    pixels = splits.train.pixels[:50]
    model = nets.digits()
    with torch.no_grad():
        model.stages[0][0].weight[0, 0, 0, 0] = float("nan")  # type: ignore[index]
    with pytest.raises(ModelError, match=r"stages\.0\.0\.weight holds NaN"):
        pack(model, pixels, **fields)  # type: ignore[arg-type]
    model = nets.digits()
    model.tails["1"][4] = nn.ReLU()  # type: ignore[index]
    with pytest.raises(ModelError, match="ReLU"):
        pack(model, pixels, **fields)  # type: ignore[arg-type]
    model = nets.digits()
    with pytest.raises(ModelError, match="calibration images"):
        pack(model, pixels[:0], **fields)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="one temperature"):
        pack(model, pixels, temperatures=(1.0,), thresholds=(0.5,), metrics={})


def test_activations_are_what_the_edge_computes(trained: Trained, splits: Splits) -> None:
    rows = activations(trained.model, splits.test.pixels[:5], 1, batch=2)
    assert rows.shape == (5, 64)
    assert rows.dtype == np.float64


# The command ------------------------------------------------------------------------------------


def app() -> typer.Typer:
    application = typer.Typer()
    register(application)
    application.command("other")(lambda: None)  # so that `train` stays a sub-command
    return application


def test_the_command_writes_files_and_prints_the_report(tmp_path: Path) -> None:
    done = CliRunner().invoke(app(), ["train", "digits", "--epochs", "2", "--out", str(tmp_path), "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["command"] == "blindtail train digits --epochs 2 --seed 0 --threads 1"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "cloud.bt",
        "edge.bt",
        "model.safetensors",
        "report.json",
    ]
    again = tmp_path / "again"
    shown = CliRunner().invoke(app(), ["train", "digits", "--epochs", "2", "--out", str(again)])
    assert shown.exit_code == 0
    for words in ("exit1", "tail", "edge budget", "offloaded", "evaluation keys", "stability ok"):
        assert words in shown.stdout
    for name in ("edge.bt", "cloud.bt"):  # the same command, the same bytes
        assert (again / name).read_bytes() == (tmp_path / name).read_bytes()


def test_a_checkpoint_is_compiled_without_training(trained: Trained, splits: Splits, tmp_path: Path) -> None:
    trained.save(tmp_path)
    weights = tmp_path / "model.safetensors"
    again = train(DIGITS, splits, checkpoint=weights, command="again")
    assert again.report["command"] == "blindtail train digits"
    assert again.report["compiled_by"] == "again"
    assert again.report["training_s"] == trained.report["training_s"]
    assert again.edge.version == trained.edge.version
    with pytest.raises(ModelError, match="does not fit"):
        train(RECIPES["fashion"], splits, checkpoint=weights)
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(DataError, match="damaged"):
        train(DIGITS, splits, checkpoint=weights)
    with pytest.raises(DataError, match="no safetensors"):
        train(DIGITS, splits, checkpoint=tmp_path / "none.safetensors")


def test_help_loads_no_torch_and_names_every_option() -> None:
    shown = CliRunner().invoke(app(), ["train", "--help"])
    for option in ("--out", "--epochs", "--seed", "--data", "--threads", "--allow-unstable", "--json"):
        assert option in shown.stdout
    script = "import sys, blindtail.train.cli; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "False"


def test_a_data_folder_for_the_digits_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(app(), ["train", "digits", "--data", str(tmp_path)])
    assert isinstance(done.exception, DataError)


# What ships -------------------------------------------------------------------------------------


def test_the_shipped_network_keeps_its_promises() -> None:
    """The checked-in pair, run as the edge runs it, gives the accuracies its report claims."""
    edge_path, cloud_path = bundle_paths("fashion")
    assert edge_path.stat().st_size + cloud_path.stat().st_size < 3_000_000
    edge, cloud = EdgeBundle.open(edge_path), CloudBundle.open(cloud_path)
    report = json.loads(edge_path.with_name("report.json").read_text())
    assert edge.version == cloud.version == report["version"]
    assert edge.cuts[1] == cloud.programs[1].spec
    claimed = report["metrics"]["test"]
    assert claimed["exit1"] >= 0.84
    assert claimed["exit2"] >= 0.90
    assert claimed["tail"] >= 0.921
    kept = report["first_1000_test_images"]
    assert kept["shares"]["tail"] <= 0.35
    assert kept["gain_kept"] >= 0.85
    assert report["metrics"]["routed"]["validation"]["shares"]["tail"] <= 0.33
    assert edge.cuts[1].uplink_bytes <= 125_000
    assert edge.cuts[1].reply_bytes <= 30_000

    test = load("fashion", "test").take(slice(0, 1_000))
    sessions = {n: ort.InferenceSession(g, providers=["CPUExecutionProvider"]) for n, g in edge.onnx.items()}
    right = np.zeros(2)
    for image, label in zip(edge.preprocessing.apply(test.pixels), test.labels, strict=True):
        x = image[None]
        for i in range(2):
            x = sessions[f"stage{i}"].run(None, {"input": x})[0]
            right[i] += int(sessions[f"exit{i}"].run(None, {"input": x})[0].argmax() == label)
    assert right[0] / 1_000 == pytest.approx(claimed["exit1"], abs=0.03)
    assert right[1] / 1_000 == pytest.approx(claimed["exit2"], abs=0.03)


def test_the_shipped_weights_are_those_of_the_shipped_pair() -> None:
    edge_path, cloud_path = bundle_paths("fashion")
    model = from_checkpoint(RECIPES["fashion"], edge_path.with_name("model.safetensors"))
    assert export_head(model) == dict(EdgeBundle.open(edge_path).onnx)
    layers = fold_tail(model.tails["1"], model.stage_infos[1].output_shape)
    weights = [layer.weight for layer in layers if isinstance(layer, Affine)]
    held = list(CloudBundle.open(cloud_path).programs[1].to_parts()[1].values())
    assert [w.shape for w in weights] == [(128, 784), (10, 128)]
    assert any(h.shape == weights[0].shape and np.allclose(h, weights[0], rtol=1e-6) for h in held)


def test_a_recipe_is_a_small_object() -> None:
    assert isinstance(RECIPES["fashion"], Recipe)
    assert RECIPES["fashion"].build().name == "fashion"
