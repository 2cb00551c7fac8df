"""A cell's models, its drain, and keys between cells, as plain records.

service blindtail.v1.Models   operators
  Push      ModelChunk ...  -> list of ModelEntry
  List      model name      -> list of ModelEntry
  Canary    CanaryCall      -> list of ModelEntry
  Rollback  model name      -> list of ModelEntry
  Drop      DropCall        -> list of ModelEntry
service blindtail.v1.Cell     operators
  Drain     grace           -> DrainStatus
  Resume    (nothing)       -> DrainStatus
  Status    (nothing)       -> DrainStatus
service blindtail.v1.Peers    other cells of the operator
  FetchKeys PeerKeys        -> KeyChunk ...
  GiveKeys  PeerKeyChunk... -> KeyStatus
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from blindtail.errors import ContainerError
from blindtail.pb import cell_pb2 as pb
from blindtail.wire.checks import (
    CHUNK_BYTES,
    CONTROL_BYTES,
    NAME_CHARS,
    OVERHEAD_BYTES,
    SHA256_BYTES,
    build,
    length,
    parse,
    program_id,
    seconds,
    text,
)
from blindtail.wire.tail import KeyChunk

MODELS = str(pb.DESCRIPTOR.services_by_name["Models"].full_name)
CELL = str(pb.DESCRIPTOR.services_by_name["Cell"].full_name)
PEERS = str(pb.DESCRIPTOR.services_by_name["Peers"].full_name)

#: Largest file that is pushed, most patterns that it is allowed for, largest list of models.
MODEL_BYTES, MOST_PATTERNS, LIST_BYTES = 1 << 30, 64, 4 * 1024 * 1024
_HEADER_BYTES = MOST_PATTERNS * (NAME_CHARS + 8) + OVERHEAD_BYTES


@dataclass(frozen=True, slots=True)
class ModelHeader:
    """Opens a push. `allow`: identities that may use the model, shell patterns; empty = every edge."""

    sha256: bytes
    total_bytes: int
    allow: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        length(self.sha256, SHA256_BYTES, "sha256")
        if not 0 < self.total_bytes <= MODEL_BYTES:
            raise ContainerError(f"a model has between 1 and {MODEL_BYTES} bytes, not {self.total_bytes}")
        if len(self.allow) > MOST_PATTERNS:
            raise ContainerError(f"a model is allowed for at most {MOST_PATTERNS} patterns of identities")
        for pattern in self.allow:
            text(pattern, NAME_CHARS, "allow")


@dataclass(frozen=True, slots=True)
class ModelChunk:
    """Up to 256 KiB of a cloud.bt; the first chunk of a stream carries the header."""

    data: bytes
    header: ModelHeader | None = None

    def __post_init__(self) -> None:
        if len(self.data) > CHUNK_BYTES:
            raise ContainerError(f"a chunk has {len(self.data)} bytes; at most {CHUNK_BYTES} are accepted")

    def encode(self) -> bytes:
        h = self.header
        if h is None:
            return build(pb.ModelChunk, data=self.data)
        header = pb.ModelHeader(sha256=h.sha256, total_bytes=h.total_bytes, allow=h.allow)
        return build(pb.ModelChunk, header=header, data=self.data)

    @classmethod
    def decode(cls, data: bytes) -> ModelChunk:
        m = parse(pb.ModelChunk(), data, CHUNK_BYTES + _HEADER_BYTES)
        if not m.HasField("header"):
            return cls(m.data)
        h = m.header
        return cls(m.data, ModelHeader(h.sha256, h.total_bytes, tuple(h.allow)))


@dataclass(frozen=True, slots=True)
class CanaryCall:
    """From now on `version` answers `share` (0 to 1) of the requests that it can answer."""

    model: str
    version: str
    share: float

    def __post_init__(self) -> None:
        text(self.model, NAME_CHARS, "model")
        text(self.version, NAME_CHARS, "version")
        if not (math.isfinite(self.share) and 0 <= self.share <= 1):
            raise ContainerError(f"a share is a number from 0 to 1, not {self.share}")

    def encode(self) -> bytes:
        return build(pb.CanaryRequest, model=self.model, version=self.version, share=self.share)

    @classmethod
    def decode(cls, data: bytes) -> CanaryCall:
        m = parse(pb.CanaryRequest(), data, CONTROL_BYTES)
        return cls(m.model, m.version, m.share)


@dataclass(frozen=True, slots=True)
class DropCall:
    model: str
    version: str

    def __post_init__(self) -> None:
        text(self.model, NAME_CHARS, "model")
        text(self.version, NAME_CHARS, "version")

    def encode(self) -> bytes:
        return build(pb.DropRequest, model=self.model, version=self.version)

    @classmethod
    def decode(cls, data: bytes) -> DropCall:
        m = parse(pb.DropRequest(), data, CONTROL_BYTES)
        return cls(m.model, m.version)


def encode_model_query(model: str) -> bytes:
    """`List`; "" = all."""
    text(model, NAME_CHARS, "model")
    return build(pb.ModelQuery, model=model)


def decode_model_query(data: bytes) -> str:
    return str(parse(pb.ModelQuery(), data, CONTROL_BYTES).model)


def encode_rollback(model: str) -> bytes:
    text(model, NAME_CHARS, "model")
    return build(pb.RollbackRequest, model=model)


def decode_rollback(data: bytes) -> str:
    return str(parse(pb.RollbackRequest(), data, CONTROL_BYTES).model)


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One version in a cell. `compatible_with`: whose edges it can serve besides its own, versions
    joined by ", ". A version without `programs` was dropped, and stays so until it is pushed again."""

    model: str
    version: str
    programs: tuple[str, ...]
    allow: tuple[str, ...] = ()
    share: float = 0.0
    requests: int = 0
    sessions: int = 0
    pushed: bool = False
    compatible_with: str = ""


