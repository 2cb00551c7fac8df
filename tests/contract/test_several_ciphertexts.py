"""One suite for every backend: tensors over several ciphertexts, in and out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bench.tails import Client
from blindtail.errors import BundleError, ContainerError, ModelError
from blindtail.he import container, program_file
from blindtail.he.backends import Keys, open_evaluator
from blindtail.he.clear import ClearDecryptor, ClearEncryptor, ClearEvaluator, write_clear_keys
from blindtail.he.dataflow import finish
from blindtail.he.elementwise import ScaleOp, SquareOp, SumOp
from blindtail.he.layout import GARBAGE, MOST_CIPHERTEXTS, Layout, runs
from blindtail.he.native_backend import NativeEvaluator, available
from blindtail.he.operations import MapOp
from blindtail.he.packing import packed_bytes
from blindtail.he.program import Program
from blindtail.he.spec import TailSpec
from tests.tiled_cases import TILED, Tiled, activations, logits, program

FloatArray = NDArray[np.float64]
REAL = ("seal", *(("native",) if available() else ()))
CASES = pytest.mark.parametrize("case", TILED, ids=str)
#: Of the activation and of the result.
MANY_IN = [case for case in TILED if program(case).spec.input_ciphertexts > 1]
MANY_OUT = [case for case in TILED if program(case).spec.output_ciphertexts > 1]
RUNS = 4


@lru_cache(maxsize=len(TILED))
def client(case: Tiled) -> Client:
    """Fresh keys, loaded by all real backends."""
    return Client.of(program(case), *REAL)


def batch(case: Tiled, seed: int) -> tuple[FloatArray, FloatArray]:
    """What the encryptor takes, and the logits that the layers give."""
    x = activations(case, case.lanes, seed)
    want = logits(case, x)
    return (x, want) if case.lanes > 1 else (x[0], want[0])


def test_the_cases_are_what_they_are_for() -> None:
    specs = [program(case).spec for case in TILED]
    assert {(2, 1), (1, 3), (2, 3)} <= {(s.input_ciphertexts, s.output_ciphertexts) for s in specs}
    assert sum(spec.input_layout.imaginary is not None for spec in specs) == 1
    assert {spec.lanes for spec in specs} == {1, 2}
    kinds = {type(op) for case in TILED for op in program(case).ops}
    assert {MapOp, SquareOp, ScaleOp, SumOp} <= kinds
    assert all(any(mark in shape for case in TILED for shape in case.shapes) for mark in "~*?")


@CASES
def test_without_noise_the_logits_are_the_layers(case: Tiled) -> None:
    x = activations(case, 4, 2)
    np.testing.assert_allclose(ClearEvaluator(program(case)).logits(x), logits(case, x), atol=1e-9)


@CASES
def test_a_program_survives_its_file(case: Tiled) -> None:
    made = program(case)
    again = Program.from_parts(*made.to_parts())
    assert (again.spec, again.content_id) == (made.spec, made.content_id)
    assert again.spec == TailSpec.from_json(made.spec.to_json())


@pytest.mark.parametrize("backend", REAL)
@CASES
def test_encrypted_logits_are_the_layers_within_a_tight_bound(case: Tiled, backend: str) -> None:
    bounds = program(case).error_bounds()
    bounds = bounds if case.lanes > 1 else bounds[0]
    ratios = []
    for seed in range(RUNS):
        x, want = batch(case, seed)
        got = client(case).decryptor.decrypt(
            client(case).evaluate(backend, client(case).encryptor.encrypt(x))
        )
        assert got.shape == want.shape
        ratios.append(np.abs(got - want) / bounds)
    assert np.max(ratios) <= 1
    assert np.max(ratios) >= 1 / 32  # the bound is not loose: 1 / 2 to 1 / 8 is usual


@pytest.mark.skipif(len(REAL) == 1, reason="the native extension is not built")
@CASES
def test_both_backends_give_the_same_logits_of_one_container(case: Tiled) -> None:
    x, _ = batch(case, 0)
    request = client(case).encryptor.encrypt(x)
    seal, native = (client(case).decryptor.decrypt(client(case).evaluate(name, request)) for name in REAL)
    assert (np.abs(seal - native) <= 2 * program(case).error_bounds()).all()
    assert not np.array_equal(seal, native)


@pytest.mark.skipif(len(REAL) == 1, reason="the native extension is not built")
@CASES
def test_threads_and_instructions_change_no_byte(case: Tiled, tmp_path: Path) -> None:
    from blindtail.he import _native

    request = client(case).encryptor.encrypt(batch(case, 0)[0])
    keys = client(case).loaded["native"][1]
    want = client(case).evaluate("native", request)
    for instructions in _native.instruction_sets():
        for threads in (1, 2):
            made = NativeEvaluator(program(case), instructions=instructions, threads=threads)
            assert made.evaluate(keys, request) == want, (instructions, threads)
    shared = NativeEvaluator(program(case), weights=tmp_path)
    assert shared.evaluate(keys, request) == want
    assert request != client(case).encryptor.encrypt(batch(case, 0)[0])


# -- containers --------------------------------------------------------------------------


@pytest.mark.parametrize("backend", REAL)
@CASES
def test_sizes_are_the_promised_ones(case: Tiled, backend: str) -> None:
    spec = program(case).spec
    request = client(case).encryptor.encrypt(batch(case, 0)[0])
    assert len(request) == spec.uplink_bytes == container.ciphertext_bytes(spec)
    assert len(client(case).evaluate(backend, request)) == spec.reply_bytes
    one, left = divmod(spec.uplink_bytes - container.HEADER_BYTES, spec.input_ciphertexts)
    assert left == 0
    assert one > container.SEED_BYTES + spec.parameters.ring_degree * 3 * (spec.input_level + 1)


def _sealed(spec: TailSpec, body: bytes) -> bytes:
    """An activation's container with a checksum that is right, whatever its body."""
    return container._seal(
        container.CIPHERTEXT, spec.input_level, container.BLAKE2XB, spec.input_scale, spec.program_id, body
    )


