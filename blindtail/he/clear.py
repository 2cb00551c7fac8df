"""The `clear` backend: the same program on readable numbers, with optional CKKS-sized noise.

For tests, simulation and predicted accuracy. Its containers are of a kind of
their own, so that no other backend ever takes one, and the other way round.
Noise is Gaussian per slot with the variances of `blindtail.he.noise`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from blindtail.errors import ContainerError, KeysMissing
from blindtail.he import container, noise
from blindtail.he.backends import Evaluator, Keys, Ticket, no_ticket, write_atomically
from blindtail.he.container import Seeded
from blindtail.he.elementwise import Linear, SumOp
from blindtail.he.layers import FloatArray
from blindtail.he.layout import SlotArray
from blindtail.he.operations import turned
from blindtail.he.params import Parameters
from blindtail.he.program import Program
from blindtail.he.spec import TailSpec


@dataclass(frozen=True)
class ClearCiphertext:
    """Slot values (N/2,) with the level and scale a real ciphertext would have."""

    slots: SlotArray
    level: int
    scale: float


class ClearOperations:
    """`Operations` on `ClearCiphertext`. `rng` None = exact arithmetic."""

    def __init__(self, program: Program, rng: np.random.Generator | None = None) -> None:
        self._program, self._rng = program, rng
        self._plain: dict[tuple[int, int, int, int], SlotArray] = {}
        lanes = program.spec.lanes
        for index, op in enumerate(program.ops):
            if isinstance(op, Linear):
                for term, giant, baby, values in op.steps():
                    self._plain[index, term, giant, baby] = np.repeat(values, lanes)

    @property
    def _parameters(self) -> Parameters:
        return self._program.spec.parameters

    def fresh(self, values: FloatArray) -> list[ClearCiphertext]:
        """Encode and encrypt: (lanes, features) -> ciphertexts at the input level."""
        spec, variance = self._program.spec, noise.fresh(self._parameters)
        tiles = spec.input_layout.place(values).reshape(spec.input_ciphertexts, -1)
        return [self._noisy(slots, spec.input_level, spec.input_scale, variance) for slots in tiles]

    def _noisy(self, slots: SlotArray, level: int, scale: float, variance: float) -> ClearCiphertext:
        if self._rng is not None:
            slots = slots + self._noise(slots, np.sqrt(variance) / scale)
        return ClearCiphertext(slots, level, scale)

    def _noise(self, like: SlotArray, deviation: float) -> SlotArray:
        """In imaginary parts as well, where there are any."""
        assert self._rng is not None
        drawn = self._rng.normal(scale=deviation, size=like.shape)
        if not np.iscomplexobj(like):
            return drawn
        return drawn + 1j * self._rng.normal(scale=deviation, size=like.shape)

    def turn(self, ct: ClearCiphertext, turn: int) -> ClearCiphertext:
        return self._noisy(
            turned(ct.slots, turn), ct.level, ct.scale, noise.keyswitch(self._parameters, ct.level)
        )

    def multiply_diagonal(
        self, ct: ClearCiphertext, op: int, term: int, giant: int, baby: int
    ) -> ClearCiphertext:
        step = self._program.ops[op]
        assert isinstance(step, Linear)
        plain = step.plain_scale(self._parameters, term)
        values = self._plain[op, term, giant, baby]
        if self._rng is not None:
            values = values + self._noise(values, np.sqrt(noise.encoding(self._parameters)) / plain)
        return ClearCiphertext(ct.slots * values, ct.level, ct.scale * plain)

    def add(self, a: ClearCiphertext, b: ClearCiphertext) -> ClearCiphertext:
        _same(a, b.level, b.scale)
        return ClearCiphertext(a.slots + b.slots, a.level, a.scale)

    def add_bias(self, ct: ClearCiphertext, op: int) -> ClearCiphertext:
        step = self._program.ops[op]
        assert isinstance(step, Linear | SumOp)
        _same(ct, step.out_level, step.out_scale)
        bias = np.repeat(step.bias_slots(), self._program.spec.lanes)
        return self._noisy(ct.slots + bias, ct.level, ct.scale, noise.encoding(self._parameters))

    def rescale(self, ct: ClearCiphertext) -> ClearCiphertext:
        if ct.level < 1:
            raise ContainerError("no level is left to rescale")
        scale = ct.scale / self._parameters.primes[ct.level]
        return self._noisy(ct.slots, ct.level - 1, scale, noise.rounding(self._parameters))

    def square(self, ct: ClearCiphertext) -> ClearCiphertext:
        return self.product(ct, ct)

    def product(self, a: ClearCiphertext, b: ClearCiphertext) -> ClearCiphertext:
        if a.level != b.level:
            raise ContainerError("operands differ in level: the program is inconsistent")
        switched = noise.keyswitch(self._parameters, a.level)
        return self._noisy(a.slots * b.slots, a.level, a.scale * b.scale, switched)

    def lower(self, ct: ClearCiphertext, level: int) -> ClearCiphertext:
        if ct.level < level:
            raise ContainerError("a ciphertext cannot gain levels: the program is inconsistent")
        return replace(ct, level=level)


def _same(ct: ClearCiphertext, level: int, scale: float) -> None:
    if (ct.level, ct.scale) != (level, scale):  # to the last bit, as SEAL wants it
        raise ContainerError("operands differ in level or scale: the program is inconsistent")


class ClearEvaluator(Evaluator):
    """Runs the program on clear containers; keys are validated as for any backend, then ignored."""

    name = "clear"

    def __init__(self, program: Program, noise_seed: int | None = None) -> None:
        super().__init__(program)
        self._rng = None if noise_seed is None else np.random.default_rng(noise_seed)
        self._operations = ClearOperations(program, self._rng)

    def prepare_keys(self, source: Path, target: Path) -> int:
        for _ in container.read_keys(self.spec, container.read_key_file(self.spec, source)):
            pass
        return write_atomically(target, [bytes.fromhex(self.spec.keys_id)])

    def load_keys(self, prepared: Path) -> Keys:
        try:
            program = prepared.read_bytes()
        except OSError as error:
            raise KeysMissing("the evaluation keys are no longer stored here; upload them again") from error
        if program != bytes.fromhex(self.spec.keys_id):
            raise KeysMissing("the stored evaluation keys belong to another program; upload them again")
        return Keys(None, 0)

    def evaluate(self, keys: Keys, container_bytes: bytes, ticket: Ticket | None = None) -> bytes:
        no_ticket(self, ticket)
        spec = self.spec
        slots = container.read_clear(
            spec,
            container_bytes,
            spec.input_level,
            spec.input_scale,
            spec.input_layout.imaginary is not None,
        )
        tiles = slots.reshape(spec.input_ciphertexts, -1)
        fresh = [ClearCiphertext(tile, spec.input_level, spec.input_scale) for tile in tiles]
        done = self.program.run(self._operations, fresh)
        return container.write_clear(
            spec, np.concatenate([one.slots.real for one in done]), 0, spec.reply.scale
        )

    def logits(self, activations: FloatArray) -> FloatArray:
        """(n, features) -> (n, outputs), lane by lane through the program."""
        spec = self.spec
        x = np.atleast_2d(np.asarray(activations, np.float64))
        rows: list[NDArray[np.float64]] = []
        for start in range(0, len(x), spec.lanes):
            batch = x[start : start + spec.lanes]
            padded = np.zeros((spec.lanes, spec.features))
            padded[: len(batch)] = batch
            done = self.program.run(self._operations, self._operations.fresh(padded))
            slots = np.concatenate([self._through_reply(one.slots.real) for one in done])
            rows.append(spec.output_layout.read(slots)[: len(batch)])
        return np.concatenate(rows)

    def _through_reply(self, slots: FloatArray) -> FloatArray:
        """What a reply keeps: copies averaged, and the dropped bits of c1 as noise."""
        spec = self.spec
        if self._rng is None:
            return slots
        kept = slots.reshape(-1, spec.reply.period).mean(axis=0)
        variance = spec.reply.period * noise.truncated(spec.parameters, spec.reply.c1_dropped_bits)
        kept = kept + self._rng.normal(scale=np.sqrt(variance) / spec.reply.scale, size=kept.shape)
        return np.tile(kept, len(slots) // spec.reply.period)


class ClearEncryptor:
    """Lays an activation out in slots and encrypts nothing. Tests only."""

    def __init__(self, spec: TailSpec) -> None:
        self._spec = spec

    def encrypt(self, activation: FloatArray) -> bytes:
        """(features,) or (lanes, features) -> a clear container."""
        spec = self._spec
        slots = spec.input_layout.place(np.asarray(activation, np.float64))
        return container.write_clear(spec, slots, spec.input_level, spec.input_scale)


class ClearDecryptor:
    """Reads a clear reply. Tests only."""

    def __init__(self, spec: TailSpec) -> None:
        self._spec = spec

    def decrypt(self, container_bytes: bytes) -> FloatArray:
        """Clear container -> (outputs,), or (lanes, outputs) with more than one lane."""
        spec = self._spec
        out = spec.output_layout.read(container.read_clear(spec, container_bytes, 0, spec.reply.scale).real)
        return out[0] if spec.lanes == 1 else out


def write_clear_keys(spec: TailSpec, target: Path) -> None:
    """A well-formed key container that opens nothing (zero residues), for the `clear` backend."""
    n = spec.parameters.ring_degree

    def digits(level: int) -> Iterable[Seeded]:
        for _ in range(level + 1):
            yield Seeded(np.zeros((level + 2, n), np.uint64), bytes(container.SEED_BYTES))

    write_atomically(target, [container.write_keys(spec, (digits(need.level) for need in spec.keys))])
