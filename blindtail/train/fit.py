"""The one training loop. Deterministic: the same recipe, data and thread count give the same weights.

A recipe's phases run one after the other (`blindtail.train.phases`). With a folder the run is kept
there after each epoch, and a run that was killed goes on as if it had not been (`blindtail.train.state`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blindtail.errors import ConfigError, DataError, ModelError
from blindtail.models.data import Images
from blindtail.models.several import flat, operands
from blindtail.models.split import SplitModel
from blindtail.train.phases import Batch, Moment, Phase, parts_of
from blindtail.train.recipe import Recipe
from blindtail.train.state import Kept, State, load

#: (steps done, steps in all, loss of the last step)
Progress = Callable[[int, int, float], None]


@contextmanager
def bounded(threads: int, seed: int) -> Iterator[None]:
    """Torch with `threads` threads and its own random state; both are restored afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, threads))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(before)


def fit(
    recipe: Recipe,
    data: Images,
    *,
    model: SplitModel | None = None,
    threads: int = 1,
    progress: Progress | None = None,
    only_tails: bool = False,
    after_step: Callable[[], None] | None = None,
    teachers: Mapping[str, SplitModel] | None = None,
    folder: Path | None = None,
) -> SplitModel:
    """Train `recipe.build()`, or `model` when given (in place), and return it in evaluation mode.

    only_tails  stages and exits stay as they are, running statistics included
    after_step  called after each step: masks of pruned weights are applied there
    teachers    by the names that phases use, trained; those of the recipe that are missing are trained
                first, each in its own folder below `folder`
    folder      where the run is kept after each epoch, and goes on from where there is one (`Kept`)

    AdamW with a one-cycle schedule in each phase; after each step what has a `project_` (a `Quadratic`,
    say) is brought back into what the compiler accepts. Raises `DataError` when there are fewer images
    than one batch, or when `folder` holds another run, and `ModelError` when the loss is not finite.
    """
    if len(data) < recipe.batch:
        raise DataError(f"training needs at least one batch of {recipe.batch} images, got {len(data)}")
    phases = [replace(p, trains="tails") if only_tails else p for p in recipe.all_phases]
    known = dict(teachers or {})
    for name, taught in recipe.teachers.items():
        if name not in known and any(phase.teacher == name for phase in phases):
            below = None if folder is None else folder / f"teacher-{name}"
            known[name] = fit(taught, data, threads=threads, progress=progress, folder=below)
    missing = {phase.teacher for phase in phases if phase.teacher} - set(known)
    if missing:
        raise ConfigError(
            f"recipe {recipe.name!r}: no teacher {', '.join(sorted(map(str, missing)))} is given"
        )
    with bounded(threads, recipe.seed):
        if model is None:
            model = recipe.build()
        run = _Run(recipe, phases, data, model, known, progress, after_step)
        run.all(None if folder is None else Kept(folder, recipe, data))
    return model.eval()


