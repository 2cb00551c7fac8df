"""The stability gate: measures by hand, verdicts, and networks that were trained on real data."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from blindtail.errors import ModelError
from blindtail.he.compiler import compile_tail
from blindtail.he.layers import Affine, FloatArray, Layer, Quadratic
from blindtail.he.stability import (
    ESCAPE_RATIO,
    WARN_PEAK,
    WARN_RATIO,
    Stability,
    Verdict,
    check,
    enforce,
    log_slope,
)
from blindtail.models.layers import Square
from blindtail.models.pack import judge_tails, pack
from blindtail.models.split import SplitModel
from blindtail.models.zoo import nets
from blindtail.train.recipe import RECIPES
from blindtail.train.run import Splits, train

pytestmark = pytest.mark.timeout(120)
DIGITS = RECIPES["digits"]
PACKED = {"temperatures": (1.0, 1.0), "thresholds": (0.5, 0.5), "metrics": {}}


def chain(*gains: float, width: int = 4) -> list[Layer]:
    """Maps gain * x with plain squares between them."""
    made: list[Layer] = []
    for i, gain in enumerate(gains):
        if i:
            made.append(Quadratic(np.ones(width), np.zeros(width), np.zeros(width), f"square{i}"))
        made.append(Affine(np.eye(width) * gain, np.zeros(width), f"map{i + 1}"))
    return made


def rows(largest: float, count: int = 100) -> FloatArray:
    """(count, 4), evenly up to `largest`."""
    return np.linspace(0.1, largest, count)[:, None] * np.ones(4)


# Measures ---------------------------------------------------------------------------------------


def test_the_measures_by_hand() -> None:
    found = check(chain(2.0, 3.0), rows(1.0), rows(1.1))
    first, square, last = found.layers
    assert (first.name, first.activation, square.activation) == ("map1", False, True)
    assert [layer.largest for layer in found.layers] == pytest.approx([2.0, 4.0, 12.0])
    assert [layer.ratio for layer in found.layers] == pytest.approx([1.1, 1.21, 1.21])
    assert (first.growth, square.growth) == (None, None)
    assert last.growth == pytest.approx(12.0 * 1.21 / 2.2)
    assert found.slope == pytest.approx(math.log(12.0 * 1.21 / 2.2))
    assert 0.98 < first.quantile / first.largest <= 1.0
    assert (found.verdict, found.problems, found.rows, found.kept) == (Verdict.OK, (), (100, 100), False)


def test_the_slope_is_that_of_least_squares() -> None:
    ranges = [1.0, 5.0, 2.0, 40.0]
    assert log_slope(ranges) == pytest.approx(np.polyfit(range(4), np.log(ranges), 1)[0])
    assert log_slope([7.0]) is None
    assert log_slope([1.0, math.inf]) == math.inf
    assert log_slope([0.0, 0.0, 0.0]) == 0.0  # a dead layer is not an error


def test_a_fifth_is_kept_aside_and_said_so() -> None:
    found = check(chain(1.0, 1.0), rows(1.0, 50))
    assert (found.rows, found.kept) == ((40, 10), True)
    assert "kept aside" in found.line()
    few = check(chain(1.0, 1.0), rows(1.0, 19))
    assert (few.rows, few.kept, few.layers[0].ratio) == ((19, 0), False, None)
    assert "no held-out data" in few.line()


def test_the_report_is_strict_json() -> None:
    for found in (check(chain(2.0, 3.0), rows(1.0)), check(chain(*[9.0] * 14), rows(9.0))):
        data = json.loads(json.dumps(found.to_json(), allow_nan=False))
        assert data["verdict"] == found.verdict.value
        assert [row["name"] for row in data["layers"]] == [layer.name for layer in found.layers]
        assert "\n" not in found.line()


# Verdicts ---------------------------------------------------------------------------------------


def verdict_of(*gains: float, calibration: FloatArray, held_out: FloatArray) -> tuple[Verdict, str]:
    found = check(chain(*gains), calibration, held_out)
    return found.verdict, found.problems[0].name if found.problems else ""


def test_held_out_values_beyond_the_room_escape() -> None:
    """The room is the compiler's: what a square's output or a logit may exceed."""

    def judged(times: float) -> tuple[Verdict, str]:
        return verdict_of(1.0, calibration=rows(1.0), held_out=rows(times))

    assert judged(WARN_RATIO * 0.99) == (Verdict.OK, "")
    assert judged(WARN_RATIO * 1.01) == (Verdict.WARN, "map1")
    assert judged(ESCAPE_RATIO * 1.01) == (Verdict.ESCAPES, "map1")
    # 1.5 times at a map is 2.25 times behind its square: that one is named.
    assert verdict_of(1.0, 1.0, calibration=rows(1.0), held_out=rows(1.5)) == (Verdict.ESCAPES, "square1")


def test_ranges_that_grow_from_map_to_map() -> None:
    data = {"calibration": rows(1.0), "held_out": rows(1.0)}
    assert verdict_of(1.0, 2.0, 2.0, 1.0, **data) == (Verdict.OK, "")
    assert verdict_of(1.0, 10.0, 0.5, 1.0, **data)[0] is Verdict.WARN
    assert verdict_of(2.0, 2.0, 2.0, 2.0, **data) == (Verdict.ESCAPES, "map4")
    # Between two maps it is a matter of how weights are shared out, no trend.
    assert verdict_of(0.01, 1e6, **data) == (Verdict.OK, "")


def test_a_range_that_a_few_values_set() -> None:
    loud = rows(1.0, 2000)
    loud[0] = WARN_PEAK * 1.1
    found = check(chain(1.0), loud, rows(1.0))
    assert found.verdict is Verdict.WARN
    assert "99.9% quantile" in found.problems[0].problem
    # On top of a trend that is a warning by itself, it is an escape.
    growing = (1.0, 10.0, 0.5, 1.0)
    assert check(chain(*growing), rows(1.0, 2000)).verdict is Verdict.WARN
    assert check(chain(*growing), np.sqrt(np.sqrt(loud)), rows(1.0)).verdict is Verdict.ESCAPES


def test_overflow_is_an_escape_and_no_error() -> None:
    found = check(chain(*[9.0] * 14), rows(9.0))
    assert found.verdict is Verdict.ESCAPES
    assert found.slope == math.inf
    assert found.problems[0].problem == "values overflow"
    assert "overflow" in found.line()
    # Undefined counts as overflow, too.
    assert check(chain(1.0), np.full((30, 4), np.nan)).verdict is Verdict.ESCAPES


def test_what_is_found_is_raised_or_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    warned = check(chain(1.0), rows(1.0), rows(1.6))
    with caplog.at_level(logging.WARNING):
        enforce(warned, "tail at cut 1")
    (record,) = caplog.records
    assert "tail at cut 1, map1: on held-out data values reach 1.6 times" in record.getMessage()
    escaping = check(chain(1.0), rows(1.0), rows(3.0))
    with pytest.raises(ModelError, match=r"map1: .*3 times.*range penalty.*--allow-unstable"):
        enforce(escaping, "the tail")
    caplog.clear()
    enforce(escaping, "the tail", allow_unstable=True)
    assert len(caplog.records) == 1
    caplog.clear()
    enforce(check(chain(1.0), rows(1.0), rows(1.0)), "the tail")
    assert not caplog.records


def test_the_compiler_takes_a_held_out_set_and_makes_the_same_program() -> None:
    layers, x = chain(1.0, 1.0), rows(1.0)
    plain = compile_tail(layers, x).spec.program_id
    assert compile_tail(layers, x, held_out=rows(1.0)).spec.program_id == plain
    with pytest.raises(ModelError, match="square1"):
        compile_tail(layers, x, held_out=rows(2.0))
    assert compile_tail(layers, x, held_out=rows(2.0), allow_unstable=True).spec.program_id == plain
    with pytest.raises(ModelError, match="held-out data has shape"):
        compile_tail(layers, x, held_out=np.ones((3, 5)))


# Trained networks, real data --------------------------------------------------------------------


@pytest.fixture(scope="module")
def splits() -> Splits:
    return Splits.load("digits", seed=0)


def digits_with(maps: int, *, norm: bool) -> SplitModel:
    """The digits' head with a tail of `maps` dense layers and x^2 between them."""
    model = nets.digits()
    tail: list[nn.Module] = [nn.Flatten()]
    for _ in range(maps - 1):
        tail += [nn.Linear(64, 64), *([nn.BatchNorm1d(64)] if norm else []), Square()]
    model.tails["1"] = nn.Sequential(*tail, nn.Linear(64, 10))
    return model


