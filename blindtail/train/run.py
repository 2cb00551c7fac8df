"""Train a recipe, calibrate it, compile it, and write `edge.bt`, `cloud.bt` and `report.json`."""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata as packages
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from blindtail.bundle import CloudBundle, EdgeBundle
from blindtail.errors import ConfigError, DataError, InputError, ModelError
from blindtail.he.objective import Objective
from blindtail.he.stability import Stability
from blindtail.models.data import Images, load, load_folder
from blindtail.models.fetch import FashionSource
from blindtail.models.pack import check_tails, judge_tails, pack, plan_tails
from blindtail.models.split import SplitModel
from blindtail.progress import Progress as CompileProgress
from blindtail.progress import Span
from blindtail.train.confidence import failure_prediction
from blindtail.train.fit import Progress, bounded, fit
from blindtail.train.measure import (
    Calibration,
    Verdicts,
    accuracies,
    calibration_errors,
    curve,
    routed,
)
from blindtail.train.pruning.owner import PrunedTails, check_layers, prune_tails, restored
from blindtail.train.pruning.policy import Policy
from blindtail.train.recipe import Recipe

#: Images from which the compiler bounds every value of the tail.
CALIBRATION_IMAGES = 4_000


@dataclass(frozen=True)
class Splits:
    """Training, validation (taken from the training data) and test images."""

    train: Images
    validation: Images
    test: Images

    @classmethod
    def load(cls, name: str, *, seed: int, folder: Path | None = None) -> Splits:
        """A known data set; `folder` holds Fashion-MNIST's four .gz files. Raises `DataError`."""
        if folder is not None and name != "fashion":
            raise DataError(f"--data is for Fashion-MNIST's files; {name!r} comes with scikit-learn")
        source = FashionSource(folder=folder)
        return cls(
            *(load(name, split, seed=seed, source=source) for split in ("train", "validation", "test"))
        )

    @classmethod
    def from_folder(cls, folder: Path, model: SplitModel) -> Splits:
        """The owner's own images: FOLDER/train, FOLDER/validation, FOLDER/test, a sub-folder per class."""
        shape, names = model.preprocessing.input_shape, model.class_names
        return cls(*(load_folder(folder / split, shape, names) for split in ("train", "validation", "test")))


