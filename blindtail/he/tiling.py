"""Which tile shapes the values of a tail get, and how rotations are split: what an objective wants.

Every value's shape is chosen together with its neighbours', since a map's cost depends on
both: states go from map to map, the best by the shapes that later maps read, at several
prices for a byte of keys where keys are bounded. What a pair of shapes costs is counted without
making its map, and its rotations are split only where a bound on its cost leaves it in the race.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from blindtail.errors import ModelError
from blindtail.he import cost
from blindtail.he.container import HEADER_BYTES, SEED_BYTES
from blindtail.he.normal import Normal
from blindtail.he.objective import Costs, NoPlan, Objective
from blindtail.he.packing import packed_bytes
from blindtail.he.params import Parameters
from blindtail.he.schedule import BACKEND, WORD_BYTES, activated, key_bytes, relinearisation
from blindtail.he.tile_counts import Counted, Known, Operand, Split, each
from blindtail.he.tile_shapes import Which, candidates, given, which
from blindtail.he.tiled import Placed, TiledMap, between
from blindtail.he.tiles import TileShape
from blindtail.progress import Span

#: States that go on from a map.
_BEAM = 128
#: Of those with the same shapes, where keys cost something, so many with the cheapest keys each.
_KEYS = 4
#: What a byte of keys may cost, in seconds: each gives another compromise of time and keys.
_PRICES = (0.0, *(10.0**e for e in range(-12, -6)))


@dataclass(frozen=True, eq=False)
class Tiling:
    """A choice for a whole tail: parameters, the placed values, and a split for each map."""

    tail: Normal
    parameters: Parameters
    values: tuple[Placed, ...]
    splits: tuple[Split, ...]
    costs: Costs

    @property
    def first(self) -> Placed:
        """The activation at the cut."""
        return self.values[0]

    @cached_property
    def maps(self) -> tuple[TiledMap, ...]:
        """Each map between its values, made when first asked for."""
        return tuple(
            between([(weight, self.values[value]) for value, weight in self.tail.sources(index)], target)
            for index, target in enumerate(self.values[1:])
        )

    def describe(self) -> dict[str, object]:
        """For people and JSON."""
        return {
            "ring_degree": self.parameters.ring_degree,
            "values": [value.name for value in self.values],
            "ciphertexts": [value.shape.tiles for value in self.values],
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
    span: Span | None = None,
) -> Tiling:
    """The tile shapes and splits that an objective wants.

    image  of the activation at the cut, (C, H, W); without it what the first map knows
    every  look at all shapes and all combinations: minutes for more than two maps
    only   for the input and each map's output, the shapes to look at; one for half as many elements as
           the input has puts the second half in imaginary parts
    span   told of each map, at each price of keys (`blindtail.progress`)

    Raises `ModelError` where shapes do not fit, and `NoPlan` where no choice keeps the bounds.
    """
    positions, whole = parameters.slots // lanes, Span.of(span)
    whole.at(0.0, "tile shapes")
    seed: _Graph | None = None
    if only is not None:
        placed = given(tail, positions, lanes, only)
    else:
        look: Which = "all" if every else which(tail, positions, image)
        placed = candidates(tail, positions, lanes, look, image)
        if look == "all" and not every:
            seed = _Graph(tail, parameters, candidates(tail, positions, lanes, "some", image))
    graph = _Graph(tail, parameters, placed, every)
    best: Tiling | None = None
    tried: list[Costs] = []
    # The first price counts the maps, which the others look up.
    parts = whole.parts(len(_PRICES), *[1] * (len(_PRICES) - 1))
    for key_s, part in zip(_PRICES, parts, strict=True):
        for found in _cheapest(graph, seed, _Prices(objective, key_s, parameters), part):
            tried.append(found.costs)
            if not objective.admits(found.costs):
                continue
            if best is None or objective.value(found.costs) < objective.value(best.costs):
                best = found
        if best is not None and not key_s:
            break  # other prices are for keys that bounds do not admit
    if best is None:
        told = ", ".join(f"{name} <= {bound:g}" for name, bound in objective.at_most.items())
        least = min(tried, key=lambda costs: costs.key_bytes)
        raise NoPlan(
            f"no tiling keeps {told} (the fewest key bytes found are {least.key_bytes:,}): allow more, "
            "make layers smaller, or cut later"
        )
    return best


class _Graph:
    """A tail's values in their shapes and the maps between them, counted when first asked for."""

    def __init__(
        self,
        tail: Normal,
        parameters: Parameters,
        placed: Sequence[Sequence[Placed]],
        every: bool = False,
    ) -> None:
        self.tail, self.parameters, self.every = tail, parameters, every
        self.values = [[Known(one) for one in of_value] for of_value in placed]
        self.levels = [parameters.max_level - depth for depth in tail.depths[0]]
        self._reads = [
            [(value, Operand(weight)) for value, weight in tail.sources(index)]
            for index in range(len(tail.maps))
        ]
        self._counted: dict[tuple[int, tuple[int, ...], int], Counted | None] = {}
        self.problem = ModelError("")
        read = [{value for value, _ in operands} for operands in self._reads]
        #: After each map, values so far that a later one reads.
        self.live = [
            [value for value in range(index + 2) if any(value in later for later in read[index + 1 :])]
            for index in range(len(tail.maps))
        ]

    def map(self, index: int, places: Sequence[int], target: int) -> Counted | None:
        """places: the shape of each value so far. None where those that are read do not go together."""
        key = index, tuple(places[value] for value, _ in self._reads[index]), target
        if key not in self._counted:
            read = [(operand, self.values[value][places[value]]) for value, operand in self._reads[index]]
            to, level = self.values[index + 1][target], self.levels[index]
            try:
                self._counted[key] = Counted(read, to, level, self.parameters.ring_degree, self.every)
            except ModelError as error:
                self._counted[key], self.problem = None, error
        return self._counted[key]

    def floor(self, index: int, places: Sequence[int], target: int) -> tuple[float, int]:
        """Seconds and bytes of plaintexts that a map between these shapes takes at least, uncounted."""
        to, level, n = self.values[index + 1][target], self.levels[index], self.parameters.ring_degree
        read = self._reads[index]
        products = sum(operand.least(self.values[value][places[value]], to) for value, operand in read)
        products, one = max(products, to.tiles), each(level, n)
        plain = (products * (level + 2) + to.tiles * level) * n * WORD_BYTES
        return products * one.product + to.tiles * one.tile, plain

    def activation(self, index: int) -> tuple[float, int]:
        """Seconds and bytes of plaintexts that a tile's activation behind this map takes."""
        if index >= len(self.tail.activations):
            return 0.0, 0
        spent = activated(self.tail, index, self.levels[index] - 1, self.parameters.ring_degree)
        return spent.total_s, spent.plain_bytes


