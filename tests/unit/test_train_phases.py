"""Phases one after the other, teachers, and runs that go on after a break as if there had been none."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from blindtail.errors import ConfigError, DataError, ModelError
from blindtail.models.data import Images
from blindtail.models.split import SplitModel
from blindtail.models.zoo import nets
from blindtail.train import fit as loop
from blindtail.train import state
from blindtail.train.fit import fit
from blindtail.train.phases import Batch, Moment, Phase, Sum
from blindtail.train.recipe import RECIPES, Recipe
from blindtail.train.run import Splits
from blindtail.train.state import State

pytestmark = pytest.mark.timeout(120)
DIGITS = RECIPES["digits"]


@pytest.fixture(scope="module")
def images() -> Images:
    data = Splits.load("digits", seed=0).train
    return replace(data, pixels=data.pixels[:320], labels=data.labels[:320])


@dataclass(frozen=True)
class Plain:
    """Cross entropy of all logits."""

    def __call__(self, batch: Batch) -> Tensor:
        parts = [F.cross_entropy(logits, batch.labels) for logits in (*batch.exits, *batch.tails)]
        return torch.stack(parts).sum()


@dataclass(frozen=True)
class Imitate:
    """The teacher's logits of the last tail."""

    def __call__(self, batch: Batch) -> Tensor:
        taught = batch.taught.tails[-1]
        assert not taught.requires_grad
        return F.mse_loss(batch.tails[-1], taught)


@dataclass(frozen=True)
class Told:
    """A schedule that notes when it was called. Its list is of no account to what a recipe is."""

    calls: list[tuple[str, float]]

    def begin(self, model: SplitModel) -> None:
        self.calls.append(("begin", 0.0))

    def step(self, model: SplitModel, moment: Moment) -> None:
        self.calls.append(("step", moment.share))

    def end(self, model: SplitModel) -> None:
        self.calls.append(("end", 1.0))

    def __repr__(self) -> str:
        return "Told()"


def _digest(model: SplitModel, part: str = "") -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if name.startswith(part):
            digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def _two(**changes: object) -> Recipe:
    """Everything, then the tails alone."""
    phases = (Phase("both", 2, Plain()), Phase("tails", 2, Plain(), trains="tails", peak_rate=1e-3))
    return replace(DIGITS, phases=phases, **changes)  # type: ignore[arg-type]


def test_a_recipe_without_phases_is_one_phase_of_its_own_numbers(images: Images) -> None:
    short = replace(DIGITS, epochs=2)
    (alone,) = short.all_phases
    assert (alone.epochs, alone.peak_rate, alone.trains) == (2, DIGITS.peak_rate, "all")
    assert _digest(fit(short, images)) == _digest(fit(replace(short, phases=(alone,)), images))


@pytest.mark.parametrize(("part", "moves"), [("head", "stages"), ("exits", "exits"), ("tails", "tails")])
def test_a_phase_moves_its_part_and_nothing_else(images: Images, part: str, moves: str) -> None:
    """Running statistics of batch norms included."""
    first = fit(replace(DIGITS, epochs=1), images)
    before = {name: _digest(first, name) for name in ("stages", "exits", "tails")}
    phase = Phase("one part", 1, Plain(), trains=part)  # type: ignore[arg-type]
    made = fit(replace(DIGITS, phases=(phase,)), images, model=first)
    after = {name: _digest(made, name) for name in before}
    assert {name for name in before if before[name] != after[name]} == {moves}
    assert all(p.requires_grad for p in made.parameters())


