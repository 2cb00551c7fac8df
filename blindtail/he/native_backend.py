"""The `native` backend: our own kernels in C++ (folder native/), on SEAL's keys and ciphertexts.

Built with the package where there is a C++ compiler. Plaintexts are encoded once,
when an evaluator is made; evaluation keys are prepared once, when they arrive, and
then read in place from a mapped file. The GIL is released while it evaluates.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np

from blindtail.errors import ContainerError, EvaluationFailed, KeysMissing
from blindtail.he import container
from blindtail.he.backends import Evaluator, Keys, Ticket, settle, write_atomically
from blindtail.he.program import MapOp, Program

_PREPARED = struct.Struct("<8s32sII")
_MAGIC = b"BLTNKEY1"
#: The prepared keys begin at a page's start, so that vector loads are aligned.
_HEAD_BYTES = 4096


def available() -> bool:
    """True when the extension was built with this installation."""
    try:
        from blindtail.he import _native  # noqa: F401
    except ImportError:
        return False
    return True


class NativeEvaluator(Evaluator):
    """Evaluates one program with the native kernels.

    instructions  "avx512", "avx2" or "portable"; empty = the best this processor has
    threads       native threads for one evaluation
    word_bits     32 or 64; 0 = 32 where all primes lie within a factor of two below 2^30

    Results are the same for every choice. Raises `ConfigError` when the extension is not built.
    """

    name = "native"
    makes_tickets = True

    def __init__(
        self, program: Program, *, instructions: str = "", threads: int = 1, word_bits: int = 0
    ) -> None:
        super().__init__(program)
        settle("native")
        from blindtail.he import _native

        self._body_error = _native.BodyError
        self.threads = threads
        spec, parameters = self.spec, self.spec.parameters
        log_n = parameters.ring_degree.bit_length() - 1
        self._tail = _native.Tail(log_n, list(parameters.key_primes), instructions, word_bits)
        for op in program.ops:
            if isinstance(op, MapOp):
                self._add_map(op)
            else:
                self._tail.add_square(op.level)
        self._tail.finish(spec.reply.period, spec.reply.c1_dropped_bits)

    def _add_map(self, op: MapOp) -> None:
        lanes, parameters = op.in_layout.lanes, self.spec.parameters
        steps = list(op.steps())
        babies = sorted({baby for _, baby, _ in steps})
        giants: list[list[tuple[int, int]]] = [[] for _ in range(max(g for g, _, _ in steps) + 1)]
        for index, (giant, baby, _) in enumerate(steps):
            giants[giant].append((babies.index(baby), index))
        element = parameters.galois_element
        self._tail.add_map(
            level=op.level,
            babies=[element(b * lanes) for b in babies],
            giants=giants,
            giant=element(op.baby * lanes),
            folds=[[element(f * lanes) for f in group] for group in op.folds],
            diagonals=np.repeat(np.stack([values for *_, values in steps]), lanes, axis=1),
            plain_scale=op.plain_scale(parameters),
            bias=np.repeat(op.bias_slots(), lanes),
            bias_scale=op.out_scale,
        )

    @property
    def instructions(self) -> str:
        """The instruction set in use."""
        return str(self._tail.instructions)

    @property
    def plain_bytes(self) -> int:
        """Memory that the encoded plaintexts take."""
        return int(self._tail.plain_bytes)

    def prepare_keys(self, source: Path, target: Path) -> int:
        spec = self.spec
        body = container.key_body(spec, container.read_key_file(spec, source))

        def parts() -> Iterator[bytes | memoryview]:
            head = _PREPARED.pack(
                _MAGIC, bytes.fromhex(spec.program_id), int(self._tail.word_bits), len(spec.keys)
            )
            yield head + bytes(_HEAD_BYTES - len(head))
            at = 0
            for need in spec.keys:
                size = container.one_key_bytes(spec, need.level)
                block = np.empty(self._tail.key_bytes(need.level), np.uint8)
                try:
                    part = np.frombuffer(body[at : at + size], np.uint8)
                    self._tail.prepare_key(need.element, need.level, part, block)
                except self._body_error as error:
                    raise ContainerError(f"evaluation keys: {error}; the sender is broken") from error
                at += size
                yield block.data

        return write_atomically(target, parts())

    def load_keys(self, prepared: Path) -> Keys:
        spec = self.spec
        shapes = [(need.element, need.level) for need in spec.keys]
        size = _HEAD_BYTES + sum(self._tail.key_bytes(level) for _, level in shapes)
        try:
            with prepared.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                magic, program, bits, count = _PREPARED.unpack_from(mapped)
        except (OSError, ValueError, struct.error) as error:
            raise KeysMissing("the evaluation keys are no longer stored here; upload them again") from error
        if (magic, program) != (_MAGIC, bytes.fromhex(spec.program_id)):
            raise KeysMissing("the stored evaluation keys belong to another program; upload them again")
        if (bits, count, len(mapped)) != (self._tail.word_bits, len(shapes), size):
            raise KeysMissing("the stored evaluation keys are damaged; upload them again")
        memory = np.frombuffer(mapped, np.uint8)[_HEAD_BYTES:]
        return Keys(self._tail.load_keys(memory, shapes), size)

    def make_ticket(self, keys: Keys, seed: bytes) -> Ticket:
        """All that is linear in c1, and the first square's keyswitch: native/src/engine_ticket.cpp."""
        try:
            made = self._tail.make_ticket(cast("Any", keys.material), seed, self.threads)
        except Exception as error:
            raise EvaluationFailed("the evaluator could not make a ticket; register again") from error
        return Ticket(made, int(made.bytes))

    def evaluate(self, keys: Keys, container_bytes: bytes, ticket: Ticket | None = None) -> bytes:
        spec = self.spec
        body = np.frombuffer(container.ciphertext_body(spec, container_bytes), np.uint8)
        try:
            loaded = cast("Any", keys.material)
            reply: bytes
            if ticket is None:
                reply = self._tail.evaluate(loaded, body, self.threads)
            else:
                made = cast("Any", ticket.material)
                reply = self._tail.evaluate_ticket(loaded, body, made, self.threads)
        except self._body_error as error:
            raise ContainerError(f"an encrypted activation: {error}; the sender is broken") from error
        except Exception as error:
            raise EvaluationFailed("the evaluator could not run this request; register again") from error
        return container.seal_reply(spec, reply)


__all__ = ["NativeEvaluator", "available"]
