"""SEAL objects in and out of TenSEAL's `sealapi`, by bytes that we write ourselves.

`sealapi` saves and loads through file paths only and always compresses, so
objects leave through a memory-backed file and the `zstandard` package, and
enter as uncompressed streams assembled here from residues that have already
been checked. SEAL never parses a peer's bytes.

Stream formats follow SEAL 4.x (`serialization.h`, `ciphertext.cpp`,
`kswitchkeys.cpp`). Residues are uint64, shape (primes, N), NTT form,
bit-reversed, prime by prime.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from blindtail.errors import StateError
from blindtail.he.params import Parameters

U64 = NDArray[np.uint64]

SEED_BYTES = 64
#: SEAL's identifier of the Blake2xb generator, the only one it uses by default.
BLAKE2XB = 1

_MAGIC, _HEADER, _MAJOR, _MINOR = 0xA15E, 16, 4, 3
_MAX_SAVED = 1 << 30


def api() -> Any:
    """`tenseal.sealapi`, imported when first needed."""
    import tenseal.sealapi as sealapi

    return sealapi


@dataclass(frozen=True)
class SealContext:
    """A SEALContext and the identifiers of its levels."""

    parameters: Parameters
    context: Any
    parms_ids: tuple[tuple[int, int, int, int], ...]  # by level
    key_parms_id: tuple[int, int, int, int]
    encoder: Any

    @staticmethod
    @lru_cache(maxsize=8)
    def of(parameters: Parameters) -> SealContext:
        s = api()
        settings = s.EncryptionParameters(s.SCHEME_TYPE.CKKS)
        settings.set_poly_modulus_degree(parameters.ring_degree)
        settings.set_coeff_modulus([s.Modulus(q) for q in parameters.key_primes])
        context = s.SEALContext(settings, True, s.SEC_LEVEL_TYPE.TC128)
        if not context.parameters_set():
            raise StateError(f"SEAL refuses the parameters: {context.parameters_error_message()}")
        ids: list[tuple[int, int, int, int]] = []
        data = context.first_context_data()
        while data is not None:
            ids.append(tuple(data.parms_id()))
            data = data.next_context_data()
        return SealContext(
            parameters, context, tuple(reversed(ids)), tuple(context.key_parms_id()), s.CKKSEncoder(context)
        )


class MemoryFile:
    """An anonymous file that has a path: the only door of `sealapi`."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("blindtail", os.MFD_CLOEXEC)
        self.path = f"/proc/self/fd/{self._fd}"

    def write(self, parts: Iterable[bytes | memoryview]) -> None:
        os.ftruncate(self._fd, 0)
        os.lseek(self._fd, 0, os.SEEK_SET)
        for part in parts:
            view = memoryview(part)
            while view:
                view = view[os.write(self._fd, view) :]

    def read(self) -> bytes:
        return os.pread(self._fd, os.fstat(self._fd).st_size, 0)

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> MemoryFile:
        return self

    def __exit__(self, *_: object) -> None:
        # Secret keys pass through here: leave zeros, not their bytes, behind.
        size = os.fstat(self._fd).st_size
        os.pwrite(self._fd, bytes(size), 0)
        self.close()


def saved_members(obj: Any) -> bytes:
    """The uncompressed body of what `obj.save` writes, SEAL header stripped."""
    with MemoryFile() as file:
        obj.save(file.path)
        data = file.read()
    magic, size, _, _, compression, _, total = struct.unpack_from("<HBBBBHQ", data)
    if magic != _MAGIC or size != _HEADER or total != len(data):
        raise StateError("SEAL wrote a stream that this version does not know")
    if compression == 0:
        return data[_HEADER:]
    return zstandard.ZstdDecompressor().decompressobj().decompress(data[_HEADER:])


def load_into(obj: Any, context: Any, parts: Sequence[bytes | memoryview]) -> Any:
    """Give `obj.load` a stream assembled from `parts`; returns `obj`."""
    with MemoryFile() as file:
        file.write(parts)
        obj.load(context, file.path)
    return obj


def _header(body_bytes: int) -> bytes:
    return struct.pack("<HBBBBHQ", _MAGIC, _HEADER, _MAJOR, _MINOR, 0, 0, _HEADER + body_bytes)


def _array(values: U64) -> list[bytes | memoryview]:
    flat = np.ascontiguousarray(values, dtype="<u8").reshape(-1)
    return [_header(8 + flat.nbytes), struct.pack("<Q", len(flat)), flat.data.cast("B")]


