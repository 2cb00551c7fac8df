"""Versions, shares, rollback and withdrawal as values; who answers which request."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blindtail.errors import AccessDenied, ConfigError, ModelWithdrawn, ProgramMismatch
from blindtail.he.clear import ClearDecryptor, ClearEncryptor
from blindtail.he.compatible import differences
from blindtail.he.program import Program
from cloud.catalogue import MOST_HISTORY, Catalogue, Rule, Version
from cloud.engine import Engine
from cloud.registry import Registry, draw
from tests.cloud_cases import activation, clear_keys
from tests.model_cases import logits_of, other_shape, retrained, version_of
from tests.refresh_cases import packed


def catalogue_of(*versions: str) -> Catalogue:
    found = Catalogue()
    for version in versions:
        found = found.with_version(version_of(version))
    return found


def registry_of(catalogue: Catalogue) -> Registry:
    registry = Registry()
    registry.adopt(catalogue)
    return registry


def ids(count: int, seed: int = 0) -> list[bytes]:
    return [random.Random(f"{seed}-{i}").randbytes(16) for i in range(count)]


def answered(catalogue: Catalogue, edge: str, requests: list[bytes]) -> list[str]:
    registry = registry_of(catalogue)
    entry = registry.find("toy", edge, retrained(edge).spec.program_id)
    return [registry.route(entry, request).version for request in requests]


def test_the_versions_are_what_the_tests_take_them_for() -> None:
    """Positive control: compatible ones differ in their id alone, the other one in more."""
    assert not differences(retrained("1").spec, retrained("2").spec)
    assert retrained("1").spec.program_id != retrained("2").spec.program_id
    assert "keys" in differences(retrained("1").spec, other_shape().spec)


# --- shares --------------------------------------------------------------------


def within(count: int, n: int, share: float) -> bool:
    """Six standard deviations of a binomial count, and six more requests: next to 0 and 1 counts are
    Poisson's, whose tail is longer. Missed once in 500 million."""
    return abs(count - n * share) <= 6 * np.sqrt(n * share * (1 - share)) + 6


@settings(max_examples=40, deadline=None)
@given(share=st.floats(0, 1), seed=st.integers(0, 1 << 30))
def test_a_share_is_met_and_a_retry_stays_where_it_was(share: float, seed: int) -> None:
    requests = ids(1500, seed)
    catalogue = catalogue_of("1", "2").with_share("toy", "2", share)
    first = answered(catalogue, "1", requests)
    assert within(first.count("2"), len(first), share)
    assert answered(catalogue, "1", requests) == first
    assert set(answered(catalogue, "2", requests)) == {"2"}  # its own edges never leave it


def test_within_fails_for_another_share() -> None:
    """Positive control of the bound above."""
    got = answered(catalogue_of("1", "2").with_share("toy", "2", 0.25), "1", ids(1500))
    assert within(got.count("2"), 1500, 0.25)
    assert not within(got.count("2"), 1500, 0.35)


@settings(max_examples=25, deadline=None)
@given(shares=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)))
def test_a_larger_share_moves_requests_to_the_canary_only(shares: tuple[float, float]) -> None:
    low, high = sorted(shares)
    requests = ids(400)
    catalogue = catalogue_of("1", "2").with_share("toy", "2", low)
    before = answered(catalogue, "1", requests)
    after = answered(catalogue.with_share("toy", "2", high), "1", requests)
    assert all(now == "2" for then, now in zip(before, after, strict=True) if then == "2")


def test_two_canaries_share_independently() -> None:
    catalogue = catalogue_of("1", "2", "3").with_share("toy", "2", 0.5).with_share("toy", "3", 0.5)
    got = answered(catalogue, "1", ids(4000))
    for version, share in (("3", 0.5), ("2", 0.25), ("1", 0.25)):
        assert within(got.count(version), len(got), share)


def test_a_share_of_one_is_all_and_ends_what_it_leaves_nothing_for() -> None:
    catalogue = catalogue_of("1", "2", "3").with_share("toy", "2", 1)
    assert set(answered(catalogue, "1", ids(50))) == {"2"}
    promoted = catalogue.with_share("toy", "3", 1)
    assert promoted.rules("toy") == (Rule("3", 1, ("1", "2")),)
    assert set(answered(promoted, "1", ids(50)) + answered(promoted, "2", ids(50))) == {"3"}


def test_versions_that_come_later_answer_their_own_edges() -> None:
    catalogue = catalogue_of("1", "2").with_share("toy", "2", 1).with_version(version_of("3"))
    assert set(answered(catalogue, "3", ids(50))) == {"3"}
    assert set(answered(catalogue.with_share("toy", "2", 1), "3", ids(50))) == {"2"}  # once asked for


def test_draws_are_spread_and_belong_to_model_version_and_request() -> None:
    got = np.array([draw("toy", "2", request) for request in ids(4000)])
    assert ((got >= 0) & (got < 1)).all()
    counts, _ = np.histogram(got, bins=10, range=(0, 1))
    assert all(within(int(count), 4000, 0.1) for count in counts)
    other = np.array([draw("toy", "3", request) for request in ids(4000)])
    assert abs(np.corrcoef(got, other)[0, 1]) < 0.1


