"""Which tile shapes the values of a tail get, and how rotations are split: what an objective wants.

Every value's shape is chosen together with its neighbours', since a map's cost depends on
both: states go from map to map, the best few by the shape that they end in, at several
prices for a byte of keys. With `every` nothing is left out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from blindtail.errors import ModelError
from blindtail.he import cost
from blindtail.he.container import HEADER_BYTES, SEED_BYTES
from blindtail.he.normal import Normal
from blindtail.he.objective import Costs, NoPlan, Objective
from blindtail.he.packing import packed_bytes
from blindtail.he.params import Parameters
from blindtail.he.schedule import BACKEND, WORD_BYTES, activated, key_bytes, relinearisation
from blindtail.he.slotmaps import LEAST_PERIOD, power_of_two
from blindtail.he.sparse import entries
from blindtail.he.spec import MOST_CIPHERTEXTS
from blindtail.he.tiled import Placed, Split, TiledMap, between, splits
from blindtail.he.tiles import Axis, Kind, TileShape

#: Shapes of a value that are looked at, those with the fewest tiles first; states that go on.
_SHAPES, _BEAM = 6, 24
#: Tails with at most so many weights in each map are quick to look at: images in tiles of any sides.
_FEW, _MANY_SHAPES = 500, 32
#: Of the shapes with the most tiles that are looked at, tiles over the fewest there can be.
_MORE_TILES = 4
#: Weights of one map from which on images are laid out by rule (`natural`) and vectors in as few
#: ciphertexts as there can be: a look takes a second.
_LARGE = 300_000
#: What a byte of keys may cost, in seconds: each gives another compromise of time and keys.
_PRICES = (0.0, *(10.0**e for e in range(-12, -6)))


# -- shapes ------------------------------------------------------------------------------


def shapes(
    image: Sequence[int], positions: int, *, every: bool = False, last: bool = False, few: bool = False
) -> list[TileShape]:
    """Shapes of a tensor (C, H, W), (C, W) or (n,), those with the fewest tiles first.

    every  all with powers of two along each axis, interleaved or not, and sums of all lengths
    last   of the logits: repeating where there is room, so that replies are short
    few    all but those of images with one axis interleaved and another cut without, the first `_MANY_SHAPES`
    """
    if len(image) > 1 and not last:
        found = list(_images(image, positions, every, few))
        least = min((shape.tiles for shape in found), default=MOST_CIPHERTEXTS + 1)
        if not (every or few):  # twice as many rows as columns, or the other way round, where that is less
            found += [s for s in _images(image, positions, every, few, askew=2) if s.tiles < least]
    else:
        found = list(_vectors(math.prod(image), positions, every or few, last))
    found = sorted(dict.fromkeys(found), key=lambda s: (s.tiles, str(s)))
    if not found:
        raise ModelError(f"a tensor {tuple(image)} needs more than {MOST_CIPHERTEXTS} ciphertexts")
    return found if every else found[: _MANY_SHAPES if few else _SHAPES]


def _images(
    image: Sequence[int], positions: int, every: bool, few: bool, askew: int = 1
) -> Iterator[TileShape]:
    """askew: how many times as many rows as columns tiles of square images have, or the reverse."""
    channels, sides = image[0], image[1:]
    fewest = -(-math.prod(image) // positions)
    for tiles in itertools.product(*([1 << b for b in range(power_of_two(n).bit_length())] for n in sides)):
        room = positions // math.prod(tiles)
        if not room:
            continue
        square = len(tiles) == 2 and sides[0] == sides[1]
        if not (every or few) and square and max(tiles) != askew * min(tiles):
            continue
        own = min(room, power_of_two(channels))
        kinds: list[tuple[Kind, ...]] = [
            (("~", "") if (every or few) and t > 1 else ("~",)) if t < n else ("",)
            for n, t in zip(sides, tiles, strict=True)
        ]
        for kind in itertools.product(*kinds):
            if not every and _mixed(kind, tiles, sides):
                continue
            axes = [Axis(channels, own), *(Axis(n, t, k) for n, t, k in zip(sides, tiles, kind, strict=True))]
            many = math.prod(axis.tiles for axis in axes)
            if many > MOST_CIPHERTEXTS or (not (every or few) and many > _MORE_TILES * fewest):
                continue
            rest = room // own
            yield TileShape((Axis(1, rest, "*"), *axes) if rest > 1 else tuple(axes))
            if (every or few) and rest > 1:
                yield TileShape((*axes, Axis(1, rest, "?")))


def _mixed(kind: Sequence[Kind], tiles: Sequence[int], sides: Sequence[int]) -> bool:
    """Whether one axis that is cut into tiles of several places is interleaved and another is not."""
    return len({k for k, t, n in zip(kind, tiles, sides, strict=True) if 1 < t < n}) > 1


def _vectors(size: int, positions: int, every: bool, last: bool) -> Iterator[TileShape]:
    own = min(power_of_two(size), positions)
    own = max(own, min(LEAST_PERIOD, positions)) if last else own
    rest = positions // own
    yield TileShape((Axis(1, rest, "*"), Axis(size, own)) if rest > 1 else (Axis(size, own),))
    if last and not every:
        return
    for bit in range(own.bit_length() - 1 if not last else 0):
        held = 1 << bit
        if -(-size // held) > (MOST_CIPHERTEXTS if every else _MORE_TILES * -(-size // positions)):
            continue
        yield TileShape((Axis(size, held), Axis(1, positions // held, "?")))
        if every:
            yield TileShape((Axis(1, positions // held, "*"), Axis(size, held)))


# -- the choice ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Tiling:
    """A choice for a whole tail: parameters, the placed input, and a map with its split for each map."""

    parameters: Parameters
    first: Placed
    maps: tuple[TiledMap, ...]
    splits: tuple[Split, ...]
    costs: Costs

    def describe(self) -> dict[str, object]:
        """For people and JSON."""
        return {
            "ring_degree": self.parameters.ring_degree,
            "values": [self.first.name, *(made.target.name for made in self.maps)],
            "ciphertexts": [len(self.first.tiles), *(len(made.rows) for made in self.maps)],
            "baby": [split.baby for split in self.splits],
        }


def choose(
    tail: Normal,
    parameters: Parameters,
    objective: Objective,
    *,
    image: Sequence[int] | None = None,
    lanes: int = 1,
    every: bool = False,
    only: Sequence[Sequence[TileShape]] | None = None,
) -> Tiling:
    """The tile shapes and splits that an objective wants, of a tail whose maps have one operand each.

    image  of the activation at the cut, (C, H, W); without it what the first map knows
    every  look at all shapes and all combinations: minutes for more than two maps
    only   for the input and each map's output, the shapes to look at; one for half as many elements as
           the input has puts the second half in imaginary parts

    Raises `ModelError` where shapes do not fit or maps read older values, and `NoPlan` where no
    choice keeps the bounds.
    """
    if any(step.skips for step in tail.maps):
        raise ModelError(f"{tail.maps[0].name}: a tail over several ciphertexts reads one value a layer")
    positions = parameters.slots // lanes
    candidates = _candidates(tail, positions, lanes, image, every, only)
    known = _Known(tail, candidates, parameters)
    best: Tiling | None = None
    tried: list[Costs] = []
    for key_s in _PRICES:
        for found in _search(tail, parameters, known, _Prices(objective, key_s, parameters), every):
            tried.append(found.costs)
            if not objective.admits(found.costs):
                continue
            if best is None or objective.value(found.costs) < objective.value(best.costs):
                best = found
    if best is None:
        told = ", ".join(f"{name} <= {bound:g}" for name, bound in objective.at_most.items())
        least = min(tried, key=lambda costs: costs.key_bytes)
        raise NoPlan(
            f"no tiling keeps {told} (the fewest key bytes found are {least.key_bytes:,}): allow more, "
            "make layers smaller, or cut later"
        )
    return best


def _candidates(
    tail: Normal,
    positions: int,
    lanes: int,
    image: Sequence[int] | None,
    every: bool,
    only: Sequence[Sequence[TileShape]] | None,
) -> list[list[Placed]]:
    """For the input and each map's output."""
    if only is not None:
        return _given(tail, positions, lanes, only)
    first = tail.maps[0]
    known = [image or (first.shapes[0] if first.shapes else (first.weight.shape[1],))]
    known += [step.shapes[1] if step.shapes else (len(step.bias),) for step in tail.maps]
    most = max(len(entries(step.weight)) for step in tail.maps)
    used = max(int(np.count_nonzero(entries(step.weight))) for step in tail.maps)
    large, few = not every and most > _LARGE, not every and used <= _FEW
    asked = [_asked(known, number, positions, every, large, few) for number in range(len(known))]
    found = [[Placed(shape, lanes) for shape in of_value] for of_value in asked]
    told = known[0]
    if told[0] % 2 == 0:  # at the cut, half of the tensor may ride as imaginary parts
        half = [(told[0] // 2, *told[1:]), *known[1:]]
        halves = _asked(half, 0, positions, every, large, few)
        found[0] += [Placed(shape, lanes, True) for shape in halves if shape.defined]
    last = tail.maps[-1].bias
    if len(last) > positions // 2:  # a result is opened by the device: nothing in it is undefined
        found[-1] = [one for one in found[-1] if one.shape.defined]
    return found


def _given(
    tail: Normal, positions: int, lanes: int, only: Sequence[Sequence[TileShape]]
) -> list[list[Placed]]:
    """Raises `ModelError` for shapes of other sizes than the values' or the ciphertexts'."""
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


def _asked(
    known: Sequence[Sequence[int]], number: int, positions: int, every: bool, large: bool, few: bool
) -> list[TileShape]:
    """Shapes to look at for one value of those known."""
    own = known[number]
    small = number + 1 == len(known) and math.prod(own) <= positions // 2
    if large and len(own) == 3 and not small:
        after = [image for image in known[number:] if len(image) == 3]
        return [natural(own, after[min(1, len(after) - 1)] if number == 0 else own, positions)]
    found = shapes(own, positions, every=every, last=small, few=few)
    found = found[:1] if large else found
    return found if number else [_full(shape) for shape in found]


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


@dataclass(frozen=True, eq=False)
class _State:
    """The maps so far. `price`: of time, plaintexts and uplink; keys are priced by all that are needed."""

    seconds: float
    plain_bytes: int
    price: float
    needs: Mapping[int, int]
    places: tuple[int, ...]
    maps: tuple[TiledMap, ...]
    splits: tuple[Split, ...]


class _Known:
    """Maps between placed values and their splits, made when first asked for."""

    def __init__(self, tail: Normal, candidates: Sequence[Sequence[Placed]], parameters: Parameters) -> None:
        self._tail, self.candidates, self._n = tail, candidates, parameters.ring_degree
        self._levels = [parameters.max_level - depth for depth in tail.depths[0]]
        self._made: dict[tuple[int, int, int], tuple[TiledMap, list[Split]] | None] = {}
        self.problem = ModelError("")

    def map(self, index: int, source: int, target: int) -> tuple[TiledMap, list[Split]] | None:
        """None where these two shapes do not go together."""
        key = index, source, target
        if key not in self._made:
            values = self.candidates[index][source], self.candidates[index + 1][target]
            try:
                made = between(self._tail.maps[index].weight, *values)
                self._made[key] = made, splits(made, self._levels[index], self._n)
            except ModelError as error:
                self._made[key], self.problem = None, error
        return self._made[key]

    def activation(self, index: int) -> tuple[float, int]:
        """Seconds and bytes of plaintexts that a tile's activation behind this map takes."""
        if index >= len(self._tail.activations):
            return 0.0, 0
        spent = activated(self._tail, index, self._levels[index] - 1, self._n)
        return spent.total_s, spent.plain_bytes


class _Prices:
    """What an objective makes of seconds and bytes, where a byte of keys costs `key_s` seconds besides."""

    def __init__(self, objective: Objective, key_s: float, parameters: Parameters) -> None:
        told = objective.weights
        # A grain of time decides where only the rest counts.
        self.second = max(told.get("total_s", 0.0) + told.get("online_s", 0.0), 1e-12)
        self.plain = told.get("memory_bytes", 0.0)
        self.uplink = told.get("uplink_bytes", 0.0)
        self.key = key_s * self.second + told.get("key_bytes", 0.0)
        self.sizes = [key_bytes(parameters, at) for at in range(parameters.max_level + 1)]
        self._memory = [_expanded(parameters, at) for at in range(parameters.max_level + 1)]

    def keys(self, needs: Mapping[int, int]) -> float:
        return sum(self.key * self.sizes[at] + self.plain * self._memory[at] for at in needs.values())

    def split(self, split: Split, needs: Mapping[int, int]) -> float:
        """Of a split, keys counted that are not there yet."""
        return self.second * split.seconds + self.plain * split.plain_bytes + self.keys(_joined(needs, split))


def _joined(needs: Mapping[int, int], split: Split) -> dict[int, int]:
    found = dict(needs)
    for turn, at in split.needs:
        found[turn] = max(found.get(turn, 0), at)
    return found


def _search(
    tail: Normal, parameters: Parameters, known: _Known, prices: _Prices, every: bool
) -> Iterator[Tiling]:
    """Tilings that are cheapest at these prices, the best first."""
    n = parameters.ring_degree
    each = SEED_BYTES + sum(packed_bytes(n, q.bit_length()) for q in parameters.primes)
    states: list[_State] = []
    for number, first in enumerate(known.candidates[0]):
        more = len(first.tiles) - 1
        spent = cost.seconds(BACKEND, n, []) + more * cost.REFERENCE[BACKEND].expand_s * n / 8192
        uplink = prices.uplink * (more + 1) * each
        states.append(_State(spent, 0, prices.second * spent + uplink, {}, (number,), (), ()))
    for index in range(len(tail.maps)):
        seconds, plain = known.activation(index)
        following: dict[tuple[int, ...], list[_State]] = {}
        for state, target in itertools.product(states, range(len(known.candidates[index + 1]))):
            found = known.map(index, state.places[-1], target)
            if found is None:
                continue
            made, ways = found
            split = min(ways, key=lambda way: prices.split(way, state.needs))
            spent, held = split.seconds + len(made.rows) * seconds, split.plain_bytes + len(made.rows) * plain
            grown = _State(
                state.seconds + spent,
                state.plain_bytes + held,
                state.price + prices.second * spent + prices.plain * held,
                _joined(state.needs, split),
                (*state.places, target),
                (*state.maps, made),
                (*state.splits, split),
            )
            following.setdefault(grown.places if every else (target,), []).append(grown)
        if not following:
            raise ModelError(f"{tail.maps[index].name}: no shapes of its tiles go together: {known.problem}")
        whole = [min(held, key=lambda s: s.price + prices.keys(s.needs)) for held in following.values()]
        states = sorted(whole, key=lambda s: s.price + prices.keys(s.needs))
        states = states if every else states[:_BEAM]
    relinearised = relinearisation(tail, parameters.max_level)
    for state in states if every else states[:2]:
        first = known.candidates[0][state.places[0]]
        costs = _costs(parameters, state, len(first.tiles) * each, relinearised)
        yield Tiling(parameters, first, state.maps, state.splits, costs)


def _costs(parameters: Parameters, state: _State, uplink: int, relinearised: int) -> Costs:
    levels = [*state.needs.values(), *([relinearised] if relinearised else [])]
    return Costs(
        total_s=state.seconds,
        online_s=state.seconds,
        uplink_bytes=HEADER_BYTES + uplink,
        key_bytes=HEADER_BYTES + sum(key_bytes(parameters, at) for at in levels),
        memory_bytes=state.plain_bytes + sum(_expanded(parameters, at) for at in levels),
    )


def _expanded(parameters: Parameters, level: int) -> int:
    """A key in memory: both halves of each digit, modulo each prime."""
    return 2 * (level + 2) * (level + 1) * parameters.ring_degree * WORD_BYTES


__all__ = ["Tiling", "choose", "natural", "shapes"]