def ciphertext_stream(
    parms_id: Sequence[int],
    scale: float,
    ntt_form: bool,
    c0: U64,
    c1: U64 | None = None,
    seed: bytes | None = None,
) -> list[bytes | memoryview]:
    """A SEAL stream of (c0, c1), or of c0 and the seed that SEAL expands into c1.

    c0, c1: (primes, N). Exactly one of `c1` and `seed` is given.
    """
    primes, n = c0.shape
    head = struct.pack("<4QBQQQdQ", *parms_id, int(ntt_form), 2, n, primes, scale, 1)
    if seed is None:
        assert c1 is not None
        body = [head, *_array(np.concatenate([c0, c1]))]
    else:
        info = struct.pack("<B", BLAKE2XB) + seed
        body = [head, *_array(c0), _header(len(info)) + info]
    return [_header(sum(len(p) for p in body)), *body]


def keyswitch_stream(
    key_parms_id: Sequence[int], entries: int, keys: Iterator[tuple[int, list[list[bytes | memoryview]]]]
) -> Iterator[bytes | memoryview]:
    """A SEAL stream of relinearisation or Galois keys, body only (see `framed`).

    `keys` yields (index, digits) with rising index < `entries`; each digit is a
    `ciphertext_stream`.
    """
    yield struct.pack("<4QQ", *key_parms_id, entries)
    nothing = struct.pack("<Q", 0)
    at = 0
    for index, digits in keys:
        yield nothing * (index - at)
        yield struct.pack("<Q", len(digits))
        for digit in digits:
            yield from digit
        at = index + 1
    yield nothing * (entries - at)


def stream_header(body_bytes: int) -> bytes:
    """The SEAL header in front of a body of `body_bytes`."""
    return _header(body_bytes)


@dataclass(frozen=True)
class SavedCiphertext:
    """A ciphertext as SEAL saved it: c0 and either c1 or a seed."""

    c0: U64
    c1: U64 | None
    seed: bytes | None
    scale: float
    ntt_form: bool


def parse_ciphertext(body: bytes, at: int = 0) -> tuple[SavedCiphertext, int]:
    """Read the members of a ciphertext that this process's SEAL saved; returns it and the end."""
    *_, ntt, size, n, primes, scale, _ = struct.unpack_from("<4QBQQQdQ", body, at)
    at += 73
    if size != 2:
        raise StateError(f"expected a ciphertext of 2 polynomials, SEAL saved {size}")
    at += _HEADER
    (words,) = struct.unpack_from("<Q", body, at)
    at += 8
    data = np.frombuffer(body, "<u8", words, at).astype(np.uint64, copy=False)
    at += words * 8
    if words == 2 * primes * n:
        both = data.reshape(2, primes, n)
        return SavedCiphertext(both[0], both[1], None, scale, bool(ntt)), at
    if words != primes * n:
        raise StateError("SEAL saved a ciphertext of an unexpected length")
    generator = body[at + _HEADER]
    if generator != BLAKE2XB:
        raise StateError(f"SEAL used generator {generator}; only Blake2xb is supported")
    at += _HEADER + 1
    seed = body[at : at + SEED_BYTES]
    return SavedCiphertext(data.reshape(primes, n), None, seed, scale, bool(ntt)), at + SEED_BYTES


def parse_plaintext(body: bytes, primes: int) -> U64:
    """The residues (primes, N) of an encoded plaintext that this process's SEAL saved, NTT form; a view."""
    *_, coefficients, _, _, _, words = struct.unpack_from("<4QQd2QQ", body)
    if words != coefficients or words % primes:
        raise StateError("SEAL saved a plaintext of an unexpected length")
    return np.frombuffer(body, "<u8", words, 72).astype(np.uint64, copy=False).reshape(primes, -1)


def parse_keyswitch(body: bytes) -> dict[int, list[SavedCiphertext]]:
    """Relinearisation or Galois keys as SEAL saved them: index -> digits."""
    (entries,) = struct.unpack_from("<Q", body, 32)
    at = 40
    keys: dict[int, list[SavedCiphertext]] = {}
    for index in range(entries):
        (digits,) = struct.unpack_from("<Q", body, at)
        at += 8
        for _ in range(digits):
            digit, at = parse_ciphertext(body, at + _HEADER)
            keys.setdefault(index, []).append(digit)
    return keys
