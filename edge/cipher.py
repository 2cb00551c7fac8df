"""The only place of the edge that holds a secret key: encrypts activations, opens replies.

`prepare_backend` pays for libraries and tables before the first request, while
nobody waits; `open_cipher` is then cheap. Cryptographic libraries are imported
when first needed, not before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
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

    tickets    the encryptor again, if it makes tickets
    following  those of a refreshed tail's later segments, for the same key
    """

    def __init__(
        self,
        encryptor: _Encryptor,
        decryptor: _Decryptor,
        tickets: Encryptor | None = None,
        following: Sequence[tuple[_Encryptor, _Decryptor]] = (),
    ) -> None:
        self._pairs, self._tickets = ((encryptor, decryptor), *following), tickets
        self._lock = threading.Lock()

    def encrypt(
        self, activation: FloatArray, wait_s: float | None = None, ticket: Any = None, segment: int = 0
    ) -> bytes:
        """(features,) -> container. Raises `DeadlineExceeded` when its turn comes too late, and
        `StateError` for a ticket that was used or is another cipher's."""
        with self._turn(wait_s):
            if ticket is None:
                return self._pairs[segment][0].encrypt(activation)
            if self._tickets is None or segment:
                raise StateError("this cipher has no tickets, or none for this segment")
            return self._tickets.encrypt(activation, ticket)

    def ticket(self, wait_s: float | None = None) -> Ticket | None:
        """One for a later `encrypt`, or None. Raises `DeadlineExceeded`."""
        if self._tickets is None:
            return None
        with self._turn(wait_s):
            return self._tickets.ticket()

    def decrypt(self, container: bytes, wait_s: float | None = None, segment: int = 0) -> FloatArray:
        """Container -> logits (outputs,). Raises `ContainerError`, `DeadlineExceeded`."""
        with self._turn(wait_s):
            opened = self._pairs[segment][1].decrypt(container)
            return np.asarray(opened, dtype=np.float64).reshape(-1)

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
    clear = 1024 + 8 * spec.output_layout.slots
    return spec.reply_bytes if backend == "seal" else max(spec.reply_bytes, clear)


def open_cipher(
    spec: TailSpec, secret: Path, backend: str, following: Sequence[TailSpec] = ()
) -> LockedCipher:
    """Loads the secret key. Raises `ContainerError` when it is damaged or of another program.

    following  later segments of a refreshed tail, whose key is the first one's
    """
    check_backend(backend)
    if backend == "clear":
        from blindtail.he.clear import ClearDecryptor, ClearEncryptor

        clear = [(ClearEncryptor(s), ClearDecryptor(s)) for s in following]
        return LockedCipher(ClearEncryptor(spec), ClearDecryptor(spec), following=clear)
    from blindtail.he.secret import Decryptor, Encryptor, SecretKey

    key = SecretKey.load(spec, secret)
    encryptor = Encryptor(spec, key)
    later = [(Encryptor(s, key), Decryptor(s, key)) for s in following]
    tickets = encryptor if spec.input_ciphertexts == 1 else None  # one covers one ciphertext
    return LockedCipher(encryptor, Decryptor(spec, key), tickets, later)


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