@dataclass(frozen=True)
class Trained:
    """What a run made; `stability` by cut, as the report has it, `orders` of pruned tails as a note."""

    model: SplitModel
    calibration: Calibration
    edge: EdgeBundle
    cloud: CloudBundle
    report: Mapping[str, Any]
    stability: Mapping[int, Stability]
    orders: str = ""

    def save(self, folder: Path) -> None:
        """Write edge.bt, cloud.bt, report.json and the owner's checkpoint model.safetensors.

        Each is written atomically; the checkpoint stays with the owner. Raises
        `DataError` when the folder cannot be written.
        """
        history = {
            key: self.report[key] for key in ("command", "training_s", "training") if key in self.report
        }
        with writing(folder):
            self.edge.save(folder / "edge.bt")
            self.cloud.save(folder / "cloud.bt")
            notes = {"training": json.dumps(history)}
            if self.orders:
                notes["pruning"] = self.orders
            save_report_and_weights(folder, self.report, self.model, notes)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Makes the folder; turns what goes wrong on the disk into `DataError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise DataError(f"cannot write to {folder} ({error.strerror}): choose another folder") from error


def save_report_and_weights(
    folder: Path, report: Mapping[str, Any], model: SplitModel, metadata: Mapping[str, str] | None = None
) -> None:
    """report.json and model.safetensors, each whole or not at all. Raises `OSError`."""
    with tempfile.TemporaryDirectory(prefix=".train-", dir=folder) as scratch:
        text, weights = Path(scratch) / "report.json", Path(scratch) / "model.safetensors"
        text.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        state = {k: v.detach().contiguous() for k, v in model.state_dict().items()}
        save_file(state, weights, metadata=None if metadata is None else dict(metadata))
        for path in (text, weights):
            os.chmod(path, 0o644)
            os.replace(path, folder / path.name)


def train(
    recipe: Recipe,
    splits: Splits,
    *,
    threads: int = 1,
    progress: Progress | None = None,
    command: str = "",
    checkpoint: Path | None = None,
    allow_unstable: bool = False,
    objective: Objective | None = None,
    prune: Policy | None = None,
    compiling: CompileProgress | None = None,
    folder: Path | None = None,
) -> Trained:
    """Run a recipe from data to a pair of bundles.

    With a `checkpoint` (a safetensors file of the recipe's network, as `save`
    writes) nothing is trained: its weights are calibrated and compiled.

    With `prune` the tails are then pruned (`blindtail.train.pruning`) and retrained, `recipe.epochs`
    each time, at a third of the recipe's rate; stages and exits stay as they are.

    Thresholds and temperatures come from the validation split; the test split is
    only measured. The same recipe, data, thread count and library versions give
    the same bytes. Raises `ModelError` or `DataError`; also when the ranges of a tail
    escape on the validation split (`judge_tails`), unless `allow_unstable`. What tails are
    compiled for is `objective`'s; one that cannot be met is an error before training.

    `progress` is told of training, `compiling` then of the compile (`blindtail.progress`). With a `folder`
    the training is kept there after each epoch, and the same call goes on with it after a break.
    """
    if prune is not None and recipe.phases:
        raise ConfigError("the tails of a recipe with phases are not pruned yet: prune those of one without")
    if objective is not None:
        plan_tails(recipe.finished(), objective)
    if prune is not None:
        check_layers(recipe.build(), prune)
    start, whole = time.perf_counter(), Span.of(compiling)
    pruning, rest = whole.parts(0 if prune is None else 1, 2)
    history: dict[str, Any]
    if checkpoint is None:
        untrained = recipe.finished()
        check_tails(untrained)
        _check_images(untrained, splits)
        model = fit(recipe, splits.train, threads=threads, progress=progress, folder=folder)
        history = {"command": command, "training_s": round(time.perf_counter() - start, 1)}
        if folder is not None:
            history["training"] = json.loads((folder / "metrics.json").read_text())
    else:
        model = from_checkpoint(recipe, checkpoint)
        history = {"training_s": 0.0, **_history(checkpoint), "compiled_by": command}
    pruned: PrunedTails | None = None
    accuracy: dict[str, Any] = {}
    if prune is not None:
        start = time.perf_counter()
        pruned, accuracy = _pruned(recipe, model, splits, prune, threads, progress, objective, pruning)
        history["pruning_s"] = round(time.perf_counter() - start, 1)
    orders = pruned.note() if pruned is not None else _note(checkpoint, "pruning") if checkpoint else ""
    with bounded(threads, recipe.seed):
        made = finish(
            recipe,
            model,
            splits,
            threads=threads,
            history=history,
            allow_unstable=allow_unstable,
            objective=objective,
            pruned=pruned,
            accuracy_before=accuracy,
            orders=orders,
            compiling=rest,
        )
    return whole.ended(made)


def _check_images(model: SplitModel, splits: Splits) -> None:
    """Raises `InputError` saying which images do not fit the model."""
    for what in ("train", "validation", "test"):
        try:
            model.preprocessing.apply(getattr(splits, what).pixels[:1])
        except InputError as error:
            raise InputError(f"{'training' if what == 'train' else what} images: {error}") from error


def _pruned(
    recipe: Recipe,
    model: SplitModel,
    splits: Splits,
    policy: Policy,
    threads: int,
    progress: Progress | None,
    objective: Objective | None,
    span: Span,
) -> tuple[PrunedTails, dict[str, Any]]:
    """The tails pruned, in place; and accuracies by split as they were before."""
    gentle = replace(recipe, peak_rate=recipe.peak_rate / 3)

    def retrain(after_step: Callable[[], None], _: Span) -> None:
        fit(
            gentle,
            splits.train,
            model=model,
            threads=threads,
            progress=progress,
            only_tails=True,
            after_step=after_step,
        )

    with bounded(threads, recipe.seed):
        before = {
            name: accuracies(Verdicts.of(model, images))
            for name, images in (("validation", splits.validation), ("test", splits.test))
        }
        calibration = splits.train.pixels[:CALIBRATION_IMAGES]
        found = prune_tails(model, calibration, policy, retrain, objective=objective, span=span)
    return found, before


def from_checkpoint(recipe: Recipe, path: Path) -> SplitModel:
    """The recipe's network with the weights of a safetensors file, in evaluation mode.

    Raises `DataError` when the file is missing or damaged, `ModelError` when it
    belongs to another network.
    """
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} is no safetensors checkpoint, or damaged ({error})") from error
    model = recipe.finished()
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(f"{path} does not fit the network of recipe {recipe.name!r}: {error}") from error
    for name, t in state.items():
        if t.is_floating_point() and not bool(torch.isfinite(t).all()):
            raise ModelError(f"{path}: {name} holds NaN or infinite weights: take an earlier checkpoint")
    return model.eval()


def _history(checkpoint: Path) -> dict[str, Any]:
    """The command and the seconds of the training that `Trained.save` noted in a checkpoint."""
    try:
        found = json.loads(_note(checkpoint, "training") or "{}")
    except ValueError:
        return {"command": ""}
    return {"command": "", **found} if isinstance(found, dict) else {"command": ""}


def _note(checkpoint: Path, name: str) -> str:
    """What `Trained.save` noted in a checkpoint under this name, or ""."""
    with safe_open(checkpoint, framework="pt") as file:
        return str((file.metadata() or {}).get(name, ""))


def finish(
    recipe: Recipe,
    model: SplitModel,
    splits: Splits,
    *,
    threads: int,
    history: Mapping[str, Any],
    allow_unstable: bool = False,
    objective: Objective | None = None,
    pruned: PrunedTails | None = None,
    accuracy_before: Mapping[str, Any] | None = None,
    orders: str = "",
    compiling: CompileProgress | Span | None = None,
) -> Trained:
    """Judge, calibrate, measure and pack a trained model; `history` says how it was trained.

    pruned, accuracy_before  when its tails were pruned: what was found, and how good they were before
    orders                   of the units of tails that are or were pruned (`PrunedTails.note`)
    """
    images = splits.train.pixels[:CALIBRATION_IMAGES]
    whole = Span.of(compiling)
    planning, judging, measuring, packing = whole.parts(1 if orders else 0, 4, 1, 15)
    compilers = restored(model, orders, objective=objective, span=planning) if orders else None
    stability = judge_tails(
        model, images, splits.validation.pixels, allow_unstable=allow_unstable, progress=judging
    )
    measuring.at(0.0, "calibrating exits")
    validation, test = Verdicts.of(model, splits.validation), Verdicts.of(model, splits.test)
    calibration = Calibration.fit(validation, recipe.offload_share)
    temperatures = calibration.temperatures
    metrics = {
        "validation": accuracies(validation),
        "test": accuracies(test),
        "calibration_error": calibration_errors(test, temperatures),
        "routed": {"validation": routed(validation, calibration), "test": routed(test, calibration)},
        "accuracy_offload_curve": {
            "validation": curve(validation, temperatures),
            "test": curve(test, temperatures),
        },
    }
    edge, cloud = pack(
        model,
        images,
        temperatures=temperatures,
        thresholds=calibration.thresholds,
        metrics=metrics,
        objective=objective,
        held_out_images=splits.validation.pixels,
        judged=True,
        compilers=compilers,
        progress=packing,
    )
    described = edge.describe()
    report = {
        "model": edge.model,
        "version": edge.version,
        **history,
        "recipe": {
            "name": recipe.name,
            "epochs": recipe.epochs,
            "batch": recipe.batch,
            "peak_rate": recipe.peak_rate,
            "weight_decay": recipe.weight_decay,
            "objective": repr(recipe.objective),
            **({"phases": [repr(phase) for phase in recipe.phases]} if recipe.phases else {}),
            "seed": recipe.seed,
            "threads": threads,
            "offload_share": recipe.offload_share,
        },
        "images": {
            "train": len(splits.train),
            "validation": len(splits.validation),
            "test": len(splits.test),
        },
        "edge_budget": model.edge_budget(),
        "stages": described["stages"],
        "exits": described["exits"],
        "tails": {
            str(cut): {
                "macs": model.tail_macs(cut),
                "program_id": spec.program_id,
                "features": spec.features,
                "uplink_bytes": spec.uplink_bytes,
                "reply_bytes": spec.reply_bytes,
                "key_bytes": spec.key_bytes,
            }
            for cut, spec in edge.cuts.items()
        },
        "stability": {str(cut): found.to_json() for cut, found in stability.items()},
        **({} if pruned is None else {"pruning": _pruning(pruned, cloud, accuracy_before)}),
        "metrics": metrics,
        "failure_prediction": {
            f"exit{i + 1}": failure_prediction(logits, test.labels, temperatures[i])
            for i, logits in enumerate(test.exits)
        },
        "first_1000_test_images": routed(test.take(1_000), calibration),
        "versions": {
            "python": platform.python_version(),
            **{name: packages.version(name) for name in ("torch", "numpy", "onnx", "safetensors")},
        },
    }
    return whole.ended(Trained(model, calibration, edge, cloud, report, stability, orders))


def _pruning(
    pruned: PrunedTails, cloud: CloudBundle, accuracy_before: Mapping[str, Any] | None
) -> dict[str, Any]:
    return {**pruned.report(cloud.programs), "accuracy_before": dict(accuracy_before or {})}