@dataclass(frozen=True, eq=False)
class _State:
    """The maps so far, counted, with a row of their splits.

    price  of all of it
    held   the level of each turn's key, -1 where there is none; turns with a conjugation from the end
    places the shape of each value so far
    """

    seconds: float
    plain_bytes: int
    price: float
    held: NDArray[np.int8]
    places: tuple[int, ...]
    maps: tuple[tuple[Counted, int], ...] = ()


class _Prices:
    """What an objective makes of seconds and bytes, where a byte of keys costs `key_s` seconds besides."""

    def __init__(self, objective: Objective, key_s: float, parameters: Parameters) -> None:
        told = objective.weights
        # A grain of time decides where only the rest counts.
        self.second = max(told.get("total_s", 0.0) + told.get("online_s", 0.0), 1e-12)
        self.online = told.get("online_s", 0.0)
        self.plain = told.get("memory_bytes", 0.0)
        self.uplink = told.get("uplink_bytes", 0.0)
        key = key_s * self.second + told.get("key_bytes", 0.0)
        levels = range(parameters.max_level + 1)
        each = [key * key_bytes(parameters, at) + self.plain * _expanded(parameters, at) for at in levels]
        #: Of a key by its level, and of none, which is level -1.
        self.keys = np.asarray([*each, 0.0])

    def spent(self, seconds: float, plain: float, tiles: int, activated: tuple[float, int]) -> float:
        """A map and its activation, of so many tiles, without keys."""
        return self.second * (seconds + tiles * activated[0]) + self.plain * (plain + tiles * activated[1])

    def after(
        self, state: _State, made: Counted, level: int, activated: tuple[float, int], to: int
    ) -> _State:
        """With the split that is cheapest where keys that are there cost nothing."""
        splits = made.splits
        prices = self.second * splits.seconds
        if self.keys.any():
            there = self.keys[state.held[splits.turns]]
            high, low = (np.maximum(self.keys[at] - there, 0.0) for at in (level, level - 1))
            prices = prices + splits.high @ high + splits.low @ low
        row = int(prices.argmin())
        held = state.held.copy()
        for needed, at in ((splits.high[row], level), (splits.low[row], level - 1)):
            turns = splits.turns[needed]
            held[turns] = np.maximum(held[turns], at)
        spent = made.tiles * activated[0]
        plain = made.plain_bytes + made.tiles * activated[1]
        return _State(
            state.seconds + float(splits.seconds[row]) + spent,
            state.plain_bytes + plain,
            state.price + float(prices[row]) + self.spent(0.0, made.plain_bytes, made.tiles, activated),
            held,
            (*state.places, to),
            (*state.maps, (made, row)),
        )


def _cheapest(graph: _Graph, seed: _Graph | None, prices: _Prices, span: Span) -> list[Tiling]:
    """Tilings that are cheapest at these prices, the best first.

    seed  of fewer shapes: what costs more than the cheapest of those is left out early
    """
    found: list[Tiling] = []
    bound = math.inf
    few, rest = span.parts(seed is not None, 3)
    if seed is not None:
        try:
            states = _search(seed, prices, math.inf, few)
        except ModelError:
            states = []  # these shapes do not go together: there are others
        found = [_tiling(seed, state) for state in states[:1]]
        bound = min((state.price for state in states), default=math.inf)
    states = _search(graph, prices, bound, rest)
    return [_tiling(graph, state) for state in (states if graph.every else states[:2])] + found