def judged(model: SplitModel, splits: Splits) -> Stability:
    return judge_tails(model, splits.train.pixels, splits.validation.pixels, allow_unstable=True)[1]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_trained_chain_of_ten_maps_is_refused(splits: Splits, seed: int) -> None:
    recipe = replace(DIGITS, build=lambda: digits_with(10, norm=True), epochs=3, seed=seed)
    with pytest.raises(ModelError, match=r"tail at cut 1, \S+: .*fewer squares"):
        train(recipe, splits)


@pytest.mark.parametrize("norm", [False, True])
def test_a_trained_tail_of_two_maps_passes(splits: Splits, norm: bool) -> None:
    trained = train(replace(DIGITS, build=lambda: digits_with(2, norm=norm), epochs=3), splits)
    found = trained.stability[1]
    assert found.verdict is Verdict.OK
    assert trained.report["stability"] == {"1": found.to_json()}
    assert found.rows == (len(splits.train), len(splits.validation))


def test_a_chain_that_overflows_before_it_is_trained(splits: Splits) -> None:
    """Folding cannot check such a tail; the message is about the overflow all the same."""
    torch.manual_seed(0)
    model = digits_with(10, norm=False).eval()
    assert judged(model, splits).verdict is Verdict.OK  # the control: default weights are small
    for layer in model.tails["1"].modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=10.0)
    with pytest.raises(ModelError, match=r"tail at cut 1, layer \d+: values overflow"):
        judge_tails(model, splits.train.pixels)


