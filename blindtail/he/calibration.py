"""What operations of `native` take on this machine, measured within a second, for predictions.

A short run of the engine's own code on keys of its own (`_native.Timer.stages`) plays the steps of an
evaluation one after the other: a request is read, decomposed, rotated at the top level and at
level 0, multiplied with diagonals, divided. From their means follow the seconds of `cost.Reference`:

    transform       (decompose + divide) / their transforms
    turn, key pair  a row of a rotation, one prime, both halves, takes (l + 1) pairs + 2 turns;
                    solved from the top level's row and level 0's, less the copies of their group
    limb pass       a diagonal's product / 2 (k + 1)
    copy            limbs scaled and added
    request         reading, packing and hashing a container, expanding its seed

Memory decides the rest. Keys and plaintexts are read once in an evaluation, so that a machine's
caches either hold all of them from one evaluation to the next, or next to nothing; in between
lies a slope, since caches are shared and not quite least-recently-used. So the run goes round in
working sets of several sizes (`SIZES`), from what fits a core's own cache to what has to come
from memory every time, and a program's seconds are interpolated at the bytes of its own keys
and plaintexts, along the logarithm of the bytes. Nothing is said about what other evaluations leave of the
caches: cells correct predictions by what they measure.

Compiled programs do not depend on any of this: the compiler keeps to `cost.REFERENCE`. Of `seal`
and `clear` only those constants are known; nothing is measured.
"""

from __future__ import annotations

import importlib
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from blindtail.errors import ConfigError
from blindtail.he import container
from blindtail.he.cost import Reference
from blindtail.he.packing import packed_bytes
from blindtail.he.params import Parameters

#: Bytes of the working sets, in the order they are measured: a budget that is too short ends early.
SIZES = (24_000_000, 64_000_000, 4_000_000, 48_000_000, 12_000_000, 32_000_000, 16_000_000)
#: Rotations (about as many as share a decomposition in programs) and diagonals of one run.
_ROTATIONS, _DIAGONALS = 2, 8
#: Shares of a row that its pairs may have. More than all of it: where memory decides, a turn hides the rest.
_LEAST_PAIRS, _MOST_PAIRS = 0.25, 1.5
#: Runs of one turn that count, and turns of each working set.
_RUNS, _MOST_ROUNDS = 6, 5


class Timer(Protocol):
    """`_native.Timer`, or what a test puts in its place."""

    def stages(self, bytes: int, rotations: int, diagonals: int, times: int) -> Sequence[Sequence[float]]: ...


