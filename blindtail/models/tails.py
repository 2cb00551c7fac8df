"""The tails of a `SplitModel`, folded and compiled: what `blindtail.models.pack` puts into files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from blindtail.bundle import EdgeBundle
from blindtail.errors import InputError, ModelError
from blindtail.he.compiler import compile_tail
from blindtail.he.frontend import fold_tail
from blindtail.he.layers import Affine, Layer
from blindtail.he.objective import DISAGREEMENT, Objective
from blindtail.he.program import Program
from blindtail.he.scales import LogitsTooLarge
from blindtail.models.refresh import Refresh, RefreshedProgram, refresh_tail
from blindtail.models.several import flat
from blindtail.models.split import SplitModel
from blindtail.progress import Span

#: A folded tail and activations at its cut, (n, features), to a program; told how far it is by a span.
TailCompiler = Callable[[Sequence[Layer], NDArray[np.float64], Span, NDArray[np.float64] | None], Program]


@torch.no_grad()
def activations(model: SplitModel, images: NDArray[Any], cut: int, batch: int = 500) -> NDArray[np.float64]:
    """Raw images (n, C, H, W) -> flattened activations at a cut, (n, features), as the edge computes them.

    Of a stage that gives several tensors: each flattened, one after the other (`several.flat`).
    """
    x = torch.from_numpy(model.preprocessing.apply(images))
    training = model.training
    model.eval()
    try:
        parts = [flat(model.head(x[i : i + batch], cut)) for i in range(0, len(x), batch)]
    finally:
        model.train(training)
    return torch.cat(parts).numpy().astype(np.float64)


def compile_tails(
    model: SplitModel,
    calibration_images: NDArray[Any],
    lanes: int = 1,
    like: EdgeBundle | None = None,
    shrink: bool = False,
    objective: Objective | None = None,
    compilers: Mapping[int, TailCompiler] | None = None,
    span: Span | None = None,
    held_out_images: NDArray[Any] | None = None,
) -> dict[int, Program]:
    """Each tail's program, by cut; for devices that hold `like`, if any. Raises `ModelError` with the cut.

    held_out_images  whose margins count where the objective bounds how often labels may change
    """
    check_model(model, calibration_images)
    asked = objective is not None and DISAGREEMENT in objective.at_most
    others = held_out_images if asked else None
    programs = {}
    for cut, part in by_cut(model, Span.of(span)):
        folding, compiling = part.parts(1, 4)
        layers = folded(model, cut, folding)
        held = None if like is None else like.cuts[cut]
        values = activations(model, calibration_images, cut)
        margins = None if others is None else activations(model, others, cut)
        try:
            if compilers is not None and cut in compilers:
                programs[cut] = compilers[cut](layers, values, compiling, margins)
            else:
                programs[cut] = compile_tail(
                    layers,
                    values,
                    lanes=lanes,
                    like=held,
                    objective=objective,
                    margins=margins,
                    progress=compiling,
                )
        except LogitsTooLarge as error:
            if not shrink:
                raise
            smaller = _shrunk(layers, 0.999 * error.factor)
            programs[cut] = compile_tail(smaller, values, like=held, progress=compiling)
        except ModelError as error:
            raise type(error)(f"tail at cut {cut}: {error}") from error
        if programs[cut].spec.features != math.prod(model.stage_infos[cut].output_shape):
            raise ModelError(f"tail at cut {cut}: the compiled program takes another number of values")
    return programs


def by_cut(model: SplitModel, span: Span) -> list[tuple[int, Span]]:
    """Each tail, with its part of a span."""
    return [(cut, part.parts(1, name=f"tail at cut {cut}: ")[0]) for cut, part in span.over(model.cuts)]


def folded(model: SplitModel, cut: int, span: Span | None = None) -> list[Layer]:
    """Raises `ModelError` naming cut and layer."""
    try:
        return fold_tail(model.tail(cut), model.stage_infos[cut].output_shape, span)
    except ModelError as error:
        raise ModelError(f"tail at cut {cut}: {error} (`blindtail lint` shows all of it)") from error


def _shrunk(layers: list[Layer], factor: float) -> list[Layer]:
    """The logits times `factor`."""
    *rest, last = layers
    assert isinstance(last, Affine)  # what `fold_tail` ends with
    return [*rest, last.times(factor)]


def refresh_tails(
    model: SplitModel, calibration_images: NDArray[Any], refresh: Refresh, whole: Span
) -> dict[int, RefreshedProgram]:
    """Each tail as segments and interludes, by cut. Raises `ModelError` with the cut."""
    check_model(model, calibration_images)
    made = {}
    for cut, span in by_cut(model, whole):
        values, shape = activations(model, calibration_images, cut), model.stage_infos[cut].output_shape
        try:
            made[cut] = refresh_tail(model.tail(cut), shape, values, refresh, span)
        except ModelError as error:
            raise type(error)(f"tail at cut {cut}: {error}") from error
    return made


def check_model(model: SplitModel, calibration_images: NDArray[Any]) -> None:
    """Raises `ModelError` or `InputError` where no tail of it could be compiled, from no such images."""
    for path, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{path} holds NaN or infinite weights: train again with a lower learning rate")
    if not model.cuts:
        raise ModelError(f"model {model.name!r} has no tail: give SplitModel one in `tails`")
    try:
        count = len(np.asarray(calibration_images))
    except (TypeError, ValueError) as error:
        raise InputError(
            "calibration images are one array (n, C, H, W), for instance np.stack(images): images of "
            "different sizes, or none at all, are not"
        ) from error
    if count == 0:
        raise ModelError("compiling a tail needs calibration images; some hundred are enough")


__all__ = ["TailCompiler", "activations", "by_cut", "check_model", "compile_tails", "folded", "refresh_tails"]