def chain_of(version: str, last: str | None = None) -> Version:
    """A version whose tail is refreshed; `last`: another last segment under the same first one."""
    lead, *others = Version.of(packed()[1], "clear").entries.values()
    entries = [replace(entry, model="toy", version=version) for entry in (lead, *others)]
    if last is not None:
        spec = replace(entries[-1].program.spec, program_id=last * 64)
        entries[-1] = replace(entries[-1], program=Program(spec, entries[-1].program.ops))
    return Version("toy", version, {entry.program_id: entry for entry in entries})


def test_a_refreshed_tail_is_answered_by_one_version() -> None:
    first = chain_of("1")
    lead = next(iter(first.entries.values()))
    both = Catalogue().with_version(first).with_version(chain_of("2"))
    registry = registry_of(both.with_share("toy", "2", 1.0))
    assert {registry.route(e, b"r" * 16).version for e in first.entries.values()} == {"2"}
    # Another last segment: none of the offload's requests goes there.
    partly = chain_of("3", "0")
    assert partly.entries[lead.program_id].program is lead.program  # the control: the first one alone fits
    assert not differences(partly.entries[lead.program_id].program.spec, lead.program.spec)
    assert partly.counterpart(lead, first) is None
    with pytest.raises(ConfigError, match="differs from 1 in segment:"):
        Catalogue().with_version(first).with_version(partly).with_share("toy", "3", 1.0)


# --- refusals -------------------------------------------------------------------


def test_a_canary_needs_a_version_whose_edges_cannot_tell() -> None:
    with pytest.raises(ConfigError, match=r"differs from 1 in .*keys.*edge\.bt.*side by side"):
        catalogue_of("1", "other").with_share("toy", "other", 0.5)
    with pytest.raises(ConfigError, match="the only version here"):
        catalogue_of("1").with_share("toy", "1", 0.5)
    with pytest.raises(ConfigError, match="no toy 9; it has 1, 2"):
        catalogue_of("1", "2").with_share("toy", "9", 0.5)
    with pytest.raises(ConfigError, match="no model dog; it has toy"):
        catalogue_of("1").with_share("dog", "1", 0.5)
    with pytest.raises(ConfigError, match="0 to 1"):
        catalogue_of("1", "2").with_share("toy", "2", float("nan"))
    side_by_side = registry_of(catalogue_of("1", "other"))
    own = side_by_side.find("toy", "other", other_shape().spec.program_id)
    assert {side_by_side.route(own, request).version for request in ids(20)} == {"other"}


def test_another_content_under_a_name_that_is_taken() -> None:
    taken = catalogue_of("1")
    assert taken.with_version(version_of("1")) is taken
    foreign = version_of("2")
    renamed = type(foreign)(foreign.model, "1", foreign.entries)
    with pytest.raises(ConfigError, match="another version, or drop"):
        taken.with_version(renamed)


# --- rollback --------------------------------------------------------------------


def test_rollback_undoes_one_change_after_another() -> None:
    start = catalogue_of("1", "2")
    quarter = start.with_share("toy", "2", 0.25)
    half = quarter.with_share("toy", "2", 0.5)
    assert half.with_share("toy", "2", 0.5) is half  # no change, nothing to undo
    assert half.rolled_back("toy").rules("toy") == quarter.rules("toy")
    back = half.rolled_back("toy").rolled_back("toy")
    assert back.rules("toy") == ()
    with pytest.raises(ConfigError, match="nothing to roll back"):
        back.rolled_back("toy")
    with pytest.raises(ConfigError, match="no model dog"):
        back.rolled_back("dog")


def test_the_history_is_bounded() -> None:
    catalogue = catalogue_of("1", "2")
    for step in range(1, 3 * MOST_HISTORY):
        catalogue = catalogue.with_share("toy", "2", step / 100)
    assert len(catalogue.shares["toy"].history) == MOST_HISTORY


# --- withdrawal --------------------------------------------------------------------


def test_a_version_that_a_canary_depends_on_is_not_dropped() -> None:
    catalogue = catalogue_of("1", "2").with_share("toy", "2", 0.25)
    with pytest.raises(ConfigError, match=r"answers a share of 0\.25 of version 1's"):
        catalogue.without("toy", "2")
    with pytest.raises(ConfigError, match=r"the canary 2 \(share 0\.25\)"):
        catalogue.without("toy", "1")
    assert catalogue.with_share("toy", "2", 0).without("toy", "2").of_model("toy").keys() == {"1"}
    promoted = catalogue.with_share("toy", "2", 1)
    with pytest.raises(ConfigError, match="roll back"):
        promoted.without("toy", "2")
    left = promoted.without("toy", "1")
    assert left.rules("toy") == ()
    with pytest.raises(ConfigError, match="nothing to roll back"):  # every change was about version 1
        left.rolled_back("toy")


