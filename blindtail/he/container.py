"""The one wire form of ciphertexts, replies and evaluation keys.

A container is an 88-byte header and a body, all little-endian:

    offset size
         0    4  magic "BLTC"
         4    1  format version, 1
         5    1  kind: 1 ciphertext, 2 reply, 3 evaluation keys, 4 clear (tests only)
         6    1  level (highest level of a key, for keys)
         7    1  generator that expands seeds: 1 = SEAL's Blake2xb, 0 = no seeds
         8    8  scale, binary64 (0 for keys)
        16    8  body bytes
        24   32  program id
        56   32  SHA-256 of the 56 header bytes before it and the body
        88       body

Residues are packed to the width of their prime (`blindtail.he.packing`).
Bodies, with N the ring degree and l the level:

    ciphertext  64-byte seed of c1; c0 in NTT form, primes q_0 ... q_l; so for each
                ciphertext that the activation lies over
    reply       c0, coefficients 0, N/2p, 2N/2p, ... (2p of them, p the period);
                then the N coefficients of c1 without their lowest bits; modulus q_0;
                so for each ciphertext of the result
    keys        for each key of the program, in its order, for each digit 0..l:
                64-byte seed of c1; c0 in NTT form, primes q_0 ... q_l, special

Reading checks everything before anything is used: magic, version, kind,
length, program, level, generator, scale (equal to the program's, bit for bit),
hash, every residue below its prime, padding bits zero. A container is good or
`ContainerError`; no third outcome.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from blindtail.errors import ContainerError
from blindtail.he.layout import SlotArray
from blindtail.he.packing import pack_bits, packed_bytes, unpack_bits
from blindtail.he.spec import KeyNeed, TailSpec

U64 = NDArray[np.uint64]
Buffer = bytes | bytearray | memoryview

MAGIC, VERSION = b"BLTC", 1
CIPHERTEXT, REPLY, KEYS, CLEAR = 1, 2, 3, 4
BLAKE2XB, NO_SEED = 1, 0
SEED_BYTES = 64
_PREFIX = struct.Struct("<4sBBBBdQ32s")
HEADER_BYTES = _PREFIX.size + 32
_NO_PROGRAM = "0" * 64

_KIND_NAMES = {
    CIPHERTEXT: "an encrypted activation",
    REPLY: "a reply",
    KEYS: "evaluation keys",
    CLEAR: "clear",
}


def _residue_bytes(count: int, primes: Iterable[int]) -> int:
    return sum(packed_bytes(count, p.bit_length()) for p in primes)


def _key_primes(spec: TailSpec, level: int) -> tuple[int, ...]:
    return (*spec.parameters.primes[: level + 1], spec.parameters.special)


def _digit_bytes(spec: TailSpec, level: int) -> int:
    return SEED_BYTES + _residue_bytes(spec.parameters.ring_degree, _key_primes(spec, level))


def ciphertext_bytes(spec: TailSpec) -> int:
    """Exact size of an encrypted activation's container."""
    return HEADER_BYTES + spec.input_ciphertexts * _one_ciphertext_bytes(spec)


def _one_ciphertext_bytes(spec: TailSpec) -> int:
    primes = spec.parameters.primes[: spec.input_level + 1]
    return SEED_BYTES + _residue_bytes(spec.parameters.ring_degree, primes)


def reply_bytes(spec: TailSpec) -> int:
    """Exact size of a reply's container."""
    return HEADER_BYTES + spec.output_ciphertexts * _one_reply_bytes(spec)


def _one_reply_bytes(spec: TailSpec) -> int:
    width = spec.parameters.primes[0].bit_length()
    kept = width - spec.reply.c1_dropped_bits
    return packed_bytes(2 * spec.reply.period, width) + packed_bytes(spec.parameters.ring_degree, kept)


def key_bytes(spec: TailSpec) -> int:
    """Exact size of the evaluation keys' container."""
    return HEADER_BYTES + sum(one_key_bytes(spec, k.level) for k in spec.keys)


def _seal(kind: int, level: int, generator: int, scale: float, program_id: str, body: Buffer) -> bytes:
    prefix = _PREFIX.pack(MAGIC, VERSION, kind, level, generator, scale, len(body), bytes.fromhex(program_id))
    digest = hashlib.sha256(prefix)
    digest.update(body)
    return b"".join((prefix, digest.digest(), body))


