"""What calibration data says of operations: values followed slot by slot, in the order of the program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from blindtail.he.elementwise import Elementwise, Op, ProductOp, ScaleOp, SquareOp, SumOp
from blindtail.he.layers import FloatArray
from blindtail.he.layout import Layout, SlotArray
from blindtail.he.operations import MapOp, fold
from blindtail.he.propagation import Operand, Stats
from blindtail.he.sparse import entries
from blindtail.progress import Span


@dataclass(frozen=True)
class Sums:
    """Of a map: whether there are places without rows, and `Stats.copies` and `Stats.alike`.

    largest  |output| over all rows of the data
    """

    scattered: bool
    copies: int
    alike: int
    largest: float


def placed(first: Layout, x: FloatArray, samples: int, tiles: int = 1) -> list[SlotArray]:
    """Some rows of x (n, features) in slots: (samples, positions) of each ciphertext, in one lane."""
    pick = x[:: max(1, len(x) // samples)][:samples]
    alone = replace(first, lanes=1)
    return list(np.split(np.stack([alone.place(row) for row in pick]), tiles, axis=1))


def statistics(
    ops: Sequence[Op],
    inputs: Sequence[SlotArray],
    sums: Sequence[Sums],
    span: Span | None = None,
    tiles: bool = False,
) -> tuple[Stats, ...]:
    """Of each operation.

    inputs  slots of each ciphertext that goes in (`placed`)
    sums    of each map among the operations
    tiles   what a map reads straight from another is taken over places that hold something, as elsewhere
    """
    held, stats, at = list(inputs), list[Stats](), 0
    known: dict[int, float] = {}
    for op, part in Span.of(span).over(ops):
        part.at(0.0, f"{op.name}: values")
        read = [held[len(held) - back] for back in op.backs]
        rms = [float(np.sqrt((np.abs(v) ** 2).mean())) for v in read]
        if tiles or not isinstance(op, MapOp):  # over places that hold something, as their map has it
            rms = [known.get(len(held) - back, r) for back, r in zip(op.backs, rms, strict=True)]
        if isinstance(op, MapOp):
            out = mapped(op, read)
            stats.append(_of_map(op, rms, out, sums[at]))
            known[len(held)] = stats[-1].rms_out
            at += 1
        else:
            out = applied(op, read)
            operands = tuple(Operand(r) for r in rms)
            if isinstance(op, ScaleOp):
                powers = (op.factors**2).mean(axis=1)
                operands = tuple(Operand(r, float(p), float(p), 1) for r, p in zip(rms, powers, strict=True))
            bound = float(np.abs(out).max())
            if isinstance(op, SquareOp) and isinstance(ops[len(stats) - 1], MapOp):
                bound = max(bound, sums[at - 1].largest ** 2)  # of all rows; slots follow some
            stats.append(Stats(operands, bound, float(np.sqrt((out**2).mean()))))
        held.append(out)
    return tuple(stats)


def mapped(op: MapOp, read: Sequence[SlotArray]) -> FloatArray:
    """What a map gives for slots (samples, positions) of each operand, in one lane."""
    total: SlotArray | None = None
    for slots, diagonals in zip(read, op.all_diagonals, strict=True):
        part = _products(slots, diagonals)
        total = part if total is None else total + part
    assert total is not None
    out: FloatArray = fold(total, op.folds).real + op.bias_slots()
    return out


def applied(op: Elementwise, read: Sequence[FloatArray]) -> FloatArray:
    """What an operation by element gives for slots (samples, positions) of each operand, in one lane."""
    if isinstance(op, SquareOp | ProductOp):
        return read[0] * read[-1]
    if isinstance(op, SumOp):
        total = sum(read[1:], read[0])
        return total if op.constant is None else total + op.bias_slots()
    terms = [slots * values for slots, (*_, values) in zip(read, op.steps(), strict=True)]
    return sum(terms[1:], terms[0]) + op.bias_slots()


def _products(slots: SlotArray, diagonals: Mapping[int, SlotArray]) -> SlotArray:
    """Sum of multipliers times rotated slots; a sample at a time, which stays in the cache."""
    positions, rows = slots.shape[1], []
    kind = np.result_type(slots, *diagonals.values())
    product = np.empty(positions, kind)
    for sample in slots:
        twice = np.concatenate([sample, sample])
        total = np.zeros(positions, kind)
        for k, multipliers in diagonals.items():
            np.multiply(multipliers, twice[k : k + positions], out=product)
            total += product
        rows.append(total)
    return np.stack(rows)


def _of_map(op: MapOp, rms: Sequence[float], out: FloatArray, sums: Sums) -> Stats:
    used = op.used
    # Where there are empty places, noise and values of the others are what counts.
    rows: Any = op.rows >= 0 if sums.scattered else slice(None)
    held: Any = op.out_layout.index >= 0 if sums.scattered else slice(None)
    operands = tuple(
        Operand(
            rms_in=rms[i],
            power=float(sum((np.abs(m[rows]) ** 2).mean() for m in diagonals.values())),
            weight_power=float((entries(term.weight) ** 2).sum() / np.prod(term.weight.shape)),
            products=len(diagonals),
            baby_turns=len({b for j, _, b in used if j == i and b}),
        )
        for i, (term, diagonals) in enumerate(zip(op.terms, op.all_diagonals, strict=True))
    )
    return Stats(
        operands=operands,
        max_out=max(sums.largest, float(np.abs(out).max())),
        rms_out=float(np.sqrt((out[:, held] ** 2).mean())),
        giant_turns=max((g for _, g, _ in used), default=0),
        folds=tuple((len(group), min(group) < 0) for group in op.folds),
        copies=sums.copies,
        alike=sums.alike,
    )


__all__ = ["Sums", "applied", "mapped", "placed", "statistics"]
