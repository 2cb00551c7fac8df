"""One suite for every backend: the same program, the same contract."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import pytest
from numpy.typing import NDArray

from blindtail.errors import ConfigError, ContainerError, KeysMissing
from blindtail.he.backends import Evaluator, Keys, open_evaluator
from blindtail.he.clear import ClearDecryptor, ClearEncryptor, write_clear_keys
from blindtail.he.native_backend import available
from blindtail.he.secret import Decryptor, Encryptor, SecretKey
from tests.he_cases import CASES, Case, activations, clear_logits, program

FloatArray = NDArray[np.float64]

#: Those that were built here; what a checkout's own tests run on must have `native`.
BACKENDS = ("clear", "seal", *(["native"] if available() else []))


class _Encryptor(Protocol):
    def encrypt(self, activation: FloatArray) -> bytes: ...


class _Decryptor(Protocol):
    def decrypt(self, container_bytes: bytes) -> FloatArray: ...


@dataclass
class Bench:
    """One backend, one program, one client with its keys."""

    case: Case
    evaluator: Evaluator
    encryptor: _Encryptor
    decryptor: _Decryptor
    key_file: Path
    prepared: Path
    keys: Keys

    def batch(self, seed: int) -> tuple[FloatArray, FloatArray]:
        """An input as the encryptor takes it, and the logits the tail should give."""
        x = activations(self.case, self.case.lanes, seed)
        want = clear_logits(self.case, x)
        return (x, want) if self.case.lanes > 1 else (x[0], want[0])


def _bench(backend: str, case: Case, folder: Path) -> Bench:
    compiled = program(case)
    evaluator = open_evaluator(backend, compiled)
    key_file, prepared = folder / "keys", folder / "prepared"
    encryptor: _Encryptor
    decryptor: _Decryptor
    if backend == "clear":
        write_clear_keys(compiled.spec, key_file)
        encryptor, decryptor = ClearEncryptor(compiled.spec), ClearDecryptor(compiled.spec)
    else:
        secret = SecretKey.generate(compiled.spec, key_file)
        encryptor, decryptor = Encryptor(compiled.spec, secret), Decryptor(compiled.spec, secret)
    assert evaluator.prepare_keys(key_file, prepared) == prepared.stat().st_size
    return Bench(case, evaluator, encryptor, decryptor, key_file, prepared, evaluator.load_keys(prepared))


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Case], Bench]:
    """The stranger of one case is the bench of the next; more than two would hold much memory."""

    @lru_cache(maxsize=2)
    def made(backend: str, case: Case) -> Bench:
        return _bench(backend, case, tmp_path_factory.mktemp("keys"))

    return made


@pytest.fixture(
    scope="module", params=[(b, c) for b in BACKENDS for c in CASES], ids=lambda p: f"{p[0]}-{p[1]}"
)
def bench(request: pytest.FixtureRequest, make: Callable[[str, Case], Bench]) -> Bench:
    return make(*request.param)


def test_encrypted_logits_are_the_clear_ones_within_a_tight_bound(bench: Bench) -> None:
    ratios: list[FloatArray] = []
    # A median of few logits says little of how loose the bound is.
    logits = {"native": 500, "seal": 150, "clear": 40}[bench.evaluator.name]
    for seed in range(max(4, -(-logits // bench.evaluator.program.error_bounds().size))):
        x, want = bench.batch(seed)
        got = bench.decryptor.decrypt(bench.evaluator.evaluate(bench.keys, bench.encryptor.encrypt(x)))
        assert got.shape == want.shape
        ratios.append(np.abs(got - want).ravel() / bench.evaluator.program.error_bounds().ravel())
    of_bound = np.concatenate(ratios)
    if bench.evaluator.name == "clear":
        assert of_bound.max() < 1e-6
        return
    assert of_bound.max() <= 1
    assert 1 / np.median(of_bound) <= 32  # the bound is not loose


def test_sizes_are_the_promised_ones(bench: Bench) -> None:
    x, _ = bench.batch(0)
    request = bench.encryptor.encrypt(x)
    reply = bench.evaluator.evaluate(bench.keys, request)
    assert bench.key_file.stat().st_size == bench.evaluator.spec.key_bytes
    if bench.evaluator.name != "clear":
        assert len(request) == bench.evaluator.spec.uplink_bytes
        assert len(reply) == bench.evaluator.spec.reply_bytes


def test_the_same_container_gives_the_same_bytes(bench: Bench) -> None:
    x, _ = bench.batch(0)
    request = bench.encryptor.encrypt(x)
    first = bench.evaluator.evaluate(bench.keys, request)
    again = open_evaluator(bench.evaluator.name, program(bench.case))
    assert first == bench.evaluator.evaluate(bench.keys, request)
    assert first == again.evaluate(again.load_keys(bench.prepared), request)
    if bench.evaluator.name != "clear":
        assert request != bench.encryptor.encrypt(x)  # a fresh seed and fresh noise each time


def test_malformed_containers_are_refused_and_harm_nothing(bench: Bench) -> None:
    x, _ = bench.batch(0)
    request = bench.encryptor.encrypt(x)
    good = bench.evaluator.evaluate(bench.keys, request)
    damaged = bytearray(request)
    damaged[len(damaged) // 2] ^= 1
    for bad in (b"", request[:-1], request + b"\0", bytes(damaged), good):
        with pytest.raises(ContainerError):
            bench.evaluator.evaluate(bench.keys, bad)
        with pytest.raises(ContainerError):
            bench.decryptor.decrypt(bad[:-1])
    assert bench.evaluator.evaluate(bench.keys, request) == good


def test_damaged_keys_leave_nothing_behind(bench: Bench, tmp_path: Path) -> None:
    data = bytearray(bench.key_file.read_bytes())
    data[len(data) // 2] ^= 4
    for bad in (b"", bytes(data[:-1]), bytes(data), bytes(data) + b"\0"):
        source, target = tmp_path / "bad", tmp_path / "prepared"
        source.write_bytes(bad)
        with pytest.raises(ContainerError):
            bench.evaluator.prepare_keys(source, target)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["bad"]
    with pytest.raises(KeysMissing, match="upload"):
        bench.evaluator.load_keys(tmp_path / "absent")
    (tmp_path / "junk").write_bytes(b"junk" * 100)
    with pytest.raises(KeysMissing, match="upload"):
        bench.evaluator.load_keys(tmp_path / "junk")


def test_another_programs_bytes_are_refused(
    bench: Bench, make: Callable[[str, Case], Bench], tmp_path: Path
) -> None:
    other = CASES[(CASES.index(bench.case) + 1) % len(CASES)]
    stranger = make(bench.evaluator.name, other)
    x, _ = stranger.batch(0)
    with pytest.raises(ContainerError, match="another program"):
        bench.evaluator.evaluate(bench.keys, stranger.encryptor.encrypt(x))
    with pytest.raises(ContainerError, match="another program"):
        bench.evaluator.prepare_keys(stranger.key_file, tmp_path / "x")
    with pytest.raises(KeysMissing, match="another program"):
        bench.evaluator.load_keys(stranger.prepared)


def test_kinds_do_not_mix(tmp_path: Path) -> None:
    """A clear container never runs on a real backend, nor the other way round."""
    case = CASES[0]
    real, clear = _bench("seal", case, tmp_path), ClearEncryptor(program(case).spec)
    x = activations(case, 1)[0]
    with pytest.raises(ContainerError, match="expected an encrypted activation"):
        real.evaluator.evaluate(real.keys, clear.encrypt(x))
    pretend = open_evaluator("clear", program(case))
    with pytest.raises(ContainerError, match="expected clear"):
        pretend.evaluate(Keys(None, 0), real.encryptor.encrypt(x))


def test_unknown_backends_are_named() -> None:
    with pytest.raises(ConfigError, match="no backend 'gpu'"):
        open_evaluator("gpu", program(CASES[0]))
