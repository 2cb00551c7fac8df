"""The tails of a `SplitModel`, pruned: what `blindtail train --prune` and `compile_model` call."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blindtail.errors import ConfigError, DataError, ModelError
from blindtail.he.compiler import compile_plan, compile_tail
from blindtail.he.frontend import fold_tail
from blindtail.he.layers import FloatArray, Layer
from blindtail.he.objective import Objective
from blindtail.he.program import Program
from blindtail.models.data import Images
from blindtail.models.pack import TailCompiler, activations
from blindtail.models.split import SplitModel
from blindtail.models.tails import by_cut
from blindtail.progress import Span
from blindtail.train.pruning.chain import Chain, Masks, chain_of
from blindtail.train.pruning.compiled import Arranged, counted, plan_for
from blindtail.train.pruning.groups import Groups, tiles
from blindtail.train.pruning.p4e import Pruned, prune
from blindtail.train.pruning.policy import Policy

#: Trains all tails on; calls its argument after each step of the optimizer. The span is for this training.
RetrainTails = Callable[[Callable[[], None], Span], None]


@dataclass(frozen=True)
class Pruning:
    """For `compile_model`: a policy, and what tails are retrained with.

    images     labelled training images
    epochs     of each retraining: one for the baselines, two for "p4e"
    peak_rate  of the one-cycle schedule
    """

    policy: Policy
    images: Images
    epochs: int = 10
    batch: int = 64
    peak_rate: float = 2.5e-3
    threads: int = 1


@dataclass(frozen=True, eq=False)
class PrunedTails:
    """Tails after pruning, by cut: what was found, what they cost before, how they are compiled.

    model  whose tails were pruned, in place
    """

    model: SplitModel
    policy: Policy
    found: Mapping[int, Pruned]
    before: Mapping[int, Mapping[str, Any]]
    names: Mapping[int, Sequence[str]]
    arranged: Mapping[int, Arranged] = field(repr=False)

    @property
    def compilers(self) -> dict[int, TailCompiler]:
        """For `blindtail.models.pack.pack`."""
        return {cut: how.compile for cut, how in self.arranged.items()}

    def report(self, programs: Mapping[int, Program]) -> dict[str, Any]:
        """What was pruned, and what each tail costs before and after: for report.json."""
        policy = asdict_policy(self.policy)
        tails = {}
        for cut, found in self.found.items():
            layers = zip(self.names[cut], found.zero_groups, found.left, strict=True)
            tails[str(cut)] = {
                "layers": [
                    {"name": name, "zero_groups": zero, "weights_left": left} for name, zero, left in layers
                ],
                "before": dict(self.before[cut]),
                "after": dict(counted(programs[cut])),
            }
        return {"policy": policy, "tails": tails}

    def note(self) -> str:
        """The orders as JSON, for the checkpoint: compiled without them, a pruned tail gains nothing."""
        return json.dumps(
            {
                str(cut): {"lanes": how.lanes, "elements": [order.tolist() for order in how.elements]}
                for cut, how in self.arranged.items()
                if how.made is not None
            }
        )


def asdict_policy(policy: Policy) -> dict[str, Any]:
    """A policy for JSON."""
    fields = {name: getattr(policy, name) for name in policy.__dataclass_fields__}
    return {**fields, "layers": dict(policy.layers), "tile": list(policy.tile)}


def prune_tails(
    model: SplitModel,
    calibration_images: NDArray[Any],
    policy: Policy,
    retrain: RetrainTails,
    *,
    lanes: int = 1,
    objective: Objective | None = None,
    span: Span | None = None,
) -> PrunedTails:
    """Prune every tail of a trained model in place, one after another; stages and exits stay.

    calibration_images  raw images (n, C, H, W): what the compiler sizes values from
    lanes, objective    what the tails will be compiled for; diagonals are those of that plan
    span                told how far it is (`blindtail.progress`)

    Raises `ConfigError` when the policy names a layer that no tail has, and `ModelError`
    when a tail cannot be compiled or pruned.
    """
    shapes = {cut: model.stage_infos[cut].output_shape for cut in model.cuts}
    chains = {cut: chain_of(model.tail(cut), shapes[cut]) for cut in model.cuts}
    _check_names(policy, chains.values())
    held: list[Masks] = []
    found, before, arranged = {}, {}, {}
    for cut, part in by_cut(model, Span.of(span)):
        chain, (folding, compiling, planning, pruning) = chains[cut], part.parts(1, 2, 2, 15)
        layers = fold_tail(model.tail(cut), shapes[cut], folding)
        values = activations(model, calibration_images, cut)
        unpruned = compile_tail(
            layers, values, lanes=lanes, objective=objective, progress=compiling.named("unpruned: ")
        )
        before[cut] = counted(unpruned)
        made, groups = None, [tiles(layer.shape, policy.tile) for layer in chain.layers]
        if policy.groups == "diagonal":
            made, groups = by_diagonals(chain, layers, values, lanes, objective, planning)

        def train_on(masks: Masks, part: Span, others: tuple[Masks, ...] = tuple(held)) -> None:
            def keep() -> None:
                for each in (*others, masks):
                    each.apply()

            retrain(keep, part)

        found[cut] = prune(chain, groups, policy, train_on, pruning)
        held.append(found[cut].masks)
        arranged[cut] = Arranged(made, found[cut].elements, lanes, objective)
    names = {cut: chain.names for cut, chain in chains.items()}
    return PrunedTails(model, policy, found, before, names, arranged)


def check_layers(model: SplitModel, policy: Policy) -> None:
    """Raises `ConfigError` when the policy names a layer that no tail of this network has."""
    shapes = {cut: model.stage_infos[cut].output_shape for cut in model.cuts}
    _check_names(policy, [chain_of(model.tail(cut), shapes[cut]) for cut in model.cuts])


def _check_names(policy: Policy, chains: Iterable[Chain]) -> None:
    known = sorted({name for chain in chains for name in chain.names})
    if unknown := sorted(set(policy.layers) - set(known)):
        raise ConfigError(f"no tail has a layer {unknown[0]!r} to prune; there are {', '.join(known)}")


def by_diagonals(
    chain: Chain,
    layers: Sequence[Layer],
    values: FloatArray,
    lanes: int,
    objective: Objective | None,
    span: Span | None = None,
) -> tuple[Any, list[Groups]]:
    """The plan of a tail (`plan_for`) as if no weight were zero, and its layers' groups by diagonal."""
    planning, compiling = (part.named("diagonals: ") for part in Span.of(span).parts(1, 1))
    planning.at(0.0, "looking at plans")
    full = chain.filled(layers)
    made = plan_for(full, lanes=lanes, objective=objective)
    return made, chain.diagonals(compile_plan(full, values, made, compiling))


