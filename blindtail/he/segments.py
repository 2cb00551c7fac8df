"""Refreshed tails: a chain of programs, with an exact step at the edge between each two.

A *segment* is an ordinary program: one ciphertext in, one out. Between two of them the
edge decrypts, does what CKKS cannot (an *interlude*: ReLU, max pooling, the sum with an
earlier value) and encrypts again, with all of a segment's levels at its disposal. All
segments share the ring, the primes and one set of evaluation keys, each at the highest
level that any of them uses, so that a device makes and uploads keys once. A segment that
consumes fewer levels than the longest one starts lower in the same chain of primes.

What lies between two interludes is a *run*: affine maps with polynomials between them. One
that is too deep for a ring is cut before a square, which the edge then does: `divide` says
where. Only a run of plain squares, one after the other, is cut.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from blindtail.errors import ModelError
from blindtail.he import cost, plan, tiling
from blindtail.he.compiler import compile_tail
from blindtail.he.dataflow import finish, key_needs
from blindtail.he.layers import Affine, FloatArray, Layer, Quadratic
from blindtail.he.layout import MOST_CIPHERTEXTS
from blindtail.he.normal import normalised
from blindtail.he.objective import Costs, NoPlan, Objective
from blindtail.he.params import MAX_LOG2_Q_128, Parameters
from blindtail.he.program import Program
from blindtail.he.schedule import BACKEND, KeysTooLarge, default_budget
from blindtail.he.slotmaps import TooWide
from blindtail.he.sparse import entries
from blindtail.he.spec import MOST_SEGMENTS, KeyNeed, Segment, check_chain
from blindtail.progress import Progress, Span

#: Parts of the whole budget of keys that each segment is given, until all of them together keep it.
_SHARES = (1.0, 0.5, 0.25, 0.125, 0.0625)


@dataclass(frozen=True, eq=False)
class Run:
    """Layers as `compile_tail` takes them, what goes into them in calibration (n, features), and a name."""

    layers: Sequence[Layer]
    values: FloatArray
    name: str


@dataclass(frozen=True, slots=True)
class Division:
    """Where runs are cut: `pieces[r]` are the numbers of maps of run r's segments, in order."""

    ring_degree: int
    pieces: tuple[tuple[int, ...], ...]
    predicted_s: float

    @property
    def segments(self) -> int:
        """Round trips, one a segment."""
        return sum(map(len, self.pieces))


def compile_runs(
    runs: Sequence[Run],
    *,
    ring_degree: int | None = None,
    key_budget_bytes: int | None = None,
    progress: Progress | Span | None = None,
) -> tuple[tuple[Program, ...], Division]:
    """The segments of a refreshed tail, as one chain (`chained`), or one ordinary program where one does.

    ring_degree       N of all segments; without it what `divide` finds
    key_budget_bytes  most bytes of the keys of all segments together; without it as for `compile_tail`,
                      or as few as were found where that is too little
    progress          told how far it is (`blindtail.progress`)

    Raises `ModelError` naming the run, `KeysTooLarge` when the given budget cannot be kept.
    """
    whole = Span.of(progress)
    dividing, rest = whole.parts(1, 3)
    found = divide([run.layers for run in runs], ring_degree=ring_degree, span=dividing)
    pieces = [piece for run, counts in zip(runs, found.pieces, strict=True) for piece in _cut(run, counts)]
    if len(pieces) == 1:
        only = pieces[0]
        made = compile_tail(
            only.layers,
            only.values,
            ring_degree=found.ring_degree,
            key_budget_bytes=key_budget_bytes,
            progress=rest,
        )
        return (made,), found
    limit = key_budget_bytes or default_budget(Parameters.create(1, found.ring_degree))
    least: tuple[int, tuple[Program, ...]] | None = None
    # Most tails keep the budget at once.
    for share, again in zip(_SHARES, rest.parts(16, *[1] * (len(_SHARES) - 1)), strict=True):
        budget = round(share * limit)
        each = again.over(pieces)
        programs = chained([_compiled(piece, found.ring_degree, budget, span) for piece, span in each])
        size = programs[0].spec.key_bytes
        if least is None or size < least[0]:
            least = (size, programs)
        if size <= limit:
            break
    assert least is not None
    if key_budget_bytes is not None and least[0] > key_budget_bytes:
        raise KeysTooLarge(
            f"the keys of this tail's {len(pieces)} segments take {least[0]:,} bytes, the budget is "
            f"{key_budget_bytes:,}: allow more, or make its layers smaller"
        )
    return whole.ended((least[1], found))


