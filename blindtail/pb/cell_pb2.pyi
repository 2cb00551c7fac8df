from blindtail.pb import tail_pb2 as _tail_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ModelHeader(_message.Message):
    __slots__ = ("sha256", "total_bytes", "allow")
    SHA256_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    ALLOW_FIELD_NUMBER: _ClassVar[int]
    sha256: bytes
    total_bytes: int
    allow: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, sha256: _Optional[bytes] = ..., total_bytes: _Optional[int] = ..., allow: _Optional[_Iterable[str]] = ...) -> None: ...

class ModelChunk(_message.Message):
    __slots__ = ("header", "data")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    header: ModelHeader
    data: bytes
    def __init__(self, header: _Optional[_Union[ModelHeader, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class ModelQuery(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class CanaryRequest(_message.Message):
    __slots__ = ("model", "version", "share")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: str
    share: float
    def __init__(self, model: _Optional[str] = ..., version: _Optional[str] = ..., share: _Optional[float] = ...) -> None: ...

class RollbackRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class DropRequest(_message.Message):
    __slots__ = ("model", "version")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: str
    def __init__(self, model: _Optional[str] = ..., version: _Optional[str] = ...) -> None: ...

class ModelEntry(_message.Message):
    __slots__ = ("model", "version", "programs", "allow", "share", "requests", "sessions", "pushed", "compatible_with")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PROGRAMS_FIELD_NUMBER: _ClassVar[int]
    ALLOW_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    PUSHED_FIELD_NUMBER: _ClassVar[int]
    COMPATIBLE_WITH_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: str
    programs: _containers.RepeatedScalarFieldContainer[str]
    allow: _containers.RepeatedScalarFieldContainer[str]
    share: float
    requests: int
    sessions: int
    pushed: bool
    compatible_with: str
    def __init__(self, model: _Optional[str] = ..., version: _Optional[str] = ..., programs: _Optional[_Iterable[str]] = ..., allow: _Optional[_Iterable[str]] = ..., share: _Optional[float] = ..., requests: _Optional[int] = ..., sessions: _Optional[int] = ..., pushed: _Optional[bool] = ..., compatible_with: _Optional[str] = ...) -> None: ...

class ModelList(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[ModelEntry]
    def __init__(self, models: _Optional[_Iterable[_Union[ModelEntry, _Mapping]]] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("grace_s",)
    GRACE_S_FIELD_NUMBER: _ClassVar[int]
    grace_s: float
    def __init__(self, grace_s: _Optional[float] = ...) -> None: ...

class ResumeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CellQuery(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainReply(_message.Message):
    __slots__ = ("draining", "sessions", "waiting")
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    draining: bool
    sessions: int
    waiting: int
    def __init__(self, draining: _Optional[bool] = ..., sessions: _Optional[int] = ..., waiting: _Optional[int] = ...) -> None: ...

class PeerKeys(_message.Message):
    __slots__ = ("identity", "program_id", "key_sha256")
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    PROGRAM_ID_FIELD_NUMBER: _ClassVar[int]
    KEY_SHA256_FIELD_NUMBER: _ClassVar[int]
    identity: str
    program_id: str
    key_sha256: bytes
    def __init__(self, identity: _Optional[str] = ..., program_id: _Optional[str] = ..., key_sha256: _Optional[bytes] = ...) -> None: ...

class PeerKeyChunk(_message.Message):
    __slots__ = ("identity", "chunk")
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    identity: str
    chunk: _tail_pb2.KeyChunk
    def __init__(self, identity: _Optional[str] = ..., chunk: _Optional[_Union[_tail_pb2.KeyChunk, _Mapping]] = ...) -> None: ...
