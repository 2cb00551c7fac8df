"""An encrypted tail as data: parameters, layouts and a list of operations.

`Program.run` is the one reading of that list; backends supply the primitive
operations. Depth, rotations, key bytes, uplink bytes and predicted seconds
are known before any key exists.

Matrix-vector product (`MapOp`). Position s of the output, before folding,
belongs to row `rows[s]` (or to none, -1). With the input rotated by k, position
s sees element content[s + k]; the first (k, s), in that order, at which a row
sees a column carries that matrix entry, so that rows that appear at several
positions share the work between them ("hybrid diagonals": Juvekar et al.,
Gazelle, USENIX Security 2018; positions holding rotated copies of the input
turn diagonals into lanes). Rotations 0 ... offsets-1 are split into baby steps
and giant steps; giant steps run Horner-style and so need one key (Halevi and
Shoup, CRYPTO 2014, section 4.3). Then rescale, then fold: acc += rotate(acc, f)
for f in `folds`. Consumes one level; so does a square.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from blindtail.errors import BundleError, ModelError
from blindtail.he import cost, noise
from blindtail.he.layers import FloatArray
from blindtail.he.params import Parameters
from blindtail.he.spec import (
    KeyNeed,
    Layout,
    ReplyForm,
    TailSpec,
    canonical_json,
    expand_runs,
    runs,
    sha256_hex,
)

FORMAT_VERSION = 1
RELINEARISE = 0  # the Galois element no rotation has: stands for the relinearisation key


@dataclass(frozen=True, eq=False)
class MapOp:
    """One affine map; input at `level`, output at `level` - 1. Offsets and folds count positions."""

    name: str
    level: int
    weight: FloatArray  # (out, in)
    bias: FloatArray  # (out,)
    in_layout: Layout
    out_layout: Layout
    rows: NDArray[np.int32]  # (positions,)
    offsets: int
    baby: int
    folds: tuple[int, ...]
    in_scale: float
    out_scale: float

    @property
    def giant(self) -> int:
        """Number of giant steps, the first included."""
        return -(-self.offsets // self.baby)

    def plain_scale(self, parameters: Parameters) -> float:
        """target * q_level / current: the product, rescaled, lands on `out_scale` to the last bit.

        SEAL refuses to add operands whose scales differ in one. Raises `ModelError`
        when no such scale exists; `landing_scale` makes one that does.
        """
        found = leading_scale(self.in_scale, self.out_scale, parameters.primes[self.level])
        if found is None:
            raise ModelError(f"{self.name}: no plaintext scale leads to its output scale")
        return found

    @cached_property
    def diagonals(self) -> dict[int, FloatArray]:
        """Offset k -> multipliers by position; offsets with nothing to multiply are absent.

        Raises `ModelError` when some matrix entry is met by no offset.
        """
        content = self.in_layout.index
        positions = len(content)
        period = _period(content, self.rows, positions)
        rows = self.rows[:period]
        out, inner = self.weight.shape
        missing = np.ones(out * inner, bool)
        found: dict[int, FloatArray] = {}
        for k in range(self.offsets):
            seen = np.roll(content, -k)[:period]
            usable = np.flatnonzero((rows >= 0) & (seen >= 0))
            entry = rows[usable].astype(np.int64) * inner + seen[usable]
            fresh = missing[entry]
            entry, first = np.unique(entry[fresh], return_index=True)
            missing[entry] = False
            values = np.zeros(period)
            values[usable[fresh][first]] = self.weight.reshape(-1)[entry]
            if values.any():
                found[k] = np.tile(values, positions // period)
        if missing.any():
            raise ModelError(f"{self.name}: its layout leaves {int(missing.sum())} weights unused")
        return found

    def steps(self) -> Iterator[tuple[int, int, FloatArray]]:
        """(giant, baby, multipliers) with multipliers rotated back by the giant step."""
        for k, values in self.diagonals.items():
            giant, baby = divmod(k, self.baby)
            yield giant, baby, np.roll(values, giant * self.baby)

    def bias_slots(self) -> FloatArray:
        """The bias at every position that holds an element, zero elsewhere; by position."""
        index = self.out_layout.index
        return np.where(index >= 0, self.bias[np.maximum(index, 0)], 0.0)

    def rotations(self) -> dict[int, int]:
        """Rotation (in slots) -> highest level it is used at."""
        lanes, need = self.in_layout.lanes, {}
        used = {divmod(k, self.baby) for k in self.diagonals}
        for _, b in used:
            if b:
                need[b * lanes] = self.level
        if any(g for g, _ in used):
            need[self.baby * lanes] = self.level
        for f in self.folds:
            need.setdefault(f * lanes, self.level - 1)
        return need


@dataclass(frozen=True, eq=False)
class SquareOp:
    """x^2, relinearised and rescaled: `level` -> `level` - 1."""

    name: str
    level: int
    layout: Layout
    in_scale: float
    out_scale: float


def leading_scale(in_scale: float, out_scale: float, q: int) -> float | None:
    """The plaintext scale whose product with `in_scale`, rescaled by q, is `out_scale` to the last bit."""
    below = above = out_scale * q / in_scale
    for _ in range(8):
        for candidate in (below, above):
            if in_scale * candidate / q == out_scale:
                return candidate
        below, above = math.nextafter(below, 0.0), math.nextafter(above, math.inf)
    return None


def landing_scale(in_scale: float, target: float, q: int) -> float:
    """The scale next to `target` that a product with a plaintext, rescaled by q, can land on."""
    return in_scale * (target * q / in_scale) / q


Op = MapOp | SquareOp
Ct = TypeVar("Ct")


class Operations(Protocol[Ct]):
    """The primitives a backend supplies. Plaintexts are encoded by the backend beforehand."""

    def rotate(self, ct: Ct, slots: int) -> Ct: ...
    def multiply_diagonal(self, ct: Ct, op: int, giant: int, baby: int) -> Ct: ...
    def add(self, a: Ct, b: Ct) -> Ct: ...
    def add_bias(self, ct: Ct, op: int) -> Ct: ...
    def rescale(self, ct: Ct) -> Ct: ...
    def square(self, ct: Ct) -> Ct: ...


def _period(content: NDArray[np.int32], rows: NDArray[np.int32], positions: int) -> int:
    """The smallest power of two with which both repeat."""
    period = 1
    while period < positions:
        if all((a.reshape(-1, period) == a[:period]).all() for a in (content, rows)):
            return period
        period *= 2
    return positions


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
        babies = {b: operations.rotate(ct, b * lanes) if b else ct for b in {b for _, b in steps}}
        total: Ct | None = None
        for giant in reversed(range(op.giant)):
            if total is not None:
                total = operations.rotate(total, op.baby * lanes)
            for g, b in steps:
                if g == giant:
                    term = operations.multiply_diagonal(babies[b], index, g, b)
                    total = term if total is None else operations.add(total, term)
        if total is None:
            raise ModelError(f"{op.name}: every weight is zero")
        total = operations.rescale(total)
        for fold in op.folds:
            total = operations.add(total, operations.rotate(total, fold * lanes))
        return operations.add_bias(total, index)

    @property
    def depth(self) -> int:
        """Levels consumed: one a map, one a square."""
        return len(self.ops)

    @property
    def rotations(self) -> tuple[int, ...]:
        """Rotations needed, in slots, rising."""
        return tuple(sorted({s for op in self.ops if isinstance(op, MapOp) for s in op.rotations()}))

    def predicted_s(self, backend: str) -> float:
        """Server seconds of one evaluation on the reference core, from operation counts."""
        return cost.seconds(backend, self.spec, [cost.count(op) for op in self.ops])

    def error_bounds(self) -> FloatArray:
        """Bounds on the logits' errors, (lanes, outputs), each exceeded once in millions.

        A rounding error meets the secret: in one slot a product of two normal values,
        whose tail falls like exp(-sqrt(2) k) and wants 12 standard deviations. The
        average over c copies tends to normal, which wants 6: 6 (1 + 1 / sqrt(c)).
        The excess of key switching (`noise.keyswitch_peak`) sits where the giant
        steps of the last map turn it.
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

    def op_summary(self) -> list[dict[str, Any]]:
        """One row per operation, for people: levels, rotations, products, predicted seconds."""
        rows = []
        for op in self.ops:
            counts = cost.count(op)
            rows.append(
                {
                    "op": "map" if isinstance(op, MapOp) else "square",
                    "name": op.name,
                    "shape": list(op.weight.shape) if isinstance(op, MapOp) else [op.layout.size],
                    "level_in": op.level,
                    "level_out": op.level - 1,
                    "rotations": counts.rotations,
                    "products": counts.products,
                    "predicted_s": cost.seconds("seal", self.spec, [counts], request=False),
                }
            )
        return rows

    def to_parts(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """JSON structure and named float64 arrays; the inverse of `from_parts`."""
        structure, tensors = _structure(self.ops, self.spec)
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
            ops = _read_ops(structure["ops"], tensors, spec)
            program = cls(spec, ops)
            rebuilt = finish(ops, spec)
            used = set(tensors)
            expected = set(_structure(ops, spec)[1])
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
            _check_map(op)
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
        for step, at in op.rotations().items():
            element = parameters.galois_element(step)
            needs[element] = max(needs.get(element, 0), at)
    spec = replace(
        draft,
        keys=tuple(KeyNeed(element, needs[element]) for element in sorted(needs)),
        output_layout=layout,
        program_id="0" * 64,
    )
    structure, tensors = _structure(ops, spec)
    blobs = [part for name in sorted(tensors) for part in (name.encode(), tensors[name].tobytes())]
    return replace(spec, program_id=sha256_hex(canonical_json({**structure, "spec": spec.to_json()}), *blobs))


def _check_map(op: MapOp) -> None:
    """Every output position that claims an element really sums that row, each column once."""
    positions = len(op.in_layout.content)
    out, inner = op.weight.shape
    if (
        op.in_layout.size != inner
        or op.out_layout.size != out
        or op.bias.shape != (out,)
        or op.rows.shape != (positions,)
        or op.rows.min() < -1
        or op.rows.max() >= out
        or not 1 <= op.baby <= op.offsets <= positions
        or len(op.folds) > 16
        or any(not 0 < f < positions for f in op.folds)
        or not (op.in_scale > 1 and op.out_scale > 1 and np.isfinite(op.in_scale * op.out_scale))
    ):
        raise ModelError(f"{op.name}: shapes, offsets or scales contradict each other")
    if not (np.isfinite(op.weight).all() and np.isfinite(op.bias).all()):
        raise ModelError(f"{op.name}: weights hold NaN or infinity")
    # A random probe in place of the weights: an exact integer identity but for
    # coincidences of probability 2^-40, without a loop over all entries.
    rng = np.random.default_rng(20260101)
    probe = replace(op, weight=rng.integers(1, 1 << 20, op.weight.shape).astype(np.float64))
    x = np.asarray(rng.integers(1, 1 << 20, (inner,)), np.float64)
    held = op.in_layout.index
    slots = np.where(held >= 0, x[np.maximum(held, 0)], np.nan)
    total = np.zeros(positions)
    for k, values in probe.diagonals.items():
        seen: FloatArray = np.roll(slots, -k)
        used = values != 0
        total[used] += values[used] * seen[used]
    for fold in op.folds:
        total = total + np.roll(total, -fold)
    claimed = op.out_layout.index
    want = probe.weight @ x
    good = np.where(claimed >= 0, total == want[np.maximum(claimed, 0)], (claimed != -1) | (total == 0))
    if not good.all():
        raise ModelError(f"{op.name}: its layout does not compute the map")


def _structure(ops: tuple[Op, ...], spec: TailSpec) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    listed: list[dict[str, Any]] = []
    tensors: dict[str, NDArray[Any]] = {}
    for index, op in enumerate(ops):
        common = {
            "name": op.name,
            "level": op.level,
            "in_scale": op.in_scale.hex(),
            "out_scale": op.out_scale.hex(),
        }
        if isinstance(op, SquareOp):
            listed.append({"op": "square", **common})
            continue
        tensors[f"op{index}.weight"] = np.ascontiguousarray(op.weight, "<f8")
        tensors[f"op{index}.bias"] = np.ascontiguousarray(op.bias, "<f8")
        listed.append(
            {
                "op": "map",
                **common,
                "rows": runs(tuple(op.rows.tolist())),
                "offsets": op.offsets,
                "baby": op.baby,
                "folds": list(op.folds),
                "out_layout": op.out_layout.to_json(),
            }
        )
    return {"format": FORMAT_VERSION, "ops": listed}, tensors


def _read_ops(listed: list[Any], tensors: Mapping[str, NDArray[Any]], spec: TailSpec) -> tuple[Op, ...]:
    if not listed or len(listed) > 64:
        raise ModelError("a program has between 1 and 64 operations")
    ops: list[Op] = []
    layout = spec.input_layout
    for index, item in enumerate(listed):
        name, level = str(item["name"]), int(item["level"])
        scales = float.fromhex(item["in_scale"]), float.fromhex(item["out_scale"])
        if item["op"] == "square":
            ops.append(SquareOp(name, level, layout, *scales))
            continue
        if item["op"] != "map":
            raise ModelError(f"operation {item['op']!r} is unknown to this release")
        out_layout = Layout.from_json(item["out_layout"])
        ops.append(
            MapOp(
                name=name,
                level=level,
                weight=np.asarray(tensors[f"op{index}.weight"], np.float64),
                bias=np.asarray(tensors[f"op{index}.bias"], np.float64),
                in_layout=layout,
                out_layout=out_layout,
                rows=np.asarray(expand_runs(item["rows"]), np.int32),
                offsets=int(item["offsets"]),
                baby=int(item["baby"]),
                folds=tuple(int(f) for f in item["folds"]),
                in_scale=scales[0],
                out_scale=scales[1],
            )
        )
        layout = out_layout
    return tuple(ops)


__all__ = ["MapOp", "Op", "Operations", "Program", "ReplyForm", "SquareOp", "finish"]
