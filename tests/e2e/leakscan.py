"""Search recorded traffic for values that must never be sent.

Every secret array is written in each form it could travel in: float64 and
float32 of both byte orders, integer words of several widths, residues
bit-packed at a prime's width at all eight bit offsets, and zlib- and
zstd-compressed copies of those. Every window of every form is looked for at
every offset of the traffic through a rolling hash, and each hit is confirmed byte
by byte. Compressed streams found in the traffic are unpacked and searched too.

A window has enough information not to occur by chance: 8 bytes of high-entropy
forms; long windows for low-entropy ones (ternary keys). Windows that are nearly
constant (runs of zeros) are not looked for, as they occur everywhere.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import zstandard
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Hashes = NDArray[np.uint64]

_BASE = 0x9E3779B97F4A7C15 | 1  # odd, so that it has an inverse modulo 2^64
_INVERSE = pow(_BASE, -1, 1 << 64)
_CHUNK = 2_000_000
_MAX_UNPACKED = 64_000_000
#: Of large forms every fourth window is looked for: three bytes more are then needed for a find.
_LARGE, _STRIDE = 100_000, 4
_SIEVE_BITS = 26
_COMPRESSED_HEADER = 16  # a frame's first bytes are the same for any content


@dataclass(frozen=True)
class Form:
    """One way a secret could be written: its bytes and the window to look for."""

    secret: str
    form: str
    data: bytes
    window: int


@dataclass(frozen=True)
class Hit:
    secret: str
    form: str
    offset: int  # in the traffic, or in the unpacked stream named by `inside`
    inside: str = ""


def float_forms(secret: str, values: NDArray[np.floating]) -> list[Form]:
    """Forms of real values (activations, weights, logits), any shape."""
    flat = np.asarray(values, np.float64).reshape(-1)
    forms = [Form(secret, dtype, flat.astype(dtype).tobytes(), 8) for dtype in ("<f8", ">f8", "<f4", ">f4")]
    return forms + _compressed(secret, forms)


def residue_forms(secret: str, residues: NDArray[np.uint64], width: int) -> list[Form]:
    """Forms of one polynomial's residues modulo a prime of `width` bits, shape (N,)."""
    flat = np.asarray(residues, np.uint64).reshape(-1)
    # A residue of a small polynomial in coefficient form is 0, 1 or p - 1.
    ternary = len(np.unique(flat)) <= 8
    forms = []
    for dtype in ("<u8", "<u4") if width <= 32 else ("<u8",):
        size = np.dtype(dtype).itemsize
        forms.append(Form(secret, dtype, flat.astype(dtype).tobytes(), 96 * size if ternary else 2 * size))
    raw = list(forms)
    bits = ((flat[:, None] >> np.arange(width, dtype=np.uint64)) & np.uint64(1)).astype(np.uint8).reshape(-1)
    for shift in range(8):
        packed = np.packbits(bits[shift:], bitorder="little").tobytes()
        window = 96 * width // 8 if ternary else 8
        forms.append(Form(secret, f"packed{width}>>{shift}", packed, window))
    return forms + _compressed(secret, [*raw, forms[len(raw)]])


def ternary_forms(secret: str, values: NDArray[np.integer]) -> list[Form]:
    """Forms of coefficients in {-1, 0, 1}, shape (N,)."""
    flat = np.asarray(values).reshape(-1)
    forms = [
        Form(secret, dtype, flat.astype(dtype).tobytes(), 96 * np.dtype(dtype).itemsize)
        for dtype in ("<i1", "<i4", "<i8", "<f8")
    ]
    two_bits = (flat % 3).astype(np.uint8)
    bits = np.stack([two_bits & 1, two_bits >> 1], axis=1).reshape(-1)
    for shift in range(8):
        packed = np.packbits(bits[shift:], bitorder="little").tobytes()
        forms.append(Form(secret, f"packed2>>{shift}", packed, 24))
    return forms + _compressed(secret, forms[:1])


def _compressed(secret: str, forms: list[Form]) -> list[Form]:
    found = []
    for form in forms:
        for level in (1, 6, 9):
            data = zlib.compress(form.data, level)[_COMPRESSED_HEADER:]
            found.append(Form(secret, f"zlib{level}({form.form})", data, 12))
        for level in (1, 3, 19):
            data = zstandard.ZstdCompressor(level=level).compress(form.data)[_COMPRESSED_HEADER:]
            found.append(Form(secret, f"zstd{level}({form.form})", data, 12))
    return found