def encode_models(entries: Sequence[ModelEntry]) -> bytes:
    fields = ModelEntry.__slots__
    return build(pb.ModelList, models=[pb.ModelEntry(**{f: getattr(e, f) for f in fields}) for e in entries])


def decode_models(data: bytes) -> list[ModelEntry]:
    def entry(m: Any) -> ModelEntry:
        return ModelEntry(
            m.model,
            m.version,
            tuple(m.programs),
            tuple(m.allow),
            m.share,
            m.requests,
            m.sessions,
            m.pushed,
            m.compatible_with,
        )

    return [entry(m) for m in parse(pb.ModelList(), data, LIST_BYTES).models]


def encode_drain(grace_s: float) -> bytes:
    """0 = the cell's own grace."""
    seconds(grace_s, "grace_s")
    return build(pb.DrainRequest, grace_s=grace_s)


def decode_drain(data: bytes) -> float:
    grace_s = float(parse(pb.DrainRequest(), data, CONTROL_BYTES).grace_s)
    seconds(grace_s, "grace_s")
    return grace_s


@dataclass(frozen=True, slots=True)
class DrainStatus:
    """`sessions` that are still used here; requests that are `waiting` or run."""

    draining: bool
    sessions: int
    waiting: int

    def encode(self) -> bytes:
        return build(pb.DrainReply, draining=self.draining, sessions=self.sessions, waiting=self.waiting)

    @classmethod
    def decode(cls, data: bytes) -> DrainStatus:
        m = parse(pb.DrainReply(), data, CONTROL_BYTES)
        return cls(m.draining, m.sessions, m.waiting)


@dataclass(frozen=True, slots=True)
class PeerKeys:
    """Whose evaluation keys, and which."""

    identity: str
    program_id: str
    key_sha256: bytes

    def __post_init__(self) -> None:
        text(self.identity, NAME_CHARS, "identity")
        program_id(self.program_id)
        length(self.key_sha256, SHA256_BYTES, "key_sha256")

    def encode(self) -> bytes:
        return build(
            pb.PeerKeys, identity=self.identity, program_id=self.program_id, key_sha256=self.key_sha256
        )

    @classmethod
    def decode(cls, data: bytes) -> PeerKeys:
        m = parse(pb.PeerKeys(), data, CONTROL_BYTES)
        return cls(m.identity, m.program_id, m.key_sha256)


@dataclass(frozen=True, slots=True)
class PeerKeyChunk:
    """A chunk of another cell's upload; the first one names the identity."""

    chunk: KeyChunk
    identity: str = ""

    def __post_init__(self) -> None:
        text(self.identity, NAME_CHARS, "identity")

    def encode(self) -> bytes:
        message = pb.PeerKeyChunk(identity=self.identity)
        message.chunk.ParseFromString(self.chunk.encode())
        return bytes(message.SerializeToString())

    @classmethod
    def decode(cls, data: bytes) -> PeerKeyChunk:
        m = parse(pb.PeerKeyChunk(), data, CHUNK_BYTES + 2 * OVERHEAD_BYTES)
        return cls(KeyChunk.decode(m.chunk.SerializeToString()), m.identity)


__all__ = [
    "CELL",
    "LIST_BYTES",
    "MODELS",
    "MODEL_BYTES",
    "PEERS",
    "CanaryCall",
    "DrainStatus",
    "DropCall",
    "ModelChunk",
    "ModelEntry",
    "ModelHeader",
    "PeerKeyChunk",
    "PeerKeys",
    "decode_drain",
    "decode_model_query",
    "decode_models",
    "decode_rollback",
    "encode_drain",
    "encode_model_query",
    "encode_models",
    "encode_rollback",
]
