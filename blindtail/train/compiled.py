"""From a trained network to what runs: exits calibrated, ranges judged, tails compiled, two files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from blindtail.bundle import CloudBundle, EdgeBundle
from blindtail.errors import DataError
from blindtail.he.objective import Objective
from blindtail.he.stability import Stability
from blindtail.models.data import Images
from blindtail.models.pack import judge_tails, pack
from blindtail.models.split import SplitModel
from blindtail.train.measure import Calibration, Verdicts, accuracies, calibration_errors, curve, routed
from blindtail.train.run import writing

#: Fewer labelled images say too little of an exit's temperature and threshold.
LEAST_IMAGES = 20


@dataclass(frozen=True)
class Compiled:
    """Both halves of a model, what its exits were calibrated to, and how stable its tails are, by cut."""

    edge: EdgeBundle
    cloud: CloudBundle
    calibration: Calibration
    stability: Mapping[int, Stability]

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
) -> Compiled:
    """Compile a trained model; nothing is trained.

    validation          labelled images: exits get their temperatures and thresholds from them
    calibration_images  raw images (n, C, H, W) from which the compiler bounds every value of a
                        tail, training images at best; without them those of `validation`
    objective           what plans are chosen for; by default the fastest within a budget of
                        keys (`compile_tail`)
    offload_share       of images that reach the tail, at most, by the default thresholds

    The model is used in evaluation mode and left unchanged. Raises `DataError` for too few
    images, and `ModelError` as `blindtail.models.pack.pack` does.
    """
    if len(validation) < LEAST_IMAGES:
        raise DataError(
            f"{len(validation)} validation images are too few to calibrate exits: give some hundred"
        )
    if not 0.0 <= offload_share <= 1.0:
        raise DataError("offload_share is a part of the images, between 0 and 1")
    own = calibration_images is None
    images = validation.pixels if calibration_images is None else calibration_images
    stability = judge_tails(model, images, None if own else validation.pixels, allow_unstable=allow_unstable)
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
        judged=True,
    )
    return Compiled(edge, cloud, calibration, stability)


__all__ = ["Compiled", "compile_model"]