def test_schedules_are_told_of_each_step(images: Images) -> None:
    calls: list[tuple[str, float]] = []
    phase = Phase("scheduled", 2, Plain(), schedules=(Told(calls),))
    fit(replace(DIGITS, batch=64, phases=(phase,)), images)
    steps = 2 * (320 // 64)
    assert calls == [("begin", 0.0), *(("step", k / steps) for k in range(steps)), ("end", 1.0)]
    assert Moment(7, 10, 1, 2).passed == pytest.approx(1.4)


def test_rates_of_their_own(images: Images) -> None:
    """A rate of nothing leaves what it is for where it was, but for decay."""
    still = Phase("still", 1, Plain(), rates={"weight": 1e-12}, weight_decay=0.0)
    model = DIGITS.build()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fit(replace(DIGITS, phases=(still,)), images, model=model)
    moved = {name for name, p in model.named_parameters() if not torch.allclose(p, before[name], atol=1e-7)}
    assert moved
    assert not [name for name in moved if name.endswith("weight")]


def test_a_student_learns_from_a_teacher_and_the_teacher_stays(images: Images) -> None:
    teacher = fit(replace(DIGITS, epochs=30), images)
    held = _digest(teacher)
    phase = Phase("imitation", 60, Sum([(1.0, Imitate())]), teacher="big", peak_rate=1e-2)
    student = replace(DIGITS, seed=3, phases=(phase,))
    made = fit(student, images, teachers={"big": teacher})
    assert _digest(teacher) == held
    labels = [model.logits(images.pixels)[-1].argmax(1) for model in (made, teacher, nets.digits().eval())]
    agreed, by_chance = ((labels[i] == labels[1]).float().mean() for i in (0, 2))
    assert agreed >= 0.9 > 0.5 > by_chance
    # The same teacher as a recipe of the student's, trained first.
    nested = replace(student, teachers={"big": replace(DIGITS, epochs=30)})
    assert _digest(fit(nested, images)) == _digest(made)
    with pytest.raises(ConfigError, match="no teacher big is given"):
        fit(student, images)
    with pytest.raises(ConfigError, match="give its phase one"):
        fit(replace(student, phases=(replace(phase, teacher=None),)), images)


class Break(Exception):
    pass


def _broken(after: int) -> Callable[[], None]:
    steps = iter(range(after))

    def step() -> None:
        if next(steps, None) is None:
            raise Break

    return step


@pytest.mark.parametrize("after", [0, 4, 5, 9, 12, 17, 19])
def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(
    images: Images, tmp_path: Path, after: int
) -> None:
    """At any step: before the first epoch is kept, within one, between phases."""
    recipe = _two(batch=64)  # five steps an epoch
    whole = fit(recipe, images)
    with pytest.raises(Break):
        fit(recipe, images, folder=tmp_path, after_step=_broken(after))
    assert (tmp_path / "training.state").exists() == (after >= 5)
    told: list[int] = []
    torch.manual_seed(12345)  # the caller's random state does not matter
    again = fit(recipe, images, folder=tmp_path, progress=lambda done, steps, loss: told.append(done))
    assert _digest(again) == _digest(whole)
    assert told[-1] == 20
    rows = json.loads((tmp_path / "metrics.json").read_text())
    assert [(row["phase"], row["epoch"]) for row in rows] == [
        (name, epoch) for name in ("both", "tails") for epoch in (1, 2)
    ]
    assert all(np.isfinite(row["loss"]) for row in rows)
    # A finished run is not run again.
    assert _digest(fit(recipe, images, folder=tmp_path, after_step=_broken(0))) == _digest(whole)


def test_teachers_are_kept_too(images: Images, tmp_path: Path) -> None:
    phase = Phase("imitation", 2, Imitate(), teacher="big")
    recipe = replace(DIGITS, seed=3, phases=(phase,), teachers={"big": replace(DIGITS, epochs=1)})
    whole = fit(recipe, images)
    with pytest.raises(Break):
        fit(recipe, images, folder=tmp_path, after_step=_broken(3))
    taught = (tmp_path / "teacher-big" / "training.state").stat()
    assert _digest(fit(recipe, images, folder=tmp_path)) == _digest(whole)
    assert (tmp_path / "teacher-big" / "training.state").stat().st_mtime_ns == taught.st_mtime_ns


def test_what_was_kept_is_forgotten_and_nothing_else(images: Images, tmp_path: Path) -> None:
    phase = Phase("imitation", 1, Imitate(), teacher="big")
    recipe = replace(DIGITS, phases=(phase,), teachers={"big": replace(DIGITS, epochs=1)})
    kept = tmp_path / "training"
    fit(recipe, images, folder=kept)
    assert (kept / "teacher-big" / "training.state").exists()
    own = kept / "0" / "picture.png"  # an owner's folder of images may have this name
    own.parent.mkdir()
    own.write_bytes(b"mine")
    state.forget(kept)
    assert [path for path in kept.rglob("*") if path.is_file()] == [own]
    own.unlink()
    own.parent.rmdir()
    state.forget(kept)
    assert not kept.exists()
    state.forget(kept)  # there is nothing: nothing happens


def test_another_run_s_folder_is_refused_and_left_alone(images: Images, tmp_path: Path) -> None:
    short = replace(DIGITS, epochs=1)
    fit(short, images, folder=tmp_path)
    path = tmp_path / "training.state"
    held = path.read_bytes()
    other = replace(images, pixels=images.pixels[::-1].copy(), labels=images.labels[::-1].copy())
    for recipe, data in (
        (replace(short, seed=1), images),
        (replace(short, epochs=2), images),
        (short, other),
    ):
        with pytest.raises(DataError, match=r"is of another run: .* remove its training\.state"):
            fit(recipe, data, folder=tmp_path)
    for damage in (held[: len(held) // 2], b"", b"not a state"):
        path.write_bytes(damage)
        with pytest.raises(DataError, match="holds no training run, or a damaged one"):
            fit(short, images, folder=tmp_path)
        assert path.read_bytes() == damage
    path.write_bytes(held)
    assert _digest(fit(short, images, folder=tmp_path)) == _digest(fit(short, images))


def test_a_state_of_another_network_is_refused() -> None:
    kept = State(0, 1, nets.fashion().state_dict(), {}, {}, [], [])
    model = nets.digits()
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=10)
    with pytest.raises(DataError, match="of another network"):
        kept.restore(model, optimizer, schedule, torch.Generator())


def test_a_full_disk_loses_nothing(images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(replace(DIGITS, epochs=1), images, folder=tmp_path)
    held = (tmp_path / "training.state").read_bytes()
    (tmp_path / "training.state").unlink()
    (tmp_path / "training.state").write_bytes(held)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    recipe = replace(DIGITS, epochs=2)
    with monkeypatch.context() as patched:
        patched.setattr(state, "save_file", full)
        with pytest.raises(DataError, match=r"cannot keep the run in .*: .*No space left.*; choose another"):
            fit(recipe, images, folder=tmp_path / "other")
    assert (tmp_path / "training.state").read_bytes() == held
    assert not list((tmp_path / "other").glob("*.part"))


def test_wrong_phases_are_refused(images: Images) -> None:
    for changes in ({"epochs": 0}, {"peak_rate": 0.0}, {"clip_norm": -1.0}, {"weight_decay": -0.1}):
        with pytest.raises(ConfigError, match="phase 'p'"):
            Phase(**{"name": "p", "epochs": 1, "loss": Plain(), **changes})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="weight other than 0"):
        Sum([(0.0, Plain())])
    with pytest.raises(ModelError, match="diverged at step"):
        fit(replace(DIGITS, phases=(Phase("p", 1, lambda batch: Plain()(batch) * torch.nan),)), images)
    assert loop.Progress
