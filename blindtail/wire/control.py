"""The control stream of edges and cells as plain records.

service blindtail.v1.Control
  Attach   Up ...       -> Down ...
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from blindtail.errors import ContainerError
from blindtail.pb import control_pb2 as pb
from blindtail.policy_document import DOCUMENT_BYTES
from blindtail.wire.checks import NAME_CHARS, TEXT_CHARS, build, encoded, length, parse, seconds, text

CONTROL = str(pb.DESCRIPTOR.services_by_name["Control"].full_name)

INSTANCE_BYTES = 16
#: Cap on one message of an edge or a cell, and on what comes down to them.
UP_BYTES, DOWN_BYTES = 64 * 1024, DOCUMENT_BYTES + 4096
#: Most entries of a mapping or list in one message of a peer.
MOST_ITEMS = 256


class PeerKind(Enum):
    EDGE = "edge"
    CELL = "cell"


_KIND_TO_PB = {PeerKind.EDGE: pb.PEER_KIND_EDGE, PeerKind.CELL: pb.PEER_KIND_CELL}
_KIND_FROM_PB = {int(number): kind for kind, number in _KIND_TO_PB.items()}

Model = tuple[str, str]  # (name, version)


def _few(items: Sequence[Any] | Mapping[Any, Any], name: str) -> None:
    if len(items) > MOST_ITEMS:
        raise ContainerError(f"{name} has {len(items)} entries; at most {MOST_ITEMS} are accepted")


def _check_models(models: Sequence[Model]) -> None:
    _few(models, "models")
    for model, version in models:
        text(model, NAME_CHARS, "model")
        text(version, NAME_CHARS, "version")


def _models_to_pb(models: Sequence[Model]) -> list[Any]:
    return [pb.ModelVersion(model=model, version=version) for model, version in models]


def _models_from_pb(models: Any) -> tuple[Model, ...]:
    return tuple((m.model, m.version) for m in models)


@dataclass(frozen=True, slots=True)
class Hello:
    """Who speaks. `instance`: 16 random bytes of this process. `policy_version` 0 = its own policy."""

    kind: PeerKind
    instance: bytes
    release: str
    models: tuple[Model, ...]
    policy_version: int = 0
    address: str = ""

    def __post_init__(self) -> None:
        length(self.instance, INSTANCE_BYTES, "instance")
        text(self.release, NAME_CHARS, "release")
        text(self.address, NAME_CHARS, "address")
        _check_models(self.models)

    def fields(self) -> dict[str, Any]:
        """By name, as every message has them that says who a peer is."""
        return {
            "kind": _KIND_TO_PB[self.kind],
            "instance": self.instance,
            "release": self.release,
            "models": _models_to_pb(self.models),
            "policy_version": self.policy_version,
            "address": self.address,
        }

    def message(self) -> Any:
        return pb.Hello(**self.fields())

    @classmethod
    def from_message(cls, m: Any) -> Hello:
        """Of any message with these fields."""
        models = _models_from_pb(m.models)
        return cls(_kind(m.kind), m.instance, m.release, models, m.policy_version, m.address)


@dataclass(frozen=True, slots=True)
class StepTiming:
    """Quantiles of one step's time, seconds."""

    step: str
    samples: int
    p50_s: float
    p95_s: float

    def __post_init__(self) -> None:
        text(self.step, NAME_CHARS, "step")
        seconds(self.p50_s, "p50_s")
        seconds(self.p95_s, "p95_s")


@dataclass(frozen=True, slots=True)
class CellLoad:
    """How busy a cell is now; `restarts` of evaluators since it started."""

    evaluators: int = 0
    queue_depth: int = 0
    backlog_s: float = 0.0
    sessions: int = 0
    restarts: int = 0
    key_store_bytes: int = 0
    draining: bool = False

    def __post_init__(self) -> None:
        seconds(self.backlog_s, "backlog_s")


