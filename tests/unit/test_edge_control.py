"""Policies from an orchestrator: tried, applied at once and as a whole, refused with a reason, remembered."""

from __future__ import annotations

import json
import logging
import stat as file_modes
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blindtail.errors import ConfigError
from blindtail.records import Action, Decision, DecisionContext
from blindtail.wire.control import PeerKind, PolicyUpdate, Report, encode_up
from edge.control import PolicyControl, PolicyFile, Rules
from edge.trial import contexts, policy_for
from orchestrator.policy import POLICIES, DeadlineAware, EdgeOnly, ExitThreshold
from tests.edge_fakes import bundle_of
from tests.policy_cases import introduce, update

UNSURE = 60


class Edge:
    """A control with a place for its rules, as a runtime has."""

    def __init__(self, state_dir: Path, own_deadline_s: float | None = 9.0, **bundle: Any) -> None:
        self.bundle = bundle_of(**bundle)
        self.rules = self.own = Rules(EdgeOnly((0.5, 0.5)), own_deadline_s)
        self.control = PolicyControl(
            self.bundle, self.own, self.use, lambda interval_s: Report(interval_s), state_dir
        )

    def use(self, rules: Rules) -> None:
        self.rules = rules

    def refusal(self, given: PolicyUpdate) -> str:
        """Why it is refused; nothing has changed then."""
        before, version = self.rules, self.control.version
        ack = self.control.receive(given)
        assert (ack.version, ack.applied) == (given.version, False)
        assert (self.rules, self.control.version) == (before, version)
        return ack.reason


@pytest.fixture
def edge(tmp_path: Path) -> Edge:
    return Edge(tmp_path)


# -- applied, or refused ------------------------------------------------------------


def test_a_policy_and_its_objective_take_effect_together(edge: Edge) -> None:
    ack = edge.control.receive(update(4, "deadline", {"safety": 1.5, "thresholds": 0.7}, 0.25))
    assert (ack.version, ack.applied, ack.reason) == (4, True, "")
    assert edge.rules == Rules(DeadlineAware((0.7, 0.7), safety=1.5), 0.25, 4)
    assert edge.control.version == edge.control.hello().policy_version == 4


def test_what_an_orchestrator_leaves_open_stays_the_edges_own(edge: Edge) -> None:
    edge.control.receive(update(1, "deadline", deadline_s=0.25))
    edge.control.receive(update(2, "threshold"))
    assert edge.rules == Rules(ExitThreshold((0.9, 0.9)), 9.0, 2)  # the model's thresholds, its own deadline


def test_a_lower_version_counts_too(edge: Edge) -> None:
    """An orchestrator that lost its state begins again at 1."""
    assert edge.control.receive(update(7, "threshold")).applied
    assert edge.control.receive(update(1, "edge-only")).applied
    assert edge.rules.version == 1


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (update(1, "deadline", {"thresholds": [0.5, 0.5, 0.5]}), "3 thresholds given, but the model has 2"),
        (update(1, "quantum"), "unknown policy 'quantum'"),
        (update(1, "deadline", {"saftey": 2}), "did you mean 'safety'"),
        (update(1, "deadline", {"safety": "high"}), "safety must be above 0"),
        (update(1, "deadline", {"thresholds": ["a", "b"]}), "threshold"),
        (update(1, "deadline", {"thresholds": {"a": 1}}), "thresholds is a number or a list"),
        (update(1, "cloud-only", {"cut": 1}), "no cut after stage 1; cuts: 2"),
        (update(1, "cloud-only", {"cut": [2]}), "cut"),
        (update(1, model="another"), "runs model toy, not another"),
        (PolicyUpdate(1, "", b"{"), "not JSON"),
        (PolicyUpdate(1, "", b'{"policy": "deadline", "new": 1}'), "no field 'new'"),
        (
            PolicyUpdate(1, "", b'{"policy": "deadline", "objectives": {"joules": 1}}'),
            "no objective 'joules'",
        ),
        (PolicyUpdate(1, "", b'{"policy": "deadline", "objectives": {"deadline_s": -1}}'), "above 0"),
    ],
)
def test_what_this_edge_cannot_follow_is_refused_with_the_reason(
    edge: Edge, given: PolicyUpdate, words: str
) -> None:
    assert words in edge.refusal(given)
    assert edge.control.receive(update(2, "edge-only")).applied  # positive control
    assert words in edge.refusal(given)
    assert edge.rules.version == 2


def test_a_policy_that_fails_or_makes_no_sense_never_meets_an_image(
    edge: Edge, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(context: DecisionContext) -> Decision:
        if context.deadline_s is not None and context.elapsed_s > context.deadline_s:
            raise ZeroDivisionError("no time")
        return Decision(Action.CONTINUE)

    for decide, words in (
        (fails, "fails after stage 0: ZeroDivisionError: no time"),
        (lambda c: "exit", "gives no decision but str"),
        (lambda c: Decision("exit"), "gives no decision"),
        (lambda c: Decision(Action.EXIT, 7), "answers from exit 7"),
        (lambda c: Decision(Action.EXIT, 1), "after stage 0, answers from exit 1"),
        (lambda c: Decision(Action.OFFLOAD), "offloads where no tail can answer"),
    ):
        introduce(monkeypatch, decide)
        assert words in edge.refusal(update(1, "strange"))
    introduce(monkeypatch, lambda c: Decision(Action.CONTINUE))
    assert edge.control.receive(update(2, "strange")).applied  # positive control


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)


