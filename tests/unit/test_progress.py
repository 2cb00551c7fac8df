"""What a compile tells of how far it is: it rises, names layers, ends at its total, and can be ended."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from bench.tails import random_layers
from blindtail.errors import ModelError
from blindtail.he.compiler import compile_tail
from blindtail.he.layers import Affine, Layer, Quadratic
from blindtail.he.normal import normalised
from blindtail.he.objective import Objective
from blindtail.he.params import Parameters
from blindtail.he.segments import Run, compile_runs
from blindtail.he.tiled_compiler import compile_tiled
from blindtail.he.tiles import TileShape
from blindtail.he.tiling import choose
from blindtail.models import plan_network
from blindtail.models.data import Images
from blindtail.models.layers import Square
from blindtail.models.lint import lint, lint_refreshed
from blindtail.models.pack import pack
from blindtail.models.refresh import Refresh
from blindtail.progress import TOTAL, Span
from blindtail.train.compiled import compile_model
from blindtail.train.pruning import Policy, Pruning
from blindtail.train.pruning.owner import restored
from blindtail.train.recipe import RECIPES
from tests import refresh_cases, tiled_cases
from tests.unit.test_train_owner import CLASSES, build

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("one_torch_thread")]

Told = list[tuple[int, int, str]]


class Stopped(Exception):
    """What a caller raises to end the work."""


def rises(told: Told) -> str:
    """All that was said, after a check of the numbers."""
    done = [at for at, _, _ in told]
    assert done == sorted(done)
    assert done[0] < TOTAL
    assert done[-1] == TOTAL
    assert {total for _, total, _ in told} == {TOTAL}
    return "\n".join(what for _, _, what in told)


def layers(width: int = 24) -> list[Layer]:
    rng = np.random.default_rng(0)
    one, zero = np.ones(8), np.zeros(8)
    return [
        Affine(rng.normal(size=(8, width)) / 5, zero, "wide"),
        Quadratic(one, zero, zero, "square"),
        Affine(rng.normal(size=(3, 8)) / 3, np.zeros(3), "last"),
    ]


def values(width: int = 24) -> NDArray[np.float64]:
    return np.random.default_rng(1).normal(size=(12, width))


@pytest.mark.parametrize("objective", [None, Objective({"key_bytes": 1.0}), Objective({"uplink_bytes": 1.0})])
def test_a_tail_is_told_of_and_is_the_same(objective: Objective | None) -> None:
    told: Told = []
    made = compile_tail(layers(), values(), objective=objective, progress=lambda *at: told.append(at))
    said = rises(told)
    for stage in ("looking at plans", "wide: values", "last: values", "scales", "error bounds", "encoding"):
        assert stage in said
    assert made.spec.program_id == compile_tail(layers(), values(), objective=objective).spec.program_id


def test_a_tail_in_another_ones_place_and_one_over_several_ciphertexts() -> None:
    told: Told = []
    compile_tail(
        layers(),
        values(),
        like=compile_tail(layers(), values()).spec,
        progress=lambda *at: told.append(at),
    )
    rises(told)
    told.clear()
    case = tiled_cases.TILED[0]
    compile_tiled(
        tiled_cases.layers(case),
        np.random.default_rng(0).normal(size=(8, case.widths[0])),
        ring_degree=case.ring_degree,
        only=[[TileShape.parse(shape)] for shape in case.shapes],
        progress=lambda *at: told.append(at),
    )
    said = rises(told)
    assert "tile shapes: fc0" in said
    assert "fc0: values" in said


def test_a_choice_of_tiles_is_told_of_by_map_and_by_price_of_keys() -> None:
    told: Told = []
    tail, most = normalised(random_layers((6, 8, 5))), Objective(at_most={"key_bytes": 4e5})
    parameters = Parameters.create(tail.depth, 8192)
    span = Span.of(lambda *at: told.append(at)).parts(1, 1)[0]
    found = choose(tail, parameters, most, lanes=512, span=span)
    shares = [done for done, _, what in told if what == "tile shapes: fc1"]
    assert len(shares) > 2  # prices, and few shapes before all at each
    assert shares == sorted(shares)
    assert told[0] == (0, TOTAL, "tile shapes")
    assert told[-1][0] < TOTAL / 2
    assert found.describe() == choose(tail, parameters, most, lanes=512).describe()


def test_a_tail_over_several_ciphertexts_is_told_of_while_shapes_are_looked_at() -> None:
    told: Told = []
    made = compile_tail(random_layers((5000, 4)), values(5000), progress=lambda *at: told.append(at))
    assert made.spec.input_ciphertexts > 1
    assert "tile shapes: fc0" in rises(told)


def test_runs_are_told_of_by_segment() -> None:
    told: Told = []
    runs = [Run(layers(), values(), "first"), Run(layers(3), values(3), "second")]
    compile_runs(runs, progress=lambda *at: told.append(at))
    said = rises(told)
    assert "where to cut: wide" in said
    assert "segment first: last: values" in said
    assert "segment second" in said


def test_a_refreshed_model_is_told_of_from_folding_to_graphs() -> None:
    told: Told = []
    _, cloud = pack(
        refresh_cases.model(),
        refresh_cases.images(),
        temperatures=(1.0,),
        thresholds=(0.9,),
        metrics={},
        version="1",
        refresh=Refresh(),
        progress=lambda *at: told.append(at),
    )
    said = rises(told)
    for stage in ("ranges", "folding 3", "segment 6: error bounds", "edge does in between", "the head"):
        assert stage in said
    silent = refresh_cases.packed()[1]
    assert [p.spec.program_id for p in cloud.segments(0)] == [p.spec.program_id for p in silent.segments(0)]


@pytest.fixture(scope="module")
def images() -> Images:
    rng = np.random.default_rng(0)
    return Images(rng.integers(0, 256, (40, 3, 8, 8), dtype=np.uint8), rng.integers(0, 3, 40), CLASSES)


def test_what_the_callback_raises_ends_a_compile_and_nothing_is_written(
    images: Images, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(1)
    model, told = build().eval(), list[tuple[int, int, str]]()
    compile_model(model, images, allow_unstable=True, progress=lambda *at: told.append(at))
    said = rises(told)
    assert "tail at cut 0: folding" in said
    assert "tail at cut 1: error bounds" in said
    assert "calibrating exits" in said

    for stop in ("ranges", "folding", "square0: values", "error bounds", "exporting the head"):
        # Code that folds takes a RuntimeError for one of a layer; a caller's is not.
        problem: type[Exception] = RuntimeError if stop in ("folding", "ranges") else Stopped

        def raising(
            done: int, total: int, what: str, at: str = stop, kind: type[Exception] = problem
        ) -> None:
            if at in what:
                raise kind(at)

        with pytest.raises(problem) as ended:
            compile_model(model, images, allow_unstable=True, progress=raising).save(tmp_path / "out")
        assert type(ended.value) is problem
        assert str(ended.value) == stop
    assert list(tmp_path.iterdir()) == []
    compile_model(model, images, allow_unstable=True).save(tmp_path / "out")  # positive control, silent
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"edge.bt", "cloud.bt"}
    assert capfd.readouterr() == ("", "")


def test_pruning_is_told_of_by_tail_and_what_the_callback_raises_ends_it(images: Images) -> None:
    torch.manual_seed(1)
    model, told = build().eval(), list[tuple[int, int, str]]()
    how = Pruning(Policy(fraction=0.5, rounds=1, iterations=2), images, epochs=1, batch=20)
    made = compile_model(model, images, allow_unstable=True, prune=how, progress=lambda *at: told.append(at))
    said = rises(told)
    for cut in model.cuts:
        for stage in ("folding", "unpruned: ", "diagonals: ", "pruning", "retraining, loss", "permuting"):
            assert f"tail at cut {cut}: {stage}" in said
        for order in ("in its own order: ", "as it was pruned: "):
            assert f"tail at cut {cut}: {order}looking at plans" in said
    assert len({done for done, _, what in told if "retraining" in what}) >= 4 * len(model.cuts)
    silent = compile_model(model, images, allow_unstable=True, prune=how)
    assert [p.content_id for p in made.cloud.programs.values()] == [
        p.content_id for p in silent.cloud.programs.values()
    ]

    def raising(done: int, total: int, what: str) -> None:
        if stop in what:
            raise ValueError(stop)

    for stop in ("diagonals: ", "retraining, loss"):
        with pytest.raises(ValueError, match=f"^{stop}$"):
            compile_model(model, images, allow_unstable=True, prune=how, progress=raising)
    note, stop = made.pruned.note() if made.pruned is not None else "", "the plan that it was pruned by"
    with pytest.raises(ValueError, match=f"^{stop}$"):
        restored(model, note, span=Span.of(raising))
    assert restored(model, note)  # the control


def test_an_error_that_work_goes_on_after_is_raised_again() -> None:
    seen: Told = []

    def raising(*at: object) -> None:
        seen.append(at)  # type: ignore[arg-type]
        raise ModelError("enough")

    span = Span.of(raising)
    with contextlib.suppress(ModelError):
        span.at(0.1, "one")
    with pytest.raises(ModelError, match="enough"):
        span.at(0.2, "two")
    assert len(seen) == 1


def test_a_span_never_falls_and_parts_fill_it() -> None:
    told: Told = []
    span = Span.of(lambda *at: told.append(at))
    first, second = span.parts(1, 3)
    second.at(0.5, "b")
    first.at(0.0, "a")
    for thing, part in second.parts(1, name="in ")[0].over(["x", "y"]):
        part.at(2.0, thing)
    assert span.ended("made") == "made"
    assert told == [
        (625, TOTAL, "b"),
        (625, TOTAL, "a"),
        (625, TOTAL, "in x"),
        (1000, TOTAL, "in y"),
        (1000, TOTAL, "done"),
    ]
    assert Span.of(None).ended(7) == 7
    assert list(span.over([])) == []


def test_commands_show_a_bar_on_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from blindtail.models.lint_cli import _bar as lint_bar
    from blindtail.train.cli import _bar as train_bar

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def shown(stream: io.StringIO, quiet: bool) -> str:
        monkeypatch.setattr("sys.stderr", stream)
        with lint_bar(quiet) as progress:
            compile_tail(layers(), values(), progress=progress)
        with train_bar(RECIPES["digits"], quiet) as (training, compiling):
            training(1, 2, 0.5)
            compile_tail(layers(), values(), progress=compiling)
        return stream.getvalue()

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    assert "compiling: done" in shown(Terminal(), quiet=False)
    assert shown(Terminal(), quiet=True).strip() == shown(io.StringIO(), quiet=False).strip() == ""


def test_lint_and_plan_tell_of_layers() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    told: Told = []
    (found,) = lint_refreshed(net, (6,), cut="input", progress=lambda *at: told.append(at))
    assert found.costs is not None
    assert "input: segment 0: error bounds" in rises(told)
    told.clear()
    lint(
        nn.Sequential(nn.Linear(6, 8), Square(), nn.Linear(8, 3)), (6,), progress=lambda *at: told.append(at)
    )
    assert "input: folding 2" in rises(told)
    assert "input: square0: values" in rises(told)
    told.clear()
    plan_network.tails("tests.meeting_cases:model", [], None, lambda *at: told.append(at))
    assert "folding" in rises(told)