def _open(
    data: Buffer, kind: int, level: int, generator: int, scale: float, program_id: str, body_bytes: int
) -> memoryview:
    """Check everything but the residues; returns the body."""
    view = memoryview(data)
    what = _KIND_NAMES[kind]
    if len(view) < HEADER_BYTES:
        raise ContainerError(f"{what}: {len(view)} bytes are fewer than a header; send it again")
    magic, version, its_kind, its_level, its_generator, its_scale, size, program = _PREFIX.unpack_from(view)
    if magic != MAGIC:
        raise ContainerError(f"{what}: this is not a blindtail container")
    if version != VERSION:
        raise ContainerError(f"{what}: container format {version}, this release reads {VERSION}; upgrade")
    if its_kind != kind:
        got = _KIND_NAMES.get(its_kind, "something unknown")
        raise ContainerError(f"expected {what}, got {got}")
    if program != bytes.fromhex(program_id):
        raise ContainerError(
            f"{what}: made for another program (or another segment of a tail); "
            "use the edge.bt and cloud.bt of one version"
        )
    if (its_level, its_generator) != (level, generator) or struct.pack("<d", its_scale) != struct.pack(
        "<d", scale
    ):
        raise ContainerError(f"{what}: level, scale or generator differ from the program's")
    if size != body_bytes or len(view) != HEADER_BYTES + body_bytes:
        raise ContainerError(
            f"{what}: {len(view)} bytes, the program's are {HEADER_BYTES + body_bytes}; it was cut or padded"
        )
    digest = hashlib.sha256(view[: _PREFIX.size])
    digest.update(view[HEADER_BYTES:])
    if digest.digest() != bytes(view[_PREFIX.size : HEADER_BYTES]):
        raise ContainerError(f"{what}: its checksum is wrong; bytes were damaged on the way, send it again")
    return view[HEADER_BYTES:]


def _pack_residues(residues: U64, primes: Iterable[int]) -> bytes:
    return b"".join(pack_bits(row, p.bit_length()) for row, p in zip(residues, primes, strict=True))


def _unpack_residues(
    body: memoryview, at: int, n: int, primes: tuple[int, ...], what: str
) -> tuple[U64, int]:
    out = np.empty((len(primes), n), np.uint64)
    for row, p in zip(out, primes, strict=True):
        size = packed_bytes(n, p.bit_length())
        row[:] = unpack_bits(body[at : at + size], n, p.bit_length())
        if int(row.max()) >= p:
            raise ContainerError(f"{what}: a residue is not below its prime; the sender is broken")
        at += size
    return out, at


@dataclass(frozen=True)
class Seeded:
    """c0 (primes, N) in NTT form, and the seed that expands into c1."""

    c0: U64
    seed: bytes


def write_ciphertexts(spec: TailSpec, ciphertexts: Iterable[Seeded]) -> bytes:
    """One encrypted activation at the program's input level and scale: `spec.input_ciphertexts` of them."""
    primes = spec.parameters.primes[: spec.input_level + 1]
    body = b"".join(part for one in ciphertexts for part in (one.seed, _pack_residues(one.c0, primes)))
    assert HEADER_BYTES + len(body) == ciphertext_bytes(spec)
    return _seal(CIPHERTEXT, spec.input_level, BLAKE2XB, spec.input_scale, spec.program_id, body)


def ciphertext_body(spec: TailSpec, data: Buffer) -> memoryview:
    """Everything checked but the residues, for a reader that checks those itself."""
    size = ciphertext_bytes(spec) - HEADER_BYTES
    return _open(data, CIPHERTEXT, spec.input_level, BLAKE2XB, spec.input_scale, spec.program_id, size)


def read_ciphertexts(spec: TailSpec, data: Buffer) -> list[Seeded]:
    """All of an activation. Raises `ContainerError` unless `data` is exactly what the program expects."""
    body = ciphertext_body(spec, data)
    primes, n = spec.parameters.primes[: spec.input_level + 1], spec.parameters.ring_degree
    found, at = list[Seeded](), 0
    for _ in range(spec.input_ciphertexts):
        seed = bytes(body[at : at + SEED_BYTES])
        c0, at = _unpack_residues(body, at + SEED_BYTES, n, primes, _KIND_NAMES[CIPHERTEXT])
        found.append(Seeded(c0, seed))
    return found


def write_reply(spec: TailSpec, halves: Iterable[tuple[U64, U64]]) -> bytes:
    """Evaluated ciphertexts at level 0, coefficient form: c0 and c1 of each, of shape (N,)."""
    width = spec.parameters.primes[0].bit_length()
    drop = spec.reply.c1_dropped_bits
    stride = spec.parameters.ring_degree // (2 * spec.reply.period)
    return seal_reply(
        spec,
        b"".join(
            pack_bits(c0[::stride], width) + pack_bits(c1 >> np.uint64(drop), width - drop)
            for c0, c1 in halves
        ),
    )


def seal_reply(spec: TailSpec, body: Buffer) -> bytes:
    """A reply's container around a body that is already packed."""
    return _seal(REPLY, 0, NO_SEED, spec.reply.scale, spec.program_id, body)


def read_reply(spec: TailSpec, data: Buffer) -> list[tuple[U64, U64]]:
    """Each ciphertext's c0 (zero off the subring) and c1 (mid-points restored), coefficient form, (N,)."""
    body = _open(data, REPLY, 0, NO_SEED, spec.reply.scale, spec.program_id, reply_bytes(spec) - HEADER_BYTES)
    each = _one_reply_bytes(spec)
    return [_read_one_reply(spec, body[at : at + each]) for at in range(0, len(body), each)]