def test_a_withdrawn_version_says_so_and_what_is_served() -> None:
    registry = registry_of(catalogue_of("1", "2").without("toy", "1"))
    program_id = retrained("1").spec.program_id
    for call in (
        lambda: registry.find("toy", "1", program_id),
        lambda: registry.by_program(program_id),
        lambda: registry.admit_to_program("edge:a", program_id),
    ):
        with pytest.raises(ModelWithdrawn, match=r"withdrawn 'toy' version 1; version 2 is served.*exits"):
            call()
    with pytest.raises(ModelWithdrawn, match="no other version is served"):
        registry_of(catalogue_of("1").without("toy", "1")).find("toy", "1", program_id)
    back = registry_of(registry.catalogue.with_version(version_of("1")))
    assert back.find("toy", "1", program_id).version == "1"
    assert not back.catalogue.withdrawn


def test_an_empty_cell_says_that_models_are_pushed() -> None:
    registry = Registry()
    assert registry.largest_container_bytes == 0
    with pytest.raises(ProgramMismatch, match="blindtail model push"):
        registry.find("toy", "1", "0" * 64)


# --- who may ----------------------------------------------------------------------


def test_patterns_of_identities() -> None:
    closed = replace(version_of("1"), allow=("edge:clinic-*", "cn:alice"))
    registry = registry_of(Catalogue().with_version(closed).with_version(version_of("2")))
    program_id = retrained("1").spec.program_id
    for identity in ("edge:clinic-7", "cn:alice"):
        registry.admit(identity, "toy", "1")
        assert registry.admit_to_program(identity, program_id).version == "1"
    for identity in ("edge:home-1", "cn:alice2", "EDGE:clinic-7"):
        with pytest.raises(AccessDenied, match=f"not for {identity}.*--allow"):
            registry.admit(identity, "toy", "1")
        with pytest.raises(AccessDenied, match=identity):
            registry.admit_to_program(identity, program_id)
        registry.admit(identity, "toy", "2")
    opened = registry.catalogue.with_version(version_of("1"))
    registry.adopt(opened)
    registry.admit("edge:home-1", "toy", "1")


# --- any order of operations ----------------------------------------------------------

VERSIONS = ("1", "2", "3", "other")
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("push"), st.sampled_from(VERSIONS)),
        st.tuples(st.just("drop"), st.sampled_from(VERSIONS)),
        st.tuples(st.just("share"), st.sampled_from(VERSIONS), st.sampled_from((0.0, 0.1, 0.5, 1.0))),
        st.tuples(st.just("rollback")),
    ),
    max_size=25,
)


def apply(catalogue: Catalogue, operation: tuple[object, ...]) -> Catalogue:
    kind, *values = operation
    if kind == "push":
        return catalogue.with_version(version_of(str(values[0])))
    if kind == "drop":
        return catalogue.without("toy", str(values[0]))
    if kind == "share":
        return catalogue.with_share("toy", str(values[0]), float(str(values[1])))
    return catalogue.rolled_back("toy")


@settings(max_examples=60, deadline=None)
@given(OPERATIONS)
def test_after_any_operations_every_edge_of_a_version_here_is_answered(
    operations: list[tuple[object, ...]],
) -> None:
    catalogue, requests = Catalogue(), ids(10)
    for operation in operations:
        try:
            catalogue = apply(catalogue, operation)
        except ConfigError:
            continue
        registry = registry_of(catalogue)
        held = registry.programs
        here = {v for _, v in catalogue.versions}
        assert not set(catalogue.versions) & set(catalogue.withdrawn)
        for rule in catalogue.rules("toy"):
            assert rule.version in here
            assert set(rule.over) <= here - {rule.version}
            assert 0 < rule.share <= 1
        for entry in registry.entries:
            for request in requests:
                serving = registry.route(entry, request)
                assert serving.name in held
                assert serving.name.partition(":")[0] == entry.program_id
                own = held[serving.name].spec
                assert not differences(own, entry.program.spec)
                assert own.program_id in catalogue.versions["toy", serving.version].entries


# --- an evaluator with a stand-in ---------------------------------------------------------


def test_an_engine_answers_for_another_version_with_the_same_loaded_keys(tmp_path: Path) -> None:
    one, two = retrained("1"), retrained("2")
    edge, own = one.spec.program_id, two.spec.program_id
    engine = Engine({edge: one}, "clear", 1 << 20)
    (tmp_path / "source").write_bytes(clear_keys())
    keys = tmp_path / "keys"
    engine._evaluators[edge].prepare_keys(tmp_path / "source", keys)
    container = ClearEncryptor(one.spec).encrypt(activation())
    engine.load(f"{edge}:{own}", two)
    for name, version in ((edge, "1"), (f"{edge}:{own}", "2")):
        reply = engine.evaluate(name, str(keys), container).container
        assert np.allclose(ClearDecryptor(one.spec).decrypt(reply), logits_of(version), atol=1e-9)
    assert engine.counters.key_loads == 1
    engine.unload(edge)
    assert list(engine.names) == [f"{edge}:{own}"]
    assert engine._keys  # the stand-in still needs them
    engine.unload(f"{edge}:{own}")
    assert not engine._keys
