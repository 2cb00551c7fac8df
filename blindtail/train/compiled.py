"""From a trained network to what runs: exits calibrated, ranges judged, tails compiled, two files."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from blindtail.bundle import CloudBundle, EdgeBundle
from blindtail.errors import DataError, InputError
from blindtail.he.objective import Objective
from blindtail.he.stability import Stability
from blindtail.models.data import Images
from blindtail.models.pack import judge_tails, pack
from blindtail.models.refresh import Refresh
from blindtail.models.split import SplitModel
from blindtail.progress import Progress, Span
from blindtail.train.fit import bounded, fit
from blindtail.train.measure import Calibration, Verdicts, accuracies, calibration_errors, curve, routed
from blindtail.train.pruning.owner import PrunedTails, Pruning, prune_tails
from blindtail.train.recipe import JointCrossEntropy, Recipe
from blindtail.train.run import CALIBRATION_IMAGES, writing

#: Fewer labelled images say too little of an exit's temperature and threshold.
LEAST_IMAGES = 20


@dataclass(frozen=True)
class Compiled:
    """Both halves of a model, what its exits were calibrated to, and how stable its tails are, by cut.

    pruned  where tails were pruned: the model with its new weights, and what pruning found
    """

    edge: EdgeBundle
    cloud: CloudBundle
    calibration: Calibration
    stability: Mapping[int, Stability]
    pruned: PrunedTails | None = None

    @property
    def pruning(self) -> dict[str, Any]:
        """What was pruned, and each tail's costs before and after; empty where nothing was."""
        return {} if self.pruned is None else self.pruned.report(self.cloud.programs)

    def save(self, folder: Path | str) -> None:
        """Write edge.bt and cloud.bt, each whole or not at all. Raises `DataError`."""
        with writing(Path(folder)):
            self.edge.save(Path(folder) / "edge.bt")
            self.cloud.save(Path(folder) / "cloud.bt")


def compile_model(
    model: SplitModel,
    validation: Images,
    *,
    calibration_images: NDArray[Any] | None = None,
    objective: Objective | None = None,
    offload_share: float = 0.3,
    lanes: int = 1,
    allow_unstable: bool = False,
    refresh: Refresh | None = None,
    prune: Pruning | None = None,
    progress: Progress | Span | None = None,
) -> Compiled:
    """Compile a trained model; nothing is trained, but for pruned tails.

    validation          labelled images: exits get their temperatures and thresholds from them
    calibration_images  raw images (n, C, H, W) from which the compiler bounds every value of a
                        tail, training images at best; without them those of `validation`
    objective           what plans are chosen for; by default the fastest within a budget of
                        keys (`compile_tail`)
    refresh             leave to decrypt between round trips, so that tails may hold ReLU, max pooling and
                        skips: devices then see the activations in between (docs/threat-model.md)
    offload_share       of images that reach the tail, at most, by the default thresholds
    prune               prune the tails and retrain them on images of its own; stages and exits stay
    progress            called with (done, total, what) as the work goes on: `done` never falls and ends
                        at `total`. What it raises ends the work, before anything is written

    The model is used in evaluation mode and left unchanged. Raises `DataError` for too few
    images or other classes, `InputError` for images that do not fit, and `ModelError` as
    `blindtail.models.pack.pack` does.
    """
    if len(validation) < LEAST_IMAGES:
        raise DataError(
            f"{len(validation)} validation images are too few to calibrate exits: give some hundred"
        )
    if not 0.0 <= offload_share <= 1.0:
        raise DataError("offload_share is a part of the images, between 0 and 1")
    try:
        model.preprocessing.apply(validation.pixels[:1])
    except InputError as error:
        raise InputError(f"validation images: {error}") from error
    if int(validation.labels.max()) >= len(model.class_names):
        raise DataError(
            f"validation labels go up to {validation.labels.max()}, model {model.name!r} has classes 0 to "
            f"{len(model.class_names) - 1}: number them as in its class_names"
        )
    own, whole = calibration_images is None, Span.of(progress)
    pruning, judging, packing = whole.parts(0 if prune is None else 20, 4, 16)
    pruning.at(0.0, "reading the model" if prune is None else "pruning and retraining")
    pruned = None if prune is None else _pruned(model, prune, lanes, objective, pruning)
    model = model if pruned is None else pruned.model
    images = validation.pixels if calibration_images is None else calibration_images
    stability = judge_tails(
        model,
        images,
        None if own else validation.pixels,
        allow_unstable=allow_unstable,
        refresh=refresh,
        progress=judging,
    )
    packing.at(0.0, "calibrating exits")
    verdicts = Verdicts.of(model, validation)
    calibration = Calibration.fit(verdicts, offload_share)
    temperatures = calibration.temperatures
    edge, cloud = pack(
        model,
        images,
        temperatures=temperatures,
        thresholds=calibration.thresholds,
        metrics={
            "validation": accuracies(verdicts),
            "calibration_error": calibration_errors(verdicts, temperatures),
            "routed": {"validation": routed(verdicts, calibration)},
            "accuracy_offload_curve": {"validation": curve(verdicts, temperatures)},
        },
        lanes=lanes,
        objective=objective,
        held_out_images=None if own else validation.pixels,
        judged=True,
        refresh=refresh,
        compilers=None if pruned is None else pruned.compilers,
        progress=packing,
    )
    return whole.ended(Compiled(edge, cloud, calibration, stability, pruned))


def _pruned(
    model: SplitModel, how: Pruning, lanes: int, objective: Objective | None, span: Span
) -> PrunedTails:
    """A copy of the model with its tails pruned."""
    model = copy.deepcopy(model).eval()
    recipe = Recipe(
        name=model.name,
        data="own",
        build=lambda: model,
        objective=JointCrossEntropy((0.0,) * len(model.exits_after)),
        epochs=how.epochs,
        batch=how.batch,
        peak_rate=how.peak_rate,
        seed=how.policy.seed,
    )

    def retrain(after_step: Callable[[], None], part: Span) -> None:
        fit(
            recipe,
            how.images,
            model=model,
            threads=how.threads,
            progress=lambda done, steps, loss: part.at(done / steps, f"retraining, loss {loss:.3f}"),
            only_tails=True,
            after_step=after_step,
        )

    with bounded(how.threads, how.policy.seed):
        pixels = how.images.pixels[:CALIBRATION_IMAGES]
        return prune_tails(model, pixels, how.policy, retrain, lanes=lanes, objective=objective, span=span)


__all__ = ["Compiled", "Refresh", "compile_model"]
