"""How values flow from operation to operation, and what follows from it.

Levels, scales and layouts must connect; then the keys that are needed, the layout of
the result and the program's identity are fixed, and so is when a value was last read.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from blindtail.errors import ModelError
from blindtail.he import program_file
from blindtail.he.elementwise import Op, ProductOp, SquareOp, SumOp
from blindtail.he.layout import GARBAGE, ZERO, Layout
from blindtail.he.operations import MapOp
from blindtail.he.params import Parameters
from blindtail.he.spec import RELINEARISE, KeyNeed, TailSpec


def finish(ops: tuple[Op, ...], draft: TailSpec) -> TailSpec:
    """Fill in what follows from the operations: keys, output layout, program id; check the chain.

    Raises `ModelError` when levels, scales or layouts do not connect.
    """
    parameters = draft.parameters
    # By value: level, scale, layout.
    values: list[tuple[int, float, Layout]] = [
        (draft.input_level, draft.input_scale, tile) for tile in draft.input_layout.tiles(parameters.slots)
    ]
    inputs, results = len(values), draft.output_ciphertexts
    last = last_uses(ops, inputs)
    if len(ops) < results:
        raise ModelError("a program has an operation for each ciphertext of its result")
    if len(ops) > program_file.MAX_OPS:
        raise ModelError(
            f"the program has {len(ops)} operations, and a file holds {program_file.MAX_OPS}: take a "
            "larger ring, whose ciphertexts are fewer, or make layers smaller"
        )
    for index, op in enumerate(ops):
        least, ends = 0 if isinstance(op, SumOp) else 1, index >= len(ops) - results
        if not op.backs or max(op.backs) > inputs + index or min(op.backs) < 1:
            raise ModelError(f"{op.name}: reads what comes after it or before the input")
        if isinstance(op, MapOp):
            before = [(term.in_scale, term.in_layout) for term in op.terms]
            after = op.out_layout
        else:
            before = [(scale, op.layout) for scale in op.in_scales]
            after = op.layout
        read = [values[inputs + index - back] for back in op.backs]
        fits = len(before) == len(read) and all(
            level >= op.level and (scale, layout) == (wanted, like)
            for (level, scale, layout), (wanted, like) in zip(read, before, strict=False)
        )
        if not fits or op.level < least or (op.out_level < 1 and not ends):
            raise ModelError(f"{op.name}: its level, scale or layout does not follow from what comes before")
        if isinstance(op, MapOp):
            op.check()
            for term in range(len(op.terms)):
                op.plain_scale(parameters, term)
        elif after.imaginary is not None:
            raise ModelError(f"{op.name}: slots with imaginary parts are for a map to read")
        else:
            op.check(parameters)
        if ends is (inputs + index in last):
            what = "the result is read" if ends else "nothing reads what it computes"
            raise ModelError(f"{op.name}: {what}")
        values.append((op.out_level, op.out_scale, after))
    for op, (level, scale, tile) in zip(ops[-results:], values[-results:], strict=True):
        period, content = draft.reply.period // tile.lanes, tile.index
        repeats = period > 0 and len(content) % period == 0
        repeats = repeats and np.array_equal(content, np.roll(content, period))
        if level != 0 or scale != draft.reply.scale or not repeats or not isinstance(op, MapOp):
            raise ModelError("the last operation does not end in the reply's form")
    layout = _whole([tile for _, _, tile in values[-results:]])
    keys = key_needs(ops, parameters)
    if draft.segment is not None:  # it shares the keys of its chain
        held = {key.element: key.level for key in draft.keys}
        if any(held.get(key.element, -1) < key.level for key in keys):
            raise ModelError("a segment's keys do not cover its operations")
        keys = draft.keys
    spec = replace(draft, keys=keys, output_layout=layout)
    return replace(spec, program_id=program_file.content_id(spec, ops))


def key_needs(ops: Sequence[Op], parameters: Parameters) -> tuple[KeyNeed, ...]:
    """The evaluation keys that operations use, by Galois element, each at its highest level."""
    needs: dict[int, int] = {}
    for op in ops:
        for turn, at in turns(op).items():
            element = RELINEARISE if turn == _RELINEARISING else parameters.turn_element(turn)
            needs[element] = max(needs.get(element, 0), at)
    return tuple(KeyNeed(element, needs[element]) for element in sorted(needs))


def last_uses(ops: Sequence[Op], inputs: int = 1) -> dict[int, int]:
    """Value -> the last operation that reads it; results, which none reads, are absent."""
    return {inputs + index - back: index for index, op in enumerate(ops) for back in op.backs}


def _whole(tiles: Sequence[Layout]) -> Layout:
    """The layout of a tensor over several ciphertexts. Raises `ModelError` unless it is all there."""
    first = tiles[0]
    if any((tile.size, tile.lanes, tile.imaginary) != (first.size, first.lanes, None) for tile in tiles):
        raise ModelError("the ciphertexts of the result are not of one tensor")
    content = tuple(itertools.chain.from_iterable(tile.content for tile in tiles))
    whole = first if len(tiles) == 1 else Layout(first.size, first.lanes, content)
    if len(set(whole.content) - {ZERO, GARBAGE}) != whole.size:
        raise ModelError("the result does not hold every output")
    return whole


#: Stands for relinearisation among turns; turns are of slots, and there are not that many.
_RELINEARISING = 1 << 62


def turns(op: Op) -> dict[int, int]:
    """Turn (in slots; ~t conjugates as well) or relinearisation -> highest level it is used at."""
    if isinstance(op, MapOp):
        return op.rotations()
    return {_RELINEARISING: op.level} if isinstance(op, SquareOp | ProductOp) else {}


__all__ = ["finish", "key_needs", "last_uses", "turns"]
