"""What operators ask of the orchestrator, as plain records.

service blindtail.v1.Policies
  Get      PolicyQuery  -> list of PolicyEntry
  Set      PolicyChange -> PolicyEntry
  History  PolicyQuery  -> list of PolicyEntry
  Usage    UsageQuery   -> list of UsageCount
  Fleet    (nothing)    -> list of FleetPeer
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from blindtail.errors import ContainerError
from blindtail.pb import control_pb2 as pb
from blindtail.policy_document import DOCUMENT_BYTES
from blindtail.wire.checks import NAME_CHARS, TEXT_CHARS, build, encoded, parse, seconds, text
from blindtail.wire.control import Hello, PolicyUpdate, Report

POLICIES = str(pb.DESCRIPTOR.services_by_name["Policies"].full_name)

#: Caps on an operator's request, and on lists for operators.
CHANGE_BYTES, LIST_BYTES = DOCUMENT_BYTES + 4096, 16 * 1024 * 1024


class PolicyState(Enum):
    ACTIVE = "active"
    REPLACED = "replaced"  # by a later version
    ROLLED_BACK = "rolled back"  # edges refused it


_STATE_TO_PB = {
    PolicyState.ACTIVE: pb.POLICY_STATE_ACTIVE,
    PolicyState.REPLACED: pb.POLICY_STATE_REPLACED,
    PolicyState.ROLLED_BACK: pb.POLICY_STATE_ROLLED_BACK,
}
_STATE_FROM_PB = {int(number): state for state, number in _STATE_TO_PB.items()}


@dataclass(frozen=True, slots=True)
class PolicyQuery:
    """`model` "" = all; `limit` 0 = the server's own."""

    model: str = ""
    limit: int = 0

    def encode(self) -> bytes:
        return build(pb.PolicyQuery, model=self.model, limit=self.limit)

    @classmethod
    def decode(cls, data: bytes) -> PolicyQuery:
        m = parse(pb.PolicyQuery(), data, CHANGE_BYTES)
        return cls(m.model, m.limit)


@dataclass(frozen=True, slots=True)
class PolicyChange:
    """A new version for `model` ("" = the default)."""

    model: str
    document: bytes
    note: str = ""

    def __post_init__(self) -> None:
        text(self.model, NAME_CHARS, "model")
        text(self.note, TEXT_CHARS, "note")

    def encode(self) -> bytes:
        return build(pb.PolicyChange, model=self.model, document=self.document, note=self.note)

    @classmethod
    def decode(cls, data: bytes) -> PolicyChange:
        m = parse(pb.PolicyChange(), data, CHANGE_BYTES)
        return cls(m.model, m.document, m.note)


@dataclass(frozen=True, slots=True)
class PolicyEntry:
    """One version in the history. `applied` and `refused` count edges that are attached."""

    update: PolicyUpdate
    state: PolicyState
    created_unix_s: float
    author: str
    note: str = ""
    applied: int = 0
    refused: int = 0

    def message(self) -> Any:
        return pb.PolicyEntry(
            policy=self.update.message(),
            state=_STATE_TO_PB[self.state],
            created_unix_s=self.created_unix_s,
            author=self.author,
            note=self.note,
            applied=self.applied,
            refused=self.refused,
        )

    @classmethod
    def from_message(cls, m: Any) -> PolicyEntry:
        state = _STATE_FROM_PB.get(m.state)
        if state is None:
            raise ContainerError(f"unknown policy state {m.state}: the peer speaks a newer protocol")
        update = PolicyUpdate.from_message(m.policy)
        return cls(update, state, m.created_unix_s, m.author, m.note, m.applied, m.refused)

    def encode(self) -> bytes:
        return encoded(self.message, "PolicyEntry")

    @classmethod
    def decode(cls, data: bytes) -> PolicyEntry:
        return cls.from_message(parse(pb.PolicyEntry(), data, LIST_BYTES))


def encode_entries(entries: Sequence[PolicyEntry]) -> bytes:
    return encoded(lambda: pb.PolicyList(entries=[e.message() for e in entries]), "PolicyList")


def decode_entries(data: bytes) -> list[PolicyEntry]:
    return [PolicyEntry.from_message(m) for m in parse(pb.PolicyList(), data, LIST_BYTES).entries]


@dataclass(frozen=True, slots=True)
class FleetPeer:
    """One attached edge or cell. `reported_s`: age of `report`, negative when there is none."""

    hello: Hello
    identity: str
    attached_s: float
    reported_s: float
    report: Report

    def message(self) -> Any:
        return pb.FleetPeer(
            **self.hello.fields(),
            identity=self.identity,
            attached_s=self.attached_s,
            reported_s=self.reported_s,
            report=self.report.message(),
        )

    @classmethod
    def from_message(cls, m: Any) -> FleetPeer:
        hello = Hello.from_message(m)
        return cls(hello, m.identity, m.attached_s, m.reported_s, Report.from_message(m.report))


def encode_fleet(peers: Sequence[FleetPeer]) -> bytes:
    return encoded(lambda: pb.FleetReply(peers=[p.message() for p in peers]), "FleetReply")


def decode_fleet(data: bytes) -> list[FleetPeer]:
    return [FleetPeer.from_message(m) for m in parse(pb.FleetReply(), data, LIST_BYTES).peers]


@dataclass(frozen=True, slots=True)
class UsageQuery:
    """What edges reported in the last `last_s` seconds; `model` "" = all."""

    model: str = ""
    last_s: float = 86_400.0

    def __post_init__(self) -> None:
        text(self.model, NAME_CHARS, "model")
        seconds(self.last_s, "last_s")

    def encode(self) -> bytes:
        return build(pb.UsageQuery, model=self.model, last_s=self.last_s)

    @classmethod
    def decode(cls, data: bytes) -> UsageQuery:
        m = parse(pb.UsageQuery(), data, CHANGE_BYTES)
        return cls(m.model, m.last_s)


@dataclass(frozen=True, slots=True)
class UsageCount:
    """`kind` is "route" (answers), "fallback" (of those) or "bytes" ("uplink" and "reply")."""

    model: str
    kind: str
    name: str
    total: int


def encode_usage(counts: Sequence[UsageCount]) -> bytes:
    fields = UsageCount.__slots__
    return encoded(
        lambda: pb.UsageReply(counts=[pb.UsageCount(**{f: getattr(c, f) for f in fields}) for c in counts]),
        "UsageReply",
    )


def decode_usage(data: bytes) -> list[UsageCount]:
    found = parse(pb.UsageReply(), data, LIST_BYTES).counts
    return [UsageCount(m.model, m.kind, m.name, m.total) for m in found]


__all__ = [
    "CHANGE_BYTES",
    "LIST_BYTES",
    "POLICIES",
    "FleetPeer",
    "PolicyChange",
    "PolicyEntry",
    "PolicyQuery",
    "PolicyState",
    "UsageCount",
    "UsageQuery",
    "decode_entries",
    "decode_fleet",
    "decode_usage",
    "encode_entries",
    "encode_fleet",
    "encode_usage",
]
