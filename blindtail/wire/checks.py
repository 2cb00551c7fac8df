"""What all records of the wire are held to: sizes before parsing, lengths, finite numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from google.protobuf.message import DecodeError, EncodeError

from blindtail.errors import ContainerError

#: Bytes of a session, of a request id, and of a key container's hash.
SESSION_BYTES, REQUEST_ID_BYTES, SHA256_BYTES = 16, 16, 32
#: Bytes of the seed that an encrypted activation starts with.
SEED_BYTES = 64
#: Most bytes of `data` in one chunk of an upload.
CHUNK_BYTES = 256 * 1024
#: Room for a message's fields other than a container or a chunk's data.
OVERHEAD_BYTES = 1024
#: Cap on messages that carry neither (Register, KeyStatus, and their replies).
CONTROL_BYTES = 4096
#: Cap on an EvaluateReply unless the caller knows the program's reply size.
REPLY_BYTES = 4 * 1024 * 1024
TEXT_CHARS = 512
NAME_CHARS = 200


def length(value: bytes, expected: int, name: str) -> None:
    if len(value) != expected:
        raise ContainerError(f"{name} has {len(value)} bytes instead of {expected}")


def text(value: str, limit: int, name: str) -> None:
    if len(value) > limit:
        raise ContainerError(f"{name} is longer than {limit} characters")


def program_id(value: str) -> None:
    if len(value) != 64 or not set(value) <= set("0123456789abcdef"):
        raise ContainerError("program_id is not a SHA-256 in lower-case hexadecimal")


def seconds(value: float, name: str) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ContainerError(f"{name} is not a finite, non-negative number of seconds")


def parse(message: Any, data: bytes, limit: int) -> Any:
    name = type(message).__name__
    if len(data) > limit:
        raise ContainerError(f"{name} has {len(data)} bytes, more than the {limit} that are accepted")
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise ContainerError(f"the bytes received are not a {name}") from error
    return message


def build(kind: Any, **fields: Any) -> bytes:
    return encoded(lambda: kind(**fields), kind.__name__)


def encoded(make: Callable[[], Any], name: str) -> bytes:
    """The bytes of the message that `make` builds. Raises `ContainerError` when a field does not fit."""
    try:
        return bytes(make().SerializeToString())
    except (EncodeError, TypeError, ValueError) as error:
        raise ContainerError(f"a field does not fit into {name}: {error}") from error