def test_packing_runs_the_gate(splits: Splits, caplog: pytest.LogCaptureFixture) -> None:
    """Calibrated on pictures of a quarter of the brightness, the same network does not hold."""
    model = train(replace(DIGITS, epochs=3), splits).model
    bright, dark = splits.train.pixels[:200], splits.train.pixels[:200] // 4
    edge, _ = pack(model, bright, held_out_images=splits.validation.pixels, **PACKED)  # type: ignore[arg-type]
    assert edge.cuts[1].program_id == pack(model, bright, **PACKED)[0].cuts[1].program_id  # type: ignore[arg-type]
    assert not caplog.records
    with pytest.raises(ModelError, match=r"tail at cut 1, .* times the calibrated range"):
        pack(model, dark, held_out_images=bright, **PACKED)  # type: ignore[arg-type]
    caplog.clear()
    allowed = pack(model, dark, held_out_images=bright, allow_unstable=True, **PACKED)[0]  # type: ignore[arg-type]
    assert "times the calibrated range" in caplog.text
    assert allowed.cuts[1].program_id == pack(model, dark, **PACKED)[0].cuts[1].program_id  # type: ignore[arg-type]


def test_a_head_that_gives_no_numbers_is_told_from_an_escape(splits: Splits) -> None:
    model = nets.digits().eval()
    with torch.no_grad():
        for layer in model.stages.modules():
            if isinstance(layer, nn.Conv2d):
                layer.weight.fill_(1e38)
    with pytest.raises(ModelError, match="the head gives NaN or infinity"):
        judge_tails(model, splits.train.pixels[:20])


def test_what_cannot_be_folded_is_named_as_before(splits: Splits) -> None:
    model = nets.digits().eval()
    model.tails["1"] = nn.Sequential(nn.Flatten(), nn.Linear(63, 10))
    with pytest.raises(ModelError, match="tail at cut 1: tail layer 1: does not fit its input") as raised:
        judge_tails(model, splits.train.pixels[:20])
    assert "overflow" not in str(raised.value)
