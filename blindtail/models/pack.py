"""From a trained `SplitModel` to the pair of bundles, edge and cloud."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from blindtail.bundle import CloudBundle, EdgeBundle, content_version
from blindtail.errors import ModelError
from blindtail.he.compiler import compile_tail
from blindtail.he.frontend import fold_tail
from blindtail.he.spec import canonical_json
from blindtail.models.export import export_head
from blindtail.models.split import SplitModel


@torch.no_grad()
def activations(model: SplitModel, images: NDArray[Any], cut: int, batch: int = 500) -> NDArray[np.float64]:
    """Raw images (n, C, H, W) -> flattened activations at a cut, (n, features), as the edge computes them."""
    x = torch.from_numpy(model.preprocessing.apply(images))
    training = model.training
    model.eval()
    try:
        parts = [model.head(x[i : i + batch], cut).flatten(1) for i in range(0, len(x), batch)]
    finally:
        model.train(training)
    return torch.cat(parts).numpy().astype(np.float64)


def pack(
    model: SplitModel,
    calibration_images: NDArray[Any],
    *,
    temperatures: Sequence[float],
    thresholds: Sequence[float],
    metrics: Mapping[str, Any],
    version: str | None = None,
    lanes: int = 1,
) -> tuple[EdgeBundle, CloudBundle]:
    """Export the head, compile every tail, and describe both halves.

    calibration_images  raw training or validation images (n, C, H, W); the
                        compiler bounds every value and scale from them
    temperatures, thresholds  one per exit, see `ExitInfo`
    version             default: a short hash of everything in both files

    Raises `ModelError` when a weight is not finite, when a tail cannot be folded
    or compiled, or when a layer has no ONNX form.
    """
    for path, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{path} holds NaN or infinite weights: train again with a lower learning rate")
    if not model.cuts:
        raise ModelError(f"model {model.name!r} has no tail: give SplitModel one in `tails`")
    if len(calibration_images) == 0:
        raise ModelError("compiling a tail needs calibration images; some hundred are enough")
    programs = {}
    for cut in model.cuts:
        layers = fold_tail(model.tails[str(cut)], model.stage_infos[cut].output_shape)
        programs[cut] = compile_tail(layers, activations(model, calibration_images, cut), lanes=lanes)
        if programs[cut].spec.features != math.prod(model.stage_infos[cut].output_shape):
            raise ModelError(f"tail at cut {cut}: the compiled program takes another number of values")
    onnx = export_head(model)
    fields: dict[str, Any] = {
        "model": model.name,
        "preprocessing": model.preprocessing,
        "class_names": model.class_names,
        "stages": model.stage_infos,
        "exits": model.exit_infos(temperatures, thresholds),
        "cuts": {cut: program.spec for cut, program in programs.items()},
        "edge_budget": model.edge_budget(),
        "onnx": onnx,
        # What an edge assumes of the cloud before it has measured anything.
        "metrics": {
            **metrics,
            "predicted_eval_s": {str(cut): p.predicted_s("seal") for cut, p in programs.items()},
        },
    }
    if version is None:
        draft = EdgeBundle(version="draft", **fields)
        # Program ids cover the tails' weights, so this covers both files.
        version = content_version(canonical_json(draft.describe()), *(onnx[name] for name in sorted(onnx)))
    return EdgeBundle(version=version, **fields), CloudBundle(model.name, version, programs)