def _read_one_reply(spec: TailSpec, body: memoryview) -> tuple[U64, U64]:
    n, q0 = spec.parameters.ring_degree, spec.parameters.primes[0]
    width, drop = q0.bit_length(), spec.reply.c1_dropped_bits
    kept, stride = 2 * spec.reply.period, n // (2 * spec.reply.period)
    size = packed_bytes(kept, width)
    c0 = np.zeros(n, np.uint64)
    c0[::stride] = unpack_bits(body[:size], kept, width)
    c1 = unpack_bits(body[size:], n, width - drop) << np.uint64(drop)
    if int(c0.max()) >= q0 or int(c1.max()) >= q0:
        raise ContainerError("a reply: a residue is not below its prime; the sender is broken")
    if drop:
        # The mid-point of what was cut; the topmost cell may reach over q_0.
        c1 = np.minimum(c1 + np.uint64(1 << (drop - 1)) - _halves(n), np.uint64(q0 - 1))
    return c0, c1


@lru_cache(maxsize=4)
def _halves(n: int) -> U64:
    """n bits, half of them set, in no order.

    A cell's values 0 ... 2^d - 1 average 2^(d-1) - 1/2. Ignoring the half would add
    (1 + X + ... + X^(N-1)) / 2 times the secret to the message: next to nothing in most
    slots, but thousands in slot 0. Taking one from every second coefficient, at
    random, leaves an error like any other.
    """
    return np.random.default_rng(n).integers(0, 2, n, dtype=np.uint64)


def write_keys(spec: TailSpec, keys: Iterable[Iterable[Seeded]]) -> bytes:
    """`keys` in the order of `spec.keys`; digits as (level + 2, N) residues, trimmed."""
    parts: list[bytes] = []
    top = 0
    for need, digits in zip(spec.keys, keys, strict=True):
        top = max(top, need.level)
        primes = _key_primes(spec, need.level)
        for digit in digits:
            parts += [digit.seed, _pack_residues(digit.c0, primes)]
    body = b"".join(parts)
    assert HEADER_BYTES + len(body) == key_bytes(spec)
    return _seal(KEYS, top, BLAKE2XB, 0.0, spec.keys_id, body)


def read_key_file(spec: TailSpec, path: Path) -> bytes:
    """The bytes of a key container, for `read_keys`; never more than one byte too many."""
    try:
        with path.open("rb") as file:
            return file.read(key_bytes(spec) + 1)
    except OSError as error:
        raise ContainerError("evaluation keys: the file cannot be read; upload them again") from error


def one_key_bytes(spec: TailSpec, level: int) -> int:
    """Bytes of one key in the body of a key container."""
    return (level + 1) * _digit_bytes(spec, level)


def key_body(spec: TailSpec, data: Buffer) -> memoryview:
    """Everything checked but the residues, for a reader that checks those itself."""
    top = max((k.level for k in spec.keys), default=0)
    return _open(data, KEYS, top, BLAKE2XB, 0.0, spec.keys_id, key_bytes(spec) - HEADER_BYTES)


def read_keys(spec: TailSpec, data: Buffer) -> Iterator[tuple[KeyNeed, list[Seeded]]]:
    """Checked keys one by one, in the order of `spec.keys`; header and hash first."""
    body = key_body(spec, data)
    at = 0
    for need in spec.keys:
        digits: list[Seeded] = []
        for _ in range(need.level + 1):
            seed = bytes(body[at : at + SEED_BYTES])
            c0, at = _unpack_residues(
                body,
                at + SEED_BYTES,
                spec.parameters.ring_degree,
                _key_primes(spec, need.level),
                _KIND_NAMES[KEYS],
            )
            digits.append(Seeded(c0, seed))
        yield need, digits


def sample(body: Buffer) -> bytes:
    """A container of no program, which `open_sample` alone takes: for measuring what containers cost."""
    return _seal(REPLY, 0, NO_SEED, 0.0, _NO_PROGRAM, body)


def open_sample(data: Buffer) -> memoryview:
    """Checks as a request is checked."""
    return _open(data, REPLY, 0, NO_SEED, 0.0, _NO_PROGRAM, len(memoryview(data)) - HEADER_BYTES)


def write_clear(spec: TailSpec, values: SlotArray, level: int, scale: float) -> bytes:
    """Slot values in the clear, for the `clear` backend alone."""
    body = np.ascontiguousarray(values, "<c16" if np.iscomplexobj(values) else "<f8").tobytes()
    return _seal(CLEAR, level, NO_SEED, scale, spec.program_id, body)


def read_clear(spec: TailSpec, data: Buffer, level: int, scale: float, imaginary: bool = False) -> SlotArray:
    """Slot values of the activation (level > 0) or the result; complex ones if `imaginary`.

    Of all ciphertexts one after the other. Raises `ContainerError`.
    """
    layout = spec.input_layout if level else spec.output_layout
    size = layout.slots * (16 if imaginary else 8)
    body = _open(data, CLEAR, level, NO_SEED, scale, spec.program_id, size)
    values = np.frombuffer(body, "<f8").astype(np.float64)
    if not np.isfinite(values).all() or float(np.abs(values).max()) > math.ldexp(1.0, 60):
        raise ContainerError("clear: values must be finite and below 2^60")
    return values.view(np.complex128) if imaginary else values
