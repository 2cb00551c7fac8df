"""The wire contract as plain records: nobody else touches generated code.

Every record encodes itself to the bytes of its protobuf message and decodes
such bytes with everything checked: the message's size against its method's cap
(before parsing), lengths of ids and hashes, finite non-negative times. Decoding
raises `ContainerError`, whoever the peer is; building a wrong record by hand
raises the same. Sizes are bytes, times are seconds.

    service blindtail.v1.Tail
      Register    RegisterCall       -> RegisterResult
      KeyStatus   KeyStatusCall      -> KeyStatus
      UploadKeys  KeyChunk ...       -> KeyStatus
      Evaluate    EvaluateCall       -> EvaluateResult
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

from google.protobuf.message import DecodeError, EncodeError

from blindtail.errors import ContainerError
from blindtail.pb import tail_pb2 as pb

SERVICE = str(pb.DESCRIPTOR.services_by_name["Tail"].full_name)

#: Bytes of a session, of a request id, and of a key container's hash.
SESSION_BYTES, REQUEST_ID_BYTES, SHA256_BYTES = 16, 16, 32
#: Most bytes of `data` in one chunk of an upload.
CHUNK_BYTES = 256 * 1024
#: Room for a message's fields other than a container or a chunk's data.
OVERHEAD_BYTES = 1024
#: Cap on messages that carry neither (Register, KeyStatus, and their replies).
CONTROL_BYTES = 4096
#: Cap on an EvaluateReply unless the caller knows the program's reply size.
REPLY_BYTES = 4 * 1024 * 1024
_TEXT_CHARS = 512
_NAME_CHARS = 200


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


def _length(value: bytes, expected: int, name: str) -> None:
    if len(value) != expected:
        raise ContainerError(f"{name} has {len(value)} bytes instead of {expected}")


def _text(value: str, limit: int, name: str) -> None:
    if len(value) > limit:
        raise ContainerError(f"{name} is longer than {limit} characters")


def _program_id(value: str) -> None:
    if len(value) != 64 or not set(value) <= set("0123456789abcdef"):
        raise ContainerError("program_id is not a SHA-256 in lower-case hexadecimal")


def _seconds(value: float, name: str) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ContainerError(f"{name} is not a finite, non-negative number of seconds")


def _parse(message: Any, data: bytes, limit: int) -> Any:
    name = type(message).__name__
    if len(data) > limit:
        raise ContainerError(f"{name} has {len(data)} bytes, more than the {limit} that are accepted")
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise ContainerError(f"the bytes received are not a {name}") from error
    return message


def _build(kind: Any, **fields: Any) -> bytes:
    try:
        return bytes(kind(**fields).SerializeToString())
    except (EncodeError, TypeError, ValueError) as error:
        raise ContainerError(f"a field does not fit into {kind.__name__}: {error}") from error


@dataclass(frozen=True, slots=True)
class RegisterCall:
    """Asks for a session. `key_sha256` is the SHA-256 (32 bytes) of the key container."""

    model: str
    version: str
    program_id: str
    key_sha256: bytes

    def __post_init__(self) -> None:
        _text(self.model, _NAME_CHARS, "model")
        _text(self.version, _NAME_CHARS, "version")
        _program_id(self.program_id)
        _length(self.key_sha256, SHA256_BYTES, "key_sha256")

    def encode(self) -> bytes:
        return _build(
            pb.RegisterRequest,
            model=self.model,
            version=self.version,
            program_id=self.program_id,
            key_sha256=self.key_sha256,
        )

    @classmethod
    def decode(cls, data: bytes) -> RegisterCall:
        m = _parse(pb.RegisterRequest(), data, CONTROL_BYTES)
        return cls(m.model, m.version, m.program_id, m.key_sha256)


@dataclass(frozen=True, slots=True)
class RegisterResult:
    """A session of 16 random bytes, and whether its keys are there.

    `address` is the host:port to dial from now on; empty means "as dialled". An
    unused session is forgotten after `idle_timeout_s`.
    """

    session: bytes
    keys: KeyState
    address: str
    idle_timeout_s: float

    def __post_init__(self) -> None:
        _length(self.session, SESSION_BYTES, "session")
        _text(self.address, _TEXT_CHARS, "address")
        _seconds(self.idle_timeout_s, "idle_timeout_s")

    def encode(self) -> bytes:
        return _build(
            pb.RegisterReply,
            session=self.session,
            keys=_STATE_TO_PB[self.keys],
            address=self.address,
            idle_timeout_s=self.idle_timeout_s,
        )

    @classmethod
    def decode(cls, data: bytes) -> RegisterResult:
        m = _parse(pb.RegisterReply(), data, CONTROL_BYTES)
        return cls(m.session, _state(m.keys), m.address, m.idle_timeout_s)


@dataclass(frozen=True, slots=True)
class KeyStatusCall:
    """Asks how much of a key container has arrived, and whether it is usable."""

    program_id: str
    key_sha256: bytes

    def __post_init__(self) -> None:
        _program_id(self.program_id)
        _length(self.key_sha256, SHA256_BYTES, "key_sha256")

    def encode(self) -> bytes:
        return _build(pb.KeyStatusRequest, program_id=self.program_id, key_sha256=self.key_sha256)

    @classmethod
    def decode(cls, data: bytes) -> KeyStatusCall:
        m = _parse(pb.KeyStatusRequest(), data, CONTROL_BYTES)
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
        _text(self.problem, _TEXT_CHARS, "problem")

    def encode(self) -> bytes:
        return _build(
            pb.KeyStatusReply,
            keys=_STATE_TO_PB[self.state],
            received_bytes=self.received_bytes,
            problem=self.problem,
        )

    @classmethod
    def decode(cls, data: bytes) -> KeyStatus:
        m = _parse(pb.KeyStatusReply(), data, CONTROL_BYTES)
        return cls(_state(m.keys), m.received_bytes, m.problem)


@dataclass(frozen=True, slots=True)
class KeyHeader:
    """Opens an upload: which keys, their exact size, and where the first chunk's data belongs."""

    program_id: str
    key_sha256: bytes
    total_bytes: int
    offset: int

    def __post_init__(self) -> None:
        _program_id(self.program_id)
        _length(self.key_sha256, SHA256_BYTES, "key_sha256")
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
            return _build(pb.KeyChunk, data=self.data)
        header = pb.KeyHeader()
        try:
            header.program_id, header.key_sha256 = h.program_id, h.key_sha256
            header.total_bytes, header.offset = h.total_bytes, h.offset
        except (TypeError, ValueError) as error:
            raise ContainerError(f"a field does not fit into KeyHeader: {error}") from error
        return _build(pb.KeyChunk, header=header, data=self.data)

    @classmethod
    def decode(cls, data: bytes) -> KeyChunk:
        m = _parse(pb.KeyChunk(), data, CHUNK_BYTES + OVERHEAD_BYTES)
        if not m.HasField("header"):
            return cls(m.data)
        h = m.header
        return cls(m.data, KeyHeader(h.program_id, h.key_sha256, h.total_bytes, h.offset))


