"""A new tail in an older one's place: same wire, same keys, other weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blindtail.errors import ModelError, ProgramMismatch
from blindtail.he.clear import ClearDecryptor, ClearEncryptor, ClearEvaluator, write_clear_keys
from blindtail.he.compatible import differences, serving_as
from blindtail.he.compiler import compile_tail
from blindtail.he.layers import Affine, Layer
from blindtail.he.normal import normalised
from tests.he_cases import CASES, Case, activations, layers, program


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(CASES), st.integers(1, 1000))
def test_a_tail_compiled_for_held_devices_is_compatible_or_refused(case: Case, seed: int) -> None:
    held = program(case).spec
    x = activations(case, 100, seed)
    made = layers(case, seed)
    # Logits that are larger than devices read are refused: bring them to the size of the old tail's.
    old = np.abs(normalised(layers(case))(activations(case, 200))).max()
    new = np.abs(normalised(made)(x)).max()
    made = smaller(made, float(min(1.0, old / new)))
    fresh = compile_tail(made, x, like=held)
    assert differences(fresh.spec, held) == []
    assert fresh.spec.program_id != held.program_id
    shown = serving_as(fresh, held)
    assert shown.spec.program_id == held.program_id
    want = normalised(made)(x[:3])
    assert np.allclose(ClearEvaluator(shown).logits(x[:3]), want, atol=1e-9 * max(1.0, np.abs(want).max()))


def smaller(made: list[Layer], factor: float) -> list[Layer]:
    *rest, last = made
    assert isinstance(last, Affine)
    return [*rest, replace(last, weight=last.weight * factor, bias=last.bias * factor)]


def test_what_an_edge_encrypts_for_the_old_tail_the_new_one_answers(tmp_path: Path) -> None:
    case = Case((64, 32, 10))
    held = program(case)
    made = smaller(layers(case, 7), 0.5)
    fresh = serving_as(compile_tail(made, activations(case, 200), like=held.spec), held.spec)
    x = activations(case, 1, 9)
    evaluator = ClearEvaluator(fresh)
    container, keys = tmp_path / "container", tmp_path / "keys"
    write_clear_keys(held.spec, container)
    evaluator.prepare_keys(container, keys)
    reply = evaluator.evaluate(evaluator.load_keys(keys), ClearEncryptor(held.spec).encrypt(x[0]))
    got = ClearDecryptor(held.spec).decrypt(reply)
    assert np.allclose(got, normalised(made)(x)[0], atol=1e-9)


def test_larger_logits_than_devices_read_are_refused() -> None:
    case = Case((64, 32, 10))
    held = program(case).spec
    for factor, fits in ((1.2, True), (1.4, False)):
        grown = smaller(layers(case), factor)
        if fits:
            assert not differences(compile_tail(grown, activations(case, 200), like=held).spec, held)
        else:
            with pytest.raises(ModelError, match="devices read up to"):
                compile_tail(grown, activations(case, 200), like=held)


@pytest.mark.parametrize("widths", [(64, 32, 16, 10), (64, 10), (64, 48, 10), (64, 32, 9)], ids=str)
def test_another_shape_is_refused_by_name(widths: tuple[int, ...]) -> None:
    held = program(Case((64, 32, 10))).spec
    case = Case(widths)
    with pytest.raises(ModelError, match="devices hold"):
        compile_tail(layers(case), activations(case, 50), like=held)
    other = program(case)
    assert differences(other.spec, held)
    with pytest.raises(ProgramMismatch, match=r"edge\.bt"):
        serving_as(other, held)


def test_a_program_serves_as_itself() -> None:
    made = program(Case((64, 32, 10)))
    assert serving_as(made, made.spec) is made
