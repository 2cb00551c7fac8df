"""The only place of the edge that holds a secret key: encrypts activations, opens replies.

`prepare_backend` pays for libraries and tables before the first request, while
nobody waits; `open_cipher` is then cheap. Cryptographic libraries are imported
when first needed, not before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from blindtail.errors import ConfigError, DeadlineExceeded, StateError
from blindtail.he.spec import TailSpec

if TYPE_CHECKING:
    from blindtail.he.secret import Encryptor, Ticket

FloatArray = NDArray[np.float64]
BACKENDS = ("seal", "clear")


class _Encryptor(Protocol):
    def encrypt(self, activation: FloatArray) -> bytes: ...


class _Decryptor(Protocol):
    def decrypt(self, container: bytes) -> FloatArray: ...


class LockedCipher:
    """One encryptor and one decryptor, one thread at a time (the library promises no more).

    tickets  the encryptor again, if it makes tickets
    """

    def __init__(
        self, encryptor: _Encryptor, decryptor: _Decryptor, tickets: Encryptor | None = None
    ) -> None:
        self._encryptor, self._decryptor, self._tickets = encryptor, decryptor, tickets
        self._lock = threading.Lock()

    def encrypt(self, activation: FloatArray, wait_s: float | None = None, ticket: Any = None) -> bytes:
        """(features,) -> container. Raises `DeadlineExceeded` when its turn comes too late, and
        `StateError` for a ticket that was used or is another cipher's."""
        with self._turn(wait_s):
            if ticket is None:
                return self._encryptor.encrypt(activation)
            if self._tickets is None:
                raise StateError("this cipher has no tickets")
            return self._tickets.encrypt(activation, ticket)

    def ticket(self, wait_s: float | None = None) -> Ticket | None:
        """One for a later `encrypt`, or None. Raises `DeadlineExceeded`."""
        if self._tickets is None:
            return None
        with self._turn(wait_s):
            return self._tickets.ticket()

    def decrypt(self, container: bytes, wait_s: float | None = None) -> FloatArray:
        """Container -> logits (outputs,). Raises `ContainerError`, `DeadlineExceeded`."""
        with self._turn(wait_s):
            return np.asarray(self._decryptor.decrypt(container), dtype=np.float64).reshape(-1)

    @contextmanager
    def _turn(self, wait_s: float | None) -> Iterator[None]:
        if not self._lock.acquire(timeout=-1 if wait_s is None else max(0.0, wait_s)):
            raise DeadlineExceeded("other requests kept the cipher busy until the deadline")
        try:
            yield
        finally:
            self._lock.release()


def check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ConfigError(f"unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}")


def prepare_backend(spec: TailSpec, backend: str) -> None:
    """Loads the backend's library and tables, once per process and program (a second, at most)."""
    check_backend(backend)
    if backend == "seal":
        import blindtail.he.secret  # noqa: F401
        from blindtail.he.sealio import SealContext

        SealContext.of(spec.parameters)


def largest_reply(spec: TailSpec, backend: str) -> int:
    """Bytes of a reply's container; `clear` sends every slot as a double."""
    return spec.reply_bytes if backend == "seal" else max(spec.reply_bytes, 1024 + 8 * spec.parameters.slots)


def open_cipher(spec: TailSpec, secret: Path, backend: str) -> LockedCipher:
    """Loads the secret key. Raises `ContainerError` when it is damaged or of another program."""
    check_backend(backend)
    if backend == "clear":
        from blindtail.he.clear import ClearDecryptor, ClearEncryptor

        return LockedCipher(ClearEncryptor(spec), ClearDecryptor(spec))
    from blindtail.he.secret import Decryptor, Encryptor, SecretKey

    key = SecretKey.load(spec, secret)
    encryptor = Encryptor(spec, key)
    return LockedCipher(encryptor, Decryptor(spec, key), encryptor)


def make_keys(
    spec: TailSpec,
    secret: Path,
    evaluation: Path,
    backend: str,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Makes both key files. Slow, and holds the interpreter: only ever called in a child process."""
    check_backend(backend)
    if backend == "clear":
        from blindtail.he.clear import write_clear_keys

        write_clear_keys(spec, evaluation)
        secret.write_bytes(b"")
        secret.chmod(0o600)
        return
    from blindtail.he.secret import SecretKey

    SecretKey.generate(spec, evaluation, progress).save(secret)