@dataclass(frozen=True, slots=True)
class Report:
    """Sums since the last report, over `interval_s`. Timings and counts only."""

    interval_s: float
    routes: Mapping[str, int] = field(default_factory=dict)
    fallbacks: Mapping[str, int] = field(default_factory=dict)
    steps: tuple[StepTiming, ...] = ()
    uplink_bytes: int = 0
    reply_bytes: int = 0
    tail: str = ""
    load: CellLoad | None = None
    models: tuple[Model, ...] = ()

    def __post_init__(self) -> None:
        seconds(self.interval_s, "interval_s")
        text(self.tail, NAME_CHARS, "tail")
        for mapping, name in ((self.routes, "routes"), (self.fallbacks, "fallbacks")):
            _few(mapping, name)
            for key in mapping:
                text(key, NAME_CHARS, name)
        _few(self.steps, "steps")
        _check_models(self.models)

    def message(self) -> Any:
        load = None
        if self.load is not None:
            load = pb.CellLoad(**{name: getattr(self.load, name) for name in CellLoad.__slots__})
        return pb.Report(
            interval_s=self.interval_s,
            routes=self.routes,
            fallbacks=self.fallbacks,
            steps=[
                pb.StepTiming(step=s.step, samples=s.samples, p50_s=s.p50_s, p95_s=s.p95_s)
                for s in self.steps
            ],
            uplink_bytes=self.uplink_bytes,
            reply_bytes=self.reply_bytes,
            tail=self.tail,
            load=load,
            models=_models_to_pb(self.models),
        )

    @classmethod
    def from_message(cls, m: Any) -> Report:
        load = None
        if m.HasField("load"):
            load = CellLoad(**{name: getattr(m.load, name) for name in CellLoad.__slots__})
        steps = tuple(StepTiming(s.step, s.samples, s.p50_s, s.p95_s) for s in m.steps)
        return cls(
            m.interval_s,
            dict(m.routes),
            dict(m.fallbacks),
            steps,
            m.uplink_bytes,
            m.reply_bytes,
            m.tail,
            load,
            _models_from_pb(m.models),
        )


@dataclass(frozen=True, slots=True)
class PolicyAck:
    """An edge's word on a policy: `applied`, or refused for `reason`."""

    version: int
    applied: bool
    reason: str = ""

    def __post_init__(self) -> None:
        text(self.reason, TEXT_CHARS, "reason")


Up = Hello | Report | PolicyAck


def encode_up(up: Up) -> bytes:
    """One message of an edge or a cell."""
    if isinstance(up, Hello):
        return encoded(lambda: pb.AttachUp(hello=up.message()), "Hello")
    if isinstance(up, Report):
        return encoded(lambda: pb.AttachUp(report=up.message()), "Report")
    return encoded(
        lambda: pb.AttachUp(ack=pb.PolicyAck(version=up.version, applied=up.applied, reason=up.reason)),
        "PolicyAck",
    )


def decode_up(data: bytes) -> Up:
    """Raises `ContainerError`."""
    m = parse(pb.AttachUp(), data, UP_BYTES)
    which = m.WhichOneof("what")
    if which == "hello":
        return Hello.from_message(m.hello)
    if which == "report":
        return Report.from_message(m.report)
    if which == "ack":
        return PolicyAck(m.ack.version, m.ack.applied, m.ack.reason)
    raise ContainerError("an empty message on the control stream: the peer speaks a newer protocol")


@dataclass(frozen=True, slots=True)
class Welcome:
    """First answer on a stream: how often to report."""

    report_interval_s: float

    def __post_init__(self) -> None:
        seconds(self.report_interval_s, "report_interval_s")


@dataclass(frozen=True, slots=True)
class PolicyUpdate:
    """A version of a policy. `model` "" = for models without one of their own.

    `document`: JSON bytes, opened by `PolicyDocument.decode`.
    """

    version: int
    model: str
    document: bytes

    def __post_init__(self) -> None:
        text(self.model, NAME_CHARS, "model")
        if len(self.document) > DOCUMENT_BYTES:
            raise ContainerError(f"a policy document has at most {DOCUMENT_BYTES} bytes")

    def message(self) -> Any:
        return pb.Policy(version=self.version, model=self.model, document=self.document)

    @classmethod
    def from_message(cls, m: Any) -> PolicyUpdate:
        return cls(m.version, m.model, m.document)


Down = PolicyUpdate | Welcome


def encode_down(down: Down) -> bytes:
    if isinstance(down, PolicyUpdate):
        return encoded(lambda: pb.AttachDown(policy=down.message()), "Policy")
    return build(pb.AttachDown, welcome=pb.Welcome(report_interval_s=down.report_interval_s))


def decode_down(data: bytes) -> Down | None:
    """None for a kind of message that this release does not know. Raises `ContainerError`."""
    m = parse(pb.AttachDown(), data, DOWN_BYTES)
    which = m.WhichOneof("what")
    if which == "policy":
        return PolicyUpdate.from_message(m.policy)
    if which == "welcome":
        return Welcome(m.welcome.report_interval_s)
    return None


def _kind(number: int) -> PeerKind:
    kind = _KIND_FROM_PB.get(number)
    if kind is None:
        raise ContainerError("the peer does not say whether it is an edge or a cell")
    return kind


__all__ = [
    "CONTROL",
    "DOWN_BYTES",
    "INSTANCE_BYTES",
    "MOST_ITEMS",
    "UP_BYTES",
    "CellLoad",
    "Down",
    "Hello",
    "Model",
    "PeerKind",
    "PolicyAck",
    "PolicyUpdate",
    "Report",
    "StepTiming",
    "Up",
    "Welcome",
    "decode_down",
    "decode_up",
    "encode_down",
    "encode_up",
]
