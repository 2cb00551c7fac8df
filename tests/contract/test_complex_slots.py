"""Two elements in one slot: the same logits, within the same kind of bound, for half the products."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench.tails import random_layers
from blindtail.he import slotmaps
from blindtail.he.backends import open_evaluator
from blindtail.he.clear import ClearEvaluator
from blindtail.he.compiler import compile_tail
from blindtail.he.layers import FloatArray
from blindtail.he.native_backend import available
from blindtail.he.normal import normalised
from blindtail.he.operations import MapOp
from blindtail.he.program import Program
from blindtail.he.secret import Decryptor, Encryptor, SecretKey

BACKENDS = ("seal", *(("native",) if available() else ()))
#: An odd number of elements, whose last slot is real; the conjugate in the last map; lanes.
NETS = {"odd": ((129, 32, 10), 1), "one map": ((300, 10), 1), "lanes": ((64, 32, 10), 8)}


def _compiled(name: str, held: slice, monkeypatch: pytest.MonkeyPatch) -> tuple[Program, FloatArray]:
    """`held` of the choices between real and complex slots."""
    widths, lanes = NETS[name]
    whole = slotmaps._halves
    monkeypatch.setattr(slotmaps, "_halves", lambda size: whole(size)[held])
    x = np.random.default_rng(3).uniform(-1, 1, (80, widths[0]))
    return compile_tail(random_layers(widths), x, lanes=lanes), x


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NETS)
def test_complex_slots_keep_their_bound(
    name: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, x = _compiled(name, slice(1, None), monkeypatch)
    spec, lanes = compiled.spec, compiled.spec.lanes
    assert spec.input_layout.imaginary is not None
    secret = SecretKey.generate(spec, tmp_path / "keys")
    evaluator = open_evaluator(backend, compiled)
    evaluator.prepare_keys(tmp_path / "keys", tmp_path / "prepared")
    keys = evaluator.load_keys(tmp_path / "prepared")
    encryptor, decryptor = Encryptor(spec, secret), Decryptor(spec, secret)
    want = normalised(random_layers(NETS[name][0]))(x)
    of_bound = []
    for at in range(0, len(x) if backend == "native" else 16, lanes):
        request = encryptor.encrypt(x[at : at + lanes] if lanes > 1 else x[at])
        got = np.atleast_2d(decryptor.decrypt(evaluator.evaluate(keys, request)))
        of_bound.append((np.abs(got - want[at : at + lanes]) / compiled.error_bounds()).ravel())
    assert np.concatenate(of_bound).max() <= 1
    assert 1 / np.median(np.concatenate(of_bound)) <= 32


@pytest.mark.parametrize("name", NETS)
def test_half_the_offsets_and_the_same_result(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as only:
        real, x = _compiled(name, slice(0, 1), only)
    with monkeypatch.context() as only:
        halved, _ = _compiled(name, slice(1, None), only)
    assert np.allclose(ClearEvaluator(real).logits(x), ClearEvaluator(halved).logits(x), atol=1e-9)
    first, other = real.ops[0], halved.ops[0]
    assert isinstance(first, MapOp)
    assert isinstance(other, MapOp)
    assert other.offsets == -(-first.offsets // 2)
    assert np.iscomplexobj(next(iter(other.diagonals.values())))
    assert real.spec.uplink_bytes == halved.spec.uplink_bytes
    assert Program.from_parts(*halved.to_parts()).spec == halved.spec


def test_noise_is_what_the_bound_assumes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With simulated noise of the sizes of `noise`, logits are off by as much as is predicted.

    What is predicted is the noisiest logit's error, at the rows of calibration data where it is largest.
    """
    for name in NETS:
        with monkeypatch.context() as only:
            compiled, x = _compiled(name, slice(1, None), only)
        want = normalised(random_layers(NETS[name][0]))(x)
        loud = np.square(x).sum(axis=1).argsort()[-4:]  # among those that predictions look at
        draws = 100
        error = ClearEvaluator(compiled, 1).logits(np.repeat(x[loud], draws, axis=0))
        error = error.reshape(len(loud), draws, -1) - want[loud][:, None]
        noisiest = np.sqrt((error**2).mean(axis=1)).max()
        assert 0.7 < noisiest / compiled.spec.predicted_noise < 1.4


def test_a_ciphertext_holds_two_elements_a_slot() -> None:
    features = 6000
    x = np.random.default_rng(0).uniform(0, 1, (5, features))
    layers = random_layers((features, 10))
    compiled = compile_tail(layers, x, ring_degree=8192)
    assert compiled.spec.parameters.slots < features
    want = normalised(layers)(x)
    assert np.allclose(ClearEvaluator(compiled).logits(x), want, atol=1e-9)
