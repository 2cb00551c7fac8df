"""What the runtime needs of a tail, wherever it runs.

A `TailClient` carries containers to an evaluator and back; it never sees a
secret key. A `Cipher` holds the secret key; it never sees a network. A `Tail` is
one cut's pair of them with a state, and is all that `EdgeRuntime` knows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from types import MappingProxyType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from blindtail.errors import (
    AccessDenied,
    ContainerError,
    DeadlineExceeded,
    EvaluationFailed,
    InputError,
    KeysMissing,
    Overloaded,
    ProgramMismatch,
    SessionLost,
    TailError,
    TailUnavailable,
)
from blindtail.he.spec import TailSpec
from blindtail.records import TailReply, TailTimings

FloatArray = NDArray[np.float64]

#: Longest wait for a reply when a request has no deadline.
TAIL_TIMEOUT_S = 30.0

#: Error on the tail path -> the word in `Answer.fallback`. Anything else: "unavailable".
FALLBACK_REASONS: tuple[tuple[type[Exception], str], ...] = (
    (DeadlineExceeded, "deadline"),
    (Overloaded, "overloaded"),
    (SessionLost, "session"),
    (KeysMissing, "keys"),
    (EvaluationFailed, "evaluation"),
    (ContainerError, "refused"),
    (ProgramMismatch, "refused"),
    (AccessDenied, "refused"),
    (InputError, "refused"),  # the activation does not fit the cipher's range
    (TailUnavailable, "unavailable"),
)


def fallback_reason(error: Exception) -> str:
    """The bounded word that tells a caller why the tail did not answer."""
    return next((word for kind, word in FALLBACK_REASONS if isinstance(error, kind)), "unavailable")


def in_all(told: Sequence[TailTimings]) -> TailTimings:
    """Of all round trips of one offload: times added up, the ticket of the first, the rest of the last."""
    queue_s, eval_s = sum(t.queue_s for t in told), sum(t.eval_s for t in told)
    return replace(told[-1], queue_s=queue_s, eval_s=eval_s, ticket=told[0].ticket)


class Ticket(Protocol):
    """An encryption of zero, made ahead of the one message that it covers (`blindtail.he.secret`)."""

    @property
    def seed(self) -> bytes:
        """64 bytes that may be announced."""


class Cipher(Protocol):
    """Encrypts activations, decrypts replies; one key for all segments of a tail. Thread-safe.

    All wait at most `wait_s` for another thread's turn, then raise `DeadlineExceeded`;
    None waits as long as it takes.
    """

    def encrypt(
        self,
        activation: FloatArray,
        wait_s: float | None = None,
        ticket: Ticket | None = None,
        segment: int = 0,
    ) -> bytes:
        """(features,) of a segment -> container; the first one's may take a ticket of this cipher's.

        Raises `DeadlineExceeded`, and `StateError` for a ticket that was used or is another's.
        """

    def ticket(self, wait_s: float | None = None) -> Ticket | None:
        """A new one, for the first segment; None from a cipher that has none. Raises `DeadlineExceeded`."""

    def decrypt(self, container: bytes, wait_s: float | None = None, segment: int = 0) -> FloatArray:
        """Container -> logits, or a segment's values. Raises `ContainerError`, `DeadlineExceeded`."""


class TailClient(Protocol):
    """Brings one container to an evaluator. Thread-safe."""

    def evaluate(self, container: bytes, remaining_s: float | None, segment: int = 0) -> TailReply:
        """Returns within `remaining_s` or raises a `TailError`. None = no deadline: `TAIL_TIMEOUT_S`."""


class TailState(Enum):
    """Where a tail stands. Only READY offloads; all others answer from exits."""

    STARTING = "starting"
    KEYS = "making keys"
    UPLOADING = "uploading keys"
    CHECKING = "cloud checks keys"
    READY = "ready"
    JOINING = "registering"
    AWAY = "cloud away"
    MISMATCH = "model mismatch"
    DENIED = "access denied"
    FAILED = "failed"
    CLOSED = "closed"


#: What an evaluation met -> the state until that has been dealt with. Anything else: AWAY.
STATE_AFTER: Mapping[type[TailError], TailState] = MappingProxyType(
    {
        SessionLost: TailState.JOINING,
        KeysMissing: TailState.UPLOADING,
        ProgramMismatch: TailState.MISMATCH,
        AccessDenied: TailState.DENIED,
    }
)
#: States that nothing but a person, or a long wait, will change.
HOPELESS = (TailState.MISMATCH, TailState.DENIED, TailState.CLOSED)


@dataclass(frozen=True, slots=True)
class TailStatus:
    """A tail's state for people: what it does, since when, and what to do about it.

    `sent_bytes` of `key_bytes` evaluation keys are uploaded. `since_s` is on the
    runtime's clock. `problem` is a public message, empty when all is well. `cell` is
    the address of the cell that answers, empty while there is none. `tickets` are at hand.
    """

    state: TailState
    problem: str = ""
    sent_bytes: int = 0
    key_bytes: int = 0
    registrations: int = 0
    since_s: float = 0.0
    cell: str = ""
    tickets: int = 0


class Tail(TailClient, Protocol):
    """One cut's encrypted tail: client, cipher and state."""

    @property
    def spec(self) -> TailSpec: ...

    @property
    def cipher(self) -> Cipher | None:
        """None until the secret key is loaded; never None while `ready`."""

    @property
    def ready(self) -> bool:
        """True when keys are uploaded, the session is registered and no back-off runs."""

    @property
    def tickets(self) -> int:
        """How many tickets are at hand."""

    def take_ticket(self, cipher: Cipher) -> Ticket | None:
        """One that this cipher made and the cell has heard of; None when there is none. It is used
        for one encryption or not at all, and never given back."""

    def status(self) -> TailStatus: ...

    def wait_ready(self, timeout_s: float) -> bool:
        """Waits until `ready`; False after `timeout_s` or when it is hopeless."""

    def close(self) -> None: ...
