"""Containers: a good one is read exactly, a bad one is refused with one clear error."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blindtail.errors import ContainerError
from blindtail.he import container
from blindtail.he.clear import write_clear_keys
from blindtail.he.container import HEADER_BYTES, Seeded
from blindtail.he.packing import pack_bits, packed_bytes, unpack_bits
from blindtail.he.spec import TailSpec
from tests.he_cases import CASES, program

SPEC = program(CASES[0]).spec
N = SPEC.parameters.ring_degree


def _residues(spec: TailSpec, seed: int = 0) -> Seeded:
    rng = np.random.default_rng(seed)
    primes = spec.parameters.primes[: spec.input_level + 1]
    c0 = np.stack([rng.integers(0, p, N, dtype=np.uint64) for p in primes])
    return Seeded(c0, rng.bytes(64))


GOOD = container.write_ciphertexts(SPEC, [_residues(SPEC)])


def _resealed(data: bytes) -> bytes:
    """Correct the checksum after tampering: what a malicious peer would do."""
    prefix, body = data[: HEADER_BYTES - 32], data[HEADER_BYTES:]
    return prefix + hashlib.sha256(prefix + body).digest() + body


@given(st.integers(1, 64), st.integers(1, 300), st.integers(0, 2**32 - 1))
def test_packing_is_lossless_and_tight(width: int, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 2**64, count, dtype=np.uint64) >> np.uint64(64 - width)
    packed = pack_bits(values, width)
    assert len(packed) == packed_bytes(count, width)
    assert (unpack_bits(packed, count, width) == values).all()
    # The definition, bit by bit: value i at bits [i * width, (i + 1) * width).
    number = int.from_bytes(packed, "little")
    i = int(rng.integers(count))
    assert number >> (i * width) & ((1 << width) - 1) == int(values[i])


def test_packing_refuses_lengths_and_padding() -> None:
    packed = bytearray(pack_bits(np.arange(3, dtype=np.uint64), 7))
    with pytest.raises(ContainerError):
        unpack_bits(bytes(packed[:-1]), 3, 7)
    packed[-1] |= 0x80
    with pytest.raises(ContainerError, match="padding"):
        unpack_bits(bytes(packed), 3, 7)


def test_a_ciphertext_comes_back_bit_for_bit() -> None:
    (back,) = container.read_ciphertexts(SPEC, GOOD)
    want = _residues(SPEC)
    assert back.seed == want.seed
    assert (back.c0 == want.c0).all()
    assert len(GOOD) == SPEC.uplink_bytes
    assert container.read_ciphertexts(SPEC, memoryview(bytearray(GOOD)))[0].seed == want.seed


def test_a_reply_comes_back_to_within_the_dropped_bits() -> None:
    rng = np.random.default_rng(3)
    q0, drop = SPEC.parameters.primes[0], SPEC.reply.c1_dropped_bits
    c0, c1 = rng.integers(0, q0, (2, N), dtype=np.uint64)
    c1[0] = q0 - 1  # the cell that reaches over the modulus
    data = container.write_reply(SPEC, [(c0, c1)])
    assert len(data) == SPEC.reply_bytes
    ((back0, back1),) = container.read_reply(SPEC, data)
    stride = N // (2 * SPEC.reply.period)
    assert (back0[::stride] == c0[::stride]).all()
    off = np.ones(N, bool)
    off[::stride] = False
    assert (back0[off] == 0).all()
    error = np.abs(back1.astype(np.int64) - c1.astype(np.int64))
    assert error.max() <= 1 << (drop - 1)
    assert int(back1.max()) < q0
    assert error.max() > 1 << (drop - 2)  # the bits really are dropped


def test_keys_come_back_and_have_the_promised_size(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    write_clear_keys(SPEC, path)
    data = path.read_bytes()
    assert len(data) == SPEC.key_bytes
    read = list(container.read_keys(SPEC, data))
    assert tuple(need for need, _ in read) == SPEC.keys
    assert all(len(digits) == need.level + 1 for need, digits in read)


def _flip(data: bytes, at: int, bit: int = 0) -> bytes:
    out = bytearray(data)
    out[at] ^= 1 << bit
    return bytes(out)


def _big_residue(data: bytes) -> bytes:
    """All ones in the first residue: 2^30 - 1, above every prime."""
    out = bytearray(data)
    out[HEADER_BYTES + 64 : HEADER_BYTES + 68] = b"\xff\xff\xff\xff"
    return _resealed(bytes(out))


def _field(offset: int, fmt: str, value: object) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        out = bytearray(data)
        struct.pack_into(fmt, out, offset, value)
        return _resealed(bytes(out))

    return change


BAD: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda d: b"", "fewer than a header"),
    "header only": (lambda d: d[:HEADER_BYTES], "cut or padded"),
    "truncated": (lambda d: d[:-1], "cut or padded"),
    "oversized": (lambda d: d + b"\0", "cut or padded"),
    "other magic": (_field(0, "<4s", b"PK\x03\x04"), "not a blindtail container"),
    "other version": (_field(4, "<B", 2), "upgrade"),
    "other kind": (_field(5, "<B", container.REPLY), "expected an encrypted activation, got a reply"),
    "unknown kind": (_field(5, "<B", 77), "something unknown"),
    "clear kind": (_field(5, "<B", container.CLEAR), "got clear"),
    "other level": (_field(6, "<B", 0), "level, scale or generator"),
    "other generator": (_field(7, "<B", 2), "level, scale or generator"),
    "other scale": (_field(8, "<d", SPEC.input_scale * 2), "level, scale or generator"),
    "scale NaN": (_field(8, "<d", float("nan")), "level, scale or generator"),
    "huge length": (_field(16, "<Q", 1 << 63), "cut or padded"),
    "other program": (_field(24, "<32s", b"x" * 32), "another program"),
    "bit flipped in the body": (lambda d: _flip(d, HEADER_BYTES + 5000), "checksum"),
    "bit flipped in the seed": (lambda d: _flip(d, HEADER_BYTES + 5), "checksum"),
    "bit flipped in the hash": (lambda d: _flip(d, HEADER_BYTES - 1), "checksum"),
    "residue above its prime": (_big_residue, "not below its prime"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_ciphertexts_are_refused(name: str) -> None:
    damage, says = BAD[name]
    with pytest.raises(ContainerError, match=says):
        container.read_ciphertexts(SPEC, damage(GOOD))


def test_bad_keys_and_replies_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    spec = program(CASES[1]).spec
    write_clear_keys(spec, path)
    keys = path.read_bytes()
    for damage, says in BAD.values():
        if "expected an" in says or "something" in says or "got clear" in says:
            says = "evaluation keys"
        with pytest.raises(ContainerError, match=says):
            list(container.read_keys(spec, damage(keys)))
    other = replace(spec, keys=spec.keys[:-1])
    with pytest.raises(ContainerError, match="cut or padded"):
        list(container.read_keys(other, keys))
    reply = container.write_reply(SPEC, [(np.zeros(N, np.uint64), np.zeros(N, np.uint64))])
    with pytest.raises(ContainerError, match="not below its prime"):
        container.read_reply(SPEC, _resealed(reply[:HEADER_BYTES] + b"\xff" * 8 + reply[HEADER_BYTES + 8 :]))
    for at in (0, 30, HEADER_BYTES + 3, len(reply) - 1):
        with pytest.raises(ContainerError):
            container.read_reply(SPEC, _flip(reply, at))


@settings(max_examples=150)
@given(st.integers(0, len(GOOD) - 1), st.integers(0, 7))
def test_no_flipped_bit_goes_unnoticed(at: int, bit: int) -> None:
    with pytest.raises(ContainerError):
        container.read_ciphertexts(SPEC, _flip(GOOD, at, bit))


@settings(max_examples=100)
@given(st.binary(max_size=400))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    for read in (container.read_ciphertexts, container.read_reply):
        with pytest.raises(ContainerError):
            read(SPEC, data)
    with pytest.raises(ContainerError):
        list(container.read_keys(SPEC, data))
