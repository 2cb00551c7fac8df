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

from blindtail.errors import ConfigError, EvaluationFailed
from blindtail.he.program import Program
from blindtail.he.spec import TailSpec


class Keys:
    """One client's evaluation keys, ready for use by the backend that loaded them."""

    def __init__(self, material: object, memory_bytes: int) -> None:
        self.material = material
        self.memory_bytes = memory_bytes


class Ticket:
    """What a backend computed ahead of one request, from its seed. For one evaluator and one set of keys."""

    def __init__(self, material: object, memory_bytes: int) -> None:
        self.material = material
        self.memory_bytes = memory_bytes


class Evaluator(ABC):
    """Evaluates one program on encrypted activations. Not thread-safe: one per thread.

    `prepare_keys` and `evaluate` may hold the GIL for as long as they run.
    """

    name: str
    #: Whether `make_ticket` can be called.
    makes_tickets = False

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
    def evaluate(self, keys: Keys, container: bytes, ticket: Ticket | None = None) -> bytes:
        """Container in, container out. Raises `ContainerError` on anything malformed.

        ticket  made by this evaluator from this container's seed and these keys: the same
                bytes come out, sooner. Any other is an `EvaluationFailed`.
        """

    def make_ticket(self, keys: Keys, seed: bytes) -> Ticket:
        """Do ahead what depends on a request's 64-byte seed alone. Raises `EvaluationFailed`."""
        raise EvaluationFailed(f"the backend {self.name} makes no tickets")


def no_ticket(evaluator: Evaluator, ticket: Ticket | None) -> None:
    """For backends that make none. Raises `EvaluationFailed`."""
    if ticket is not None:
        raise EvaluationFailed(f"the backend {evaluator.name} makes no tickets")


def open_evaluator(name: str, program: Program, threads: int = 1, weights: Path | None = None) -> Evaluator:
    """An evaluator of `program` on "native", "seal" or "clear". Raises `ConfigError` otherwise.

    `native` is there where it was built; "auto" takes it, or else `seal`. `clear` computes on
    readable numbers. It exists for tests and simulation and accepts clear containers alone.
    `threads`: native threads of one evaluation, for backends with a choice. `weights`: a private
    folder where a backend that can keeps encoded weights as files, for all evaluators to share.
    """
    name = settle(name)
    if name == "native":
        from blindtail.he.native_backend import NativeEvaluator

        return NativeEvaluator(program, threads=threads, weights=weights)
    if name == "seal":
        from blindtail.he.seal_backend import SealEvaluator

        return SealEvaluator(program)
    if name == "clear":
        from blindtail.he.clear import ClearEvaluator

        return ClearEvaluator(program)
    raise AssertionError(name)


def settle(name: str) -> str:
    """The backend that a setting means: "auto" is "native" where it was built, else "seal".

    Raises `ConfigError` for an unknown one, and for "native" where it was not built.
    """
    from blindtail.he.native_backend import available

    if name == "auto":
        return "native" if available() else "seal"
    if name == "native" and not available():
        raise ConfigError(
            "the native backend was not built: install a C++20 compiler and install blindtail again, "
            "or use the backend seal"
        )
    if name not in ("native", "seal", "clear"):
        raise ConfigError(f"there is no backend {name!r}: use native or seal, or clear for tests")
    return name


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