_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


_PARAMETERS = st.dictionaries(
    st.sampled_from(["thresholds", "safety", "reserve_s", "cut", "other"]) | st.text(max_size=5), _VALUES
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.fixed_dictionaries(
        {"policy": st.sampled_from(sorted(POLICIES)) | _VALUES},
        optional={"parameters": _PARAMETERS | _VALUES, "objectives": _VALUES},
    )
    | _VALUES
)
def test_whatever_comes_is_applied_whole_or_refused_with_a_reason(tmp_path: Path, document: Any) -> None:
    edge = Edge(tmp_path)
    before = edge.rules
    ack = edge.control.receive(PolicyUpdate(5, "", json.dumps(document).encode()))
    encode_up(ack)
    if ack.applied:
        assert edge.rules.version == 5
        again = Edge(tmp_path)
        again.control.restore()
        assert again.rules == edge.rules
    else:
        assert ack.reason
        assert edge.rules is before


def test_a_long_reason_is_cut(edge: Edge) -> None:
    given = PolicyUpdate(1, "", json.dumps({"policy": "deadline", "parameters": {"x" * 5000: 1}}).encode())
    ack = edge.control.receive(given)
    assert 0 < len(ack.reason) <= 512
    encode_up(ack)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("shape", [{}, {"exits": (1,), "cuts": ()}, {"exits": (2,), "cuts": (0, 1, 2)}])
def test_our_own_policies_pass_the_trial_on_every_model(name: str, shape: dict[str, Any]) -> None:
    bundle = bundle_of(**shape)
    assert policy_for(bundle, name).name == name
    tried = list(contexts(bundle))
    assert len(tried) >= 96
    assert {c.stage for c in tried} == {0, 1, 2}
    assert {c.can_offload for c in tried} == ({True, False} if bundle.cuts else {False})


# -- remembered ------------------------------------------------------------------------


def test_the_last_good_policy_holds_after_a_restart(tmp_path: Path) -> None:
    first = Edge(tmp_path)
    first.control.receive(update(3, "threshold", {"thresholds": 0.6}, 0.5))
    first.refusal(update(4, "quantum"))
    path = tmp_path / "policy-toy.json"
    assert file_modes.S_IMODE(path.stat().st_mode) == 0o600
    second = Edge(tmp_path)
    second.control.restore()
    assert second.rules == first.rules
    assert second.control.version == 3
    assert second.control.hello().instance != first.control.hello().instance
    assert [p.name for p in tmp_path.iterdir()] == ["policy-toy.json"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-10],
        lambda data: data.replace(b"0.5", b"0.6"),
        lambda data: data.replace(b'"format": 1', b'"format": 2'),
        lambda data: b"[]",
        lambda data: b"\xff\xfe",
        lambda data: b"[" * 90_000,
        lambda data: data + b" " * 200_000,
    ],
)
def test_a_damaged_file_is_removed_and_said_so(
    tmp_path: Path, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    Edge(tmp_path).control.receive(update(3, "threshold", {}, 0.5))
    path = tmp_path / "policy-toy.json"
    path.write_bytes(damage(path.read_bytes()))
    caplog.set_level(logging.WARNING, "edge.control")
    edge = Edge(tmp_path)
    edge.control.restore()
    assert (edge.rules, edge.control.version) == (edge.own, 0)
    assert not path.exists()
    assert [r.getMessage() for r in caplog.records] == [
        f"the stored policy is not used and removed: {path} is damaged"
    ]
    edge.control.restore()  # no file: nothing to say
    assert len(caplog.records) == 1


def test_a_stored_policy_that_a_new_model_cannot_follow_is_dropped(tmp_path: Path) -> None:
    Edge(tmp_path).control.receive(update(3, "threshold", {"thresholds": [0.5, 0.6]}))
    later = Edge(tmp_path, exits=(0,))  # its next version has one exit less
    later.control.restore()
    assert later.rules == later.own
    assert not (tmp_path / "policy-toy.json").exists()


def test_a_directory_that_cannot_be_written_does_not_keep_a_policy_from_working(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    edge = Edge(tmp_path / "file")
    assert edge.control.receive(update(3, "threshold")).applied
    assert edge.rules.version == 3
    assert "cannot be stored" in caplog.text


def test_files_of_models_with_odd_names_stay_in_the_directory(tmp_path: Path) -> None:
    paths = {PolicyFile(tmp_path, name).path for name in ("a", "../a", "a/b", ".", "", "ü", "A" * 200)}
    assert len(paths) == 7
    assert {p.parent for p in paths} == {tmp_path}
    for name in ("../a", "a/b"):
        file = PolicyFile(tmp_path, name)
        file.write(update(5))
        found = file.read()
        assert found is not None
        assert found.version == 5
    other = PolicyFile(tmp_path, "other")
    PolicyFile(tmp_path, "a/b").path.rename(other.path)
    with pytest.raises(ConfigError, match="damaged"):
        other.read()


def test_hello_names_the_model_and_no_more(edge: Edge) -> None:
    hello = edge.control.hello()
    assert (hello.kind, hello.models, hello.policy_version, hello.address) == (
        PeerKind.EDGE,
        (("toy", "1"),),
        0,
        "",
    )
    assert len(hello.instance) == 16
