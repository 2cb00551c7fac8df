"""From layers and calibration data to a `Program` whose values lie over several ciphertexts.

For tensors that one ciphertext does not hold, and for shapes that an owner asks for
(`blindtail.he.tiling` chooses them). The rest is as in `blindtail.he.compiler`: scales are
chosen by predicted noise, the same for all tiles of a value, and the noisiest logit's error
comes from the program's own derivatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from blindtail.he import plan
from blindtail.he.assemble import Builder, activated_value, applied, mapped
from blindtail.he.completion import checked, completed
from blindtail.he.elementwise import Op, ScaleOp
from blindtail.he.layers import FloatArray, Layer
from blindtail.he.layout import SlotArray
from blindtail.he.normal import Normal, normalised
from blindtail.he.objective import Objective
from blindtail.he.operations import MapOp, Term
from blindtail.he.params import Parameters
from blindtail.he.program import Program
from blindtail.he.propagation import Operand, Stats
from blindtail.he.scales import Draft
from blindtail.he.sparse import entries
from blindtail.he.tiled import TiledMap
from blindtail.he.tiles import TileShape
from blindtail.he.tiling import Tiling, choose
from blindtail.progress import Progress, Span

_UNSET = 2.0
#: Rows of calibration data that are followed slot by slot: tiles have many diagonals.
_SAMPLES = 4


def compile_tiled(
    layers: Sequence[Layer],
    calibration: FloatArray,
    *,
    objective: Objective | None = None,
    lanes: int = 1,
    ring_degree: int | None = None,
    image: Sequence[int] | None = None,
    only: Sequence[Sequence[TileShape]] | None = None,
    every: bool = False,
    progress: Progress | Span | None = None,
) -> Program:
    """Compile alternating affine maps and polynomials over as many ciphertexts as they need.

    calibration  activations at the cut, (n, features), n >= 1
    objective    what to have little of, and bounds; without it the fastest within the usual budget of keys
    lanes        independent images per ciphertext, a power of two
    ring_degree  N; without it the smallest ring that is 128-bit secure
    image        shape of the activation at the cut, (C, H, W), where the layers do not tell
    only, every  as for `tiled.choose`
    progress     told how far it is (`blindtail.progress`)

    Levels consumed: one a map, one a square. Raises `ModelError` with the way out, `NoPlan` where
    no tiling keeps the objective's bounds.
    """
    tail = normalised(layers)
    x = checked(calibration, tail.maps[0])
    parameters = Parameters.create(tail.depth, ring_degree)
    wanted = objective or plan.fastest(tail, ring_degree)
    whole = Span.of(progress)
    looking, rest = whole.parts(1, 1)
    looking.at(0.0, "tile shapes")
    found = choose(tail, parameters, wanted, image=image, lanes=lanes, every=every, only=only)
    return whole.ended(compile_tiling(tail, x, found, rest))


def compile_tiling(
    tail: Normal, calibration: FloatArray, tiling: Tiling, span: Span | None = None
) -> Program:
    """The program of a tiling that was chosen for this very tail."""
    drafting, rest = Span.of(span).parts(1, 1)
    drafting.at(0.0, "layouts of tiles")
    draft = drafted(tail, tiling, calibration, drafting)
    last = tiling.maps[-1].target
    index = last.layout.index.reshape(len(last.tiles), -1)
    period = index.shape[1]
    while (
        period > max(1, plan.REPLY_PERIOD // last.lanes) and (index == np.roll(index, period // 2, 1)).all()
    ):
        period //= 2
    return completed(
        draft,
        tiling.parameters,
        tiling.first.layout,
        last.layout,
        period * last.lanes,
        calibration,
        rest,
    )


def drafted(tail: Normal, tiling: Tiling, x: FloatArray, span: Span | None = None) -> Draft:
    """Operations at their levels, tile after tile, with statistics of calibration data x, (n, features)."""
    builder = Builder(tiling.parameters.max_level, len(tiling.first.tiles))
    held = [list(range(len(tiling.first.tiles)))]  # by value of the tail: its tiles
    ties: dict[int, int] = {}
    for index, made in enumerate(tiling.maps):
        values = [tile for value, _ in tail.sources(index) for tile in held[value]]
        level = min(builder.levels[value] for value in values)
        ops = [_map_op(tail, tiling, index, made, tile, level) for tile in range(len(made.rows))]
        results = list[int]()
        for op, met in zip(ops, made.met, strict=True):
            backs = [builder.back(value) for value in values]
            others = tuple(replace(term, back=back) for term, back in zip(op.others, backs[1:], strict=True))
            placed = replace(op, back=backs[0], others=others)
            if others:  # what `MapOp.met` would find again: all operands repeat alike
                placed.__dict__["met"] = met
            if results:
                builder.ties[len(builder.ops)] = results[0]
            results.append(builder.add(placed))
        if index < len(tail.activations):
            began = len(builder.ops)
            per_tile = []
            for tile, value in enumerate(results):
                start = len(builder.ops)
                per_tile.append(
                    activated_value(builder, tail.activations[index], made.target.tiles[tile], value)
                )
                _tie_alike(builder, began, start)
            results = per_tile
        held.append(results)
    ties.update(builder.ties)
    stats = _statistics(tail, tiling, builder.ops, x, Span.of(span))
    return Draft(tuple(builder.ops), stats, ties, len(tiling.first.tiles), len(held[-1]))


def _tie_alike(builder: Builder, began: int, start: int) -> None:
    """Multiples in a tile's activation take the scale of the first tile's: one choice for all tiles."""
    if start == began:
        return
    for at in range(start, len(builder.ops)):
        if isinstance(builder.ops[at], ScaleOp) and at not in builder.ties:
            builder.ties[at] = builder.inputs + began + (at - start)


def _map_op(tail: Normal, tiling: Tiling, index: int, made: TiledMap, tile: int, level: int) -> MapOp:
    """One tile's map, reading all tiles of its inputs; where there are no weights, with none."""
    step, split = tail.maps[index], tiling.splits[index]
    terms = []
    for layout, weight, offsets in zip(made.reads, made.blocks[tile], made.offsets[tile], strict=True):
        bound = offsets[-1] + 1 if offsets else 1
        terms.append(Term(1, weight, layout, bound, 1, _UNSET))
    first, *others = terms
    name = step.name if len(made.rows) == 1 else f"{step.name}.tile{tile}"
    return MapOp(
        name=name,
        level=level,
        weight=first.weight,
        bias=step.bias,
        in_layout=first.in_layout,
        out_layout=made.target.tiles[tile],
        rows=made.rows[tile],
        offsets=first.offsets,
        stride=1,
        baby=min(split.baby, max(term.offsets for term in terms)),
        folds=split.folds,
        in_scale=_UNSET,
        out_scale=_UNSET,
        others=tuple(others),
    )


