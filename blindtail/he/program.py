"""An encrypted tail as data: parameters, layouts and a list of operations.

`Program.run` is the one reading of that list; backends supply the primitive
operations, or read the list themselves and owe the same result. Depth,
rotations, key bytes, uplink bytes and predicted seconds are known before any
key exists. `blindtail.he.operations` says what the operations compute.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from blindtail.errors import BundleError, ModelError
from blindtail.he import cost, noise, program_file
from blindtail.he.calibration import Calibration, word_bytes
from blindtail.he.layers import FloatArray
from blindtail.he.operations import MapOp, Op, SquareOp, in_slots, landing_scale, leading_scale
from blindtail.he.program_file import FORMAT_VERSION
from blindtail.he.spec import KeyNeed, ReplyForm, TailSpec, canonical_json, sha256_hex

RELINEARISE = 0  # the Galois element no rotation has: stands for the relinearisation key

Ct = TypeVar("Ct")


class Operations(Protocol[Ct]):
    """The primitives a backend supplies. Plaintexts are encoded by the backend beforehand."""

    def turn(self, ct: Ct, turn: int) -> Ct: ...  # rotates left; ~t by t, and conjugates
    def multiply_diagonal(self, ct: Ct, op: int, giant: int, baby: int) -> Ct: ...
    def add(self, a: Ct, b: Ct) -> Ct: ...
    def add_bias(self, ct: Ct, op: int) -> Ct: ...
    def rescale(self, ct: Ct) -> Ct: ...
    def square(self, ct: Ct) -> Ct: ...


@dataclass(frozen=True, eq=False)
class Program:
    """A compiled tail, weights included: the cloud's half. Build with `compile_tail` or `from_parts`."""

    spec: TailSpec
    ops: tuple[Op, ...]

    def run(self, operations: Operations[Ct], ct: Ct) -> Ct:
        """Fresh ciphertext at the input level -> logits at level 0."""
        for index, op in enumerate(self.ops):
            if isinstance(op, MapOp):
                ct = self._run_map(operations, index, op, ct)
            else:
                ct = operations.rescale(operations.square(ct))
        return ct

    def _run_map(self, operations: Operations[Ct], index: int, op: MapOp, ct: Ct) -> Ct:
        lanes = op.in_layout.lanes
        steps = sorted({divmod(k, op.baby) for k in op.diagonals})
        babies = {b: operations.turn(ct, b * lanes) if b else ct for b in {b for _, b in steps}}
        total: Ct | None = None
        for giant in reversed(range(op.giant)):
            if total is not None:
                total = operations.turn(total, op.baby * lanes)
            for g, b in steps:
                if g == giant:
                    term = operations.multiply_diagonal(babies[b], index, g, b)
                    total = term if total is None else operations.add(total, term)
        if total is None:
            raise ModelError(f"{op.name}: every weight is zero")
        total = operations.rescale(total)
        for group in op.folds:
            held = total
            for f in group:
                total = operations.add(total, operations.turn(held, in_slots(f, lanes)))
        return operations.add_bias(total, index)

    @cached_property
    def content_id(self) -> str:
        """Its own program id, also where it answers under another one (`compatible.serving_as`)."""
        return _content_id(self.spec, self.ops)

    @property
    def depth(self) -> int:
        """Levels consumed: one a map, one a square."""
        return len(self.ops)

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
            counts = cost.count_part(self.ops, part)
            one = one if calibration is None else calibration.at(self.working_bytes(part))
        elif part == "total":
            counts = [cost.count(op, backend) for op in self.ops]
        else:
            raise ModelError(f"the backend {backend} makes no tickets")
        return cost.seconds(backend, self.spec.parameters.ring_degree, counts, one=one, part=part)

    def working_bytes(self, part: cost.Part = "total") -> int:
        """Keys, plaintexts and ticket that `native` reads (or writes) in one evaluation, or in a part."""
        ops = {"total": self.ops, "online": self.ops[2:], "ticket": self.ops[:2]}[part]
        keys: dict[int, int] = {}  # a key is read up to the level it is used at
        for op in ops:
            needs = op.rotations() if isinstance(op, MapOp) else {RELINEARISE: op.level}
            for step, level in needs.items():
                keys[step] = max(keys.get(step, 0), level)
        read = ops if part == "ticket" else self.ops
        limbs = sum(len(op.diagonals) * (op.level + 2) for op in read if isinstance(op, MapOp))
        if part != "total":
            limbs += 5 * self.ops[0].level + 5
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
        spec, lanes, last = self.spec, self.spec.lanes, self.ops[-1]
        assert isinstance(last, MapOp)
        unturned = noise.peak_shares(spec.parameters)
        turned = [np.roll(unturned, -giant * last.baby * lanes) for giant in range(last.giant)]
        share = np.sum(turned, axis=0).reshape(-1, spec.reply.period).sum(axis=0)  # over averaged copies
        excess = spec.predicted_worst_noise**2 - spec.predicted_noise**2
        sigmas = 6.0 * (1 + math.sqrt(spec.reply.period / spec.parameters.slots))
        bounds: FloatArray = sigmas * np.sqrt(spec.predicted_noise**2 + excess * share)
        return bounds[: spec.outputs * lanes].reshape(spec.outputs, lanes).T

    def op_summary(self, backend: str = "native") -> list[dict[str, Any]]:
        """One row per operation, for people: levels, rotations, products, counts and seconds on `backend`."""
        rows = []
        for op in self.ops:
            counts = cost.count(op, backend)
            row: dict[str, Any] = {
                "op": "map" if isinstance(op, MapOp) else "square",
                "name": op.name,
                "shape": list(op.weight.shape) if isinstance(op, MapOp) else [op.layout.size],
                "level_in": op.level,
                "level_out": op.level - 1,
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


def finish(ops: tuple[Op, ...], draft: TailSpec) -> TailSpec:
    """Fill in what follows from the operations: keys, output layout, program id; check the chain.

    Raises `ModelError` when levels, scales or layouts do not connect.
    """
    parameters = draft.parameters
    level, scale, layout = draft.input_level, draft.input_scale, draft.input_layout
    for op in ops:
        before = op.in_layout if isinstance(op, MapOp) else op.layout
        if op.level != level or op.in_scale != scale or before != layout or level < 1:
            raise ModelError(f"{op.name}: its level, scale or layout does not follow from what comes before")
        if isinstance(op, MapOp):
            op.check()
            op.plain_scale(parameters)
            layout = op.out_layout
        elif op.out_scale != op.in_scale * op.in_scale / parameters.primes[op.level]:
            raise ModelError(f"{op.name}: a square's scale is the input's, squared and rescaled")
        level, scale = level - 1, op.out_scale
    period = draft.reply.period // layout.lanes
    content = layout.index
    repeats = period > 0 and len(content) % period == 0 and np.array_equal(content, np.roll(content, period))
    if level != 0 or scale != draft.reply.scale or not repeats:
        raise ModelError("the last operation does not end in the reply's form")
    needs: dict[int, int] = {}
    for op in ops:
        if isinstance(op, SquareOp):
            needs[RELINEARISE] = max(needs.get(RELINEARISE, 0), op.level)
            continue
        for turn, at in op.rotations().items():
            element = parameters.turn_element(turn)
            needs[element] = max(needs.get(element, 0), at)
    spec = replace(
        draft,
        keys=tuple(KeyNeed(element, needs[element]) for element in sorted(needs)),
        output_layout=layout,
    )
    return replace(spec, program_id=_content_id(spec, ops))


def _content_id(spec: TailSpec, ops: tuple[Op, ...]) -> str:
    structure, tensors = program_file.structure(ops)
    blobs = [part for name in sorted(tensors) for part in (name.encode(), tensors[name].tobytes())]
    nameless = replace(spec, program_id="0" * 64).to_json()
    return sha256_hex(canonical_json({**structure, "spec": nameless}), *blobs)


__all__ = [
    "FORMAT_VERSION",
    "RELINEARISE",
    "MapOp",
    "Op",
    "Operations",
    "Program",
    "ReplyForm",
    "SquareOp",
    "finish",
    "landing_scale",
    "leading_scale",
]