def _parts(body: bytes, count: int) -> list[bytes]:
    size = len(body) // count
    return [body[at : at + size] for at in range(0, len(body), size)]


@pytest.mark.parametrize("backend", REAL)
@pytest.mark.parametrize("case", MANY_IN[:2], ids=str)
def test_damaged_activations_are_refused_and_harm_nothing(case: Tiled, backend: str) -> None:
    spec, used = program(case).spec, client(case)
    request = used.encryptor.encrypt(batch(case, 0)[0])
    reply = used.evaluate(backend, request)
    body = request[container.HEADER_BYTES :]
    first, second = _parts(body, 2)
    header = request[: container.HEADER_BYTES]
    swapped = bytearray(request)
    here, there = container.HEADER_BYTES + 100, container.HEADER_BYTES + len(first) + 100
    swapped[here], swapped[there] = request[there], request[here]
    assert swapped != request
    # Modulo primes just below 2^30, residues are below their prime; all ones are not.
    bad = {
        "cut": (header + first, "it was cut or padded"),
        "cut and sealed": (_sealed(spec, first), "it was cut or padded"),
        "grown": (_sealed(spec, body + first), "it was cut or padded"),
        "bytes swapped": (bytes(swapped), "checksum"),
        "ciphertexts swapped": (header + second + first, "checksum"),
        "residue of the first": (_sealed(spec, first[:-8] + b"\xff" * 8 + second), "not below its prime"),
        "residue of the second": (_sealed(spec, body[:-8] + b"\xff" * 8), "not below its prime"),
    }
    for data, told in bad.values():
        with pytest.raises(ContainerError, match=told):
            used.evaluate(backend, data)
        with pytest.raises(ContainerError, match=told):
            container.read_ciphertexts(spec, data)
    assert used.evaluate(backend, request) == reply
    assert _sealed(spec, body) == request


@pytest.mark.parametrize("backend", REAL)
@pytest.mark.parametrize("case", MANY_IN[:2], ids=str)
def test_the_order_of_ciphertexts_matters(case: Tiled, backend: str) -> None:
    """Sealed again, two that changed places are an activation of its own: its logits tell."""
    spec, used = program(case).spec, client(case)
    x, want = batch(case, 0)
    first, second = _parts(used.encryptor.encrypt(x)[container.HEADER_BYTES :], 2)
    got = used.decryptor.decrypt(used.evaluate(backend, _sealed(spec, second + first)))
    assert np.abs(got - want).max() > 100 * program(case).error_bounds().max()
    same = used.decryptor.decrypt(used.evaluate(backend, _sealed(spec, first + second)))
    assert np.abs(same - want).max() <= program(case).error_bounds().max()


@pytest.mark.parametrize("case", MANY_OUT[:2], ids=str)
def test_damaged_replies_are_refused(case: Tiled) -> None:
    spec, used = program(case).spec, client(case)
    x, want = batch(case, 0)
    reply = used.evaluate(REAL[-1], used.encryptor.encrypt(x))
    body = reply[container.HEADER_BYTES :]
    parts = _parts(body, spec.output_ciphertexts)
    c0_bytes = packed_bytes(2 * spec.reply.period, spec.parameters.primes[0].bit_length())
    broken = parts[1][: c0_bytes - 8] + b"\xff" * 8 + parts[1][c0_bytes:]
    bad = {
        "cut or padded": container.seal_reply(spec, parts[0]),
        "checksum": reply[: container.HEADER_BYTES] + b"".join(reversed(parts)),
        "not below its prime": container.seal_reply(spec, b"".join([parts[0], broken, *parts[2:]])),
    }
    for told, data in bad.items():
        with pytest.raises(ContainerError, match=told):
            used.decryptor.decrypt(data)
    other = used.decryptor.decrypt(container.seal_reply(spec, b"".join(reversed(parts))))
    assert np.abs(other - want).max() > 100 * program(case).error_bounds().max()
    assert np.abs(used.decryptor.decrypt(reply) - want).max() <= program(case).error_bounds().max()


