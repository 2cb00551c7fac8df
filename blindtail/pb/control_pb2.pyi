from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PeerKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PEER_KIND_UNSPECIFIED: _ClassVar[PeerKind]
    PEER_KIND_EDGE: _ClassVar[PeerKind]
    PEER_KIND_CELL: _ClassVar[PeerKind]

class PolicyState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    POLICY_STATE_UNSPECIFIED: _ClassVar[PolicyState]
    POLICY_STATE_ACTIVE: _ClassVar[PolicyState]
    POLICY_STATE_REPLACED: _ClassVar[PolicyState]
    POLICY_STATE_ROLLED_BACK: _ClassVar[PolicyState]
PEER_KIND_UNSPECIFIED: PeerKind
PEER_KIND_EDGE: PeerKind
PEER_KIND_CELL: PeerKind
POLICY_STATE_UNSPECIFIED: PolicyState
POLICY_STATE_ACTIVE: PolicyState
POLICY_STATE_REPLACED: PolicyState
POLICY_STATE_ROLLED_BACK: PolicyState

class ModelVersion(_message.Message):
    __slots__ = ("model", "version")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: str
    def __init__(self, model: _Optional[str] = ..., version: _Optional[str] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("kind", "instance", "release", "models", "policy_version", "address")
    KIND_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    kind: PeerKind
    instance: bytes
    release: str
    models: _containers.RepeatedCompositeFieldContainer[ModelVersion]
    policy_version: int
    address: str
    def __init__(self, kind: _Optional[_Union[PeerKind, str]] = ..., instance: _Optional[bytes] = ..., release: _Optional[str] = ..., models: _Optional[_Iterable[_Union[ModelVersion, _Mapping]]] = ..., policy_version: _Optional[int] = ..., address: _Optional[str] = ...) -> None: ...

class Report(_message.Message):
    __slots__ = ("interval_s", "routes", "fallbacks", "steps", "uplink_bytes", "reply_bytes", "tail", "load", "models")
    class RoutesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class FallbacksEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    INTERVAL_S_FIELD_NUMBER: _ClassVar[int]
    ROUTES_FIELD_NUMBER: _ClassVar[int]
    FALLBACKS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    UPLINK_BYTES_FIELD_NUMBER: _ClassVar[int]
    REPLY_BYTES_FIELD_NUMBER: _ClassVar[int]
    TAIL_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    interval_s: float
    routes: _containers.ScalarMap[str, int]
    fallbacks: _containers.ScalarMap[str, int]
    steps: _containers.RepeatedCompositeFieldContainer[StepTiming]
    uplink_bytes: int
    reply_bytes: int
    tail: str
    load: CellLoad
    models: _containers.RepeatedCompositeFieldContainer[ModelVersion]
    def __init__(self, interval_s: _Optional[float] = ..., routes: _Optional[_Mapping[str, int]] = ..., fallbacks: _Optional[_Mapping[str, int]] = ..., steps: _Optional[_Iterable[_Union[StepTiming, _Mapping]]] = ..., uplink_bytes: _Optional[int] = ..., reply_bytes: _Optional[int] = ..., tail: _Optional[str] = ..., load: _Optional[_Union[CellLoad, _Mapping]] = ..., models: _Optional[_Iterable[_Union[ModelVersion, _Mapping]]] = ...) -> None: ...

class StepTiming(_message.Message):
    __slots__ = ("step", "samples", "p50_s", "p95_s")
    STEP_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    P50_S_FIELD_NUMBER: _ClassVar[int]
    P95_S_FIELD_NUMBER: _ClassVar[int]
    step: str
    samples: int
    p50_s: float
    p95_s: float
    def __init__(self, step: _Optional[str] = ..., samples: _Optional[int] = ..., p50_s: _Optional[float] = ..., p95_s: _Optional[float] = ...) -> None: ...

class CellLoad(_message.Message):
    __slots__ = ("evaluators", "queue_depth", "backlog_s", "sessions", "restarts", "key_store_bytes", "draining")
    EVALUATORS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_DEPTH_FIELD_NUMBER: _ClassVar[int]
    BACKLOG_S_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    RESTARTS_FIELD_NUMBER: _ClassVar[int]
    KEY_STORE_BYTES_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    evaluators: int
    queue_depth: int
    backlog_s: float
    sessions: int
    restarts: int
    key_store_bytes: int
    draining: bool
    def __init__(self, evaluators: _Optional[int] = ..., queue_depth: _Optional[int] = ..., backlog_s: _Optional[float] = ..., sessions: _Optional[int] = ..., restarts: _Optional[int] = ..., key_store_bytes: _Optional[int] = ..., draining: _Optional[bool] = ...) -> None: ...

class PolicyAck(_message.Message):
    __slots__ = ("version", "applied", "reason")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    version: int
    applied: bool
    reason: str
    def __init__(self, version: _Optional[int] = ..., applied: _Optional[bool] = ..., reason: _Optional[str] = ...) -> None: ...

class AttachUp(_message.Message):
    __slots__ = ("hello", "report", "ack")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    report: Report
    ack: PolicyAck
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., report: _Optional[_Union[Report, _Mapping]] = ..., ack: _Optional[_Union[PolicyAck, _Mapping]] = ...) -> None: ...

