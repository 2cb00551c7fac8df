"""The data plane as plain records: an edge and one cell.

service blindtail.v1.Tail
  Register    RegisterCall       -> RegisterResult
  KeyStatus   KeyStatusCall      -> KeyStatus
  UploadKeys  KeyChunk ...       -> KeyStatus
  Evaluate    EvaluateCall       -> EvaluateResult
  Tickets     TicketOffer        -> TicketsTaken
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from blindtail.errors import ContainerError
from blindtail.pb import tail_pb2 as pb
from blindtail.wire.checks import (
    CHUNK_BYTES,
    CONTROL_BYTES,
    NAME_CHARS,
    OVERHEAD_BYTES,
    REPLY_BYTES,
    REQUEST_ID_BYTES,
    SEED_BYTES,
    SESSION_BYTES,
    SHA256_BYTES,
    TEXT_CHARS,
    build,
    length,
    parse,
    program_id,
    seconds,
    text,
)

SERVICE = str(pb.DESCRIPTOR.services_by_name["Tail"].full_name)


#: Most other cells that a reply to Register names.
MOST_OTHERS = 8
#: Most seeds in one call of Tickets.
MOST_SEEDS = 64
_OFFER_BYTES = MOST_SEEDS * (SEED_BYTES + 8) + OVERHEAD_BYTES


class KeyState(Enum):
    """Where a set of evaluation keys stands in the cloud."""

    MISSING = "missing"  # nothing, or only a part, has arrived
    CHECKING = "checking"  # all bytes are there, validation is running
    READY = "ready"  # evaluations may start
    REFUSED = "refused"  # validation failed; the bytes are gone


_STATE_TO_PB = {
    KeyState.MISSING: pb.KEY_STATE_MISSING,
    KeyState.CHECKING: pb.KEY_STATE_CHECKING,
    KeyState.READY: pb.KEY_STATE_READY,
    KeyState.REFUSED: pb.KEY_STATE_REFUSED,
}
_STATE_FROM_PB: dict[int, KeyState] = {int(number): state for state, number in _STATE_TO_PB.items()}


@dataclass(frozen=True, slots=True)
class RegisterCall:
    """Asks for a session. `key_sha256` is the SHA-256 (32 bytes) of the key container."""

    model: str
    version: str
    program_id: str
    key_sha256: bytes

    def __post_init__(self) -> None:
        text(self.model, NAME_CHARS, "model")
        text(self.version, NAME_CHARS, "version")
        program_id(self.program_id)
        length(self.key_sha256, SHA256_BYTES, "key_sha256")

    def encode(self) -> bytes:
        return build(
            pb.RegisterRequest,
            model=self.model,
            version=self.version,
            program_id=self.program_id,
            key_sha256=self.key_sha256,
        )

    @classmethod
    def decode(cls, data: bytes) -> RegisterCall:
        m = parse(pb.RegisterRequest(), data, CONTROL_BYTES)
        return cls(m.model, m.version, m.program_id, m.key_sha256)


@dataclass(frozen=True, slots=True)
class RegisterResult:
    """A session of 16 random bytes, and whether its keys are there.

    `address` is the host:port to dial from now on; empty means "as dialled". An
    unused session is forgotten after `idle_timeout_s`. A cell that is `draining`
    is about to end; `others` are cells to try instead.
    """

    session: bytes
    keys: KeyState
    address: str
    idle_timeout_s: float
    draining: bool = False
    others: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        length(self.session, SESSION_BYTES, "session")
        text(self.address, TEXT_CHARS, "address")
        seconds(self.idle_timeout_s, "idle_timeout_s")
        if len(self.others) > MOST_OTHERS:
            raise ContainerError(
                f"{len(self.others)} other cells are named; at most {MOST_OTHERS} are accepted"
            )
        for address in self.others:
            text(address, NAME_CHARS, "others")

    def encode(self) -> bytes:
        return build(
            pb.RegisterReply,
            session=self.session,
            keys=_STATE_TO_PB[self.keys],
            address=self.address,
            idle_timeout_s=self.idle_timeout_s,
            draining=self.draining,
            others=self.others,
        )

    @classmethod
    def decode(cls, data: bytes) -> RegisterResult:
        m = parse(pb.RegisterReply(), data, CONTROL_BYTES)
        return cls(m.session, _state(m.keys), m.address, m.idle_timeout_s, m.draining, tuple(m.others))


@dataclass(frozen=True, slots=True)
class KeyStatusCall:
    """Asks how much of a key container has arrived, and whether it is usable."""

    program_id: str
    key_sha256: bytes

    def __post_init__(self) -> None:
        program_id(self.program_id)
        length(self.key_sha256, SHA256_BYTES, "key_sha256")

    def encode(self) -> bytes:
        return build(pb.KeyStatusRequest, program_id=self.program_id, key_sha256=self.key_sha256)

    @classmethod
    def decode(cls, data: bytes) -> KeyStatusCall:
        m = parse(pb.KeyStatusRequest(), data, CONTROL_BYTES)
        return cls(m.program_id, m.key_sha256)


@dataclass(frozen=True, slots=True)
class KeyStatus:
    """`received_bytes` of a MISSING key container are kept: send the rest from there.

    `problem` says why keys were REFUSED; it is empty otherwise.
    """

    state: KeyState
    received_bytes: int
    problem: str = ""

    def __post_init__(self) -> None:
        text(self.problem, TEXT_CHARS, "problem")

    def encode(self) -> bytes:
        return build(
            pb.KeyStatusReply,
            keys=_STATE_TO_PB[self.state],
            received_bytes=self.received_bytes,
            problem=self.problem,
        )

    @classmethod
    def decode(cls, data: bytes) -> KeyStatus:
        m = parse(pb.KeyStatusReply(), data, CONTROL_BYTES)
        return cls(_state(m.keys), m.received_bytes, m.problem)


@dataclass(frozen=True, slots=True)
class KeyHeader:
    """Opens an upload: which keys, their exact size, and where the first chunk's data belongs."""

    program_id: str
    key_sha256: bytes
    total_bytes: int
    offset: int

    def __post_init__(self) -> None:
        program_id(self.program_id)
        length(self.key_sha256, SHA256_BYTES, "key_sha256")
        if self.offset > self.total_bytes:
            raise ContainerError("the upload starts behind the end of the key container")