def restored(
    model: SplitModel,
    note: str,
    lanes: int = 1,
    objective: Objective | None = None,
    span: Span | None = None,
) -> dict[int, TailCompiler]:
    """How the tails of a pruned checkpoint are compiled, from what `PrunedTails.note` wrote.

    span  told of each tail (`blindtail.progress`)

    Raises `DataError` when the note does not belong to this model.
    """
    found, whole = dict[int, TailCompiler](), Span.of(span)
    try:
        noted = list(json.loads(note).items())
        for (text, entry), part in whole.over(noted):
            part.at(0.0, f"tail at cut {text}: the plan that it was pruned by")
            cut = int(text)
            shape = model.stage_infos[cut].output_shape
            chain = chain_of(model.tail(cut), shape)
            orders = tuple(np.asarray(order, np.int64) for order in entry["elements"])
            widths = [
                np.array_equal(np.sort(o), np.arange(w)) for o, w in zip(orders, chain.widths, strict=True)
            ]
            if not all(widths):
                raise ValueError("no orders of its elements")
            held = int(entry["lanes"])
            if held < 1 or held & (held - 1):
                raise ValueError("lanes are no power of two")
            full = chain.filled(fold_tail(model.tail(cut), shape))
            made = plan_for(full, lanes=held, objective=objective)
            found[cut] = Arranged(made, orders, held, objective).compile
    except (ModelError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        whole.at(0.0, "the orders of pruned tails")  # what a caller raised to end the work is raised again
        raise DataError(
            f"the checkpoint's orders of pruned tails are damaged ({error}): prune again"
        ) from error
    return found


__all__ = ["PrunedTails", "Pruning", "by_diagonals", "check_layers", "prune_tails", "restored"]
