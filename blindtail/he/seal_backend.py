"""The reference backend: SEAL through TenSEAL's `sealapi`, one thread, holding the GIL.

For loopback and trusted peers. Bytes of a peer are checked by
`blindtail.he.container`; SEAL loads only streams that this process assembled
from the checked residues.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np

from blindtail.errors import EvaluationFailed, KeysMissing
from blindtail.he import container, sealio
from blindtail.he.backends import Evaluator, Keys, Ticket, no_ticket, write_atomically
from blindtail.he.container import Seeded
from blindtail.he.elementwise import Linear, SumOp
from blindtail.he.layout import SlotArray
from blindtail.he.program import Program
from blindtail.he.sealio import U64
from blindtail.he.spec import RELINEARISE

_PREPARED = struct.Struct("<8s32sQQ")
_PREPARED_MAGIC = b"BLTSEAL1"


class SealEvaluator(Evaluator):
    """Encodes the program's diagonals once; then evaluates containers."""

    name = "seal"

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self._seal = sealio.SealContext.of(program.spec.parameters)
        api = sealio.api()
        self._evaluator = api.Evaluator(self._seal.context)
        self._plain: dict[tuple[int, int, int, int], Any] = {}
        self._bias: dict[int, Any] = {}
        for index, op in enumerate(program.ops):
            if isinstance(op, Linear):
                self._encode(index, op)
            elif isinstance(op, SumOp) and op.constant is not None:
                self._bias[index] = self._encoded(op.bias_slots(), op.level, op.scale)

    def _encode(self, index: int, op: Linear) -> None:
        for term, giant, baby, values in op.steps():
            scale = op.plain_scale(self.spec.parameters, term)
            self._plain[index, term, giant, baby] = self._encoded(values, op.level, scale)
        self._bias[index] = self._encoded(op.bias_slots(), op.out_level, op.out_scale)

    def _encoded(self, positions: SlotArray, level: int, scale: float) -> Any:
        plain = sealio.api().Plaintext()
        slots = np.repeat(positions, self.spec.lanes).tolist()
        self._seal.encoder.encode(slots, self._seal.parms_ids[level], scale, plain)
        return plain

    def prepare_keys(self, source: Path, target: Path) -> int:
        spec = self.spec
        n, top = spec.parameters.ring_degree, spec.parameters.max_level
        relin: list[tuple[int, list[list[bytes | memoryview]]]] = []
        galois: list[tuple[int, list[list[bytes | memoryview]]]] = []
        for need, digits in container.read_keys(spec, container.read_key_file(spec, source)):
            streams = [self._digit(need.level, digit) for digit in digits]
            # SEAL wants every digit; those above the key's level are never read.
            streams += [self._digit(need.level, None)] * (top + 1 - len(streams))
            if need.element == RELINEARISE:
                relin.append((0, streams))
            else:
                galois.append(((need.element - 1) // 2, streams))
        key_id = self._seal.key_parms_id
        galois.sort(key=lambda entry: entry[0])
        bodies = [
            list(sealio.keyswitch_stream(key_id, 1, iter(relin))),
            list(sealio.keyswitch_stream(key_id, n, iter(galois))),
        ]
        sizes = [sum(len(part) for part in body) for body in bodies]
        head = _PREPARED.pack(_PREPARED_MAGIC, bytes.fromhex(spec.keys_id), sizes[0] + 16, sizes[1] + 16)

        def parts() -> Iterator[bytes | memoryview]:
            yield head
            for body, size in zip(bodies, sizes, strict=True):
                yield sealio.stream_header(size)
                yield from body

        return write_atomically(target, parts())

    def _digit(self, level: int, digit: Seeded | None) -> list[bytes | memoryview]:
        """One digit as a SEAL stream: trimmed residues in their places, zeros elsewhere."""
        primes = self.spec.parameters.key_primes
        full = np.zeros((len(primes), self.spec.parameters.ring_degree), np.uint64)
        seed = bytes(sealio.SEED_BYTES)
        if digit is not None:
            full[: level + 1] = digit.c0[:-1]
            full[-1] = digit.c0[-1]
            seed = digit.seed
        return sealio.ciphertext_stream(self._seal.key_parms_id, 1.0, True, full, seed=seed)

    def load_keys(self, prepared: Path) -> Keys:
        api = sealio.api()
        try:
            with prepared.open("rb") as file:
                magic, program, relin_bytes, galois_bytes = _PREPARED.unpack(file.read(_PREPARED.size))
                if magic != _PREPARED_MAGIC or program != bytes.fromhex(self.spec.keys_id):
                    raise KeysMissing(
                        "the stored evaluation keys belong to another program; upload them again"
                    )
                relin_stream, galois_stream = file.read(relin_bytes), file.read(galois_bytes)
        except (OSError, struct.error) as error:
            raise KeysMissing("the evaluation keys are no longer stored here; upload them again") from error
        try:
            relin = sealio.load_into(api.RelinKeys(), self._seal.context, [relin_stream])
            galois = sealio.load_into(api.GaloisKeys(), self._seal.context, [galois_stream])
        except Exception as error:
            raise KeysMissing("the stored evaluation keys are damaged; upload them again") from error
        # SEAL holds c0 and c1 of every digit as 64-bit words.
        return Keys((relin, galois), 2 * (relin_bytes + galois_bytes))

    def evaluate(self, keys: Keys, container_bytes: bytes, ticket: Ticket | None = None) -> bytes:
        no_ticket(self, ticket)
        spec, api = self.spec, sealio.api()
        level, scale = self._seal.parms_ids[spec.input_level], spec.input_scale
        streams = [
            sealio.ciphertext_stream(level, scale, True, fresh.c0, seed=fresh.seed)
            for fresh in container.read_ciphertexts(spec, container_bytes)
        ]
        try:
            inputs = [sealio.load_into(api.Ciphertext(), self._seal.context, stream) for stream in streams]
            relin, galois = cast("tuple[Any, Any]", keys.material)
            results = self.program.run(_SealOperations(self, relin, galois), inputs)
            halves = [self._halves(ct) for ct in results]
        except Exception as error:
            # SEAL's messages name its internals; the log has the chain, the peer does not.
            raise EvaluationFailed("the evaluator could not run this request; register again") from error
        return container.write_reply(spec, halves)

    def _halves(self, ct: Any) -> tuple[U64, U64]:
        """c0 and c1 of a result, coefficient form, (N,) each."""
        self._evaluator.transform_from_ntt_inplace(ct)
        done, _ = sealio.parse_ciphertext(sealio.saved_members(ct))
        assert done.c1 is not None
        return done.c0[0].copy(), done.c1[0].copy()


class _SealOperations:
    """`Operations` on SEAL ciphertexts, for one client's keys."""

    def __init__(self, owner: SealEvaluator, relin: Any, galois: Any) -> None:
        self._owner, self._relin, self._galois = owner, relin, galois
        self._evaluator = owner._evaluator
        self._new = sealio.api().Ciphertext

    def turn(self, ct: Any, turn: int) -> Any:
        out = self._new()
        element = self._owner.spec.parameters.turn_element(turn)
        self._evaluator.apply_galois(ct, element, self._galois, out)
        return out

    def multiply_diagonal(self, ct: Any, op: int, term: int, giant: int, baby: int) -> Any:
        out = self._new()
        self._evaluator.multiply_plain(ct, self._owner._plain[op, term, giant, baby], out)
        return out

    def add(self, a: Any, b: Any) -> Any:
        out = self._new()
        self._evaluator.add(a, b, out)
        return out

    def add_bias(self, ct: Any, op: int) -> Any:
        out = self._new()
        self._evaluator.add_plain(ct, self._owner._bias[op], out)
        return out

    def rescale(self, ct: Any) -> Any:
        self._evaluator.rescale_to_next_inplace(ct)
        return ct

    def square(self, ct: Any) -> Any:
        out = self._new()
        self._evaluator.square(ct, out)
        self._evaluator.relinearize_inplace(out, self._relin)
        return out

    def product(self, a: Any, b: Any) -> Any:
        out = self._new()
        self._evaluator.multiply(a, b, out)
        self._evaluator.relinearize_inplace(out, self._relin)
        return out

    def lower(self, ct: Any, level: int) -> Any:
        parms_id = self._owner._seal.parms_ids[level]
        if ct.parms_id() == parms_id:
            return ct
        out = self._new()
        self._evaluator.mod_switch_to(ct, parms_id, out)
        return out


__all__ = ["SealEvaluator"]
