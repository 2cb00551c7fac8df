"""Our bytes against SEAL's own: keys trimmed and rebuilt act bit for bit like the originals."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from blindtail.errors import ContainerError, InputError
from blindtail.he import container, sealio
from blindtail.he.seal_backend import SealEvaluator
from blindtail.he.secret import Decryptor, Encryptor, SecretKey
from blindtail.he.spec import RELINEARISE
from tests.he_cases import CASES, activations, program

CASE = CASES[1]
COMPILED = program(CASE)
SPEC = COMPILED.spec


def _residues(ct: Any) -> np.ndarray[Any, Any]:
    saved, _ = sealio.parse_ciphertext(sealio.saved_members(ct))
    assert saved.c1 is not None
    return np.concatenate([saved.c0, saved.c1])


def test_a_seeded_stream_of_ours_is_read_like_seals() -> None:
    seal, api = sealio.SealContext.of(SPEC.parameters), sealio.api()
    generator = api.KeyGenerator(seal.context)
    encryptor = api.Encryptor(seal.context, generator.secret_key())
    plain = api.Plaintext()
    seal.encoder.encode([0.25, -3.0], seal.parms_ids[2], 2.0**30, plain)
    fresh = encryptor.encrypt_symmetric(plain)
    with sealio.MemoryFile() as file:
        fresh.save(file.path)
        theirs = api.Ciphertext()
        theirs.load(seal.context, file.path)
    saved, end = sealio.parse_ciphertext(sealio.saved_members(fresh))
    assert end == len(sealio.saved_members(fresh))
    stream = sealio.ciphertext_stream(seal.parms_ids[2], saved.scale, True, saved.c0, seed=saved.seed)
    ours = sealio.load_into(api.Ciphertext(), seal.context, stream)
    assert (_residues(ours) == _residues(theirs)).all()


def test_trimmed_keys_act_bit_for_bit_like_whole_ones(tmp_path: Path) -> None:
    seal, api = sealio.SealContext.of(SPEC.parameters), sealio.api()
    generator = api.KeyGenerator(seal.context)
    encryptor = api.Encryptor(seal.context, generator.secret_key())
    evaluator = api.Evaluator(seal.context)
    whole: dict[int, Any] = {}
    trimmed = []
    for need in SPEC.keys:
        if need.element == RELINEARISE:
            made, index, kind = generator.create_relin_keys(), 0, api.RelinKeys
        else:
            made, index, kind = (
                generator.create_galois_keys([need.element]),
                (need.element - 1) // 2,
                api.GaloisKeys,
            )
        body = sealio.saved_members(made)
        whole[need.element] = sealio.load_into(kind(), seal.context, [sealio.stream_header(len(body)), body])
        digits = sealio.parse_keyswitch(body)[index][: need.level + 1]
        rows = [*range(need.level + 1), len(SPEC.parameters.primes)]
        trimmed.append([container.Seeded(d.c0[rows], d.seed or b"") for d in digits])
    (tmp_path / "keys").write_bytes(container.write_keys(SPEC, trimmed))
    ours = SealEvaluator(COMPILED)
    ours.prepare_keys(tmp_path / "keys", tmp_path / "prepared")
    relin, galois = cast("tuple[Any, Any]", ours.load_keys(tmp_path / "prepared").material)
    rng = np.random.default_rng(0)
    for need in SPEC.keys:
        plain, fresh, theirs, got = api.Plaintext(), api.Ciphertext(), api.Ciphertext(), api.Ciphertext()
        values = rng.normal(size=SPEC.parameters.slots).tolist()
        seal.encoder.encode(values, seal.parms_ids[need.level], 2.0**24, plain)
        encryptor.encrypt_symmetric(plain, fresh)
        if need.element == RELINEARISE:
            evaluator.square(fresh, theirs)
            evaluator.square(fresh, got)
            evaluator.relinearize_inplace(theirs, whole[need.element])
            evaluator.relinearize_inplace(got, relin)
        else:
            evaluator.apply_galois(fresh, need.element, whole[need.element], theirs)
            evaluator.apply_galois(fresh, need.element, galois, got)
        assert (_residues(got) == _residues(theirs)).all(), need


def test_the_secret_key_file_is_private_whole_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret.key"
    secret = SecretKey.generate(SPEC, tmp_path / "keys")
    secret.save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    loaded = SecretKey.load(SPEC, path)
    assert loaded.evaluation_sha256 == secret.evaluation_sha256
    assert "0x" not in repr(secret)
    assert len(repr(secret)) < 20
    with pytest.raises(TypeError, match="does not leave its process"):
        __import__("pickle").dumps(secret)
    x = activations(CASE, 1)[0]
    request = Encryptor(SPEC, loaded).encrypt(x)
    evaluator = SealEvaluator(COMPILED)
    evaluator.prepare_keys(tmp_path / "keys", tmp_path / "prepared")
    reply = evaluator.evaluate(evaluator.load_keys(tmp_path / "prepared"), request)
    a, b = Decryptor(SPEC, secret).decrypt(reply), Decryptor(SPEC, loaded).decrypt(reply)
    assert (a == b).all()
    # Under another key the logits are noise, without any error a peer could observe.
    stranger = SecretKey.generate(SPEC, tmp_path / "other")
    assert np.abs(Decryptor(SPEC, stranger).decrypt(reply) - a).max() > 1
    data = path.read_bytes()
    for bad in (b"", data[:50], data[:-1], data[:200] + bytes([data[200] ^ 1]) + data[201:]):
        path.write_bytes(bad)
        with pytest.raises(ContainerError, match="generate new keys"):
            SecretKey.load(SPEC, path)
    path.write_bytes(data)
    with pytest.raises(ContainerError, match="another program"):
        SecretKey.load(program(CASES[0]).spec, path)


def test_activations_that_cannot_be_encrypted_are_refused(tmp_path: Path) -> None:
    encryptor = Encryptor(SPEC, SecretKey.generate(SPEC, tmp_path / "keys"))
    for value in (np.nan, np.inf, 1e30):
        x = activations(CASE, 1)[0]
        x[3] = value
        with pytest.raises(InputError, match="check the image"):
            encryptor.encrypt(x)
