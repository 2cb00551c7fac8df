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
from blindtail.he.assemble import Builder, activated_value
from blindtail.he.completion import checked, completed
from blindtail.he.elementwise import Op, ScaleOp
from blindtail.he.followed import Sums, placed, statistics
from blindtail.he.layers import FloatArray, Layer
from blindtail.he.normal import Normal, normalised
from blindtail.he.objective import Objective
from blindtail.he.operations import MapOp, Term
from blindtail.he.params import Parameters
from blindtail.he.program import Program
from blindtail.he.scales import Draft
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
    found = choose(tail, parameters, wanted, image=image, lanes=lanes, every=every, only=only, span=looking)
    return whole.ended(compile_tiling(tail, x, found, rest))


def compile_tiling(
    tail: Normal, calibration: FloatArray, tiling: Tiling, span: Span | None = None
) -> Program:
    """The program of a tiling that was chosen for this very tail."""
    return compile_tiling_with_error(tail, calibration, tiling, span)[0]


def compile_tiling_with_error(
    tail: Normal, calibration: FloatArray, tiling: Tiling, span: Span | None = None
) -> tuple[Program, float]:
    """And the standard deviation of a logit on `native`, in the noisiest slot."""
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
    for index, made in enumerate(tiling.maps):
        values = [tile for value, _ in tail.sources(index) for tile in held[value]]
        level = min(builder.levels[value] for value in values)
        ops = [_map_op(tail, tiling, index, made, tile, level) for tile in range(len(made.rows))]
        results = list[int]()
        for op, met in zip(ops, made.met, strict=True):
            backs = [builder.back(value) for value in values]
            others = tuple(replace(term, back=back) for term, back in zip(op.others, backs[1:], strict=True))
            ready = replace(op, back=backs[0], others=others)
            if others:  # what `MapOp.met` would find again: all operands repeat alike
                ready.__dict__["met"] = met
            if results:
                builder.ties[len(builder.ops)] = results[0]
            results.append(builder.add(ready))
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
    inputs = placed(tiling.first.layout, x, _SAMPLES, len(tiling.first.tiles))
    exact, _ = tail.values(x)
    stats = statistics(builder.ops, inputs, _sums(builder.ops, tiling, exact), span, True)
    return Draft(tuple(builder.ops), stats, builder.ties, len(inputs), len(held[-1]))


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
        # Of an image, for planning again.
        shapes=step.shapes if tail.sources(index)[0][0] == index else None,
    )


def _sums(ops: Sequence[Op], tiling: Tiling, exact: Sequence[FloatArray]) -> list[Sums]:
    """Of each map among the operations. exact: what the tail's maps give, of all rows of the data"""
    largest = [float(np.abs(v).max()) for v, made in zip(exact, tiling.maps, strict=True) for _ in made.rows]
    maps = [op for op in ops if isinstance(op, MapOp)]
    return [Sums(True, _copies(op), 1, most) for op, most in zip(maps, largest, strict=True)]


def _copies(op: MapOp) -> int:
    """How often the least held of its elements is."""
    index = op.out_layout.index
    seen = np.bincount(index[index >= 0])
    return int(seen[seen > 0].min())


__all__ = ["compile_tiled", "compile_tiling", "compile_tiling_with_error", "drafted"]