@dataclass(frozen=True, slots=True)
class KeyChunk:
    """Up to 256 KiB of a key container; the first chunk of a stream carries the header."""

    data: bytes
    header: KeyHeader | None = None

    def __post_init__(self) -> None:
        if len(self.data) > CHUNK_BYTES:
            raise ContainerError(f"a chunk has {len(self.data)} bytes; at most {CHUNK_BYTES} are accepted")

    def encode(self) -> bytes:
        h = self.header
        if h is None:
            return build(pb.KeyChunk, data=self.data)
        header = pb.KeyHeader()
        try:
            header.program_id, header.key_sha256 = h.program_id, h.key_sha256
            header.total_bytes, header.offset = h.total_bytes, h.offset
        except (TypeError, ValueError) as error:
            raise ContainerError(f"a field does not fit into KeyHeader: {error}") from error
        return build(pb.KeyChunk, header=header, data=self.data)

    @classmethod
    def decode(cls, data: bytes) -> KeyChunk:
        m = parse(pb.KeyChunk(), data, CHUNK_BYTES + OVERHEAD_BYTES)
        if not m.HasField("header"):
            return cls(m.data)
        h = m.header
        return cls(m.data, KeyHeader(h.program_id, h.key_sha256, h.total_bytes, h.offset))


@dataclass(frozen=True, slots=True)
class EvaluateCall:
    """One encrypted activation. A retry resends the same `request_id` and bytes with attempt + 1.

    `remaining_s` is the time left for the reply to be of use; 0 means no deadline.
    `program_id` names a segment of the session's tail; empty means the program of the session.
    """

    session: bytes
    request_id: bytes
    container: bytes
    attempt: int = 0
    remaining_s: float = 0.0
    program_id: str = ""

    def __post_init__(self) -> None:
        length(self.session, SESSION_BYTES, "session")
        length(self.request_id, REQUEST_ID_BYTES, "request_id")
        seconds(self.remaining_s, "remaining_s")
        if self.program_id:
            program_id(self.program_id)

    def encode(self) -> bytes:
        return build(
            pb.EvaluateRequest,
            session=self.session,
            request_id=self.request_id,
            attempt=self.attempt,
            remaining_s=self.remaining_s,
            container=self.container,
            program_id=self.program_id,
        )

    @classmethod
    def decode(cls, data: bytes, container_bytes: int) -> EvaluateCall:
        """`container_bytes`: the largest container that any program here accepts."""
        m = parse(pb.EvaluateRequest(), data, container_bytes + OVERHEAD_BYTES)
        return cls(m.session, m.request_id, m.container, m.attempt, m.remaining_s, m.program_id)