def _search(graph: _Graph, prices: _Prices, bound: float, span: Span) -> list[_State]:
    """Of the last map, the cheapest first; of those that cost less than `bound`."""
    n, parameters = graph.parameters.ring_degree, graph.parameters
    states: list[_State] = []
    for number, first in enumerate(graph.values[0]):
        spent = cost.seconds(BACKEND, n, []) + _expand_s(n, first.tiles - 1)
        price = prices.second * spent - prices.online * _expand_s(n, first.tiles)
        price += prices.uplink * first.tiles * _each_bytes(parameters)
        states.append(_State(spent, 0, price, np.full(2 * parameters.slots, -1, np.int8), (number,)))
    for index, part in span.over(range(len(graph.tail.maps))):
        part.at(0.0, f"tile shapes: {graph.tail.maps[index].name}")
        grown = _following(graph, prices, states, index, bound)
        states = sorted(grown, key=lambda state: state.price)
        if not states:
            if bound < math.inf:
                break
            name = graph.tail.maps[index].name
            raise ModelError(f"{name}: no shapes of its tiles go together: {graph.problem}")
        states = states if graph.every else states[:_BEAM]
    return states


def _following(
    graph: _Graph, prices: _Prices, states: Sequence[_State], index: int, most: float
) -> Iterator[_State]:
    """States with one more map that cost less than `most`: for the shapes that later maps read, the cheapest.

    Where keys cost something, a few with other keys, which later maps may need; where nothing is left
    out, one for each set of keys.
    """
    activation, level = graph.activation(index), graph.levels[index]
    kept = len(states) * _BEAM if graph.every else _KEYS if prices.keys.any() and graph.live[index] else 1
    for target, to in enumerate(graph.values[index + 1]):
        ways: dict[tuple[int, ...], list[tuple[float, int, _State, Counted]]] = {}
        for number, state in enumerate(states):
            floor = graph.floor(index, state.places, target)
            if state.price + prices.spent(*floor, to.tiles, activation) >= most:
                continue
            made = graph.map(index, state.places, target)
            if made is not None:
                alike = tuple((*state.places, target)[value] for value in graph.live[index])
                least = state.price + prices.spent(made.floor_s, made.plain_bytes, to.tiles, activation)
                ways.setdefault(alike, []).append((least, number, state, made))
        for of_shapes in ways.values():
            found: dict[bytes, _State] = {}
            bound = most
            for least, _, state, made in sorted(of_shapes, key=lambda way: way[:2]):
                if least >= bound:
                    break
                grown = prices.after(state, made, level, activation, target)
                key = grown.held.tobytes() if kept > 1 else b""
                if grown.price < (found[key].price if key in found else bound):
                    found[key] = grown
                    if len(found) > kept:
                        del found[max(found, key=lambda key: found[key].price)]
                    if len(found) == kept:
                        bound = max(state.price for state in found.values())
            yield from found.values()


def _each_bytes(parameters: Parameters) -> int:
    """Of a ciphertext of the activation."""
    residues = sum(packed_bytes(parameters.ring_degree, q.bit_length()) for q in parameters.primes)
    return SEED_BYTES + residues


def uplink_bytes(parameters: Parameters, tiles: int) -> int:
    """Of a request whose activation lies over so many ciphertexts."""
    return HEADER_BYTES + tiles * _each_bytes(parameters)


def _expand_s(n: int, tiles: int) -> float:
    """Seconds to expand the seeds of so many ciphertexts of the activation."""
    return tiles * cost.REFERENCE[BACKEND].expand_s * n / 8192


def _tiling(graph: _Graph, state: _State) -> Tiling:
    parameters, tiles = graph.parameters, graph.values[0][state.places[0]].tiles
    relinearised = relinearisation(graph.tail, parameters.max_level)
    levels = [*state.held[state.held >= 0].tolist(), *([relinearised] if relinearised else [])]
    costs = Costs(
        total_s=state.seconds,
        online_s=state.seconds - _expand_s(parameters.ring_degree, tiles),  # all that a ticket holds
        uplink_bytes=uplink_bytes(parameters, tiles),
        key_bytes=HEADER_BYTES + sum(key_bytes(parameters, at) for at in levels),
        memory_bytes=state.plain_bytes + sum(_expanded(parameters, at) for at in levels),
    )
    values = tuple(of[place].placed for of, place in zip(graph.values, state.places, strict=True))
    return Tiling(graph.tail, parameters, values, tuple(made.split(row) for made, row in state.maps), costs)


def _expanded(parameters: Parameters, level: int) -> int:
    """A key in memory: both halves of each digit, modulo each prime."""
    return 2 * (level + 2) * (level + 1) * parameters.ring_degree * WORD_BYTES


__all__ = ["Tiling", "choose", "uplink_bytes"]
