"""From a trained `SplitModel` to the pair of bundles, edge and cloud."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from blindtail.bundle import CloudBundle, EdgeBundle, content_version
from blindtail.errors import ConfigError, InputError, ModelError
from blindtail.he import choice
from blindtail.he.compiler import check_depth
from blindtail.he.objective import Objective
from blindtail.he.plan import Plan
from blindtail.he.spec import canonical_json
from blindtail.he.stability import WAYS_OUT, Stability, Verdict, check, enforce
from blindtail.he.tiling import Tiling
from blindtail.interludes import RefreshedTail, graph_name
from blindtail.models.export import export_head
from blindtail.models.refresh import Refresh, RefreshedProgram, runs_of
from blindtail.models.split import SplitModel
from blindtail.models.tails import (
    TailCompiler,
    activations,
    by_cut,
    check_model,
    compile_tails,
    folded,
    refresh_tails,
)
from blindtail.progress import Progress, Span

#: Images on which a new model's head is compared with the one that devices hold.
_COMPARED = 32


def pack(
    model: SplitModel,
    calibration_images: NDArray[Any],
    *,
    temperatures: Sequence[float],
    thresholds: Sequence[float],
    metrics: Mapping[str, Any],
    version: str | None = None,
    lanes: int = 1,
    objective: Objective | None = None,
    held_out_images: NDArray[Any] | None = None,
    allow_unstable: bool = False,
    judged: bool = False,
    refresh: Refresh | None = None,
    compilers: Mapping[int, TailCompiler] | None = None,
    progress: Progress | Span | None = None,
) -> tuple[EdgeBundle, CloudBundle]:
    """Export the head, compile every tail, and describe both halves.

    calibration_images  raw training or validation images (n, C, H, W); the
                        compiler bounds every value and scale from them
    temperatures, thresholds  one per exit, see `ExitInfo`
    version             default: a short hash of everything in both files
    objective           what plans are chosen for (`blindtail plan`); by default the fastest within
                        a budget of keys (`compile_tail`)
    held_out_images, allow_unstable  for the stability gate, see `judge_tails`; a bound on "disagreement"
                        is held against the margins of these images
    judged              True when the caller has had it judge this model already
    refresh             the owner's leave to decrypt between round trips: tails may then hold ReLU, max
                        pooling and skips, and be as deep as they like. THE DEVICE SEES THE ACTIVATIONS
                        in between (docs/threat-model.md). A tail that needs no refresh gets none
    compilers           by cut, what compiles a tail in place of `compile_tail`: a pruned one has its
                        own (`blindtail.train.pruning`), and lanes and objective are its own then
    progress            called with (done, total, what) as the work goes on (`compile_tail`)

    Raises `ModelError` when a weight is not finite, when a tail cannot be folded
    or compiled, when one is unstable, when no plan keeps the objective's bounds, or
    when a layer has no ONNX form.
    """
    whole = Span.of(progress)
    judging, compiling, rest = whole.parts(0 if judged else 3, 16, 1)
    if not judged:
        judge_tails(
            model,
            calibration_images,
            held_out_images,
            allow_unstable=allow_unstable,
            refresh=refresh,
            progress=judging,
        )
    if refresh is None:
        alone = compile_tails(
            model,
            calibration_images,
            lanes,
            objective=objective,
            compilers=compilers,
            span=compiling,
            held_out_images=held_out_images,
        )
        tails = {cut: RefreshedProgram((program,), ()) for cut, program in alone.items()}
    else:
        if lanes != 1 or objective is not None or compilers is not None:
            raise ConfigError(
                "a refreshed tail takes one image at a time, has no objective and is not pruned"
            )
        tails = refresh_tails(model, calibration_images, refresh, compiling)
    programs = {cut: tail.programs[0] for cut, tail in tails.items()}
    chains = {cut: tail for cut, tail in tails.items() if len(tail.programs) > 1}
    rest.at(0.0, "exporting the head")
    onnx = export_head(model)
    for cut, tail in chains.items():
        onnx |= {graph_name(cut, i): made.onnx for i, made in enumerate(tail.interludes)}
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
            "predicted_eval_s": {str(cut): tail.predicted_s for cut, tail in tails.items()},
        },
        "refreshed": {
            cut: RefreshedTail(tuple(p.spec for p in tail.programs), tuple(i.inputs for i in tail.interludes))
            for cut, tail in chains.items()
        },
    }
    if version is None:
        draft = EdgeBundle(version="draft", **fields)
        # Program ids cover the tails' weights, so this covers both files.
        version = content_version(canonical_json(draft.describe()), *(onnx[name] for name in sorted(onnx)))
    following = {cut: tail.programs[1:] for cut, tail in chains.items()}
    edge, cloud = EdgeBundle(version=version, **fields), CloudBundle(model.name, version, programs, following)
    return whole.ended((edge, cloud))


def pack_tail(
    model: SplitModel,
    calibration_images: NDArray[Any],
    like: EdgeBundle,
    *,
    version: str | None = None,
    shrink: bool = False,
    held_out_images: NDArray[Any] | None = None,
    allow_unstable: bool = False,
    judged: bool = False,
    progress: Progress | Span | None = None,
) -> CloudBundle:
    """New tails for devices that hold `like`: a cloud.bt that takes the place of its own.

    No device is touched: head and exits must be the ones in `like` (compared by what
    they compute on calibration images), and each tail is compiled to be told apart
    from the old one by nothing but its answers (`blindtail.he.compatible`).

    version  default: a short hash of the new programs
    shrink   scale logits down where they are larger than devices read: no label
             changes, but the tail's probabilities are less pronounced
    held_out_images, allow_unstable, judged, progress  as for `pack`

    Raises `ModelError` when the model is another, its head differs, or a tail
    cannot take the old one's place.
    """
    if (model.name, tuple(model.class_names)) != (like.model, like.class_names):
        raise ModelError(
            f"devices hold model {like.model!r}, this is {model.name!r}, or its classes differ: "
            "pack it as a model of its own"
        )
    if like.refreshed:
        raise ModelError(
            "devices hold a refreshed tail, whose segments cannot be replaced: pack the model anew and hand "
            "out its edge.bt"
        )
    if set(model.cuts) != set(like.cuts):
        raise ModelError(
            f"devices cut after stages {sorted(like.cuts)}, this model after {sorted(model.cuts)}"
        )
    whole = Span.of(progress)
    judging, compiling, rest = whole.parts(0 if judged else 3, 16, 1)
    if not judged:
        judge_tails(
            model, calibration_images, held_out_images, allow_unstable=allow_unstable, progress=judging
        )
    programs = compile_tails(model, calibration_images, like=like, shrink=shrink, span=compiling)
    rest.at(0.0, "comparing heads")
    images = calibration_images[:_COMPARED]
    for cut in model.cuts:
        ours, theirs = activations(model, images, cut), held_activations(like, images, cut)
        if not np.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * float(np.abs(theirs).max())):
            raise ModelError(
                f"the head differs from the one that devices hold (up to {np.abs(ours - theirs).max():.3g} "
                f"at cut {cut}): keep its weights while the tail is trained, or hand out a new edge.bt"
            )
    if version is None:
        version = content_version(*(p.spec.program_id.encode() for _, p in sorted(programs.items())))
    return whole.ended(CloudBundle(like.model, version, programs))


def plan_tails(model: SplitModel, objective: Objective, *, lanes: int = 1) -> dict[int, Plan | Tiling]:
    """The plan that `objective` chooses for each tail, before training, calibration data or keys.

    It depends on the sizes of layers and on which weights are zero. Raises `ModelError`,
    `NoPlan` among them.
    """
    return {cut: choice.best(folded(model, cut), objective, lanes=lanes) for cut in model.cuts}


def held_activations(bundle: EdgeBundle, images: NDArray[Any], cut: int) -> NDArray[np.float64]:
    """Raw images (n, C, H, W) -> activations (n, features) as devices that hold `bundle` compute them."""
    import onnxruntime

    sessions = [
        onnxruntime.InferenceSession(bundle.onnx[f"stage{i}"], providers=["CPUExecutionProvider"])
        for i in range(cut + 1)
    ]
    rows = []
    for x in bundle.preprocessing.apply(images):
        x = x[None]
        for session in sessions:
            (x,) = session.run(None, {session.get_inputs()[0].name: x})
        rows.append(x.reshape(-1))
    return np.stack(rows).astype(np.float64)


def judge_tails(
    model: SplitModel,
    calibration_images: NDArray[Any],
    held_out_images: NDArray[Any] | None = None,
    *,
    allow_unstable: bool = False,
    refresh: Refresh | None = None,
    progress: Progress | Span | None = None,
) -> dict[int, Stability]:
    """The stability gate (`blindtail.he.stability`) on every tail: its findings, by cut.

    held_out_images  raw images (m, C, H, W) that are not among the calibration images. Without
                     any, every fifth calibration image is kept aside for this; a tail is
                     still compiled from all of them
    progress         as for `pack`
    refresh          as for `pack`: each segment is judged, and the worst one's findings are returned

    Warns of each layer whose range does not hold. Raises `ModelError` with the layer's name and
    the way out when a tail escapes, unless `allow_unstable`; also for what `pack` refuses.
    """
    check_model(model, calibration_images)
    found, whole = {}, Span.of(progress)
    for cut, span in by_cut(model, whole):
        span.at(0.0, "ranges")
        where, tail, shape = f"tail at cut {cut}", model.tail(cut), model.stage_infos[cut].output_shape
        values = _named(model, calibration_images, cut, "calibration images")
        held = None
        if held_out_images is not None and len(held_out_images):
            held = _named(model, held_out_images, cut, "held-out images")
        if not all(np.isfinite(x).all() for x in (values, held) if x is not None):
            raise ModelError(f"{where}: the head gives NaN or infinity for it; check images and weights")
        if refresh is not None:
            found[cut] = _judged_runs(model, cut, values, held, refresh, allow_unstable, span)
            continue
        try:
            with np.errstate(all="ignore"):
                layers = folded(model, cut, span)
        except ModelError as error:
            # Folding compares with the tail itself, and cannot where that overflows.
            name = _overflowing(tail, values, shape)
            if name is None:
                raise
            raise ModelError(f"{where}, layer {name}: values overflow; {WAYS_OUT}") from error
        found[cut] = check(layers, values, held)
        enforce(found[cut], where, allow_unstable=allow_unstable)
    return whole.ended(found)


def _judged_runs(
    model: SplitModel,
    cut: int,
    values: NDArray[np.float64],
    held: NDArray[np.float64] | None,
    refresh: Refresh,
    allow_unstable: bool,
    span: Span,
) -> Stability:
    tail, shape = model.tail(cut), model.stage_infos[cut].output_shape
    own, other = span.parts(1, 1)
    try:
        runs = runs_of(tail, shape, values, refresh, progress=own)
        others = None if held is None else runs_of(tail, shape, held, refresh, progress=other)
    except ModelError as error:
        raise ModelError(f"tail at cut {cut}: {error}") from error
    judged = []
    for k, run in enumerate(runs):
        judged.append(check(run.layers, run.values, None if others is None else others[k].values))
        enforce(judged[-1], f"tail at cut {cut}, segment {run.name}", allow_unstable=allow_unstable)
    return max(judged, key=lambda one: list(Verdict).index(one.verdict))


@torch.no_grad()
def _overflowing(tail: nn.Module, values: NDArray[np.float64], shape: Sequence[int]) -> str | None:
    """The first layer of a tail that overflows in double precision on (n, features) values, if one does."""
    tail = copy.deepcopy(tail).double().eval()
    found: list[str] = []

    def watch(name: str) -> Any:
        def look(layer: nn.Module, given: Any, out: Any) -> None:
            if isinstance(out, Tensor) and not bool(torch.isfinite(out).all()):
                found.append(name)

        return look

    for name, layer in tail.named_modules():
        layer.register_forward_hook(watch(name or "output"))
    with suppress(Exception):  # what does not run at all has been named by whoever folds it
        tail(torch.from_numpy(values).reshape(-1, *shape))
    return found[0] if found else None


def _named(model: SplitModel, images: NDArray[Any], cut: int, what: str) -> NDArray[np.float64]:
    """Activations at a cut. Raises `InputError` saying which images do not fit."""
    try:
        return activations(model, images, cut)
    except InputError as error:
        raise InputError(f"{what}: {error}") from error


def check_tails(model: SplitModel) -> None:
    """What of `pack`'s refusals can be told before training: tails that do not fold, or are too deep.

    Raises `ModelError` naming cut and layer.
    """
    for cut in model.cuts:
        try:
            check_depth(folded(model, cut))
        except ModelError as error:
            raise ModelError(_at(cut, error)) from error


def _at(cut: int, error: ModelError) -> str:
    said = str(error)
    return said if said.startswith("tail at cut") else f"tail at cut {cut}: {said}"


__all__ = [
    "TailCompiler",
    "activations",
    "check_tails",
    "held_activations",
    "judge_tails",
    "pack",
    "pack_tail",
    "plan_tails",
]
