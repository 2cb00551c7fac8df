"""Encoded weights of a program as one file, which every evaluator of a node reads in place.

    head       magic, format version, program id, word size, number of maps; filled up to a page
    maps       one block each, as native/src/tail.hpp `encode_map` makes them: diagonals, then the bias
    SHA-256    of all that comes before

The file belongs to the weights: its name and its head carry the program's own id
(`Program.content_id`), whatever id the program answers for. It is written whole or
not at all; one that is not as it should be, to the last bit, is made again. Damage
would otherwise give wrong logits, and nobody would hear of it.
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from blindtail.he.backends import write_atomically

_log = logging.getLogger(__name__)

_MAGIC = b"BLTNENC1"
#: Of the layout, and of the encoding itself: another rounding of a weight is another version.
_VERSION = 1
_HEAD = struct.Struct("<8sI32sII")
#: Blocks begin at a page's start and are multiples of 64 bytes, so that vector loads are aligned.
_HEAD_BYTES = 4096
_DIGEST_BYTES = 32
_NAME = re.compile(rf"([0-9a-f]{{64}})\.(?:32|64)\.{_VERSION}")

Block = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Shape:
    """What a file must be for: program id (hex), word size, bytes of each map."""

    program_id: str
    word_bits: int
    maps: tuple[int, ...]

    @property
    def name(self) -> str:
        """Of the file in its folder."""
        return f"{self.program_id}.{self.word_bits}.{_VERSION}"

    @property
    def file_bytes(self) -> int:
        return _HEAD_BYTES + sum(self.maps) + _DIGEST_BYTES

    @property
    def head(self) -> bytes:
        fields = (_MAGIC, _VERSION, bytes.fromhex(self.program_id), self.word_bits, len(self.maps))
        return _HEAD.pack(*fields).ljust(_HEAD_BYTES, b"\0")


def program_of(name: str) -> str | None:
    """Id of the program that a file of this name is of; None when no evaluator reads such a file."""
    found = _NAME.fullmatch(name)
    return None if found is None else found[1]


def shared(folder: Path, shape: Shape, encode: Callable[[int, Block], None]) -> list[Block] | None:
    """Each map's block, mapped read-only from the file in `folder`; it is made when it is not there.

    encode(index, out) encodes one map; a block is in memory at a time. Evaluators that
    start together may each write the file: all write the same bytes, and one renaming
    wins. None, with a line in the log, when the folder does not take it: the caller then
    keeps weights of its own.
    """
    path = folder / shape.name
    try:
        found = read(path, shape)
        if found is None:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomically(path, _parts(shape, encode))
            found = read(path, shape)
    except OSError as error:
        _log.warning("encoded weights are kept in memory, not in a file that is shared: %s", error.strerror)
        return None
    if found is None:
        _log.warning("encoded weights are kept in memory: their file did not stay as it was written")
    return found


def read(path: Path, shape: Shape) -> list[Block] | None:
    """The blocks of a file that is whole, in memory that stays mapped as long as one of them lives.

    None when it is absent or anything about it is not as it should be. Raises `OSError`.
    """
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (FileNotFoundError, ValueError):  # ValueError: it is empty
        return None
    end = len(mapped) - _DIGEST_BYTES
    whole = memoryview(mapped)
    if len(mapped) != shape.file_bytes or whole[:_HEAD_BYTES] != shape.head:
        _log.warning("a file of encoded weights is not of this program or format: it is made again")
        return None
    # This also brings the pages in, which the first evaluation would otherwise wait for.
    if hashlib.sha256(whole[:end]).digest() != whole[end:]:
        _log.warning("a file of encoded weights is damaged: it is made again")
        return None
    blocks, at = [], _HEAD_BYTES
    for size in shape.maps:
        blocks.append(np.frombuffer(mapped, np.uint8, size, at))
        at += size
    return blocks


def _parts(shape: Shape, encode: Callable[[int, Block], None]) -> Iterator[bytes | memoryview]:
    digest = hashlib.sha256(shape.head)
    yield shape.head
    for index, size in enumerate(shape.maps):
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        block = np.frombuffer(pages, np.uint8)
        encode(index, block)
        digest.update(block.data)
        yield block.data
    yield digest.digest()


__all__ = ["Block", "Shape", "program_of", "read", "shared"]
