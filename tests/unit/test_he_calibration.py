"""Seconds of single operations from a timer that is made up, and from the real one."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, fields, replace

import pytest

from blindtail.errors import ConfigError, ModelError
from blindtail.he import calibration, cost
from blindtail.he.calibration import SIZES, Calibration, calibrate
from blindtail.he.cost import Reference
from blindtail.he.native_backend import available
from blindtail.he.operations import MapOp
from blindtail.he.params import Parameters
from blindtail.he.program import Program
from tests.cloud_cases import program

#: Seconds that the made-up machine takes for one limb or pair; `PAIR_S` from memory.
TRANSFORM_S, PAIR_S, HOT_S, PASS_S, TURN_S, COPY_S = 5e-6, 3e-6, 1e-6, 0.8e-6, 0.5e-6, 0.6e-6
OPEN_S, EXPAND_S = 2e-5, 1e-4
CACHE_BYTES = 20_000_000


class FakeTimer:
    """Exact seconds for `parameters`; every third run is spoiled by somebody else's work."""

    def __init__(self, parameters: Parameters, scale: float = 1.0) -> None:
        self.k, self.scale, self.asked = len(parameters.primes), scale, list[int]()
        self._runs = itertools.count()

    def stages(self, bytes: int, rotations: int, diagonals: int, times: int) -> Sequence[Sequence[float]]:
        self.asked.append(bytes)
        k, pair_s = self.k, PAIR_S if bytes > CACHE_BYTES else HOT_S

        def fold(rows: int, digits: int) -> float:
            return rows * (rotations * (digits * pair_s + 2 * TURN_S) + 2 * COPY_S)

        exact = (
            OPEN_S,
            EXPAND_S,
            k * (k + 1) * TRANSFORM_S,
            fold(k + 1, k),
            fold(2, 1),
            2 * k * COPY_S,
            diagonals * 2 * (k + 1) * PASS_S,
            2 * (k + 1) * TRANSFORM_S,
        )
        spoiled = [1000.0 if next(self._runs) % 3 == 2 else 1.0 for _ in range(times)]
        return [[self.scale * by * s for s in exact] for by in spoiled]


def still() -> float:
    return 0.0


@pytest.mark.parametrize("parameters", [Parameters.create(1, 4096), Parameters.create(5, 8192)])
def test_what_a_timer_says_comes_back_as_single_operations(
    parameters: Parameters, monkeypatch: pytest.MonkeyPatch
) -> None:
    contained_s = 3e-5
    monkeypatch.setattr(calibration, "_container", lambda _: lambda: contained_s)
    made = calibrate(parameters, timer=FakeTimer(parameters), clock=still)
    assert [size for size, _ in made.points] == sorted(SIZES)
    width = parameters.ring_degree / 8192
    growth = width * math.log2(parameters.ring_degree) / 13
    for size, one in made.points:
        assert one.transform_s * growth == pytest.approx(TRANSFORM_S)
        assert one.key_pair_s * width == pytest.approx(PAIR_S if size > CACHE_BYTES else HOT_S)
        assert one.turn_s * width == pytest.approx(TURN_S)
        assert one.limb_pass_s * width == pytest.approx(PASS_S)
        assert one.copy_s * width == pytest.approx(COPY_S)
        assert one.expand_s * width == pytest.approx(EXPAND_S)
        assert one.request_s * width == pytest.approx(OPEN_S + EXPAND_S + contained_s)


def test_a_working_set_between_two_lies_between_them() -> None:
    parameters = Parameters.create(5, 8192)
    made = calibrate(parameters, timer=FakeTimer(parameters), clock=still)
    least, most = made.points[0][1], made.points[-1][1]
    assert made.at(1) == least
    assert made.at(1e12) == most
    between = made.at(math.sqrt(16e6 * 24e6)).key_pair_s
    assert between == pytest.approx((HOT_S + PAIR_S) / 2)
    rising = [made.at(size).key_pair_s for size in range(1_000_000, 80_000_000, 500_000)]
    assert rising == sorted(rising)


def test_a_program_is_predicted_by_counts_and_its_own_bytes() -> None:
    made = program()
    parameters = made.spec.parameters
    costs = calibrate(parameters, timer=FakeTimer(parameters), clock=still)
    size = made.working_bytes()
    keys = sum(2 * (n.level + 2) * (n.level + 1) for n in made.spec.keys)
    plain = sum(len(op.diagonals) * (op.level + 2) for op in made.ops if isinstance(op, MapOp))
    assert size == (keys + plain) * parameters.ring_degree * calibration.word_bytes(parameters)
    one = costs.at(size)
    counts = [cost.count(op, "native") for op in made.ops]
    want = cost.seconds("native", parameters.ring_degree, counts, one=one)
    assert made.predicted_s("native", costs) == pytest.approx(want)
    twice = calibrate(parameters, timer=FakeTimer(parameters, scale=2.0), clock=still)
    assert made.predicted_s("native", twice) == pytest.approx(2 * want, rel=0.2)
    # Other backends keep to the reference.
    assert made.predicted_s("seal", costs) == made.predicted_s("seal")