class Scanner:
    """Looks for many forms at once. Build once, scan any number of recordings."""

    def __init__(self, forms: list[Form]) -> None:
        self._forms = forms
        self._tables: dict[int, tuple[Hashes, NDArray[np.int64], NDArray[np.bool_]]] = {}
        by_window: dict[int, list[int]] = {}
        for i, form in enumerate(forms):
            by_window.setdefault(form.window, []).append(i)
        for window, members in by_window.items():
            hashes, places = [], []
            for i in members:
                data = np.frombuffer(forms[i].data, np.uint8)
                if len(data) < window:
                    continue
                keep = np.flatnonzero(_informative(data, window))
                if len(data) > _LARGE:
                    keep = keep[keep % _STRIDE == 0]
                hashes.append(_window_hashes(data, window)[keep])
                places.append(keep + (i << 40))
            if not hashes:
                continue
            every, where = np.concatenate(hashes), np.concatenate(places)
            order = np.argsort(every, kind="stable")
            known = np.zeros(1 << _SIEVE_BITS, np.bool_)
            known[_sieve(every)] = True
            self._tables[window] = every[order], where[order], known

    @property
    def windows(self) -> int:
        """How many windows are looked for; 0 would make a scan meaningless."""
        return sum(len(hashes) for hashes, _, _ in self._tables.values())

    def covered(self) -> set[tuple[str, str]]:
        """(secret, form) pairs that have at least one window to look for."""
        members = {int(i) for _, places, _ in self._tables.values() for i in np.unique(places >> 40)}
        return {(self._forms[i].secret, self._forms[i].form) for i in members}

    def scan(self, traffic: bytes, *, unpack: bool = True) -> list[Hit]:
        """All forms found in `traffic`, one hit each, unpacked streams included."""
        hits = list(self._scan(traffic, ""))
        if unpack:
            for name, content in _streams(traffic):
                hits.extend(self._scan(content, name))
        return hits

    def _scan(self, traffic: bytes, inside: str) -> Iterator[Hit]:
        seen: set[int] = set()
        for start in range(0, len(traffic), _CHUNK):
            for window, (hashes, places, known) in self._tables.items():
                chunk = np.frombuffer(traffic[start : start + _CHUNK + window - 1], np.uint8)
                if len(chunk) < window:
                    continue
                found = _window_hashes(chunk, window)
                # Few pass the sieve, and only they are worth a search.
                passed = np.flatnonzero(known[_sieve(found)])
                at = np.searchsorted(hashes, found[passed])
                at[at == len(hashes)] = 0
                for i in np.flatnonzero(hashes[at] == found[passed]):
                    offset = passed[i]
                    index, place = divmod(int(places[at[i]]), 1 << 40)
                    want = self._forms[index].data[place : place + window]
                    if index not in seen and chunk[offset : offset + window].tobytes() == want:
                        seen.add(index)
                        yield Hit(
                            self._forms[index].secret, self._forms[index].form, start + int(offset), inside
                        )


def _sieve(hashes: Hashes) -> Hashes:
    """A place in the sieve for each hash: high bits of a product, since bytes are no good hash."""
    return (hashes * np.uint64(_BASE)) >> np.uint64(64 - _SIEVE_BITS)


def _powers(base: int, count: int) -> Hashes:
    """1, base, base^2, ... modulo 2^64, by doubling."""
    out = np.ones(1, np.uint64)
    while len(out) < count:
        step = np.uint64(pow(base, len(out), 1 << 64))
        out = np.concatenate([out, out * step])
    return out[:count]


def _window_hashes(data: Bytes, window: int) -> Hashes:
    """A hash of data[i : i + window] for every i, modulo 2^64: shape (len - window + 1,)."""
    count = len(data) - window + 1
    if window == 8:  # the bytes themselves are the hash
        words = np.zeros(count, np.uint64)
        for i in range(8):
            words |= data[i : i + count].astype(np.uint64) << np.uint64(8 * i)
        return words
    terms = (data.astype(np.uint64) + np.uint64(1)) * _powers(_BASE, len(data))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(terms, dtype=np.uint64)])
    return (sums[window:] - sums[:count]) * _powers(_INVERSE, count)


def _informative(data: Bytes, window: int) -> NDArray[np.bool_]:
    """Which windows are worth looking for: enough different neighbours, not a run of zeros."""
    count = len(data) - window + 1
    changes = np.concatenate([[0], np.cumsum(data[1:] != data[:-1])])
    total = changes[window - 1 : window - 1 + count] - changes[:count]
    if window > 64:
        return np.asarray(total >= 32)
    nonzero = np.concatenate([[0], np.cumsum(data != 0)])
    filled = nonzero[window : window + count] - nonzero[:count]
    return np.asarray((total >= min(5, window - 1)) & (filled >= min(5, window)))


def _streams(traffic: bytes) -> Iterator[tuple[str, bytes]]:
    """Contents of every zlib or zstd stream that starts anywhere in the traffic."""
    for magic, name in (
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"\x78\x01", "zlib"),
        (b"\x78\x5e", "zlib"),
        (b"\x78\x9c", "zlib"),
        (b"\x78\xda", "zlib"),
    ):
        at = traffic.find(magic)
        while at >= 0:
            content = _unpack(name, traffic[at : at + _MAX_UNPACKED])
            if len(content) >= 8:
                yield f"{name} stream at byte {at}", content
            at = traffic.find(magic, at + 1)


def _unpack(name: str, data: bytes) -> bytes:
    """As much as can be unpacked; a stream by chance ends at its first error."""
    out = bytearray()
    unpacker = zstandard.ZstdDecompressor().decompressobj() if name == "zstd" else zlib.decompressobj()
    try:
        for start in range(0, len(data), 4096):
            out += unpacker.decompress(data[start : start + 4096])
            if len(out) > _MAX_UNPACKED or getattr(unpacker, "eof", False):
                break
    except (zlib.error, zstandard.ZstdError):
        pass
    return bytes(out)


def plant(traffic: bytes, form: Form, offset: int) -> bytes:
    """`traffic` with four windows of `form` written over it: a positive control."""
    data = np.frombuffer(form.data, np.uint8)
    keep = np.flatnonzero(_informative(data, form.window))
    start = int(keep[len(keep) // 2])
    piece = form.data[start : start + 4 * form.window]
    return traffic[:offset] + piece + traffic[offset + len(piece) :]


def summary(hits: list[Hit]) -> Mapping[str, list[str]]:
    """Secret -> forms found, for an assertion message that shows no value."""
    out: dict[str, list[str]] = {}
    for hit in hits:
        out.setdefault(hit.secret, []).append(f"{hit.form} at {hit.inside or 'byte'} {hit.offset}")
    return out
