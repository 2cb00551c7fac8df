"""Values out of range are noted on the device, and nobody else can tell that they were."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from blindtail.bundle import EdgeBundle
from blindtail.he.compiler import compile_tail
from blindtail.he.layers import Affine
from blindtail.he.scales import LIKE_HEADROOM
from blindtail.he.stability import RANGE_MARGIN, logit_bound
from blindtail.metrics import EdgeMetrics
from blindtail.records import Answer, TailReply, TailTimings
from blindtail.wire.control import encode_up
from edge.accounting import seen_from_outside
from edge.ranges import ACTIVATION, LOGITS, NOTES, Ranges
from edge.runtime import EdgeRuntime
from edge.status import RuntimeStatus
from orchestrator.policy import ExitThreshold
from tests.clock import FakeClock
from tests.edge_fakes import CLASSES, FakeTail, PlainCipher, bundle_of, image, spec_of

UNSURE = 60


def logits_of(largest: float) -> TailReply:
    logits = np.zeros(CLASSES)
    logits[3] = largest
    return TailReply(logits.tobytes(), TailTimings(0.0, 0.001, "fake"), 0.001)


@dataclass
class Seen:
    """What one answer leaves behind: on the device, and for everybody else."""

    answer: Answer
    status: RuntimeStatus
    sent: list[bytes]  # containers that went to the tail
    report: bytes  # as it would be sent to an orchestrator
    metrics: str  # as a scraper would read them


def answered(logits: float = 5.0, bundle: EdgeBundle | None = None, pixel: int = UNSURE) -> Seen:
    """An image that is offloaded, three times, on a clock that stands still: the last answer."""
    sent: list[bytes] = []

    def behave(container: bytes, remaining_s: float | None) -> TailReply:
        sent.append(container)
        return logits_of(logits)

    registry, clock = CollectorRegistry(), FakeClock()
    tail = FakeTail(behave, cipher=PlainCipher(clock))
    with EdgeRuntime(
        bundle or bundle_of(),
        {2: tail},
        ExitThreshold((0.9, 0.9)),
        clock=clock,
        metrics=EdgeMetrics(registry, "toy"),
    ) as edge:
        answer = [edge.infer(image(1, pixel)) for _ in range(3)][-1]
        status = edge.status()
        report = encode_up(edge._report(60.0))
    lines = generate_latest(registry).decode().splitlines()
    metrics = "\n".join(line for line in lines if "_created" not in line)
    return Seen(answer, status, sent, report, metrics)


def narrow(input_bound: float) -> EdgeBundle:
    return bundle_of(spec=replace(spec_of(), input_bound=input_bound))


def test_the_bounds_are_those_the_program_was_compiled_for() -> None:
    x = np.random.default_rng(0).normal(size=(50, 8))
    layer = Affine(np.random.default_rng(1).normal(size=(3, 8)), np.zeros(3), "only")
    spec = compile_tail([layer], x).spec
    assert spec.input_bound == np.abs(x).max()
    # Over slots, of which some hold partial sums: at least the largest logit.
    assert np.abs(layer(x)).max() <= logit_bound(spec) * (1 + 1e-9)
    assert logit_bound(spec) < 4 * np.abs(layer(x)).max()
    # A replaced tail may use this much more, and is then no event.
    assert pytest.approx(4.0 / LIKE_HEADROOM) == RANGE_MARGIN


@pytest.mark.parametrize(
    ("kind", "bound"), [(ACTIVATION, spec_of().input_bound), (LOGITS, logit_bound(spec_of()))]
)
def test_what_lies_beyond_the_margin_is_noted(kind: str, bound: float) -> None:
    ranges = Ranges({2: [spec_of()]})
    inside = np.array([0.0, -bound * RANGE_MARGIN * 0.999])
    assert ranges.note(kind, 2, inside) == {}
    assert ranges.note(kind, 2, np.array([[-3.0 * bound], [1.0]])) == {kind: pytest.approx(3.0)}
    for odd in (math.nan, math.inf):
        assert ranges.note(kind, 2, np.array([odd, 0.0])) == {}
    assert Ranges({2: [replace(spec_of(), input_bound=0.0)]}).note(ACTIVATION, 2, np.ones(3)) == {}


def test_the_device_is_told() -> None:
    usual = answered()
    assert not set(NOTES) & set(usual.answer.extra)
    assert usual.status.out_of_range == {}
    wild = answered(logits=100.0)
    assert wild.answer.route == "tail"
    assert wild.answer.extra[LOGITS] == float(f"{100.0 / logit_bound(spec_of()):.2g}")
    assert wild.status.out_of_range == {LOGITS: 3}
    loud = answered(bundle=narrow(0.1))
    assert loud.answer.extra[ACTIVATION] == float(f"{UNSURE / 255 / 0.1:.2g}")
    assert loud.status.out_of_range == {ACTIVATION: 3}
    both = answered(100.0, narrow(0.1))
    assert set(NOTES) <= set(both.answer.extra)


@pytest.mark.parametrize(
    "event", [{"logits": 100.0}, {"bundle": narrow(0.1)}, {"logits": 100.0, "bundle": narrow(0.1)}]
)
def test_nobody_else_can_tell(event: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """Same requests, same report, same metrics, same answer in time, and not a word in a log."""
    caplog.set_level(logging.DEBUG)
    usual = answered()
    said = len(caplog.records)
    noted = answered(**event)
    assert noted.status.out_of_range  # the event took place
    assert noted.sent == usual.sent
    assert noted.report == usual.report
    assert noted.metrics == usual.metrics
    assert (noted.answer.route, noted.answer.fallback) == (usual.answer.route, usual.answer.fallback)
    assert len(caplog.records) == 2 * said
    assert not any(word in noted.metrics + caplog.text for word in (*NOTES, "range"))
    logging.getLogger("edge.runtime").debug("out of range")  # the control: it would have been seen
    assert len(caplog.records) == 2 * said + 1
    assert "range" in caplog.text


def test_what_others_may_know_does_change_them() -> None:
    """The control: the comparison above sees a request that takes another route."""
    usual, other = answered(), answered(pixel=250)
    assert other.answer.route == "exit1"
    assert other.sent != usual.sent
    assert other.report != usual.report
    assert other.metrics != usual.metrics


def test_an_answer_as_others_see_it_has_no_note() -> None:
    wild = answered(100.0, narrow(0.1)).answer
    shown = seen_from_outside(wild)
    assert shown == replace(wild, extra={"cut": 2.0})
    # Neither has one whose reply did not open.
    unopened = replace(wild, route="exit2", fallback="refused")
    assert seen_from_outside(unopened) == replace(shown, route="tail", fallback=None)


def test_an_exit_that_stands_in_keeps_the_note_of_the_activation() -> None:
    """The tail was to be asked with values out of its range, and the device may know."""
    refused = answered(math.nan, narrow(0.1))
    assert (refused.answer.route, refused.answer.fallback) == ("exit2", "refused")
    assert ACTIVATION in refused.answer.extra
    assert LOGITS not in refused.answer.extra