@dataclass(frozen=True, slots=True)
class EvaluateResult:
    """Encrypted logits, and the time they took on the cloud's own clock.

    `version` of the model answered (a canary's may differ from the edge's own). A
    cell that is `draining` still answers, but wants its sessions to move. `ticket`:
    what the cell had done ahead for this activation's seed was used.
    """

    container: bytes
    queue_s: float
    eval_s: float
    evaluator: str = ""
    draining: bool = False
    version: str = ""
    ticket: bool = False

    def __post_init__(self) -> None:
        seconds(self.queue_s, "queue_s")
        seconds(self.eval_s, "eval_s")
        text(self.evaluator, NAME_CHARS, "evaluator")
        text(self.version, NAME_CHARS, "version")

    def encode(self) -> bytes:
        return build(
            pb.EvaluateReply,
            container=self.container,
            queue_s=self.queue_s,
            eval_s=self.eval_s,
            evaluator=self.evaluator,
            draining=self.draining,
            version=self.version,
            ticket=self.ticket,
        )

    @classmethod
    def decode(cls, data: bytes, container_bytes: int = REPLY_BYTES) -> EvaluateResult:
        m = parse(pb.EvaluateReply(), data, container_bytes + OVERHEAD_BYTES)
        return cls(m.container, m.queue_s, m.eval_s, m.evaluator, m.draining, m.version, m.ticket)


@dataclass(frozen=True, slots=True)
class TicketOffer:
    """Seeds (64 bytes each, at most `MOST_SEEDS`, the one to be used first in front) that this
    session's activations will come with."""

    session: bytes
    seeds: tuple[bytes, ...]

    def __post_init__(self) -> None:
        length(self.session, SESSION_BYTES, "session")
        if len(self.seeds) > MOST_SEEDS:
            raise ContainerError(f"{len(self.seeds)} seeds are named; at most {MOST_SEEDS} are accepted")
        for seed in self.seeds:
            length(seed, SEED_BYTES, "a seed")

    def encode(self) -> bytes:
        return build(pb.TicketsRequest, session=self.session, seeds=self.seeds)

    @classmethod
    def decode(cls, data: bytes) -> TicketOffer:
        m = parse(pb.TicketsRequest(), data, _OFFER_BYTES)
        return cls(m.session, tuple(m.seeds))


@dataclass(frozen=True, slots=True)
class TicketsTaken:
    """The first `accepted` seeds of an offer are taken. `capacity`: how many this client may have
    at the cell at once; 0 = the cell does nothing ahead."""

    accepted: int
    capacity: int

    def __post_init__(self) -> None:
        for name, value in (("accepted", self.accepted), ("capacity", self.capacity)):
            if value < 0:
                raise ContainerError(f"{name} is a number from 0 on, not {value}")
        if self.accepted > MOST_SEEDS:
            raise ContainerError(f"{self.accepted} seeds are accepted, of at most {MOST_SEEDS} in an offer")

    def encode(self) -> bytes:
        return build(pb.TicketsReply, accepted=self.accepted, capacity=self.capacity)

    @classmethod
    def decode(cls, data: bytes) -> TicketsTaken:
        m = parse(pb.TicketsReply(), data, CONTROL_BYTES)
        return cls(m.accepted, m.capacity)


def _state(number: int) -> KeyState:
    state = _STATE_FROM_PB.get(number)
    if state is None:
        raise ContainerError(f"unknown key state {number}: the peer speaks a newer protocol")
    return state
