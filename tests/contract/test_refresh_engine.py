"""Segments of one chain on every backend: one set of keys, loaded once, and the numbers of the clear maps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blindtail.bundle import CloudBundle
from blindtail.errors import ConfigError, ContainerError, InputError, KeysMissing, ProgramMismatch
from blindtail.he.backends import open_evaluator
from blindtail.he.compiler import compile_tail
from blindtail.he.layers import Affine, Layer, Quadratic
from blindtail.he.native_backend import available
from blindtail.he.normal import normalised
from blindtail.he.program import Program
from blindtail.he.segments import chained
from blindtail.wire import EvaluateCall
from cloud.catalogue import Catalogue
from cloud.engine import Engine
from cloud.registry import Registry
from edge.cipher import make_keys, open_cipher
from edge.interludes import largest_input

BACKENDS = ["clear", "seal", *(["native"] if available() else [])]
RNG = np.random.default_rng(1)


def _affine(out: int, given: int, name: str, shift: float = 0.0) -> Affine:
    rng = np.random.default_rng(out + given)
    return Affine(rng.normal(size=(out, given)) / given**0.5, rng.normal(size=out) / 8 + shift, name)


def _layers(shift: float = 0.0) -> list[list[Layer]]:
    """Three levels, one, and one: a deep segment between two flat ones."""
    ones = np.ones(12)
    square = Quadratic(ones, 0 * ones, 0 * ones, "square")
    return [
        [_affine(16, 24, "a")],
        [_affine(12, 16, "b"), square, _affine(20, 12, "c", shift)],
        [_affine(5, 20, "d")],
    ]


def chain(shift: float = 0.0) -> tuple[Program, ...]:
    values = [np.random.default_rng(2).uniform(-1, 1, (32, n)) for n in (24, 16, 20)]
    return chained(
        [compile_tail(x, v, ring_degree=8192) for x, v in zip(_layers(shift), values, strict=True)]
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_set_of_keys_evaluates_every_segment(backend: str, tmp_path: Path) -> None:
    programs = chain()
    specs, ids = [p.spec for p in programs], [p.spec.program_id for p in programs]
    kind = "clear" if backend == "clear" else "seal"
    secret, sent, prepared = (tmp_path / n for n in ("secret", "sent", "prepared"))
    make_keys(specs[0], secret, sent, kind)
    assert sent.stat().st_size == specs[0].key_bytes == specs[2].key_bytes
    cipher = open_cipher(specs[0], secret, kind, specs[1:])
    open_evaluator(backend, programs[0]).prepare_keys(sent, prepared)
    engine = Engine(dict(zip(ids, programs, strict=True)), backend, 1)  # room for one key set
    for i, (layers, spec) in enumerate(zip(_layers(), specs, strict=True)):
        x = RNG.uniform(-1, 1, spec.features)
        container = cipher.encrypt(x, segment=i)
        if backend != "clear":
            assert len(container) == spec.uplink_bytes
        got = cipher.decrypt(engine.evaluate(ids[i], str(prepared), container).container, segment=i)
        want = normalised(layers)(x[None])[0]
        np.testing.assert_allclose(got, want, atol=0.01 * np.abs(want).max() + 1e-12)
        # Another segment's container is refused, also where it has the same size.
        for j in {0, 1, 2} - {i}:
            with pytest.raises(ContainerError):
                engine.evaluate(ids[j], str(prepared), container)
    assert engine.counters.key_loads == 1
    # They stay while any segment is here, and belong to this chain alone.
    engine.unload(ids[0])
    engine.evaluate(ids[2], str(prepared), cipher.encrypt(np.zeros(20), segment=2))
    assert engine.counters.key_loads == 1
    for name in ids[1:]:
        engine.unload(name)
    assert not engine._keys
    alone = compile_tail([_affine(5, 20, "d")], RNG.uniform(-1, 1, (32, 20)), ring_degree=8192)
    with pytest.raises(KeysMissing, match="another program"):
        open_evaluator(backend, alone).load_keys(prepared)


def test_what_the_edge_lets_through_can_be_encrypted(tmp_path: Path) -> None:
    """The bound by which strange values are replaced is the encryptor's own, a hair below it."""
    specs = [p.spec for p in chain()]
    make_keys(specs[0], tmp_path / "secret", tmp_path / "keys", "seal")
    cipher = open_cipher(specs[0], tmp_path / "secret", "seal", specs[1:])
    for i, spec in enumerate(specs):
        signs = RNG.choice([-1.0, 1.0], spec.features)
        for values in (np.ones(spec.features), -np.ones(spec.features), signs):
            sent = cipher.encrypt(largest_input(spec) * values, segment=i)
            assert len(sent) == spec.uplink_bytes
            with pytest.raises(InputError):
                cipher.encrypt(1.01 * largest_input(spec) * values, segment=i)


