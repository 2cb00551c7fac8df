"""What every evaluation backend offers, and how to open one.

Backends run the same `Program`. Each proves itself in one contract suite
(tests/contract). An evaluator has no way to hold a secret key.
"""

from __future__ import annotations

import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path

from blindtail.errors import ConfigError
from blindtail.he.program import Program
from blindtail.he.spec import TailSpec


class Keys:
    """One client's evaluation keys, ready for use by the backend that loaded them."""

    def __init__(self, material: object, memory_bytes: int) -> None:
        self.material = material
        self.memory_bytes = memory_bytes


class Evaluator(ABC):
    """Evaluates one program on encrypted activations. Not thread-safe: one per thread.

    `prepare_keys` and `evaluate` may hold the GIL for as long as they run.
    """

    name: str

    def __init__(self, program: Program) -> None:
        self.program = program

    @property
    def spec(self) -> TailSpec:
        return self.program.spec

    @abstractmethod
    def prepare_keys(self, source: Path, target: Path) -> int:
        """Validate a key container in full and write the form `load_keys` reads, atomically.

        Returns the bytes written. Raises `ContainerError` when the container does
        not fit the program; then nothing is left at `target`.
        """

    @abstractmethod
    def load_keys(self, prepared: Path) -> Keys:
        """Raises `KeysMissing` when the file is gone or is not one of ours."""

    @abstractmethod
    def evaluate(self, keys: Keys, container: bytes) -> bytes:
        """Container in, container out. Raises `ContainerError` on anything malformed."""


def open_evaluator(name: str, program: Program) -> Evaluator:
    """An evaluator of `program` on backend "seal" or "clear". Raises `ConfigError` otherwise.

    `clear` computes on readable numbers. It exists for tests and simulation and
    accepts clear containers alone.
    """
    if name == "seal":
        from blindtail.he.seal_backend import SealEvaluator

        return SealEvaluator(program)
    if name == "clear":
        from blindtail.he.clear import ClearEvaluator

        return ClearEvaluator(program)
    raise ConfigError(f"there is no backend {name!r}: use seal, or clear for tests")


def write_atomically(target: Path, parts: Iterable[bytes | memoryview], mode: int = 0o600) -> int:
    """Write, flush to disk, rename into place: `target` is whole or absent. Returns the bytes."""
    handle, temporary = tempfile.mkstemp(prefix=".partial-", dir=target.parent)
    total = 0
    try:
        with os.fdopen(handle, "wb") as file:
            for part in parts:
                total += file.write(part)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return total
