"""The `native` backend: our own kernels in C++ (folder native/), on SEAL's keys and ciphertexts.

Built with the package where there is a C++ compiler. Weights are encoded once for a
folder that evaluators share, or else once for each of them; evaluation keys are
prepared once, when they arrive. Both are then read in place from mapped files. The
GIL is released while it evaluates.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict, cast

import numpy as np
from numpy.typing import NDArray

from blindtail.errors import ContainerError, EvaluationFailed, KeysMissing
from blindtail.he import container, encoded
from blindtail.he.backends import Evaluator, Keys, Ticket, settle, write_atomically
from blindtail.he.elementwise import Linear, ProductOp, SumOp
from blindtail.he.operations import MapOp, in_slots
from blindtail.he.program import Program

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


class _Plan(TypedDict):
    """What a map does, but for its weights; arguments of the native module."""

    level: int
    babies: list[int]
    inputs: list[int]
    giants: list[list[tuple[int, int]]]
    giant: int
    folds: list[list[int]]


class _Weights(TypedDict):
    """A map's weights in slots, (diagonals, N / 2) and (N / 2,), with their scales."""

    diagonals: NDArray[np.float64]
    plain_scale: float
    bias: NDArray[np.float64]
    bias_scale: float
    imaginary: NDArray[np.float64] | None  # of the diagonals


class NativeEvaluator(Evaluator):
    """Evaluates one program with the native kernels.

    instructions  "avx512", "avx2" or "portable"; empty = the best this processor has
    threads       native threads for one evaluation
    word_bits     32 or 64; 0 = 32 where all primes lie within a factor of two below 2^30
    weights       folder in which encoded weights lie as files (`blindtail.he.encoded`), shared by all
                  evaluators that are given it; it must be as private as the program. None = in memory

    Results are the same for every choice. Raises `ConfigError` when the extension is not built.
    """

    name = "native"
    makes_tickets = True

    def __init__(
        self,
        program: Program,
        *,
        instructions: str = "",
        threads: int = 1,
        word_bits: int = 0,
        weights: Path | None = None,
    ) -> None:
        super().__init__(program)
        settle("native")
        from blindtail.he import _native

        self._body_error = _native.BodyError
        self.threads = threads
        spec, parameters = self.spec, self.spec.parameters
        log_n = parameters.ring_degree.bit_length() - 1
        inputs = spec.input_ciphertexts
        self._tail = _native.Tail(log_n, list(parameters.key_primes), instructions, word_bits, inputs)
        blocks = None if weights is None else self._shared(weights)
        #: Whether weights are in a mapped file, whose memory all evaluators of this node share.
        self.shares_weights = blocks is not None
        left = iter(blocks or ())
        for index, op in enumerate(program.ops):
            sources = [inputs + index - back for back in op.backs]
            if isinstance(op, Linear):
                if blocks is not None:
                    self._tail.add_encoded_map(**self._plan(op), sources=sources, encoded=next(left))
                else:
                    self._tail.add_map(**self._plan(op), **self._weights(op), sources=sources)
            elif isinstance(op, SumOp):
                constant = None if op.constant is None else np.repeat(op.bias_slots(), spec.lanes)
                self._tail.add_sum(op.level, sources, constant, op.scale)
            elif isinstance(op, ProductOp):
                self._tail.add_product(op.level, sources)
            else:
                self._tail.add_square(op.level, sources)
        self._tail.finish(spec.reply.period, spec.reply.c1_dropped_bits, spec.output_ciphertexts)

    def _shared(self, folder: Path) -> list[encoded.Block] | None:
        maps = [op for op in self.program.ops if isinstance(op, Linear)]
        sizes = tuple(self._tail.map_bytes(op.level, sum(1 for _ in op.steps())) for op in maps)
        shape = encoded.Shape(self.program.content_id, self.word_bits, sizes)

        def encode(index: int, out: encoded.Block) -> None:
            op = maps[index]
            self._tail.encode_map(op.level, **self._weights(op), out=out)

        return encoded.shared(folder, shape, encode)

    def _plan(self, op: Linear) -> _Plan:
        lanes, element = self.spec.lanes, self.spec.parameters.turn_element
        used = op.used if isinstance(op, MapOp) else [(term, 0, 0) for term in range(len(op.backs))]
        babies = sorted({(term, baby) for term, _, baby in used})
        giants: list[list[tuple[int, int]]] = [[] for _ in range(max(g for _, g, _ in used) + 1)]
        for index, (term, giant, baby) in enumerate(used):
            giants[giant].append((babies.index((term, baby)), index))
        groups = op.folds if isinstance(op, MapOp) else ()
        return {
            "level": op.level,
            "babies": [element(b * lanes) for _, b in babies],
            "inputs": [term for term, _ in babies],
            "giants": giants,
            "giant": element(op.baby * lanes) if isinstance(op, MapOp) else 1,
            "folds": [[element(in_slots(f, lanes)) for f in group] for group in groups],
        }

    def _weights(self, op: Linear) -> _Weights:
        parameters = self.spec.parameters
        scale = op.plain_scale(parameters)
        # An operand's own scale, as a multiple of the first one's.
        rows = [values * (op.plain_scale(parameters, term) / scale) for term, *_, values in op.steps()]
        diagonals = np.repeat(np.stack(rows), self.spec.lanes, axis=1)
        return {
            "diagonals": np.ascontiguousarray(diagonals.real),
            "imaginary": np.ascontiguousarray(diagonals.imag) if np.iscomplexobj(diagonals) else None,
            "plain_scale": scale,
            "bias": np.repeat(op.bias_slots(), self.spec.lanes),
            "bias_scale": op.out_scale,
        }

    @property
    def instructions(self) -> str:
        """The instruction set in use."""
        return str(self._tail.instructions)

    @property
    def word_bits(self) -> int:
        """Of the words in use: 32 or 64."""
        return int(self._tail.word_bits)

    @property
    def plain_bytes(self) -> int:
        """Bytes of the encoded weights: memory of its own, or mapped and shared (`shares_weights`)."""
        return int(self._tail.plain_bytes)

    def prepare_keys(self, source: Path, target: Path) -> int:
        spec = self.spec
        body = container.key_body(spec, container.read_key_file(spec, source))

        def parts() -> Iterator[bytes | memoryview]:
            head = _PREPARED.pack(_MAGIC, bytes.fromhex(spec.keys_id), self.word_bits, len(spec.keys))
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
        if (magic, program) != (_MAGIC, bytes.fromhex(spec.keys_id)):
            raise KeysMissing("the stored evaluation keys belong to another program; upload them again")
        if (bits, count, len(mapped)) != (self.word_bits, len(shapes), size):
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
        self._tail.expect()  # helpers wake up while the checksum is computed
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
