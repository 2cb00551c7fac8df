"""An encrypted tail as data: parameters, layouts and a list of operations.

`Program.run` is the one reading of that list; backends supply the primitive
operations, or read the list themselves and owe the same result. Depth,
rotations, key bytes, uplink bytes and predicted seconds are known before any
key exists. `blindtail.he.operations` says what the operations compute.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, reduce
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from blindtail.errors import BundleError, ModelError
from blindtail.he import cost, noise, program_file
from blindtail.he.calibration import Calibration, word_bytes
from blindtail.he.dataflow import finish, last_uses, turns
from blindtail.he.elementwise import Op, ProductOp, ScaleOp, SquareOp, SumOp
from blindtail.he.layers import FloatArray
from blindtail.he.operations import MapOp, grouped, in_slots
from blindtail.he.program_file import FORMAT_VERSION
from blindtail.he.spec import TailSpec

Ct = TypeVar("Ct")


class Operations(Protocol[Ct]):
    """The primitives a backend supplies. Plaintexts are encoded by the backend beforehand."""

    def turn(self, ct: Ct, turn: int) -> Ct: ...  # rotates left; ~t by t, and conjugates
    def multiply_diagonal(self, ct: Ct, op: int, term: int, giant: int, baby: int) -> Ct: ...
    def add(self, a: Ct, b: Ct) -> Ct: ...
    def add_bias(self, ct: Ct, op: int) -> Ct: ...  # the operation's `bias_slots`, at the ciphertext's level
    def rescale(self, ct: Ct) -> Ct: ...
    def square(self, ct: Ct) -> Ct: ...  # relinearised, like the next
    def product(self, a: Ct, b: Ct) -> Ct: ...
    def lower(self, ct: Ct, level: int) -> Ct: ...  # drops primes; the scale stays


@dataclass(frozen=True, eq=False)
class Program:
    """A compiled tail, weights included: the cloud's half. Build with `compile_tail` or `from_parts`."""

    spec: TailSpec
    ops: tuple[Op, ...]

    def run(self, operations: Operations[Ct], fresh: Sequence[Ct]) -> list[Ct]:
        """Fresh ciphertexts at the input level -> logits at level 0. Raises `ModelError` when damaged.

        As many as the activation and the logits lie over (`spec.input_ciphertexts`): mostly one and one.
        """
        values, inputs = dict(enumerate(fresh)), self.spec.input_ciphertexts
        last, groups = last_uses(self.ops, inputs), grouped(self.ops, inputs)
        if len(values) != inputs:
            raise ModelError(f"the program takes {inputs} ciphertexts, not {len(values)}")
        turned: dict[tuple[int, int], Ct] = {}
        for index, op in enumerate(self.ops):
            own = inputs + index
            if index and groups[index] != groups[index - 1]:
                turned = {}
            if any(own - back not in values for back in op.backs):
                raise ModelError(f"{op.name}: reads what is not there")
            read = [operations.lower(values[own - back], op.level) for back in op.backs]
            values[own] = self._run_op(operations, index, op, read, turned)
            for value in [v for v in values if last.get(v) == index]:
                del values[value]
        return [values[inputs + index] for index in self.results]

    def _run_op(
        self,
        operations: Operations[Ct],
        index: int,
        op: Op,
        read: list[Ct],
        turned: dict[tuple[int, int], Ct],
    ) -> Ct:
        if isinstance(op, MapOp):
            return self._run_map(operations, index, op, read, turned)
        if isinstance(op, SquareOp):
            return operations.rescale(operations.square(read[0]))
        if isinstance(op, ProductOp):
            return operations.rescale(operations.product(*read))
        if isinstance(op, SumOp):
            total = operations.add(*read) if len(read) > 1 else read[0]
            return total if op.constant is None else operations.add_bias(total, index)
        terms = [operations.multiply_diagonal(ct, index, i, 0, 0) for i, ct in enumerate(read)]
        return operations.add_bias(operations.rescale(reduce(operations.add, terms)), index)

    def _run_map(
        self,
        operations: Operations[Ct],
        index: int,
        op: MapOp,
        read: list[Ct],
        turned: dict[tuple[int, int], Ct],
    ) -> Ct:
        """turned: (operand, positions) -> the rotated operand, of maps of the same group before this one."""
        lanes = op.in_layout.lanes
        steps = sorted(op.used)
        for i, b in sorted({(i, b) for i, _, b in steps} - set(turned)):
            turned[i, b] = operations.turn(read[i], b * lanes) if b else read[i]
        babies = turned
        total: Ct | None = None
        for giant in reversed(range(op.giant)):
            if total is not None:
                total = operations.turn(total, op.baby * lanes)
            for i, g, b in steps:
                if g == giant:
                    term = operations.multiply_diagonal(babies[i, b], index, i, g, b)
                    total = term if total is None else operations.add(total, term)
        if total is None:
            raise ModelError(f"{op.name}: every weight is zero")
        total = operations.rescale(total)
        for group in op.folds:
            held = total
            for f in group:
                total = operations.add(total, operations.turn(held, in_slots(f, lanes)))
        return operations.add_bias(total, index)

    @property
    def results(self) -> range:
        """The operations whose results are the logits' ciphertexts, in their order."""
        return range(len(self.ops) - self.spec.output_ciphertexts, len(self.ops))

    @property
    def is_chain(self) -> bool:
        """Maps of one operand and squares in turns, each of the value before, in one ciphertext each."""
        if self.spec.input_ciphertexts > 1 or self.spec.output_ciphertexts > 1:
            return False
        return all(
            op.backs == (1,) and isinstance(op, SquareOp if i % 2 else MapOp) for i, op in enumerate(self.ops)
        )

    @cached_property
    def content_id(self) -> str:
        """Its own program id, also where it answers under another one (`compatible.serving_as`)."""
        return program_file.content_id(self.spec, self.ops)

    @property
    def depth(self) -> int:
        """Levels consumed, on the longest way through: one a map, one a square."""
        return self.spec.input_level

    @property
    def rotations(self) -> tuple[int, ...]:
        """Turns needed, in slots, rising; a negative one, ~t, conjugates as well."""
        return tuple(sorted({s for op in self.ops if isinstance(op, MapOp) for s in op.rotations()}))

    def predicted_s(
        self, backend: str, calibration: Calibration | None = None, part: cost.Part = "total"
    ) -> float:
        """Server seconds from operation counts: of one evaluation, of what a ticket leaves of it
        ("online"), or of making a ticket; on the reference core, or where `native` was calibrated.

        Raises `ModelError` for a part that the backend does not have.
        """
        one = cost.reference(backend)
        if backend == "native":
            if not self.is_chain:
                # A ticket then holds the expanded seed alone.
                counts = [] if part == "ticket" else self._counts(backend)
            else:
                counts = cost.count_part(self.ops, part)
            one = one if calibration is None else calibration.at(self.working_bytes(part))
        elif part == "total":
            counts = self._counts(backend)
        else:
            raise ModelError(f"the backend {backend} makes no tickets")
        found = cost.seconds(backend, self.spec.parameters.ring_degree, counts, one=one, part=part)
        # Each ciphertext of the activation has a seed of its own to expand.
        more = 0 if part == "online" else self.spec.input_ciphertexts - 1
        return found + more * one.expand_s * self.spec.parameters.ring_degree / 8192

    def _counts(self, backend: str) -> list[cost.Counts]:
        return cost.counted(self.ops, self.spec.input_ciphertexts, backend)

    def working_bytes(self, part: cost.Part = "total") -> int:
        """Keys, plaintexts and ticket that `native` reads (or writes) in one evaluation, or in a part."""
        ops = {"total": self.ops, "online": self.ops[2:], "ticket": self.ops[:2]}[part]
        if not self.is_chain:
            ops = () if part == "ticket" else self.ops
        keys: dict[int, int] = {}  # a key is read up to the level it is used at
        for op in ops:
            for step, level in turns(op).items():
                keys[step] = max(keys.get(step, 0), level)
        read = ops if part == "ticket" else self.ops
        limbs = sum(_products(op) * (op.level + 2) for op in read)
        if part != "total":
            limbs += 5 * self.spec.input_level + 5
        limbs += sum(2 * (level + 2) * (level + 1) for level in keys.values())
        parameters = self.spec.parameters
        return limbs * parameters.ring_degree * word_bytes(parameters)

    def error_bounds(self) -> FloatArray:
        """Bounds on the logits' errors, (lanes, outputs), each exceeded once in millions.

        A rounding error meets the secret: in one slot a product of two normal values,
        whose tail falls like exp(-sqrt(2) k) and wants 12 standard deviations. The
        average over c copies tends to normal, which wants 6: 6 (1 + 1 / sqrt(c)).
        The excess of key switching (`noise.keyswitch_peak`) sits where the giant
        steps of the last map turn it.

        Variances are those of `seal`, and `native` stays below them step by step. With
        k digits, P as large as the primes and s = `params.ERROR_STD`, a key switch of
        `seal` has coefficient variance k N s^2 / 3 from digits and N / 18 from dividing
        by P: 3.4 k N and 0.06 N. On `native`,

        - hoisted digits are centred: a quarter of the first, and no excess in any slot;
        - baby steps are not divided by P on their own, so their N / 18 is gone; a map is
          divided by P and q_level at once, where the first rounding is q_level times
          smaller than the second, which `seal` has as well;
        - a giant step divides c1 alone, and fold groups after the first do: N / 18 each,
          as on `seal`. The m rotations of such a group share that rounding. Averaged over
          copies it may add up m-fold, to m^2 N / 18; `seal` has m (3.4 k + 0.06) N, and
          `native` m 0.9 k N + 0.06 m^2 N, which is less up to m = 46;
        - folding ends in one division by P, `seal`'s in one a rotation;
        - single rotations and relinearisations are as on `seal`, excess included.
        """
        spec, lanes, period = self.spec, self.spec.lanes, self.spec.reply.period
        excess = spec.predicted_worst_noise**2 - spec.predicted_noise**2
        sigmas = 6.0 * (1 + math.sqrt(period / spec.parameters.slots))
        unturned = noise.peak_shares(spec.parameters)
        found = np.zeros((spec.outputs, lanes))
        for index in self.results:
            last = self.ops[index]
            assert isinstance(last, MapOp)
            turned = [np.roll(unturned, -giant * last.baby * lanes) for giant in range(last.giant)]
            share = np.sum(turned, axis=0).reshape(-1, period).sum(axis=0)  # over averaged copies
            bounds = sigmas * np.sqrt(spec.predicted_noise**2 + excess * share)
            held = last.out_layout.index[: period // lanes]
            places = np.flatnonzero(held >= 0)
            np.maximum.at(found, held[places], bounds.reshape(-1, lanes)[places])
        return found.T

    def op_summary(self, backend: str = "native") -> list[dict[str, Any]]:
        """One row per operation, for people: levels, rotations, products, counts and seconds on `backend`."""
        rows = []
        for op, counts in zip(self.ops, self._counts(backend), strict=True):
            row: dict[str, Any] = {
                "op": program_file.KINDS[type(op)],
                "name": op.name,
                "shape": list(op.weight.shape) if isinstance(op, MapOp) else [op.layout.size],
                "operands": len(op.backs),
                "level_in": op.level,
                "level_out": op.out_level,
                **asdict(counts),
                "predicted_s": cost.seconds(
                    backend, self.spec.parameters.ring_degree, [counts], request=False
                ),
            }
            if isinstance(op, MapOp):
                row.update(baby=op.baby, giant=op.giant, folds=[list(group) for group in op.folds])
            rows.append(row)
        return rows

    def to_parts(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """JSON structure and named float64 arrays; the inverse of `from_parts`."""
        structure, tensors = program_file.structure(self.ops)
        return {**structure, "spec": self.spec.to_json()}, tensors

    @classmethod
    def from_parts(cls, structure: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> Program:
        """Rebuild and check in full. Raises `BundleError` when anything is off."""
        try:
            if structure["format"] != FORMAT_VERSION:
                raise BundleError(
                    f"program format {structure['format']}, this release reads {FORMAT_VERSION}: "
                    "compile the model again"
                )
            spec = TailSpec.from_json(structure["spec"])
            ops = program_file.read_ops(structure["ops"], tensors, spec)
            program = cls(spec, ops)
            rebuilt = finish(ops, spec)
            used = set(tensors)
            expected = set(program_file.structure(ops)[1])
            if rebuilt != spec or used != expected:
                raise ModelError("its description does not follow from its operations")
        except BundleError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError, ModelError) as error:
            raise BundleError(f"the program is damaged ({error}): compile the model again") from error
        return program


def _products(op: Op) -> int:
    """With plaintexts."""
    if isinstance(op, MapOp):
        return len(op.used)
    return len(op.backs) if isinstance(op, ScaleOp) else 0


__all__ = ["Operations", "Program"]
