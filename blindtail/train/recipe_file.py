"""Recipes from a TOML file: a network, data, and phases with their losses and schedules.

    name = "ward"
    network = "net.py:ward"            # what makes a SplitModel; THE FILE'S CODE IS RUN
    data = "images"                    # "fashion", "digits", or a folder with train/, validation/ and test/
    seed = 0

    [[phase]]
    name = "together"
    epochs = 16
    peak_rate = 3e-3

      [[phase.loss]]
      kind = "cross-entropy"
      weight = 1.0
      exits = [0.1, 0.2]

A phase's `teacher` is the name of a `[teacher.NAME]` table, itself a recipe without data. `kind` names a
class of `LOSSES` or `SCHEDULES`; the rest of its table are that class's fields.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from blindtail.config import build, read_toml
from blindtail.errors import ConfigError
from blindtail.models import named
from blindtail.models.split import SplitModel
from blindtail.train.amm import BoundActivations
from blindtail.train.losses import (
    ContinuationDistillation,
    CrossEntropy,
    Distillation,
    Features,
    RangePenalty,
    SelfDistillation,
)
from blindtail.train.phases import Loss, Part, Phase, Schedule, Sum
from blindtail.train.progressive import Progressive
from blindtail.train.quail import LayerFromTeacher, TailFrom
from blindtail.train.recipe import Augmentation, Recipe, mirror
from blindtail.train.turning import AllAtOnce, LayerByLayer

#: Data that comes with blindtail or its optional packages; any other name is a folder.
KNOWN_DATA = ("fashion", "digits")
_AUGMENTATIONS: Mapping[str, Augmentation] = MappingProxyType({"mirror": mirror})
_DEEPEST = 4


#: What a file may name, by `kind`: dataclasses, whose fields are settings.
LOSSES: Mapping[str, Callable[..., Loss]] = MappingProxyType(
    {
        "cross-entropy": CrossEntropy,
        "self-distillation": SelfDistillation,
        "distillation": Distillation,
        "continuation": ContinuationDistillation,
        "features": Features,
        "range-penalty": RangePenalty,
        "layer-from-teacher": LayerFromTeacher,
        "tail-from": TailFrom,
    }
)
SCHEDULES: Mapping[str, Callable[..., Schedule]] = MappingProxyType(
    {
        "all-at-once": AllAtOnce,
        "layer-by-layer": LayerByLayer,
        "min-max": BoundActivations,
        "progressive": Progressive,
    }
)


@dataclass(frozen=True)
class _PhaseTable:
    """A phase but its losses and schedules."""

    name: str
    epochs: int
    trains: Part = "all"
    teacher: str | None = None
    peak_rate: float = 3e-3
    warm_up: float = 0.2
    weight_decay: float = 0.02
    clip_norm: float = 5.0
    rates: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _RecipeTable:
    """A recipe but its phases and teachers."""

    network: str
    name: str = ""
    data: str = ""
    seed: int = 0
    batch: int = 128
    augment: str | None = None
    offload_share: float = 0.32


@dataclass(frozen=True)
class _Network:
    """What makes the network; told by its name, so that a run is known by it."""

    where: str
    folder: Path = field(repr=False)

    def __call__(self) -> SplitModel:
        file, colon, name = self.where.rpartition(":")
        path = self.folder / file
        made = named.module(f"{path}:{name}" if colon and file.endswith(".py") else self.where)
        if not isinstance(made, SplitModel):
            raise ConfigError(
                f"{self.where} gives a {type(made).__name__}, not a SplitModel: say where it is cut and "
                "where its exits are (`SplitModel.from_parts`)"
            )
        return made


def load_recipe(path: Path, *, seed: int | None = None) -> Recipe:
    """The recipe in a file, with another seed where one is given. Networks are named, not made yet.

    Raises `ConfigError` naming the file, the phase and the setting.
    """
    return _recipe(read_toml(path), path, "", seed, 0)


def data_folder(recipe: Recipe, path: Path) -> Path | None:
    """Where the images of a recipe from this file lie; None for data that are known by name."""
    return None if recipe.data in KNOWN_DATA else path.resolve().parent / recipe.data


def _recipe(table: dict[str, Any], path: Path, where: str, seed: int | None, depth: int) -> Recipe:
    if depth > _DEEPEST:
        raise ConfigError(f"{path}: {where} has teachers of teachers more than {_DEEPEST} deep")
    phases = _tables(table.pop("phase", []), path, f"{where}phase")
    taught = table.pop("teacher", {})
    if not isinstance(taught, dict) or not all(isinstance(one, dict) for one in taught.values()):
        raise ConfigError(f"{path}: {where}teacher: write [{where}teacher.NAME] tables, each a recipe")
    told = build(_RecipeTable, table, where, str(path))
    if not phases:
        raise ConfigError(f"{path}: {where or 'a recipe '}needs phases: write [[{where}phase]] tables")
    if not depth and not told.data:
        raise ConfigError(
            f"{path}: setting 'data' is missing: {', '.join(KNOWN_DATA)}, or a folder of images"
        )
    if told.augment is not None and told.augment not in _AUGMENTATIONS:
        raise ConfigError(
            f"{path}: {where}augment: there is no {told.augment!r}, only {', '.join(_AUGMENTATIONS)}"
        )
    made = tuple(_phase(phase, path, f"{where}phase {i + 1}") for i, phase in enumerate(phases))
    teachers = {
        str(name): _recipe(one, path, f"{where}teacher.{name}.", seed, depth + 1)
        for name, one in taught.items()
    }
    for phase in made:
        if phase.teacher is not None and phase.teacher not in teachers:
            there = f": there are {', '.join(teachers)}" if teachers else ""
            raise ConfigError(
                f"{path}: {where}phase {phase.name!r} has a teacher {phase.teacher!r} and there is no "
                f"[{where}teacher.{phase.teacher}]{there}"
            )
    first = made[0]
    try:
        return Recipe(
            name=told.name or (where.rstrip(".").rpartition(".")[2] if where else path.stem),
            data=told.data,
            build=_Network(told.network, path.resolve().parent),
            objective=_Nothing(),
            epochs=sum(phase.epochs for phase in made),
            batch=told.batch,
            peak_rate=first.peak_rate,
            warm_up=first.warm_up,
            weight_decay=first.weight_decay,
            clip_norm=first.clip_norm,
            augment=None if told.augment is None else _AUGMENTATIONS[told.augment],
            seed=told.seed if seed is None else seed,
            offload_share=told.offload_share,
            phases=made,
            teachers=teachers,
        )
    except ConfigError as error:
        raise ConfigError(f"{path}: {where}{error}") from error


@dataclass(frozen=True)
class _Nothing:
    """The objective of a recipe whose phases have losses of their own."""

    def __call__(self, exits: Any, tails: Any, labels: Any) -> Any:
        raise ConfigError("this recipe trains by its phases alone")


def _phase(table: dict[str, Any], path: Path, where: str) -> Phase:
    losses = _tables(table.pop("loss", []), path, f"{where}.loss")
    schedules = _tables(table.pop("schedule", []), path, f"{where}.schedule")
    told = build(_PhaseTable, table, f"{where}.", str(path))
    where = f"{where} ({told.name!r})"
    if not losses:
        raise ConfigError(f"{path}: {where} has nothing to learn: write [[phase.loss]] tables")
    parts = []
    for i, one in enumerate(losses):
        at = f"{where}, loss {i + 1}"
        weight = one.pop("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise ConfigError(f"{path}: {at}: its weight is a number")
        parts.append((float(weight), _of_kind(LOSSES, one, path, at)))
    scheduled = tuple(
        _of_kind(SCHEDULES, one, path, f"{where}, schedule {i + 1}") for i, one in enumerate(schedules)
    )
    try:
        return Phase(
            name=told.name,
            epochs=told.epochs,
            loss=parts[0][1] if len(parts) == 1 and parts[0][0] == 1 else Sum(tuple(parts)),
            trains=told.trains,
            teacher=told.teacher,
            schedules=scheduled,
            peak_rate=told.peak_rate,
            warm_up=told.warm_up,
            weight_decay=told.weight_decay,
            clip_norm=told.clip_norm,
            rates=told.rates,
        )
    except ConfigError as error:
        raise ConfigError(f"{path}: {where}: {error}") from error


def _of_kind(known: Mapping[str, Callable[..., Any]], table: dict[str, Any], path: Path, where: str) -> Any:
    kind = table.pop("kind", None)
    if kind not in known:
        said = "its kind is missing" if kind is None else f"there is no kind {kind!r}"
        raise ConfigError(f"{path}: {where}: {said}; there are {', '.join(sorted(known)) or 'none'}")
    try:
        return build(known[kind], table, f"{where}: ", str(path))  # type: ignore[arg-type]
    except TypeError as error:  # a function, say: not for files
        raise ConfigError(f"{path}: {where}: {error}") from error


def _tables(found: Any, path: Path, where: str) -> list[dict[str, Any]]:
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise ConfigError(f"{path}: {where}: write [[{where}]] tables, one each")
    return found


def described() -> dict[str, dict[str, list[str]]]:
    """Kinds and their settings, for documentation and its test."""
    return {
        what: {
            kind: [
                f"{one.name}: {typing.get_type_hints(made)[one.name]}"
                + ("" if one.default is MISSING else f" = {one.default}")
                for one in fields(made)  # type: ignore[arg-type]
            ]
            for kind, made in sorted(known.items())
        }
        for what, known in (("losses", LOSSES), ("schedules", SCHEDULES))
    }


__all__ = ["KNOWN_DATA", "LOSSES", "SCHEDULES", "data_folder", "described", "load_recipe"]
