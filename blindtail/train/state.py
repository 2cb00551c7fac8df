"""A training run on disk: after a break it goes on with the same weights as if there had been none."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from blindtail.errors import DataError
from blindtail.models.data import Images
from blindtail.train.recipe import Recipe

#: Of the file; others are refused.
_FORMAT = 1
_AWAY = "remove its training.state, or choose another folder"


@dataclass(frozen=True)
class State:
    """After epoch `epoch` of phase `phase`, or before its first (0); of a finished run, after the last phase.

    model, optimizer, schedule  state dictionaries
    random   states of the run's generator and of torch
    history  a row for each epoch so far
    """

    phase: int
    epoch: int
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    schedule: Mapping[str, Any]
    random: Sequence[Tensor]
    history: Sequence[Mapping[str, Any]]

    @classmethod
    def of(
        cls,
        phase: int,
        epoch: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        generator: torch.Generator,
        history: Sequence[Mapping[str, Any]],
    ) -> State:
        return cls(
            phase,
            epoch,
            model.state_dict(),
            optimizer.state_dict(),
            schedule.state_dict(),
            [generator.get_state(), torch.random.get_rng_state()],
            list(history),
        )

    def restore(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        generator: torch.Generator,
    ) -> int:
        """Put it all back, torch's own random state too; the epoch to go on with.

        Raises `DataError` where the network is another than the one that was kept.
        """
        load(model, self.model)
        try:
            optimizer.load_state_dict(dict(self.optimizer))
            schedule.load_state_dict(dict(self.schedule))
            generator.set_state(self.random[0])
            torch.random.set_rng_state(self.random[1])
        except (RuntimeError, ValueError, KeyError, IndexError, TypeError) as error:
            raise DataError(f"the kept run does not fit this recipe ({error}): {_AWAY}") from error
        return self.epoch


def load(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Raises `DataError` where the network has other weights."""
    try:
        model.load_state_dict(dict(weights))
    except RuntimeError as error:
        raise DataError(f"the kept run is of another network: {_AWAY}") from error


class Kept:
    """One run in a folder: `training.state`, whole or not at all, and metrics.json with its history.

    A run is known by its recipe, the training images and the versions that decide numbers: a folder with
    another's is refused, so that nothing is mixed up.
    """

    def __init__(self, folder: Path, recipe: Recipe, data: Images) -> None:
        self.folder, self.path = folder, folder / "training.state"
        # Functions are told by their names, not by where they lie in memory.
        said = re.sub(r" at 0x[0-9a-f]+", "", repr(recipe))
        told = hashlib.sha256(f"{said} {torch.__version__} {torch.get_num_threads()}".encode())
        for array in (data.pixels, data.labels):
            told.update(str((array.dtype, array.shape)).encode())
            told.update(array.tobytes())
        self.run = told.hexdigest()

    def load(self) -> State | None:
        """What was kept, if anything. Raises `DataError` for another run's, or for a damaged file."""
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                told = json.loads((file.metadata() or {})["state"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            known = told.pop("format"), told.pop("run")
            state = None if known != (_FORMAT, self.run) else _state(told, tensors)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{self.path} holds no training run, or a damaged one: {_AWAY}") from error
        if state is None:
            raise DataError(
                f"{self.path} is of another run: its recipe, images, threads or torch differ; {_AWAY}"
            )
        return state

    def save(self, state: State) -> None:
        """Raises `DataError` where the disk does not take it; what was there stays."""
        part, text = self.path.with_suffix(".part"), self.folder / "metrics.part"
        told, tensors = _told(state)
        told |= {"format": _FORMAT, "run": self.run}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, part, metadata={"state": json.dumps(told)})
            os.replace(part, self.path)
            text.write_text(json.dumps(list(state.history), indent=1) + "\n", encoding="utf-8")
            os.replace(text, self.folder / "metrics.json")
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise DataError(
                f"cannot keep the run in {self.folder}: {error}; choose another folder"
            ) from error


def forget(folder: Path) -> None:
    """Remove what `Kept` wrote here and in folders of teachers, and nothing else; a folder left empty too.

    What cannot be removed stays.
    """
    with contextlib.suppress(OSError):
        for below in folder.glob("teacher-*"):
            forget(below)
        for name in ("training.state", "training.part", "metrics.json", "metrics.part"):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()  # refuses where something of somebody else's is left


def _told(state: State) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """As JSON and tensors."""
    moments = state.optimizer.get("state", {})
    tensors = {f"model/{name}": tensor for name, tensor in state.model.items()}
    tensors |= {f"optimizer/{i}/{name}": t for i, of in moments.items() for name, t in of.items()}
    tensors |= {f"random/{i}": tensor for i, tensor in enumerate(state.random)}
    told = {
        "phase": state.phase,
        "epoch": state.epoch,
        "groups": state.optimizer.get("param_groups", []),
        "schedule": dict(state.schedule),
        "history": list(state.history),
    }
    return told, {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def _state(told: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> State:
    """The reverse. Raises `KeyError`, `ValueError` for what is missing or not of its kind."""
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "random": {}}
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        if kind == "optimizer":
            number, _, of = rest.partition("/")
            moments.setdefault(int(number), {})[of] = tensor
        else:
            parts[kind][rest] = tensor
    return State(
        int(told["phase"]),
        int(told["epoch"]),
        parts["model"],
        {"state": moments, "param_groups": told["groups"]},
        told["schedule"],
        [parts["random"][str(i)] for i in range(len(parts["random"]))],
        told["history"],
    )


__all__ = ["Kept", "State", "forget", "load"]
