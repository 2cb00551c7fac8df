"""Bit packing: residues travel at exactly the width of their prime.

Little-endian throughout: value i occupies bits [i * width, (i + 1) * width) of
the byte string, bit 0 of a byte first. Unused bits of the last byte are zero.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from blindtail.errors import ContainerError

U64 = NDArray[np.uint64]


def packed_bytes(count: int, width: int) -> int:
    """Bytes that `count` values of `width` bits take."""
    return (count * width + 7) // 8


def pack_bits(values: U64, width: int) -> bytes:
    """Pack values < 2^width (not checked) into `packed_bytes` bytes; 1 <= width <= 64."""
    count = len(values)
    groups = -(-count // 64)
    columns = np.zeros((64, groups), np.uint64)
    padded = np.zeros(groups * 64, np.uint64)
    padded[:count] = values
    columns[:] = padded.reshape(groups, 64).T
    words = np.zeros((width, groups), np.uint64)
    for i in range(64):  # 64 values fill exactly `width` words
        word, shift = divmod(i * width, 64)
        words[word] |= columns[i] << np.uint64(shift)
        if shift + width > 64:
            words[word + 1] |= columns[i] >> np.uint64(64 - shift)
    return words.T.astype("<u8", copy=True).tobytes()[: packed_bytes(count, width)]


def unpack_bits(data: bytes | memoryview, count: int, width: int) -> U64:
    """Inverse of `pack_bits`. Raises `ContainerError` on a wrong length or set padding bits."""
    if len(data) != packed_bytes(count, width):
        raise ContainerError(f"packed block has {len(data)} bytes, {packed_bytes(count, width)} expected")
    groups = -(-count // 64)
    raw = np.zeros(groups * width * 8, np.uint8)
    raw[: len(data)] = np.frombuffer(data, np.uint8)
    words = raw.view("<u8").astype(np.uint64, copy=False).reshape(groups, width).T.copy()
    mask = np.uint64((1 << width) - 1)
    out = np.empty((64, groups), np.uint64)
    for i in range(64):
        word, shift = divmod(i * width, 64)
        value = words[word] >> np.uint64(shift)
        if shift + width > 64:
            value |= words[word + 1] << np.uint64(64 - shift)
        out[i] = value & mask
    flat = out.T.reshape(-1)
    spare = len(data) * 8 - count * width
    if spare and data[-1] >> (8 - spare):
        raise ContainerError("padding bits of a packed block are not zero")
    return flat[:count]