def _registry(*bundles: CloudBundle) -> Registry:
    return Registry(bundles, "clear")


def _bundle(version: str, shift: float = 0.0) -> CloudBundle:
    lead, *rest = chain(shift)
    return CloudBundle("toy", version, {0: lead}, {0: tuple(rest)})


def test_a_cell_finds_segments_through_their_first_one_alone() -> None:
    bundle = _bundle("1")
    registry, (lead, second, third) = _registry(bundle), bundle.segments(0)
    entry = registry.find("toy", "1", lead.spec.program_id)
    assert registry.segment(entry, "") is registry.segment(entry, lead.spec.program_id) is entry
    for later in (second, third):
        found = registry.segment(entry, later.spec.program_id)
        assert (found.program, found.keys_id) == (later, lead.spec.program_id)
        with pytest.raises(ProgramMismatch):
            registry.find("toy", "1", later.spec.program_id)
        with pytest.raises(ProgramMismatch):
            registry.by_program(later.spec.program_id)
    with pytest.raises(ProgramMismatch, match="no segment of this session"):
        registry.segment(entry, "ab" * 32)
    assert set(registry.programs) == {p.spec.program_id for p in bundle.segments(0)}


def test_a_segment_of_another_version_is_no_segment_of_this_session() -> None:
    """Their first segments are the same program, and so are the keys: the others are told apart."""
    one, two = _bundle("1"), _bundle("2", shift=1.0)
    assert one.programs[0].spec == two.programs[0].spec
    registry = _registry(one, two)
    entry = registry.find("toy", "1", one.programs[0].spec.program_id)
    with pytest.raises(ProgramMismatch):
        registry.segment(entry, two.following[0][0].spec.program_id)


def test_segments_are_not_shared_out_to_another_version() -> None:
    ones = np.ones(12)
    other = [_layers()[1][0], Quadratic(ones, 0 * ones, 0 * ones, "s"), _affine(5, 12, "e")]
    values = np.random.default_rng(2).uniform(-1, 1, (32, 16))
    first = compile_tail([_affine(16, 24, "a", 0.5)], RNG.uniform(-1, 1, (32, 24)), ring_degree=8192)
    lead, *rest = chained([first, compile_tail(other, values, ring_degree=8192)])
    catalogue = Catalogue.of([_bundle("1"), CloudBundle("toy", "2", {0: lead}, {0: tuple(rest)})], "clear")
    with pytest.raises(ConfigError, match="segment"):
        catalogue.with_share("toy", "2", 0.5)


@settings(max_examples=50, deadline=None)
@given(st.one_of(st.just(""), st.text("0123456789abcdef", min_size=64, max_size=64)))
def test_an_evaluation_names_a_segment_or_none(program_id: str) -> None:
    call = EvaluateCall(bytes(16), bytes(16), b"x" * 10, 1, 0.5, program_id)
    assert EvaluateCall.decode(call.encode(), 10) == call


@pytest.mark.parametrize("program_id", ["x", "A" * 64, "0" * 63, "é" * 64])
def test_an_evaluation_that_names_no_program_is_refused(program_id: str) -> None:
    with pytest.raises(ContainerError, match="program_id"):
        EvaluateCall(bytes(16), bytes(16), b"", program_id=program_id)