def test_a_ticket_and_what_it_leaves_make_up_an_evaluation() -> None:
    """Keys are used by one of both; divisions of c0 by P, and products with it, are left to the request."""
    made = program()
    total, online, ticket = (
        cost.count_part(made.ops, "total"),
        cost.count_part(made.ops, "online"),
        cost.count_part(made.ops, "ticket"),
    )
    assert total == [cost.count(op, "native") for op in made.ops]

    def pairs(steps: Sequence[cost.Counts]) -> int:
        return sum(step.key_pairs for step in steps)

    assert pairs(online) + pairs(ticket) == pairs(total)
    first = made.ops[0]
    assert isinstance(first, MapOp)
    assert total[0].transforms - ticket[0].transforms == online[0].transforms
    assert 0 < made.predicted_s("native", part="online") < made.predicted_s("native")
    assert 0 < made.predicted_s("native", part="ticket") < made.predicted_s("native")
    with pytest.raises(ModelError, match="seal makes no tickets"):
        made.predicted_s("seal", part="online")


def test_a_program_without_squares_has_tickets_too() -> None:
    made = program()
    alone = Program(made.spec, made.ops[:1])
    assert 0 < alone.predicted_s("native", part="online") < alone.predicted_s("native")
    assert len(cost.count_part(alone.ops, "ticket")) == 1


def test_a_budget_ends_the_measuring() -> None:
    parameters = Parameters.create(3, 8192)
    ticks = itertools.count()
    timer = FakeTimer(parameters)
    made = calibrate(parameters, timer=timer, budget_s=5.0, clock=lambda: float(next(ticks)))
    assert 1 <= len(timer.asked) < 5
    assert made.took_s > 0
    # However little there is: one working set, and it says all that can be said.
    timer = FakeTimer(parameters)
    made = calibrate(parameters, timer=timer, budget_s=0.0, clock=lambda: float(next(ticks)))
    assert timer.asked == [SIZES[0]]
    assert made.at(1) == made.at(1e9)


def test_what_is_not_credible_is_refused() -> None:
    parameters = Parameters.create(3, 8192)
    for scale in (0.0, -1.0, math.nan, 1e9):
        with pytest.raises(ConfigError, match="nothing credible"):
            calibrate(parameters, timer=FakeTimer(parameters, scale=scale), clock=still)


def test_a_working_set_that_was_spoiled_is_left_out() -> None:
    parameters = Parameters.create(3, 8192)

    class Spoiled(FakeTimer):
        def stages(self, bytes: int, rotations: int, diagonals: int, times: int) -> Sequence[Sequence[float]]:
            runs = super().stages(bytes, rotations, diagonals, times)
            return runs if bytes != SIZES[0] else [[math.nan, *run[1:]] for run in runs]

    made = calibrate(parameters, timer=Spoiled(parameters), clock=still)
    assert [size for size, _ in made.points] == sorted(SIZES[1:])


def test_a_stored_calibration_comes_back_or_is_refused() -> None:
    parameters = Parameters.create(3, 8192)
    made = calibrate(parameters, timer=FakeTimer(parameters), clock=still)
    stored = json.loads(json.dumps(made.to_json()))
    assert Calibration.from_json(stored) == made
    for damaged in (
        {},
        {**stored, "points": []},
        {**stored, "points": stored["points"][::-1]},
        {**stored, "points": [[1, {"transform_s": 1}]]},
        {**stored, "points": [[1, {**stored["points"][0][1], "transform_s": -1.0}]]},
        {**stored, "points": "none"},
    ):
        with pytest.raises(ConfigError, match="stored calibration is damaged"):
            Calibration.from_json(damaged)


def test_the_reference_constants_have_their_shares_of_what_they_do_not_name() -> None:
    """The compiler chooses by them: a program must not change because predictions know more."""
    assert replace(cost.REFERENCE["native"], expand_s=0.0) == Reference(5.25e-6, 2.6e-6, 1.5e-6, 0.2e-3)
    for one in cost.REFERENCE.values():
        assert one.turn_s == one.copy_s == 0


@pytest.mark.skipif(not available(), reason="the native backend was not built")
@pytest.mark.parametrize("threads", [1, 2])
def test_this_machine_is_measured(threads: int) -> None:
    parameters = Parameters.create(1, 4096)
    made = calibrate(parameters, threads=threads, budget_s=0.05)
    assert made.took_s > 0
    for _, one in made.points:
        assert all(math.isfinite(s) for s in asdict(one).values())
        assert all(getattr(one, f.name) > 0 for f in fields(one) if f.name != "turn_s")


@pytest.mark.skipif(not available(), reason="the native backend was not built")
def test_a_ring_that_cannot_be_timed_says_so() -> None:
    with pytest.raises(ConfigError, match="cannot be calibrated here: an even number of data primes"):
        calibrate(Parameters.create(2, 8192))