@CASES
def test_clear_containers_hold_all_ciphertexts(case: Tiled, tmp_path: Path) -> None:
    spec = program(case).spec
    evaluator = open_evaluator("clear", program(case))
    write_clear_keys(spec, tmp_path / "keys")
    evaluator.prepare_keys(tmp_path / "keys", tmp_path / "prepared")
    keys = evaluator.load_keys(tmp_path / "prepared")
    x, want = batch(case, 0)
    request = ClearEncryptor(spec).encrypt(x)
    got = ClearDecryptor(spec).decrypt(evaluator.evaluate(keys, request))
    np.testing.assert_allclose(got, want, atol=1e-9)
    slots = spec.input_layout.place(x)
    for bad in (slots[: len(slots) // 2], np.concatenate([slots, slots]), np.append(slots[:-1], np.nan)):
        data = container.write_clear(spec, bad, spec.input_level, spec.input_scale)
        with pytest.raises(ContainerError, match=r"cut or padded|finite"):
            evaluator.evaluate(Keys(None, 0), data)


# -- damaged programs ---------------------------------------------------------------------


def _missing(structure: dict[str, Any], _: TailSpec) -> None:
    """All of the last ciphertext of the result is undefined."""
    layout = Layout.from_json(structure["ops"][-1]["out_layout"])
    structure["ops"][-1]["out_layout"] = Layout(layout.size, 1, (GARBAGE,) * len(layout.content)).to_json()


def _read_result(structure: dict[str, Any], _: TailSpec) -> None:
    structure["ops"][-1]["reads"] = [1]


def _read_nothing(structure: dict[str, Any], _: TailSpec) -> None:
    structure["ops"][-3]["reads"] = [9]


def _resized(key: str, each: int, count: int, more: int = 0) -> Callable[[dict[str, Any], TailSpec], None]:
    """A layout over `count` ciphertexts of `each` positions, and more positions."""

    def damage(structure: dict[str, Any], spec: TailSpec) -> None:
        layout: Layout = getattr(spec, key)
        content = layout.content[:each] * count + layout.content[:more]
        structure["spec"][key] = {"size": layout.size, "lanes": 1, "runs": runs(content)}

    return damage


_SLOTS = 2048
_DAMAGE = {
    "incomplete": (_missing, "does not hold every output"),
    "a result that is read": (_read_result, "the result is read"),
    "a value that is not there": (_read_nothing, "reads what is not there"),
    "more outputs than operations": (_resized("output_layout", _SLOTS, 4), "operation for each"),
    "fewer outputs than there are": (_resized("output_layout", _SLOTS, 2), "does not follow"),
    "outputs of another form": (_resized("output_layout", _SLOTS, 3), "does not follow"),
    "too many out": (_resized("output_layout", _SLOTS, MOST_CIPHERTEXTS + 1), "contradict"),
    "too many in": (_resized("input_layout", _SLOTS, MOST_CIPHERTEXTS + 1), "contradict"),
    "most that may come in": (_resized("input_layout", _SLOTS, MOST_CIPHERTEXTS), "damaged"),
    "no multiple in": (_resized("input_layout", _SLOTS, 1, 1), "contradict"),
    "no multiple out": (_resized("output_layout", _SLOTS, 3, 1000), "contradict"),
    "half of one": (_resized("output_layout", 0, 0, _SLOTS // 2), "contradict"),
}


@pytest.mark.parametrize("what", _DAMAGE)
def test_damaged_programs_are_refused(what: str) -> None:
    made = program(TILED[1])
    assert (made.spec.parameters.slots, len(made.ops)) == (_SLOTS, 3)
    structure, tensors = made.to_parts()
    structure = copy.deepcopy(structure)
    damage, told = _DAMAGE[what]
    damage(structure, made.spec)
    with pytest.raises(BundleError, match=f"{told}.*compile the model again"):
        Program.from_parts(structure, tensors)


def test_a_program_has_only_as_many_operations_as_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    made = program(TILED[3])
    monkeypatch.setattr(program_file, "MAX_OPS", len(made.ops))
    assert finish(made.ops, made.spec) == made.spec
    monkeypatch.setattr(program_file, "MAX_OPS", len(made.ops) - 1)
    with pytest.raises(ModelError, match="larger ring"):
        finish(made.ops, made.spec)