@dataclass(frozen=True, slots=True)
class EvaluateCall:
    """One encrypted activation. A retry resends the same `request_id` and bytes with attempt + 1.

    `remaining_s` is the time left for the reply to be of use; 0 means no deadline.
    """

    session: bytes
    request_id: bytes
    container: bytes
    attempt: int = 0
    remaining_s: float = 0.0

    def __post_init__(self) -> None:
        _length(self.session, SESSION_BYTES, "session")
        _length(self.request_id, REQUEST_ID_BYTES, "request_id")
        _seconds(self.remaining_s, "remaining_s")

    def encode(self) -> bytes:
        return _build(
            pb.EvaluateRequest,
            session=self.session,
            request_id=self.request_id,
            attempt=self.attempt,
            remaining_s=self.remaining_s,
            container=self.container,
        )

    @classmethod
    def decode(cls, data: bytes, container_bytes: int) -> EvaluateCall:
        """`container_bytes`: the largest container that any program here accepts."""
        m = _parse(pb.EvaluateRequest(), data, container_bytes + OVERHEAD_BYTES)
        return cls(m.session, m.request_id, m.container, m.attempt, m.remaining_s)


@dataclass(frozen=True, slots=True)
class EvaluateResult:
    """Encrypted logits, and the time they took on the cloud's own clock."""

    container: bytes
    queue_s: float
    eval_s: float
    evaluator: str = ""

    def __post_init__(self) -> None:
        _seconds(self.queue_s, "queue_s")
        _seconds(self.eval_s, "eval_s")
        _text(self.evaluator, _NAME_CHARS, "evaluator")

    def encode(self) -> bytes:
        return _build(
            pb.EvaluateReply,
            container=self.container,
            queue_s=self.queue_s,
            eval_s=self.eval_s,
            evaluator=self.evaluator,
        )

    @classmethod
    def decode(cls, data: bytes, container_bytes: int = REPLY_BYTES) -> EvaluateResult:
        m = _parse(pb.EvaluateReply(), data, container_bytes + OVERHEAD_BYTES)
        return cls(m.container, m.queue_s, m.eval_s, m.evaluator)


def _state(number: int) -> KeyState:
    state = _STATE_FROM_PB.get(number)
    if state is None:
        raise ContainerError(f"unknown key state {number}: the peer speaks a newer protocol")
    return state


__all__ = [
    "CHUNK_BYTES",
    "CONTROL_BYTES",
    "OVERHEAD_BYTES",
    "REPLY_BYTES",
    "REQUEST_ID_BYTES",
    "SERVICE",
    "SESSION_BYTES",
    "SHA256_BYTES",
    "EvaluateCall",
    "EvaluateResult",
    "KeyChunk",
    "KeyHeader",
    "KeyState",
    "KeyStatus",
    "KeyStatusCall",
    "RegisterCall",
    "RegisterResult",
]