class _Run:
    """One recipe's phases on one network."""

    def __init__(
        self,
        recipe: Recipe,
        phases: list[Phase],
        data: Images,
        model: SplitModel,
        teachers: Mapping[str, SplitModel],
        progress: Progress | None,
        after_step: Callable[[], None] | None,
    ) -> None:
        self.recipe, self.phases, self.model, self.teachers = recipe, phases, model, teachers
        for name, teacher in teachers.items():
            if teacher.preprocessing != model.preprocessing:
                raise ConfigError(f"teacher {name!r} prepares images in another way than {model.name!r} does")
        self.images = torch.from_numpy(model.preprocessing.apply(data.pixels))  # (n, C, H, W)
        self.labels = torch.from_numpy(data.labels)
        self.progress, self.after_step = progress, after_step
        self.per_epoch = len(self.labels) // recipe.batch
        self.steps = sum(phase.epochs for phase in phases) * self.per_epoch
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.history: list[dict[str, Any]] = []
        self.done = 0

    def all(self, kept: Kept | None) -> None:
        state = None if kept is None else kept.load()
        for index, phase in enumerate(self.phases):
            for schedule in phase.schedules:
                schedule.begin(self.model)
            if state is None or index >= state.phase:
                self._phase(index, phase, state if state and index == state.phase else None, kept)
            for schedule in phase.schedules:
                schedule.end(self.model)
        if state is not None and state.phase >= len(self.phases):
            load(self.model, state.model)
        elif kept is not None:
            kept.save(State(len(self.phases), 0, self.model.state_dict(), {}, {}, [], self.history))
        for parameter in self.model.parameters():
            parameter.requires_grad_(True)

    def _phase(self, index: int, phase: Phase, state: State | None, kept: Kept | None) -> None:
        model, trained = self.model, parts_of(self.model, phase.trains)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        learning = _groups(trained, phase)
        optimizer = torch.optim.AdamW(learning, lr=phase.peak_rate, weight_decay=phase.weight_decay)
        rates = [group["lr"] for group in learning]
        steps = phase.epochs * self.per_epoch
        # A rise of exactly one step has no length, by which torch would divide.
        rise = phase.warm_up if float(phase.warm_up * steps) != 1.0 else 1.001 * phase.warm_up
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps, pct_start=rise)
        teacher = None if phase.teacher is None else self.teachers[phase.teacher].eval()
        model.eval()
        for module in trained:
            module.train()
        first = 0
        if state is not None:
            first = state.restore(model, optimizer, schedule, self.generator)
            self.history = [dict(row) for row in state.history]
        before = sum(p.epochs for p in self.phases[:index])
        self.done = (before + first) * self.per_epoch
        for epoch in range(first, phase.epochs):
            loss = self._epoch(phase, epoch, optimizer, schedule, teacher)
            self.history.append(
                {"phase": phase.name, "epoch": epoch + 1, "loss": loss, "rate": schedule.get_last_lr()[0]}
            )
            if kept is not None:
                kept.save(
                    State.of(index, epoch + 1, model, optimizer, schedule, self.generator, self.history)
                )

    def _epoch(
        self,
        phase: Phase,
        epoch: int,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        teacher: SplitModel | None,
    ) -> float:
        """Returns the mean loss."""
        model, size, total = self.model, self.recipe.batch, torch.zeros((), dtype=torch.float64)
        found = (getattr(module, "project_", None) for module in model.modules())
        projected: list[Callable[[], None]] = [project for project in found if callable(project)]
        learning = [p for group in optimizer.param_groups for p in group["params"]]
        order = torch.randperm(len(self.labels), generator=self.generator)
        for number, batch in enumerate(order[: self.per_epoch * size].view(self.per_epoch, size)):
            moment = Moment(
                epoch * self.per_epoch + number, phase.epochs * self.per_epoch, epoch, phase.epochs
            )
            for changing in phase.schedules:
                changing.step(model, moment)
            x = self.images[batch]
            if self.recipe.augment is not None:
                x = self.recipe.augment(x, self.generator)
            loss = phase.loss(_batch(model, x, self.labels[batch], moment, teacher))
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(learning, phase.clip_norm)
            optimizer.step()
            schedule.step()
            for project in projected:
                project()
            if self.after_step is not None:
                self.after_step()
            self.done += 1
            total += loss.detach()
            if self.done % 50 == 0 or number + 1 == self.per_epoch:
                self._tell(float(loss.detach()))
        return float(total) / self.per_epoch

    def _tell(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise ModelError(
                f"training diverged at step {self.done} of {self.steps}: lower the recipe's peak_rate "
                "or its clip_norm"
            )
        if self.progress is not None and (self.done % 50 == 0 or self.done == self.steps):
            self.progress(self.done, self.steps, loss)


def _groups(trained: list[nn.Module], phase: Phase) -> list[dict[str, Any]]:
    """Parameters that learn, by their rates; each once."""
    by_rate: dict[float, list[nn.Parameter]] = {}
    for module in trained:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(True)
            share = next((share for ending, share in phase.rates.items() if name.endswith(ending)), 1.0)
            by_rate.setdefault(share, []).append(parameter)
    if not by_rate:
        raise ConfigError(f"phase {phase.name!r}: nothing in its {phase.trains} can be trained")
    return [{"params": params, "lr": share * phase.peak_rate} for share, params in by_rate.items()]


def _batch(
    model: SplitModel, x: Tensor, labels: Tensor, moment: Moment, teacher: SplitModel | None = None
) -> Batch:
    taught = None
    if teacher is not None:
        with torch.no_grad():
            taught = _batch(teacher, x, labels, moment)
    exits, tails, cuts = list[Tensor](), list[Tensor](), dict[int, Tensor]()
    given: Any = x
    for i, stage in enumerate(model.stages):  # as `SplitModel.forward`, which does not tell of cuts
        given = stage(*operands(given))
        if i in model.exits_after:
            exits.append(model.exits[str(i)](*operands(given)))
        if i in model.cuts:
            cuts[i] = flat(given) if isinstance(given, tuple) else given
            tails.append(model.tails[str(i)](*operands(given)))
    return Batch(x, labels, exits, tails, cuts, model, moment, taught)


__all__ = ["Progress", "bounded", "fit"]
