"""Shapes of tile tensors that are worth a look: for each value of a tail all there are, or a few.

What is looked at depends on how long that takes: a pair of shapes costs a few passes over a map's weights.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from blindtail.errors import ModelError
from blindtail.he.layout import MOST_CIPHERTEXTS
from blindtail.he.normal import Normal
from blindtail.he.slotmaps import LEAST_PERIOD, TooWide, power_of_two
from blindtail.he.sparse import entries
from blindtail.he.tiled import Placed
from blindtail.he.tiles import Axis, Kind, TileShape

#: Shapes of a value that are looked at where not all are, those with the fewest tiles first.
_SHAPES = 6
#: All are looked at where weights times pairs of shapes are at most so many, in all maps: a second or two.
_WORK = 2e8
#: Of the shapes with the most tiles that are looked at, tiles over the fewest there can be.
_MORE_TILES = 4
#: Else, weights of one map from which on images are laid out by rule (`natural`) and vectors in as few
#: ciphertexts as there can be.
_LARGE = 300_000


Which = Literal["all", "some", "rule"]


@dataclass(frozen=True, slots=True)
class Look:
    """What is looked at: `which` "all" shapes there are, "some" or those by "rule"; positions of a tile."""

    which: Which
    positions: int

    @property
    def every(self) -> bool:
        return self.which == "all"


def shapes(image: Sequence[int], look: Look, *, last: bool = False) -> list[TileShape]:
    """Shapes of a tensor (C, H, W), (C, W) or (n,), those with the fewest tiles first.

    look  all: with powers of two along each axis, interleaved or not, and sums of all lengths
    last  of the logits: repeating where there is room, so that replies are short

    Raises `TooWide` where there is none of few enough tiles.
    """
    if len(image) > 1 and not last:
        found = list(_images(image, look))
        least = min((shape.tiles for shape in found), default=MOST_CIPHERTEXTS + 1)
        if not look.every:  # twice as many rows as columns, or the other way round, where that is less
            found += [s for s in _images(image, look, askew=2) if s.tiles < least]
    else:
        found = list(_vectors(math.prod(image), look, last))
    found = sorted(dict.fromkeys(found), key=lambda s: (s.tiles, str(s)))
    if not found:
        raise TooWide(f"a tensor {tuple(image)} needs more than {MOST_CIPHERTEXTS} ciphertexts")
    return found if look.every else found[:_SHAPES]


def _images(image: Sequence[int], look: Look, askew: int = 1) -> Iterator[TileShape]:
    """askew: how many times as many rows as columns tiles of square images have, or the reverse."""
    channels, sides, positions, every = image[0], image[1:], look.positions, look.every
    fewest = -(-math.prod(image) // positions)
    for tiles in itertools.product(*([1 << b for b in range(power_of_two(n).bit_length())] for n in sides)):
        room = positions // math.prod(tiles)
        if not room:
            continue
        square = len(tiles) == 2 and sides[0] == sides[1]
        if not every and square and max(tiles) != askew * min(tiles):
            continue
        own = min(room, power_of_two(channels))
        kinds: list[tuple[Kind, ...]] = [
            (("~", "") if every and t > 1 else ("~",)) if t < n else ("",)
            for n, t in zip(sides, tiles, strict=True)
        ]
        for kind in itertools.product(*kinds):
            if not every and _mixed(kind, tiles, sides):
                continue
            axes = [Axis(channels, own), *(Axis(n, t, k) for n, t, k in zip(sides, tiles, kind, strict=True))]
            many = math.prod(axis.tiles for axis in axes)
            if many > MOST_CIPHERTEXTS or (not every and many > _MORE_TILES * fewest):
                continue
            rest = room // own
            yield TileShape((Axis(1, rest, "*"), *axes) if rest > 1 else tuple(axes))
            if every and rest > 1:
                yield TileShape((*axes, Axis(1, rest, "?")))


def _mixed(kind: Sequence[Kind], tiles: Sequence[int], sides: Sequence[int]) -> bool:
    """Whether one axis that is cut into tiles of several places is interleaved and another is not."""
    return len({k for k, t, n in zip(kind, tiles, sides, strict=True) if 1 < t < n}) > 1


def _vectors(size: int, look: Look, last: bool) -> Iterator[TileShape]:
    positions, every = look.positions, look.every
    own = min(power_of_two(size), positions)
    own = max(own, min(LEAST_PERIOD, positions)) if last else own
    rest, fewest = positions // own, -(-size // positions)
    if fewest > MOST_CIPHERTEXTS:
        return
    yield TileShape((Axis(1, rest, "*"), Axis(size, own)) if rest > 1 else (Axis(size, own),))
    if last:
        return
    for bit in range(own.bit_length() - 1):
        held = 1 << bit
        if -(-size // held) > min(MOST_CIPHERTEXTS, math.inf if every else _MORE_TILES * fewest):
            continue
        yield TileShape((Axis(size, held), Axis(1, positions // held, "?")))
        if every:
            yield TileShape((Axis(1, positions // held, "*"), Axis(size, held)))


def candidates(
    tail: Normal, positions: int, lanes: int, which: Which, image: Sequence[int] | None = None
) -> list[list[Placed]]:
    """For the input and each map's output.

    image  of the activation at the cut, (C, H, W); without it what the first map knows

    Raises `TooWide` naming the map that takes or gives more than the most ciphertexts of this ring hold.
    """
    first, look = tail.maps[0], Look(which, positions)
    known = [image or (first.shapes[0] if first.shapes else (first.weight.shape[1],))]
    known += [step.shapes[1] if step.shapes else (len(step.bias),) for step in tail.maps]
    told = known[0]
    read = [{value for value, _ in tail.sources(index)} for index in range(len(tail.maps))]
    alone = all(
        0 not in values or values == {0} for values in read
    )  # all that a map reads is complex, or none
    # At the cut, half of the tensor may ride as imaginary parts.
    half = [(told[0] // 2, *told[1:]), *known[1:]] if told[0] % 2 == 0 and alone else None
    found = [_placed(known, 0, look, lanes), *([] for _ in tail.maps)]
    found[0] += [] if half is None else _placed(half, 0, look, lanes, True)
    found[1:] = [_placed(known, number, look, lanes) for number in range(1, len(known))]
    for number, (own, of_value) in enumerate(zip(known, found, strict=True)):
        if not of_value:
            raise TooWide(_refused(tail, number, math.prod(own), positions, half is not None))
    if len(tail.maps[-1].bias) > positions // 2:  # a device opens a result: nothing in it is undefined
        found[-1] = [one for one in found[-1] if one.shape.defined]
    return found


def _placed(
    known: Sequence[Sequence[int]], number: int, look: Look, lanes: int, halved: bool = False
) -> list[Placed]:
    """In the shapes to look at for one value of those known; none where it is too wide."""
    try:
        return [Placed(shape, lanes, halved) for shape in _asked(known, number, look)]
    except TooWide:
        return []


def _refused(tail: Normal, number: int, size: int, positions: int, twice: bool) -> str:
    """Which layer a value is too wide for, and the way out. twice: it might have had imaginary parts"""
    name, what = tail.maps[max(0, number - 1)].name, "gives" if number else "takes, at the cut,"
    each = 2 * positions if twice and not number else positions
    out = "make this layer smaller" if number else "cut later, add a bottleneck"
    return (
        f"{name} {what} {size:,} values, and {MOST_CIPHERTEXTS} ciphertexts of {each:,} a lane do not hold "
        f"them: {out}, or use fewer lanes or a larger ring"
    )


def which(tail: Normal, positions: int, image: Sequence[int] | None = None) -> Which:
    """All shapes where that is quick, else some, or of large maps those by rule."""
    used = [
        (value, index, int(np.count_nonzero(entries(weight))))
        for index in range(len(tail.maps))
        for value, weight in tail.sources(index)
    ]
    found = candidates(tail, positions, 1, "all", image)
    if sum(weights * len(found[value]) * len(found[index + 1]) for value, index, weights in used) <= _WORK:
        return "all"
    return "rule" if max(weights for *_, weights in used) > _LARGE else "some"


def _asked(known: Sequence[Sequence[int]], number: int, look: Look) -> list[TileShape]:
    """Shapes to look at for one value of those known."""
    own, rule = known[number], look.which == "rule"
    small = number + 1 == len(known) and math.prod(own) <= look.positions // 2
    if rule and len(own) == 3 and not small:
        after = [image for image in known[number:] if len(image) == 3]
        return [natural(own, after[min(1, len(after) - 1)] if number == 0 else own, look.positions)]
    found = shapes(own, look, last=small)
    found = found[:1] if rule else found
    return found if number else list(dict.fromkeys(map(_full, found)))


def given(
    tail: Normal, positions: int, lanes: int, only: Sequence[Sequence[TileShape]]
) -> list[list[Placed]]:
    """`only` for the input and each map's output, checked.

    Raises `ModelError` for shapes of other sizes than the values' or the ciphertexts'.
    """
    sizes = [tail.maps[0].weight.shape[1], *(len(step.bias) for step in tail.maps)]
    if len(only) != len(sizes) or not all(only):
        raise ModelError(f"give shapes for the input and each map's output: {len(sizes)} lists, none empty")
    found = []
    for number, (size, of_value) in enumerate(zip(sizes, only, strict=True)):
        for shape in of_value:
            if shape.positions != positions:
                raise ModelError(f"{shape}: {shape.positions} positions, a ciphertext has {positions}")
            if shape.size != size and (number or 2 * shape.size != size):
                raise ModelError(f"{shape}: {shape.size} elements, value {number} of this tail has {size}")
            if shape.size != size and not shape.defined:
                raise ModelError(f"{shape}: beside imaginary parts nothing may be undefined; write */t")
        found.append([Placed(shape, lanes, shape.size != size) for shape in of_value])
    return found


def _full(shape: TileShape) -> TileShape:
    """A device fills every place: what sums by rotations would leave undefined is held as often as fits."""
    return TileShape(tuple(Axis(1, axis.tile, "*") if axis.kind == "?" else axis for axis in shape.axes))


def natural(image: Sequence[int], at: Sequence[int], positions: int) -> TileShape:
    """Of an image (C, H, W), at the resolution of another: pictures of every so-manieth pixel.

    A convolution from one resolution to the other then reads neighbours at few offsets.
    """
    down, across = (min(power_of_two(n), power_of_two(m)) for n, m in zip(image[1:], at[1:], strict=True))
    while down * across > positions:
        down, across = (down // 2, across) if down >= across else (down, across // 2)
    room = positions // (down * across)
    own = min(room, power_of_two(image[0]))
    sides = [Axis(n, t, "~" if t < n else "") for n, t in zip(image[1:], (down, across), strict=True)]
    axes = (Axis(image[0], own), *sides)
    return TileShape((Axis(1, room // own, "*"), *axes) if room > own else axes)


__all__ = ["Look", "Which", "candidates", "given", "natural", "shapes", "which"]