def _statistics(
    tail: Normal, tiling: Tiling, ops: Sequence[Op], x: FloatArray, span: Span
) -> tuple[Stats, ...]:
    exact, _ = tail.values(x)
    largest = [float(np.abs(v).max()) for v in exact]
    pick = x[:: max(1, len(x) // _SAMPLES)][:_SAMPLES]
    alone = replace(tiling.first.layout, lanes=1)
    placed = np.stack([alone.place(row) for row in pick])
    held: list[SlotArray] = list(np.split(placed, len(tiling.first.tiles), axis=1))
    tiles = [number for number, made in enumerate(tiling.maps) for _ in made.rows]
    known: dict[int, float] = {}
    found: list[Stats] = []
    at = 0
    for op, part in span.over(ops):
        part.at(0.0, f"{op.name}: values")
        read = [held[len(held) - back] for back in op.backs]
        rms = [
            known.get(len(held) - back, float(np.sqrt((np.abs(v) ** 2).mean())))
            for back, v in zip(op.backs, read, strict=True)
        ]
        if isinstance(op, MapOp):
            number = tiles[at]
            at += 1
            out = mapped(op, read)
            found.append(_of_map(op, rms, out, largest[number], tiling.maps[number]))
            known[len(held)] = found[-1].rms_out
        else:
            out = applied(op, read)
            operands = tuple(Operand(r) for r in rms)
            if isinstance(op, ScaleOp):
                powers = (op.factors**2).mean(axis=1)
                operands = tuple(Operand(r, float(p), float(p), 1) for r, p in zip(rms, powers, strict=True))
            bound = float(np.abs(out).max())
            if len(op.backs) == 1 and len(found) and isinstance(ops[len(found) - 1], MapOp):
                bound = max(bound, largest[tiles[at - 1]] ** 2)
            found.append(Stats(operands, bound, float(np.sqrt((out**2).mean()))))
        held.append(out)
    return tuple(found)


def _of_map(op: MapOp, rms: Sequence[float], out: FloatArray, largest: float, made: TiledMap) -> Stats:
    used, rows = op.used, op.rows >= 0
    held = op.out_layout.index >= 0
    operands = tuple(
        Operand(
            rms_in=rms[i],
            power=float(sum((np.abs(m[rows]) ** 2).mean() for m in diagonals.values())),
            weight_power=float((entries(term.weight) ** 2).sum() / max(1, np.prod(term.weight.shape))),
            products=len(diagonals),
            baby_turns=len({b for j, _, b in used if j == i and b}),
        )
        for i, (term, diagonals) in enumerate(zip(op.terms, op.all_diagonals, strict=True))
    )
    seen = np.bincount(op.out_layout.index[held])
    return Stats(
        operands=operands,
        max_out=max(largest, float(np.abs(out).max())),
        rms_out=float(np.sqrt((out[:, held] ** 2).mean())),
        giant_turns=max((g for _, g, _ in used), default=0),
        folds=tuple((len(group), min(group) < 0) for group in op.folds),
        copies=int(seen[seen > 0].min()),
    )


__all__ = ["compile_tiled", "compile_tiling", "drafted"]