def _compiled(piece: Run, ring_degree: int, budget: int, span: Span) -> Program:
    (own,) = span.parts(1, name=f"segment {piece.name}: ")
    try:
        try:
            return compile_tail(
                piece.layers, piece.values, ring_degree=ring_degree, key_budget_bytes=budget, progress=own
            )
        except (KeysTooLarge, NoPlan):
            fewest = Objective({"key_bytes": 1.0})
            return compile_tail(
                piece.layers, piece.values, ring_degree=ring_degree, objective=fewest, progress=own
            )
    except ModelError as error:
        raise type(error)(f"segment {piece.name}: {error}") from error


def _cut(run: Run, counts: Sequence[int]) -> Iterator[Run]:
    """A run's segments. Between two of them lies a plain square, which the edge does."""
    if len(counts) == 1:
        yield run
        return
    maps, values, at = normalised(run.layers).maps, run.values, 0
    for part, count in enumerate(counts):
        own = maps[at : at + count]
        layers = _with_squares(own)
        yield Run(layers, values, f"{run.name} ({part + 1} of {len(counts)})")
        values, at = normalised(layers)(values) ** 2, at + count


def _with_squares(maps: Sequence[Affine]) -> list[Layer]:
    layers: list[Layer] = []
    for step in maps:
        if layers:
            ones = np.ones(len(layers[-1].bias))  # type: ignore[union-attr]
            layers.append(Quadratic(ones, 0 * ones, 0 * ones, f"square before {step.name}"))
        layers.append(step)
    return layers


# -- where to cut ------------------------------------------------------------------------