@dataclass(frozen=True)
class Calibration:
    """Seconds of single operations by working set, for one ring, its primes and a number of threads.

    points  (bytes of keys and plaintexts, seconds at N = 8192), rising
    took_s  what measuring took
    """

    points: tuple[tuple[int, Reference], ...]
    took_s: float = 0.0

    def at(self, working_bytes: float) -> Reference:
        """Between two points along the logarithm of the bytes; beyond them, the nearest."""
        if working_bytes <= self.points[0][0]:
            return self.points[0][1]
        for (low, below), (high, above) in itertools.pairwise(self.points):
            if working_bytes <= high:
                share = math.log(working_bytes / low) / math.log(high / low)
                a, b = asdict(below), asdict(above)
                return Reference(**{name: a[name] + share * (b[name] - a[name]) for name in a})
        return self.points[-1][1]

    def to_json(self) -> dict[str, Any]:
        return {"took_s": self.took_s, "points": [[size, asdict(one)] for size, one in self.points]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Calibration:
        """Raises `ConfigError` for anything that `to_json` did not make."""
        try:
            points = tuple((int(size), Reference(**one)) for size, one in data["points"])
            _check(points)
            return cls(points, float(data["took_s"]))
        except (LookupError, TypeError, ValueError) as error:
            raise ConfigError(f"a stored calibration is damaged ({error})") from error


def _check(points: Sequence[tuple[int, Reference]]) -> None:
    """Raises `ValueError` unless sizes rise and predictions can be made of the seconds."""
    if not points or any(b <= a for (a, _), (b, _) in itertools.pairwise(points)):
        raise ValueError("sizes do not rise")
    if not all(_credible(one) for _, one in points):
        raise ValueError("its seconds are no seconds")


def _credible(one: Reference) -> bool:
    """A turn may be below zero: where memory decides, it hides the rest."""
    needed = (one.transform_s, one.key_pair_s, one.limb_pass_s, one.request_s)
    others = (one.expand_s, one.copy_s)
    return all(0 < s < 1 for s in needed) and all(0 <= s < 1 for s in others) and abs(one.turn_s) < 1


def word_bytes(parameters: Parameters) -> int:
    """Of a residue in `native`'s keys and plaintexts: 32 bits where the primes allow."""
    primes = parameters.key_primes
    return 4 if max(primes) < 1 << 30 and max(primes) < 2 * min(primes) else 8


def open_timer(parameters: Parameters, threads: int = 1, instructions: str = "") -> Timer:
    """Raises `ConfigError` where `native` was not built, or cannot time such a ring."""
    try:
        native: Any = importlib.import_module("blindtail.he._native")
        timer: Timer = native.Timer(
            parameters.ring_degree.bit_length() - 1,
            list(parameters.key_primes),
            instructions=instructions,
            word_bits=8 * word_bytes(parameters),
            rotations=_DIAGONALS,  # as many rotated inputs as diagonals
            threads=threads,
        )
        return timer
    except (ImportError, ValueError) as error:
        raise ConfigError(f"the native backend cannot be calibrated here: {error}") from error


def calibrate(
    parameters: Parameters,
    *,
    threads: int = 1,
    instructions: str = "",
    budget_s: float = 1.0,
    timer: Timer | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Calibration:
    """Measures on this machine, in turns that a busy moment spoils alike.

    budget_s  about so long; one working set is measured in any case
    threads   that share one evaluation; instructions as in `NativeEvaluator`

    Raises `ConfigError` where nothing can be measured, or nothing credible was.
    """
    start_s = clock()
    timer = timer or open_timer(parameters, threads, instructions)
    contain = _container(parameters)
    found: dict[int, list[Sequence[float]]] = {}
    container_s, slowest_s = [], 0.0
    for turn in range(_MOST_ROUNDS * len(SIZES)):
        before_s = clock()
        if turn and before_s - start_s + slowest_s > budget_s:
            break
        size = SIZES[turn % len(SIZES)]
        warm = _round(parameters, size)
        runs = timer.stages(size, _ROTATIONS, _DIAGONALS, warm + _RUNS)
        found.setdefault(size, []).extend(runs[warm:])
        container_s.append(contain())  # by now its code and its bytes have left the caches
        slowest_s = max(slowest_s, clock() - before_s)
    every = ((size, _reference(parameters, found[size], _typical(container_s))) for size in sorted(found))
    points = tuple((size, one) for size, one in every if _credible(one))
    if not points:
        raise ConfigError("calibrating the native backend gave nothing credible: the machine was too busy")
    return Calibration(points, clock() - start_s)


def _round(parameters: Parameters, size: int) -> int:
    """Runs that read a working set once."""
    k, n = len(parameters.primes), parameters.ring_degree
    rows = _ROTATIONS * (2 * k * (k + 1) + 4) + _DIAGONALS * (k + 1)
    return math.ceil(size / (rows * n * word_bytes(parameters)))


def _reference(parameters: Parameters, runs: Sequence[Sequence[float]], container_s: float) -> Reference:
    """From runs of (open, expand, decompose, rotations, low, copies, products, divide), seconds each."""
    stages = map(_typical, zip(*runs, strict=True))
    opened, expand, decompose, rotations, low, copies, products, divide = stages
    k, width = len(parameters.primes), parameters.ring_degree / 8192
    growth = width * math.log2(parameters.ring_degree) / 13
    copy = copies / (2 * k)
    # A busy moment in one of them must not make copies more than half of a row, nor pairs nothing of it, or
    # more than all.
    each = ((rotations / (k + 1)), (low / 2))
    row, low_row = (max(s - 2 * copy, s / 2) / _ROTATIONS for s in each)
    pair = min(max((row - low_row) / (k - 1), _LEAST_PAIRS * row / k), _MOST_PAIRS * row / k)
    turn = (row - k * pair) / 2
    return Reference(
        transform_s=(decompose + divide) / (k * (k + 1) + 2 * (k + 1)) / growth,
        key_pair_s=pair / width,
        limb_pass_s=products / _DIAGONALS / (2 * (k + 1)) / width,
        request_s=(opened + expand + container_s) / width,
        expand_s=expand / width,
        turn_s=turn / width,
        copy_s=copy / width,
    )


def _typical(seconds: Sequence[float]) -> float:
    """The mean without what somebody else's work spoiled: more than twice the median.

    Not the median, since an evaluation is the sum of many steps, and so is its median of their means.
    """
    most_s = 2 * statistics.median(seconds)
    return statistics.fmean([s for s in seconds if s <= most_s] or [math.nan])


def _container(parameters: Parameters) -> Callable[[], float]:
    """Gives the seconds of checking a request's container and making a reply's."""
    limb = packed_bytes(parameters.ring_degree, parameters.primes[0].bit_length())
    request, body = container.sample(bytes(limb * len(parameters.primes))), bytes(limb)

    def took() -> float:
        start_s = time.perf_counter()
        container.open_sample(request)
        container.sample(body)
        return time.perf_counter() - start_s

    return took


__all__ = ["SIZES", "Calibration", "Timer", "calibrate", "open_timer", "word_bytes"]
