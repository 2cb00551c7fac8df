"""A tiny model for tests of the cloud: keys of a few hundred KB, evaluations of milliseconds."""

from __future__ import annotations

import functools
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from blindtail.bundle import CloudBundle
from blindtail.he.clear import ClearDecryptor, ClearEncryptor, write_clear_keys
from blindtail.he.compiler import compile_tail
from blindtail.he.layers import Affine, Quadratic
from blindtail.he.program import Program
from blindtail.rpc import TailStub
from blindtail.wire import (
    EvaluateCall,
    EvaluateResult,
    KeyHeader,
    KeyState,
    KeyStatusCall,
    RegisterCall,
    RegisterResult,
)

FEATURES, CLASSES = 16, 4
CHUNK = 100_000


@functools.cache
def layers(seed: int = 0) -> tuple[Affine | Quadratic, ...]:
    rng = np.random.default_rng(seed)
    hidden = 8
    ones = np.ones(hidden)
    return (
        Affine(rng.normal(size=(hidden, FEATURES)) / 4, rng.normal(size=hidden) / 10, "first"),
        Quadratic(ones, 0 * ones, 0 * ones, "square"),
        Affine(rng.normal(size=(CLASSES, hidden)) / 3, rng.normal(size=CLASSES) / 10, "second"),
    )


def activation(seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(1000 + seed).uniform(0, 1, FEATURES)


@functools.cache
def program(seed: int = 0) -> Program:
    return compile_tail(layers(seed), np.random.default_rng(7).uniform(0, 1, (20, FEATURES)))


def bundle(seed: int = 0, *, model: str = "toy", version: str = "1") -> CloudBundle:
    return CloudBundle(model, version, {0: program(seed)})


def expected(x: NDArray[np.float64], seed: int = 0) -> NDArray[np.float64]:
    first, _, second = layers(seed)
    assert isinstance(first, Affine)
    assert isinstance(second, Affine)
    return np.asarray(second.weight @ (first.weight @ x + first.bias) ** 2 + second.bias)


@functools.cache
def clear_keys(seed: int = 0) -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "keys"
        write_clear_keys(program(seed).spec, path)
        return path.read_bytes()


def sha(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


@dataclass
class Client:
    """What an edge does, step by step, with clear containers."""

    stub: TailStub
    seed: int = 0
    model: str = "toy"
    version: str = "1"
    keys: bytes = b""

    def __post_init__(self) -> None:
        self.spec = program(self.seed).spec
        self.keys = self.keys or clear_keys(self.seed)
        self.sha256 = sha(self.keys)

    def register(self) -> RegisterResult:
        call = RegisterCall(self.model, self.version, self.spec.program_id, self.sha256)
        return self.stub.register(call, 10)

    def status(self) -> KeyState:
        return self.stub.key_status(KeyStatusCall(self.spec.program_id, self.sha256), 10).state

    def upload(self, offset: int = 0, until: int | None = None) -> KeyState:
        header = KeyHeader(self.spec.program_id, self.sha256, self.spec.key_bytes, offset)
        data = self.keys[offset:until]
        pieces = (data[i : i + CHUNK] for i in range(0, len(data), CHUNK))
        return self.stub.upload_keys(header, pieces, 20).state

    def upload_and_wait(self) -> KeyState:
        self._settled(self.status())  # a cell that asks its peers takes no upload meanwhile
        return self._settled(self.upload())

    def _settled(self, state: KeyState) -> KeyState:
        import time

        for _ in range(300):
            if state is not KeyState.CHECKING:
                return state
            time.sleep(0.05)
            state = self.status()
        raise AssertionError("the check of the keys did not end")

    def container(self, seed: int = 0) -> bytes:
        return ClearEncryptor(self.spec).encrypt(activation(seed))

    def evaluate(
        self,
        session: bytes,
        seed: int = 0,
        *,
        request_id: bytes | None = None,
        remaining_s: float = 10.0,
        container: bytes | None = None,
        attempt: int = 0,
    ) -> EvaluateResult:
        call = EvaluateCall(
            session,
            request_id or os.urandom(16),
            self.container(seed) if container is None else container,
            attempt,
            remaining_s,
        )
        return self.stub.evaluate(call, 20)

    def logits(self, reply: EvaluateResult) -> NDArray[np.float64]:
        return ClearDecryptor(self.spec).decrypt(reply.container)
