"""The edge's half of the cryptography: key generation, encryption, decryption.

The one module that can hold a secret key. `cloud` and `orchestrator` must not
import it (checked by the import rules). SEAL does the cryptography; SEAL through
TenSEAL holds the GIL, so key generation belongs in a process of its own.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from blindtail.errors import ContainerError, InputError
from blindtail.he import container, sealio
from blindtail.he.backends import write_atomically
from blindtail.he.container import Seeded
from blindtail.he.layers import FloatArray
from blindtail.he.program import RELINEARISE
from blindtail.he.spec import KeyNeed, TailSpec

_FILE = struct.Struct("<8s32s32sQ")
_MAGIC = b"BLTSKEY1"
#: |value| * scale must stay below q / _HEADROOM when encrypting.
_HEADROOM = 4.0


class SecretKey:
    """A secret key for one program. Its repr shows nothing; it is never pickled.

    evaluation_sha256  SHA-256 (32 bytes) of the evaluation keys' container made with it
    """

    def __init__(self, spec: TailSpec, key: Any, evaluation_sha256: bytes) -> None:
        self.spec = spec
        self.evaluation_sha256 = evaluation_sha256
        self._key = key

    def __repr__(self) -> str:
        return "SecretKey(...)"

    def __reduce__(self) -> Any:
        raise TypeError("a secret key does not leave its process; save it with SecretKey.save")

    @classmethod
    def generate(
        cls, spec: TailSpec, evaluation_keys: Path, progress: Callable[[int, int], None] | None = None
    ) -> SecretKey:
        """A fresh key; writes the container of its evaluation keys. About 30 ms a key, GIL held.

        progress(done, total) is called after each evaluation key.
        """
        seal = sealio.SealContext.of(spec.parameters)
        generator = sealio.api().KeyGenerator(seal.context)

        def made() -> Iterator[list[Seeded]]:
            for done, need in enumerate(spec.keys, 1):
                yield _evaluation_key(generator, need)
                if progress:
                    progress(done, len(spec.keys))

        data = container.write_keys(spec, made())
        write_atomically(evaluation_keys, [data])
        return cls(spec, generator.secret_key(), hashlib.sha256(data).digest())

    def save(self, path: Path) -> None:
        """Write to `path`, mode 0600, whole or not at all."""
        body = sealio.saved_members(self._key)
        head = _FILE.pack(_MAGIC, bytes.fromhex(self.spec.program_id), self.evaluation_sha256, len(body))
        write_atomically(path, [head, hashlib.sha256(head + body).digest(), body], mode=0o600)

    @classmethod
    def load(cls, spec: TailSpec, path: Path) -> SecretKey:
        """Raises `ContainerError` when the file is damaged or belongs to another program."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ContainerError("the secret key file cannot be read; generate new keys") from error
        try:
            magic, program, evaluation, size = _FILE.unpack_from(data)
        except struct.error as error:
            raise ContainerError("the secret key file is damaged; generate new keys") from error
        body = data[_FILE.size + 32 :]
        digest = hashlib.sha256(data[: _FILE.size] + body).digest()
        if magic != _MAGIC or size != len(body) or digest != data[_FILE.size : _FILE.size + 32]:
            raise ContainerError("the secret key file is damaged; generate new keys")
        if program != bytes.fromhex(spec.program_id):
            raise ContainerError("the secret key belongs to another program; generate new keys")
        seal = sealio.SealContext.of(spec.parameters)
        try:
            key = sealio.load_into(
                sealio.api().SecretKey(), seal.context, [sealio.stream_header(len(body)), body]
            )
        except Exception as error:
            raise ContainerError("SEAL refuses the secret key file; generate new keys") from error
        return cls(spec, key, evaluation)


def _evaluation_key(generator: Any, need: KeyNeed) -> list[Seeded]:
    """One key, trimmed to the digits and primes its level uses."""
    if need.element == RELINEARISE:
        saved = sealio.saved_members(generator.create_relin_keys())
        digits = sealio.parse_keyswitch(saved)[0]
    else:
        saved = sealio.saved_members(generator.create_galois_keys([need.element]))
        digits = sealio.parse_keyswitch(saved)[(need.element - 1) // 2]
    trimmed: list[Seeded] = []
    for digit in digits[: need.level + 1]:
        assert digit.seed is not None
        rows = [*range(need.level + 1), digit.c0.shape[0] - 1]  # the special prime is last
        trimmed.append(Seeded(digit.c0[rows], digit.seed))
    return trimmed


class Encryptor:
    """Activation -> container: layout, encoding, symmetric encryption, a fresh seed each time."""

    def __init__(self, spec: TailSpec, secret: SecretKey) -> None:
        self._spec = spec
        self._seal = sealio.SealContext.of(spec.parameters)
        self._encryptor = sealio.api().Encryptor(self._seal.context, secret._key)
        modulus = 1.0
        for q in spec.parameters.primes[: spec.input_level + 1]:
            modulus *= q
        self._limit = modulus / (_HEADROOM * spec.input_scale)

    def encrypt(self, activation: FloatArray) -> bytes:
        """(features,) or (lanes, features) -> `spec.uplink_bytes` bytes at the input level.

        Raises `InputError` when a value is not finite or too large for the modulus.
        """
        spec = self._spec
        values = np.asarray(activation, np.float64)
        if not np.isfinite(values).all() or float(np.abs(values).max(initial=0.0)) > self._limit:
            raise InputError(
                "the activation at the cut is not finite or too large to encrypt; check the image"
            )
        slots = spec.input_layout.place(values)
        plain = sealio.api().Plaintext()
        self._seal.encoder.encode(
            slots.tolist(), self._seal.parms_ids[spec.input_level], spec.input_scale, plain
        )
        saved, _ = sealio.parse_ciphertext(sealio.saved_members(self._encryptor.encrypt_symmetric(plain)))
        assert saved.seed is not None
        return container.write_ciphertext(spec, Seeded(saved.c0, saved.seed))


class Decryptor:
    """Reply -> logits: restore c1's mid-points, transform, decrypt, decode, average the copies."""

    def __init__(self, spec: TailSpec, secret: SecretKey) -> None:
        self._spec = spec
        self._seal = sealio.SealContext.of(spec.parameters)
        api = sealio.api()
        self._decryptor = api.Decryptor(self._seal.context, secret._key)
        self._evaluator = api.Evaluator(self._seal.context)

    def decrypt(self, container_bytes: bytes) -> FloatArray:
        """Container -> (outputs,), or (lanes, outputs) with more than one lane.

        c0 is known on the subring alone; elsewhere it is zero here, so the slots
        hold garbage that averages to exactly nothing over each slot's copies.
        Raises `ContainerError` when the reply is not what the program sends.
        """
        spec, api = self._spec, sealio.api()
        c0, c1 = container.read_reply(spec, container_bytes)
        stream = sealio.ciphertext_stream(
            self._seal.parms_ids[0], spec.reply.scale, False, c0[None, :], c1[None, :]
        )
        ct = sealio.load_into(api.Ciphertext(), self._seal.context, stream)
        self._evaluator.transform_to_ntt_inplace(ct)
        plain = api.Plaintext()
        self._decryptor.decrypt(ct, plain)
        slots = np.asarray(self._seal.encoder.decode_double(plain))
        period = spec.reply.period
        averaged = slots.reshape(-1, period).mean(axis=0)
        out = spec.output_layout.read(np.tile(averaged, len(slots) // period))
        return out[0] if spec.lanes == 1 else out


__all__ = ["Decryptor", "Encryptor", "SecretKey"]
