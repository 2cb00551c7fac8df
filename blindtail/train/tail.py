"""A better tail for devices that are out there: head and exits stay, the tail is trained on."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from blindtail.bundle import CloudBundle, EdgeBundle
from blindtail.errors import ConfigError
from blindtail.he.stability import Stability
from blindtail.models.pack import judge_tails, pack_tail
from blindtail.models.split import SplitModel
from blindtail.progress import Progress as CompileProgress
from blindtail.progress import Span
from blindtail.train.fit import Progress, bounded, fit
from blindtail.train.measure import Verdicts, accuracies
from blindtail.train.recipe import Recipe
from blindtail.train.run import (
    CALIBRATION_IMAGES,
    Splits,
    from_checkpoint,
    save_report_and_weights,
    writing,
)


@dataclass(frozen=True)
class TrainedTail:
    """A cloud.bt that takes an older one's place, and how much better it is; `stability` by cut."""

    model: SplitModel
    cloud: CloudBundle
    report: Mapping[str, Any]
    stability: Mapping[int, Stability]

    def save(self, folder: Path) -> None:
        """Write cloud.bt, report.json and model.safetensors, each whole or not at all. Raises `DataError`."""
        with writing(folder):
            self.cloud.save(folder / "cloud.bt")
            save_report_and_weights(folder, self.report, self.model)


def train_tail(
    recipe: Recipe,
    splits: Splits,
    checkpoint: Path,
    like: EdgeBundle,
    *,
    threads: int = 1,
    progress: Progress | None = None,
    command: str = "",
    allow_unstable: bool = False,
    compiling: CompileProgress | None = None,
) -> TrainedTail:
    """Train the tails of `checkpoint` for `recipe.epochs` more and compile them for devices that hold `like`.

    checkpoint  model.safetensors with the head that is in `like`
    compiling   told of the compile, as `progress` is of the training

    The same recipe, data, thread count and library versions give the same bytes.
    Raises `DataError` and `ModelError` (see `blindtail.models.pack.pack_tail`); the stability
    gate judges what was trained, not what the checkpoint holds.
    """
    if recipe.phases:
        raise ConfigError("the tails of a recipe with phases are not trained on yet: pack its model anew")
    start, whole = time.perf_counter(), Span.of(compiling)
    judging, packing = whole.parts(1, 4)
    model = from_checkpoint(recipe, checkpoint)
    images = splits.train.pixels[:CALIBRATION_IMAGES]
    with bounded(threads, recipe.seed):
        before = {
            "validation": accuracies(Verdicts.of(model, splits.validation)),
            "test": accuracies(Verdicts.of(model, splits.test)),
        }
        # A wrong checkpoint is told of now, not after the training.
        pack_tail(model, images, like, shrink=True, judged=True)
    # From weights that are good already: a third of the rate that they were trained with.
    gentle = replace(recipe, peak_rate=recipe.peak_rate / 3)
    fit(gentle, splits.train, model=model, threads=threads, progress=progress, only_tails=True)
    with bounded(threads, recipe.seed):
        stability = judge_tails(
            model, images, splits.validation.pixels, allow_unstable=allow_unstable, progress=judging
        )
        cloud = pack_tail(model, images, like, shrink=True, judged=True, progress=packing)
        after = {
            "validation": accuracies(Verdicts.of(model, splits.validation)),
            "test": accuracies(Verdicts.of(model, splits.test)),
        }
    report = {
        "model": cloud.model,
        "version": cloud.version,
        "for_devices_with": like.version,
        "command": command,
        "training_s": round(time.perf_counter() - start, 1),
        "epochs": recipe.epochs,
        "seed": recipe.seed,
        "programs": {str(cut): p.spec.program_id for cut, p in cloud.programs.items()},
        "stability": {str(cut): found.to_json() for cut, found in stability.items()},
        "before": before,
        "after": after,
    }
    return whole.ended(TrainedTail(model, cloud, report, stability))
