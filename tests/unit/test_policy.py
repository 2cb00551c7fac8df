"""Policies decide by their documented order and refuse parameters they do not know."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blindtail.records import Action, DecisionContext, ExitSeen, LatencyEstimate
from orchestrator import policy as module
from orchestrator.policy import (
    POLICIES,
    UNAVAILABLE,
    CloudOnly,
    DeadlineAware,
    EdgeOnly,
    ExitThreshold,
    PolicyError,
    best_exit,
    make_policy,
)

T = (0.8, 0.9)


def seen(index: int, confidence: float) -> ExitSeen:
    return ExitSeen(index, confidence, confidence, 0.5)


def context(**changes: Any) -> DecisionContext:
    """The last of three stages, at a cut with a ready tail; exit 0 and 1 unsure; no deadline."""
    base: dict[str, Any] = {
        "stage": 2,
        "stages": 3,
        "exits": (seen(0, 0.5), seen(1, 0.6)),
        "exit_here": 1,
        "cut_here": True,
        "tail_ready": True,
        "elapsed_s": 0.01,
        "deadline_s": None,
        "offload": LatencyEstimate(0.2, 0.4, 10),
        "next_exit": None,
        "cut_ahead": False,
    }
    return DecisionContext(**{**base, **changes})


FIRST = {
    "stage": 0,
    "exits": (seen(0, 0.5),),
    "exit_here": 0,
    "cut_here": False,
    "offload": None,
    "next_exit": LatencyEstimate(0.002, 0.004, 10),
    "cut_ahead": True,
}
AWAY = {"tail_ready": False, "offload": None}
E, C, OFF = Action.EXIT, Action.CONTINUE, Action.OFFLOAD

CASES: list[tuple[str, Any, dict[str, Any], Action, int | None, str]] = [
    ("sure exit answers", ExitThreshold(T), {"exits": (seen(0, 0.5), seen(1, 0.9))}, E, 1, "sure"),
    ("threshold is inclusive", ExitThreshold(T), {**FIRST, "exits": (seen(0, 0.8),)}, E, 0, "sure"),
    ("unsure goes on", ExitThreshold(T), FIRST, C, None, "unsure"),
    ("unsure at the last cut offloads", ExitThreshold(T), {}, OFF, None, "unsure"),
    ("a later cut is waited for", ExitThreshold(T), {"stage": 1, "cut_ahead": True}, C, None, "unsure"),
    (
        "no tail, best exit",
        ExitThreshold(T),
        {**AWAY, "exits": (seen(0, 0.7), seen(1, 0.6))},
        E,
        0,
        UNAVAILABLE,
    ),
    ("no cut at all is no fault", ExitThreshold(T), {**AWAY, "cut_here": False}, E, 1, "unsure"),
    ("an old sure exit does not count twice", ExitThreshold(T), {"exit_here": None}, OFF, None, "unsure"),
    ("edge-only never offloads", EdgeOnly(T), {}, E, 1, "unsure"),
    ("edge-only goes on", EdgeOnly(T), FIRST, C, None, "unsure"),
    ("edge-only takes sure exits", EdgeOnly(T), {"exits": (seen(0, 0.5), seen(1, 1.0))}, E, 1, "sure"),
    (
        "cloud-only ignores sure exits",
        CloudOnly(),
        {"exits": (seen(0, 1.0), seen(1, 1.0))},
        OFF,
        None,
        "always",
    ),
    ("cloud-only goes to the last cut", CloudOnly(), {"stage": 1, "cut_ahead": True}, C, None, "always"),
    ("cloud-only at the cut given", CloudOnly(1), {"stage": 1, "cut_ahead": True}, OFF, None, "always"),
    ("cloud-only without a tail", CloudOnly(), AWAY, E, 1, UNAVAILABLE),
    ("deadline: sure exit first", DeadlineAware(T), {"exits": (seen(0, 0.5), seen(1, 0.95))}, E, 1, "sure"),
    ("deadline: none, offload", DeadlineAware(T), {}, OFF, None, "unsure"),
    ("deadline: offload fits", DeadlineAware(T), {"deadline_s": 0.45}, OFF, None, "unsure"),
    ("deadline: the p95 decides, not the p50", DeadlineAware(T), {"deadline_s": 0.35}, E, 1, "no time"),
    (
        "deadline: time spent counts",
        DeadlineAware(T),
        {"deadline_s": 0.45, "elapsed_s": 0.1},
        E,
        1,
        "no time",
    ),
    ("deadline: safety", DeadlineAware(T, safety=2.0), {"deadline_s": 0.45}, E, 1, "no time"),
    ("deadline: reserve", DeadlineAware(T, reserve_s=0.1), {"deadline_s": 0.45}, E, 1, "no time"),
    ("deadline: goes on", DeadlineAware(T), {**FIRST, "deadline_s": 1.0}, C, None, "unsure"),
    ("deadline: next exit too slow", DeadlineAware(T), {**FIRST, "deadline_s": 0.012}, E, 0, "unsure"),
    ("deadline: passed", DeadlineAware(T), {**FIRST, "deadline_s": 0.005}, E, 0, "unsure"),
    (
        "deadline: no exit yet, goes on",
        DeadlineAware(T),
        {**FIRST, "exits": (), "exit_here": None, "deadline_s": 0.001},
        C,
        None,
        "unsure",
    ),
    ("deadline: tail away", DeadlineAware(T), {**AWAY, "deadline_s": 1.0}, E, 1, UNAVAILABLE),
    (
        "deadline: keeps the offload that going on would forfeit",
        DeadlineAware(T),
        {**FIRST, "cut_here": True, "offload": LatencyEstimate(0.2, 0.4), "deadline_s": 0.412},
        OFF,
        None,
        "unsure",
    ),
    (
        "deadline: goes on while a later offload still fits",
        DeadlineAware(T),
        {**FIRST, "cut_here": True, "offload": LatencyEstimate(0.2, 0.4), "deadline_s": 0.5},
        C,
        None,
        "unsure",
    ),
    (
        "deadline: at the last cut with an exit ahead it offloads",
        DeadlineAware(T),
        {
            **FIRST,
            "cut_here": True,
            "cut_ahead": False,
            "offload": LatencyEstimate(0.2, 0.4),
            "deadline_s": 0.5,
        },
        OFF,
        None,
        "unsure",
    ),
]


@pytest.mark.parametrize(
    ("name", "policy", "changes", "action", "index", "reason"), CASES, ids=[c[0] for c in CASES]
)
def test_decisions(
    name: str, policy: Any, changes: dict[str, Any], action: Action, index: int | None, reason: str
) -> None:
    decision = policy.decide(context(**changes))
    assert (decision.action, decision.exit_index, decision.reason) == (action, index, reason)


estimates = st.none() | st.builds(LatencyEstimate, st.floats(0, 1), st.floats(0, 3), st.integers(0, 9))
contexts = st.builds(
    lambda stage, sure, exit_now, cut, ready, elapsed, deadline, offload, following, ahead: context(
        stage=stage,
        exits=tuple(seen(i, c) for i, c in enumerate(sure)),
        exit_here=len(sure) - 1 if exit_now and sure else None,
        cut_here=cut,
        tail_ready=ready,
        elapsed_s=elapsed,
        deadline_s=deadline,
        offload=offload if cut and ready else None,
        next_exit=following if stage < 2 else None,
        cut_ahead=ahead and stage < 2,
    ),
    st.integers(0, 2),
    st.lists(st.floats(0, 1), max_size=2),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.floats(0, 2),
    st.none() | st.floats(0.001, 3),
    estimates,
    estimates,
    st.booleans(),
)


@given(
    contexts, st.sampled_from([ExitThreshold(T), EdgeOnly(T), CloudOnly(), CloudOnly(1), DeadlineAware(T)])
)
def test_decisions_are_pure_and_possible(c: DecisionContext, policy: Any) -> None:
    decision = policy.decide(c)
    assert decision == policy.decide(c)
    if decision.action is Action.OFFLOAD:
        assert c.can_offload
        if isinstance(policy, DeadlineAware) and c.deadline_s is not None and c.offload is not None:
            assert c.elapsed_s + c.offload.p95_s <= c.deadline_s + 1e-9
    if decision.action is Action.CONTINUE:
        assert not c.last_stage
    if decision.action is Action.EXIT and decision.exit_index is not None:
        assert decision.exit_index in {e.index for e in c.exits}
    if decision.action is Action.EXIT and decision.exit_index is None:
        assert not c.exits
        assert c.last_stage


def test_the_best_exit_is_the_surest_and_on_a_tie_the_later_one() -> None:
    assert best_exit(()) is None
    assert best_exit((seen(0, 0.9), seen(1, 0.7))) == seen(0, 0.9)
    assert best_exit((seen(0, 0.7), seen(1, 0.7))) == seen(1, 0.7)


def test_policies_are_made_by_name_with_the_models_thresholds() -> None:
    assert make_policy("threshold", thresholds=[0.7, 0.8]) == ExitThreshold((0.7, 0.8))
    assert make_policy("edge-only", {"thresholds": 0.5}, thresholds=[0.7, 0.8]) == EdgeOnly((0.5, 0.5))
    assert make_policy("cloud-only", {"cut": 1}, thresholds=[0.7]) == CloudOnly(1)
    assert make_policy("deadline", {"safety": 1.5}, thresholds=[0.7]) == DeadlineAware((0.7,), safety=1.5)
    assert set(POLICIES) == {"deadline", "threshold", "edge-only", "cloud-only"}


@pytest.mark.parametrize(
    ("name", "parameters", "words"),
    [
        ("dedline", {}, "did you mean 'deadline'"),
        ("threshold", {"treshold": 0.5}, "did you mean 'thresholds'"),
        ("cloud-only", {"thresholds": 0.5}, "no parameter 'thresholds'"),
        ("threshold", {"thresholds": [0.5]}, "2 exits"),
        ("threshold", {"thresholds": "high"}, "number"),
        ("threshold", {"thresholds": [0.5, float("nan")]}, "confidence"),
        ("threshold", {"thresholds": [0.5, -0.1]}, "confidence"),
        ("threshold", {"thresholds": [True, False]}, "confidence"),
        ("deadline", {"safety": 0}, "safety"),
        ("deadline", {"reserve_s": -1}, "reserve_s"),
        ("deadline", {"safety": "2"}, "safety"),
        ("cloud-only", {"cut": -1}, "cut"),
        ("cloud-only", {"cut": "last"}, "cut"),
    ],
)
def test_wrong_parameters_are_named(name: str, parameters: dict[str, Any], words: str) -> None:
    with pytest.raises(PolicyError, match=words) as caught:
        make_policy(name, parameters, thresholds=[0.7, 0.8])
    assert isinstance(caught.value, ValueError)


def test_thresholds_cannot_be_missing() -> None:
    with pytest.raises(PolicyError, match="thresholds"):
        make_policy("threshold")


def test_the_module_imports_the_standard_library_and_records_only() -> None:
    assert module.__file__ is not None
    tree = ast.parse(Path(module.__file__).read_text())
    names = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
    names |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    foreign = {n for n in names if n.split(".")[0] not in sys.stdlib_module_names}
    assert foreign == {"blindtail.records"}


def test_a_number_beyond_every_float_is_refused() -> None:
    with pytest.raises(PolicyError, match="safety"):
        make_policy("deadline", {"safety": 10**400}, thresholds=[0.5])
