from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class KeyState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    KEY_STATE_UNSPECIFIED: _ClassVar[KeyState]
    KEY_STATE_MISSING: _ClassVar[KeyState]
    KEY_STATE_CHECKING: _ClassVar[KeyState]
    KEY_STATE_READY: _ClassVar[KeyState]
    KEY_STATE_REFUSED: _ClassVar[KeyState]
KEY_STATE_UNSPECIFIED: KeyState
KEY_STATE_MISSING: KeyState
KEY_STATE_CHECKING: KeyState
KEY_STATE_READY: KeyState
KEY_STATE_REFUSED: KeyState

class RegisterRequest(_message.Message):
    __slots__ = ("model", "version", "program_id", "key_sha256")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PROGRAM_ID_FIELD_NUMBER: _ClassVar[int]
    KEY_SHA256_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: str
    program_id: str
    key_sha256: bytes
    def __init__(self, model: _Optional[str] = ..., version: _Optional[str] = ..., program_id: _Optional[str] = ..., key_sha256: _Optional[bytes] = ...) -> None: ...

class RegisterReply(_message.Message):
    __slots__ = ("session", "keys", "address", "idle_timeout_s", "draining", "others")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    IDLE_TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    OTHERS_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    keys: KeyState
    address: str
    idle_timeout_s: float
    draining: bool
    others: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, session: _Optional[bytes] = ..., keys: _Optional[_Union[KeyState, str]] = ..., address: _Optional[str] = ..., idle_timeout_s: _Optional[float] = ..., draining: _Optional[bool] = ..., others: _Optional[_Iterable[str]] = ...) -> None: ...

class KeyStatusRequest(_message.Message):
    __slots__ = ("program_id", "key_sha256")
    PROGRAM_ID_FIELD_NUMBER: _ClassVar[int]
    KEY_SHA256_FIELD_NUMBER: _ClassVar[int]
    program_id: str
    key_sha256: bytes
    def __init__(self, program_id: _Optional[str] = ..., key_sha256: _Optional[bytes] = ...) -> None: ...

class KeyStatusReply(_message.Message):
    __slots__ = ("keys", "received_bytes", "problem")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    keys: KeyState
    received_bytes: int
    problem: str
    def __init__(self, keys: _Optional[_Union[KeyState, str]] = ..., received_bytes: _Optional[int] = ..., problem: _Optional[str] = ...) -> None: ...

class KeyHeader(_message.Message):
    __slots__ = ("program_id", "key_sha256", "total_bytes", "offset")
    PROGRAM_ID_FIELD_NUMBER: _ClassVar[int]
    KEY_SHA256_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    program_id: str
    key_sha256: bytes
    total_bytes: int
    offset: int
    def __init__(self, program_id: _Optional[str] = ..., key_sha256: _Optional[bytes] = ..., total_bytes: _Optional[int] = ..., offset: _Optional[int] = ...) -> None: ...

class KeyChunk(_message.Message):
    __slots__ = ("header", "data")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    header: KeyHeader
    data: bytes
    def __init__(self, header: _Optional[_Union[KeyHeader, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class EvaluateRequest(_message.Message):
    __slots__ = ("session", "request_id", "attempt", "remaining_s", "container", "program_id")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    REMAINING_S_FIELD_NUMBER: _ClassVar[int]
    CONTAINER_FIELD_NUMBER: _ClassVar[int]
    PROGRAM_ID_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    request_id: bytes
    attempt: int
    remaining_s: float
    container: bytes
    program_id: str
    def __init__(self, session: _Optional[bytes] = ..., request_id: _Optional[bytes] = ..., attempt: _Optional[int] = ..., remaining_s: _Optional[float] = ..., container: _Optional[bytes] = ..., program_id: _Optional[str] = ...) -> None: ...

class EvaluateReply(_message.Message):
    __slots__ = ("container", "queue_s", "eval_s", "evaluator", "draining", "version", "ticket")
    CONTAINER_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    EVAL_S_FIELD_NUMBER: _ClassVar[int]
    EVALUATOR_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    container: bytes
    queue_s: float
    eval_s: float
    evaluator: str
    draining: bool
    version: str
    ticket: bool
    def __init__(self, container: _Optional[bytes] = ..., queue_s: _Optional[float] = ..., eval_s: _Optional[float] = ..., evaluator: _Optional[str] = ..., draining: _Optional[bool] = ..., version: _Optional[str] = ..., ticket: _Optional[bool] = ...) -> None: ...

class TicketsRequest(_message.Message):
    __slots__ = ("session", "seeds")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    SEEDS_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    seeds: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, session: _Optional[bytes] = ..., seeds: _Optional[_Iterable[bytes]] = ...) -> None: ...

class TicketsReply(_message.Message):
    __slots__ = ("accepted", "capacity")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_FIELD_NUMBER: _ClassVar[int]
    accepted: int
    capacity: int
    def __init__(self, accepted: _Optional[int] = ..., capacity: _Optional[int] = ...) -> None: ...