class AttachDown(_message.Message):
    __slots__ = ("policy", "welcome")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    policy: Policy
    welcome: Welcome
    def __init__(self, policy: _Optional[_Union[Policy, _Mapping]] = ..., welcome: _Optional[_Union[Welcome, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("report_interval_s",)
    REPORT_INTERVAL_S_FIELD_NUMBER: _ClassVar[int]
    report_interval_s: float
    def __init__(self, report_interval_s: _Optional[float] = ...) -> None: ...

class Policy(_message.Message):
    __slots__ = ("version", "model", "document")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DOCUMENT_FIELD_NUMBER: _ClassVar[int]
    version: int
    model: str
    document: bytes
    def __init__(self, version: _Optional[int] = ..., model: _Optional[str] = ..., document: _Optional[bytes] = ...) -> None: ...

class PolicyEntry(_message.Message):
    __slots__ = ("policy", "state", "created_unix_s", "author", "note", "applied", "refused")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    CREATED_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    AUTHOR_FIELD_NUMBER: _ClassVar[int]
    NOTE_FIELD_NUMBER: _ClassVar[int]
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    policy: Policy
    state: PolicyState
    created_unix_s: float
    author: str
    note: str
    applied: int
    refused: int
    def __init__(self, policy: _Optional[_Union[Policy, _Mapping]] = ..., state: _Optional[_Union[PolicyState, str]] = ..., created_unix_s: _Optional[float] = ..., author: _Optional[str] = ..., note: _Optional[str] = ..., applied: _Optional[int] = ..., refused: _Optional[int] = ...) -> None: ...

class PolicyList(_message.Message):
    __slots__ = ("entries",)
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[PolicyEntry]
    def __init__(self, entries: _Optional[_Iterable[_Union[PolicyEntry, _Mapping]]] = ...) -> None: ...

class PolicyQuery(_message.Message):
    __slots__ = ("model", "limit")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    model: str
    limit: int
    def __init__(self, model: _Optional[str] = ..., limit: _Optional[int] = ...) -> None: ...

class PolicyChange(_message.Message):
    __slots__ = ("model", "document", "note")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DOCUMENT_FIELD_NUMBER: _ClassVar[int]
    NOTE_FIELD_NUMBER: _ClassVar[int]
    model: str
    document: bytes
    note: str
    def __init__(self, model: _Optional[str] = ..., document: _Optional[bytes] = ..., note: _Optional[str] = ...) -> None: ...

class FleetQuery(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FleetPeer(_message.Message):
    __slots__ = ("kind", "identity", "instance", "release", "models", "policy_version", "address", "attached_s", "reported_s", "report")
    KIND_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    ATTACHED_S_FIELD_NUMBER: _ClassVar[int]
    REPORTED_S_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    kind: PeerKind
    identity: str
    instance: bytes
    release: str
    models: _containers.RepeatedCompositeFieldContainer[ModelVersion]
    policy_version: int
    address: str
    attached_s: float
    reported_s: float
    report: Report
    def __init__(self, kind: _Optional[_Union[PeerKind, str]] = ..., identity: _Optional[str] = ..., instance: _Optional[bytes] = ..., release: _Optional[str] = ..., models: _Optional[_Iterable[_Union[ModelVersion, _Mapping]]] = ..., policy_version: _Optional[int] = ..., address: _Optional[str] = ..., attached_s: _Optional[float] = ..., reported_s: _Optional[float] = ..., report: _Optional[_Union[Report, _Mapping]] = ...) -> None: ...

class UsageQuery(_message.Message):
    __slots__ = ("model", "last_s")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LAST_S_FIELD_NUMBER: _ClassVar[int]
    model: str
    last_s: float
    def __init__(self, model: _Optional[str] = ..., last_s: _Optional[float] = ...) -> None: ...

class UsageCount(_message.Message):
    __slots__ = ("model", "kind", "name", "total")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    model: str
    kind: str
    name: str
    total: int
    def __init__(self, model: _Optional[str] = ..., kind: _Optional[str] = ..., name: _Optional[str] = ..., total: _Optional[int] = ...) -> None: ...

class UsageReply(_message.Message):
    __slots__ = ("counts",)
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    counts: _containers.RepeatedCompositeFieldContainer[UsageCount]
    def __init__(self, counts: _Optional[_Iterable[_Union[UsageCount, _Mapping]]] = ...) -> None: ...

class FleetReply(_message.Message):
    __slots__ = ("peers",)
    PEERS_FIELD_NUMBER: _ClassVar[int]
    peers: _containers.RepeatedCompositeFieldContainer[FleetPeer]
    def __init__(self, peers: _Optional[_Iterable[_Union[FleetPeer, _Mapping]]] = ...) -> None: ...
