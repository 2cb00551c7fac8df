"""The edge's half of the cryptography: key generation, encryption, decryption.

The one module that can hold a secret key. `cloud` and `orchestrator` must not
import it (checked by the import rules). SEAL does the cryptography; SEAL through
TenSEAL holds the GIL, so key generation belongs in a process of its own.
"""

from __future__ import annotations

import hashlib
import os
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from blindtail.errors import ContainerError, InputError, StateError
from blindtail.he import container, sealio
from blindtail.he.backends import write_atomically
from blindtail.he.container import Seeded
from blindtail.he.layers import FloatArray
from blindtail.he.sealio import U64
from blindtail.he.spec import RELINEARISE, KeyNeed, TailSpec

_FILE = struct.Struct("<8s32s32sQ")
_MAGIC = b"BLTSKEY1"


class SecretKey:
    """A secret key for one program, or one chain of segments. Its repr shows nothing; it is never pickled.

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
        head = _FILE.pack(_MAGIC, bytes.fromhex(self.spec.keys_id), self.evaluation_sha256, len(body))
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
        if program != bytes.fromhex(spec.keys_id):
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


class Ticket:
    """An encryption of zero, made ahead: it covers one message, added to its c0 later. Thread-safe.

    seed  64 bytes that expand into c1. Public like any ciphertext's: it may be announced
          before there is a message, and a cloud can do ahead what depends on c1 alone

    *One* message: two under one ticket would tell their difference to everybody who
    sees both. So c0 never leaves this object without a message, and after that one it
    is gone, in whatever thread it was asked for first. A ticket is not pickled, not
    copied and no good in another process; a file of it would be a second use in waiting.
    """

    __slots__ = ("_c0", "_lock", "_maker", "_process", "seed")

    def __init__(self, seed: bytes, c0: U64, maker: object) -> None:
        """c0: residues (primes, N) in NTT form, owned from now on; maker: who may use it."""
        self.seed = seed
        self._c0: U64 | None = c0
        self._maker, self._process = maker, os.getpid()
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return "Ticket(...)"

    def __reduce__(self) -> Any:
        raise TypeError("a ticket does not leave its process; it is good for one message")

    @property
    def used(self) -> bool:
        return self._c0 is None

    def _cover(self, maker: object, message: U64, primes: U64) -> U64:
        """c0 plus the message, by prime; the first call's alone. Raises `StateError`.

        message: residues (primes, N) in NTT form, each below its prime; primes: (primes, 1).
        """
        if maker is not self._maker or os.getpid() != self._process:
            raise StateError("this ticket is another key's or another process's; make one here")
        with self._lock:
            c0, self._c0 = self._c0, None
        if c0 is None:
            raise StateError("this ticket has covered a message; a second would reveal both: take another")
        c0 += message
        # Below twice the prime; without the subtraction's wrap-around it was below the prime.
        np.minimum(c0, c0 - primes, out=c0)
        return c0


class Encryptor:
    """Activation -> container: layout, encoding, symmetric encryption, a fresh seed each time."""

    def __init__(self, spec: TailSpec, secret: SecretKey) -> None:
        self._spec = spec
        self._seal = sealio.SealContext.of(spec.parameters)
        self._encryptor = sealio.api().Encryptor(self._seal.context, secret._key)
        self._limit = spec.largest_input
        self._primes = np.array(spec.parameters.primes[: spec.input_level + 1], np.uint64)[:, None]

    def ticket(self) -> Ticket:
        """A ticket for one later `encrypt` by this very object: (input level + 1) * N * 8 bytes.

        Raises `StateError` where an activation lies over several ciphertexts: a ticket covers one.
        """
        if self._spec.input_ciphertexts > 1:
            raise StateError("an activation of several ciphertexts has no tickets: encrypt it without one")
        parms_id = self._seal.parms_ids[self._spec.input_level]
        saved = _seeded(self._encryptor.encrypt_zero_symmetric(parms_id))
        return Ticket(saved.seed, saved.c0.copy(), self)

    def encrypt(self, activation: FloatArray, ticket: Ticket | None = None) -> bytes:
        """(features,) or (lanes, features) -> `spec.uplink_bytes` bytes at the input level.

        ticket  one that this object made; its only use. The container is one like any other:
                same format, same noise (one error polynomial and the encoding's rounding)

        Raises `InputError` when a value is not finite or too large for the modulus, and
        `StateError` for a ticket that was used or that another object made.
        """
        plain = self._encoded(activation)
        if ticket is None:
            made = [_seeded(self._encryptor.encrypt_symmetric(one)) for one in plain]
            return container.write_ciphertexts(self._spec, made)
        message = sealio.parse_plaintext(sealio.saved_members(plain[0]), len(self._primes))
        c0 = ticket._cover(self, message, self._primes)
        return container.write_ciphertexts(self._spec, [Seeded(c0, ticket.seed)])

    def _encoded(self, activation: FloatArray) -> list[Any]:
        """One plaintext for each ciphertext."""
        spec = self._spec
        values = np.asarray(activation, np.float64)
        if not np.isfinite(values).all() or float(np.abs(values).max(initial=0.0)) > self._limit:
            raise InputError(
                "the activation at the cut is not finite or too large to encrypt; check the image"
            )
        found = []
        for slots in spec.input_layout.place(values).reshape(spec.input_ciphertexts, -1):
            plain = sealio.api().Plaintext()
            parms_id = self._seal.parms_ids[spec.input_level]
            self._seal.encoder.encode(slots.tolist(), parms_id, spec.input_scale, plain)
            found.append(plain)
        return found


def _seeded(made: Any) -> Seeded:
    """What SEAL has just encrypted under the secret key: c0 (a view) and the seed."""
    saved, _ = sealio.parse_ciphertext(sealio.saved_members(made))
    assert saved.seed is not None
    return Seeded(saved.c0, saved.seed)


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
        spec = self._spec
        read = container.read_reply(spec, container_bytes)
        out = spec.output_layout.read(np.concatenate([self._slots(c0, c1) for c0, c1 in read]))
        return out[0] if spec.lanes == 1 else out

    def _slots(self, c0: U64, c1: U64) -> FloatArray:
        """Of one ciphertext, (N / 2,), copies averaged."""
        spec, api = self._spec, sealio.api()
        stream = sealio.ciphertext_stream(
            self._seal.parms_ids[0], spec.reply.scale, False, c0[None, :], c1[None, :]
        )
        ct = sealio.load_into(api.Ciphertext(), self._seal.context, stream)
        self._evaluator.transform_to_ntt_inplace(ct)
        plain = api.Plaintext()
        self._decryptor.decrypt(ct, plain)
        slots = np.asarray(self._seal.encoder.decode_double(plain))
        period = spec.reply.period
        averaged: FloatArray = slots.reshape(-1, period).mean(axis=0)
        return np.tile(averaged, len(slots) // period)


__all__ = ["Decryptor", "Encryptor", "SecretKey", "Ticket"]
