"""The scanner that the end-to-end leak test relies on finds every form planted, and nothing else."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import zstandard

from blindtail.he.packing import pack_bits
from tests.e2e import leakscan
from tests.e2e.leakscan import Form, Scanner, float_forms, plant, residue_forms, ternary_forms

PRIME = 1073643521  # 30 bits


def _noise(size: int, seed: int = 1) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8).tobytes()


def _forms() -> list[Form]:
    rng = np.random.default_rng(7)
    activation = np.maximum(rng.normal(size=784).astype(np.float32), 0)
    weights = rng.normal(size=(128, 96))
    secret = rng.integers(-1, 2, size=4096)
    ntt = rng.integers(0, PRIME, size=4096, dtype=np.uint64)
    return [
        *float_forms("activation", activation),
        *float_forms("weights", weights),
        *ternary_forms("secret", secret),
        *residue_forms("secret residues", (secret % PRIME).astype(np.uint64), 30),
        *residue_forms("secret ntt", ntt, 30),
    ]


FORMS = _forms()
SCANNER = Scanner(FORMS)
TRAFFIC = _noise(3_000_000)


def test_every_form_has_windows() -> None:
    assert SCANNER.covered() == {(f.secret, f.form) for f in FORMS}
    assert SCANNER.windows > 100_000


def test_noise_and_zeros_hold_nothing() -> None:
    assert SCANNER.scan(TRAFFIC) == []
    assert SCANNER.scan(bytes(100_000)) == []


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f"{f.secret}:{f.form}")
@pytest.mark.parametrize("offset", [12_345])
def test_a_planted_piece_is_found(form: Form, offset: int) -> None:
    hits = SCANNER.scan(plant(TRAFFIC[:20_000], form, offset), unpack=False)
    assert form.secret.split()[0] in {h.secret.split()[0] for h in hits}


def test_a_piece_across_two_chunks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leakscan, "_CHUNK", 1000)
    hits = SCANNER.scan(plant(TRAFFIC[:5000], FORMS[0], 995), unpack=False)
    assert "activation" in {h.secret for h in hits}


def test_the_containers_own_packing_is_found() -> None:
    """The packing that ciphertexts travel in, starting at any byte of the traffic."""
    residues = np.random.default_rng(7).integers(0, PRIME, size=4096, dtype=np.uint64)
    scanner = Scanner(residue_forms("poly", residues, 30))
    packed = pack_bits(residues, 30)
    for start in (0, 4, 100, 1000):
        assert scanner.scan(b"abc" + packed[start : start + 40] + b"xyz"), start
    assert scanner.scan(pack_bits(residues[3:90], 30))  # from another element: another bit offset


@pytest.mark.parametrize("level", [1, 4, 9])
def test_compressed_streams_are_unpacked(level: int) -> None:
    """At a level, and with a prefix, for which no compressed form was prepared."""
    data = b"header" + FORMS[0].data
    for packed in (zlib.compress(data, level), zstandard.ZstdCompressor(level=level).compress(data)):
        hits = SCANNER.scan(TRAFFIC[:1000] + packed + TRAFFIC[1000:2000])
        assert any(h.secret == "activation" and h.inside for h in hits)


def test_hits_name_the_secret_and_show_no_value() -> None:
    hits = SCANNER.scan(plant(TRAFFIC[:5000], FORMS[0], 100), unpack=False)
    text = repr(leakscan.summary(hits))
    assert "activation" in text
    assert "<f8" in text