def divide(
    runs: Sequence[Sequence[Layer]], *, ring_degree: int | None = None, span: Span | None = None
) -> Division:
    """The fewest round trips that fit, then the least predicted seconds of all segments together.

    Rings are tried in the order of the round trips that their levels allow, smaller ones first: a
    larger ring costs more of everything else. Raises `ModelError` with the run's name when no
    ring carries it.
    """
    tails = [normalised(layers) for layers in runs]
    rings = [ring_degree] if ring_degree else [n for n in MAX_LOG2_Q_128 if _most_maps(n)]
    bounds = {
        n: sum(-(-len(t.maps) // max(1, _most_maps(n))) if t.is_chain else 1 for t in tails) for n in rings
    }
    best: Division | None = None
    problem: ModelError | None = None
    for n, part in Span.of(span).over(sorted(rings, key=lambda n: (bounds[n], n))):
        if best is not None and bounds[n] >= best.segments:
            break
        try:
            found = _divided(runs, n, part)
        except ModelError as error:
            problem = error
            continue
        if best is None or (found.segments, found.predicted_s) < (best.segments, best.predicted_s):
            best = found
    if best is None:
        assert problem is not None
        raise problem
    if best.segments > MOST_SEGMENTS:
        raise ModelError(
            f"this tail needs {best.segments} round trips, at most {MOST_SEGMENTS} are possible: cut later"
        )
    return best


def _most_maps(n: int) -> int:
    """With squares between them: their levels, one prime that stays and the special one fit the bound."""
    return (MAX_LOG2_Q_128[n] // 30 - 1) // 2


def _divided(runs: Sequence[Sequence[Layer]], n: int, span: Span) -> Division:
    pieces, seconds = list[tuple[int, ...]](), 0.0
    most = _most_maps(n)
    for layers, part in span.over(runs):
        tail = normalised(layers)
        maps = tail.maps
        part.at(0.0, f"where to cut: {maps[0].name}, N = {n}")
        if not tail.is_chain:
            pieces.append((len(maps),))
            seconds += _seconds(layers, n)
            continue
        problems: list[ModelError] = []

        def price(i: int, j: int, maps: Sequence[Affine] = maps, told: list[ModelError] = problems) -> float:
            if j - i > most:
                return math.inf
            try:
                return _seconds(_with_squares(maps[i:j]), n)
            except ModelError as error:
                told.append(error)
                return math.inf

        counts, spent = fewest(len(maps), cache(price), most)
        if math.isinf(spent):
            said = str(problems[-1]) if problems else f"a ring of {n} carries no map at 128 bits"
            raise ModelError(f"{maps[0].name}: {said}")
        pieces.append(counts)
        seconds += spent
    return Division(n, tuple(pieces), seconds)


def _seconds(layers: Sequence[Layer], n: int) -> float:
    fastest = Objective({"total_s": 1.0}, {"key_bytes": default_budget(Parameters.create(1, n))})
    try:
        return _best(layers, fastest, n).total_s
    except NoPlan:
        return _best(layers, Objective({"key_bytes": 1.0}), n).total_s


def _best(layers: Sequence[Layer], objective: Objective, n: int) -> Costs:
    """In one ciphertext where values fit, else in several."""
    try:
        return plan.best(layers, objective, ring_degree=n).costs
    except TooWide:
        tail = normalised(layers)
        if len(tail.maps) == 1:
            return _lone(tail.maps[0], n)
        return tiling.choose(tail, Parameters.create(tail.depth, n), objective).costs


def _lone(step: Affine, n: int) -> Costs:
    """At least, of a map over several ciphertexts: it cannot be cut, so that no more need be known.

    Raises `ModelError` where not even the most there can be hold what it gives or, as complex slots, takes.
    """
    given, held = max(len(step.bias), -(-step.weight.shape[1] // 2)), MOST_CIPHERTEXTS * n // 2
    if given > held:
        raise ModelError(
            f"{step.name}: {given:,} values, and {MOST_CIPHERTEXTS} ciphertexts hold {held:,}: "
            "make the layer smaller"
        )
    products = -(-len(entries(step.weight)) // n)  # complex slots
    seconds = cost.seconds(BACKEND, n, [cost.affine(1, 0, 0, products, (), BACKEND)])
    return Costs(seconds, seconds, 0, 0, 0)


def fewest(maps: int, price: Callable[[int, int], float], most: int) -> tuple[tuple[int, ...], float]:
    """Maps 0 ... maps - 1 in the fewest pieces of `most` maps at most, and of those ways the cheapest.

    price(i, j) of maps i to j - 1 as one piece, infinite where that cannot be. Returns the sizes of
    the pieces and their price; an infinite one where there is no way.
    """

    def least(count: int) -> int:
        return -(-count // max(1, most))

    # Prices are dear: only those of pieces that some division into so many can hold are asked for.
    for pieces in range(least(maps), maps + 1):
        best: list[tuple[float, float, tuple[int, ...]]] = [(0, 0.0, ())]
        for end in range(1, maps + 1):
            found: tuple[float, float, tuple[int, ...]] = (math.inf, math.inf, ())
            for start in range(max(0, end - most), end):
                count, spent, before = best[start]
                if count + 1 + least(maps - end) > pieces or math.isinf(spent):
                    continue
                cost = spent + price(start, end)
                if not math.isinf(cost):
                    found = min(found, (count + 1, cost, (*before, end - start)))
            best.append(found)
        if not math.isinf(best[-1][1]):
            return best[-1][2], best[-1][1]
    return (), math.inf


# -- one chain ---------------------------------------------------------------------------


def chained(programs: Sequence[Program]) -> tuple[Program, ...]:
    """Programs compiled one by one, for one ring, as the segments of one chain.

    Each keeps its operations, layouts and scales; parameters become those of the longest one
    and keys those of all. Raises `ModelError` when their rings or primes are not of one chain,
    or when a ciphertext carries several images.
    """
    if not 2 <= len(programs) <= MOST_SEGMENTS:
        raise ModelError(f"a refreshed tail has 2 to {MOST_SEGMENTS} segments, not {len(programs)}")
    longest = max((p.spec.parameters for p in programs), key=lambda p: p.max_level)
    for program in programs:
        if not _begins(program.spec.parameters, longest):
            raise ModelError("segments of one tail are compiled for one ring and one chain of primes")
        if program.spec.lanes != 1:
            raise ModelError("a refreshed tail takes one image at a time: compile it with one lane")
    keys = united(programs)
    made: list[Program] = []
    for index, program in enumerate(programs):
        lead = made[0].spec.program_id if made else ""
        place = Segment(index, len(programs), lead)
        draft = replace(program.spec, parameters=longest, keys=keys, segment=place)
        made.append(Program(finish(program.ops, draft), program.ops))
    return tuple(made)


def united(programs: Sequence[Program]) -> tuple[KeyNeed, ...]:
    """The evaluation keys that some of the programs need, each at the highest level."""
    listed = itertools.chain.from_iterable(key_needs(p.ops, p.spec.parameters) for p in programs)
    needs: dict[int, int] = {}
    for key in listed:
        needs[key.element] = max(needs.get(key.element, 0), key.level)
    return tuple(KeyNeed(element, needs[element]) for element in sorted(needs))


def _begins(own: Parameters, longest: Parameters) -> bool:
    same = own.ring_degree == longest.ring_degree and own.special == longest.special
    return same and own.primes == longest.primes[: len(own.primes)]


def check_programs(programs: Sequence[Program]) -> None:
    """Raises `ModelError` unless these are the segments of one chain, all of them and in order, and
    their keys exactly those that they need."""
    check_chain([program.spec for program in programs])
    if programs[0].spec.keys != united(programs):
        raise ModelError("the keys of a refreshed tail do not follow from its segments")


__all__ = ["Division", "Run", "chained", "check_programs", "compile_runs", "divide", "fewest", "united"]
