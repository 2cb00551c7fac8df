"""Plans for a tail: what each way to arrange it would cost, and the one that an objective wants.

Nothing here looks at values: a plan needs the sizes of the layers and which weights
are zero, no calibration data and no keys. Searching is `blindtail.he.schedule`'s; it
keeps what no other choice beats in price and keys. Where more than these two count,
it runs for several prices: a bound on something else is met by weighing it (Everett,
Operations Research 1963: what a price makes best is best for the amount it uses).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from blindtail.errors import ModelError
from blindtail.he import cost, grids, schedule, slotmaps
from blindtail.he.container import HEADER_BYTES, SEED_BYTES
from blindtail.he.elementwise import Linear
from blindtail.he.layers import Layer
from blindtail.he.layout import Layout
from blindtail.he.normal import Normal, normalised
from blindtail.he.objective import DISAGREEMENT, METRICS, UPLINK_S, Costs, NoPlan, Objective
from blindtail.he.packing import packed_bytes
from blindtail.he.params import MAX_LOG2_Q_128, PRIME_BITS, PRIME_SIZES, Parameters
from blindtail.he.program import Program
from blindtail.he.schedule import State, Step, Weights

REPLY_PERIOD = slotmaps.LEAST_PERIOD
#: Prices of a second online, and of a byte of plaintexts, in seconds of a whole evaluation: a program
#: of 10 MB that takes 5 ms is as much one as the other at 5e-10.
_ONLINE, _BYTES = (0.0, 1.0, 10.0), (0.0, 5e-11, 5e-10, 5e-9)


@dataclass(frozen=True, eq=False)
class Plan:
    """One way to run a tail: parameters, layout at the cut, a step for each map, and what it costs."""

    parameters: Parameters
    first: Layout
    steps: tuple[Step, ...]
    costs: Costs

    @property
    def lanes(self) -> int:
        return self.first.lanes

    @property
    def complex_slots(self) -> bool:
        return self.first.imaginary is not None

    def describe(self) -> dict[str, object]:
        """For people and JSON."""
        return {
            "ring_degree": self.parameters.ring_degree,
            "prime_bits": self.parameters.primes[-1].bit_length(),
            "lanes": self.lanes,
            "complex_slots": self.complex_slots,
            "maps": [
                {
                    "sum": step.arrangement.kind,
                    "offsets": step.arrangement.offsets // step.arrangement.stride,
                    "baby": step.baby // step.arrangement.stride,
                    "folds": [len(group) for group in step.folds],
                }
                for step in self.steps
            ],
            **{name: self.costs.of(name) for name in METRICS},
        }


def front(layers: Sequence[Layer], *, lanes: int = 1, ring_degree: int | None = None) -> list[Plan]:
    """Plans that no other beats in all of `METRICS`, fastest first. Takes about a second.

    lanes, ring_degree  as for `compile_tail`

    Raises `ModelError` when no ring fits.
    """
    prices = [Weights(1.0, online, plain) for online, plain in itertools.product(_ONLINE, _BYTES)]
    found = sorted(_plans(normalised(layers), lanes, ring_degree, prices), key=_by_total)
    kept: list[Plan] = []
    for plan in found:
        if not any(other.costs.beats(plan.costs) or other.costs == plan.costs for other in kept):
            kept = [other for other in kept if not plan.costs.beats(other.costs)] + [plan]
    return sorted(kept, key=_by_total)


def best(
    layers: Sequence[Layer], objective: Objective, *, lanes: int = 1, ring_degree: int | None = None
) -> Plan:
    """The plan that `objective` wants; of those within 2% of it the one with fewest bytes of keys.

    Raises as `ranked` does.
    """
    found = ranked(layers, objective, lanes=lanes, ring_degree=ring_degree)
    least = objective.value(found[0].costs)
    close = [plan for plan in found if objective.value(plan.costs) <= schedule.CLOSE * least]
    return min(close, key=lambda plan: (plan.costs.key_bytes, objective.value(plan.costs)))


def ranked(
    layers: Sequence[Layer], objective: Objective, *, lanes: int = 1, ring_degree: int | None = None
) -> list[Plan]:
    """Plans within the objective's bounds, the best first; not all there are, but the best few.

    lanes, ring_degree  as for `compile_tail`

    Raises `NoPlan` when none keeps the bounds, naming what the least would be, and
    `ModelError` when no ring fits.
    """
    tail, problem = normalised(layers), NoPlan("")
    for bits in sizes(objective):
        try:
            return fitting(tail, objective, lanes, ring_degree, bits=bits)
        except NoPlan as error:
            problem = error
        except ModelError:
            if bits == PRIME_BITS:  # of smaller primes there may be too few
                raise
    raise problem


def sizes(objective: Objective) -> list[int]:
    """Bits of primes worth a look, most first: fewer than usual where uplink is bounded or weighed,
    or where images say how large errors may be."""
    small = {"uplink_bytes", DISAGREEMENT} & set(objective.at_most) or objective.weights.get("uplink_bytes")
    return list(reversed(PRIME_SIZES)) if small and not objective.usual_primes else [PRIME_BITS]


def _uplink_bytes(parameters: Parameters) -> int:
    residues = sum(packed_bytes(parameters.ring_degree, q.bit_length()) for q in parameters.primes)
    return HEADER_BYTES + SEED_BYTES + residues


def fitting(
    tail: Normal,
    objective: Objective,
    lanes: int,
    ring_degree: int | None,
    *,
    bits: int = PRIME_BITS,
    precise: bool = False,
    known: dict[int, grids.Ways] | None = None,
) -> list[Plan]:
    """`ranked` with primes of so many bits.

    precise  only such whose last map has a periodic input, with several periods of the reply: fewer
             folds at the last level leave less noise in the logits
    known    by the number of slots: ways that are made already, and will be

    Raises as `ranked` does.
    """
    known, wanted = {} if known is None else known, _weights(objective)
    most = objective.at_most.get("uplink_bytes", math.inf)
    found = list(_plans(tail, lanes, ring_degree, [wanted], bits, precise, known, most))
    if {"online_s", "memory_bytes", "total_s"} & set(objective.at_most):
        # What the wanted price makes best may break these bounds: look for what else there is.
        others = [
            Weights(wanted.total_s + total, wanted.online_s + online, wanted.plain_bytes + plain)
            for total, online, plain in itertools.product((0.0, 1.0), _ONLINE, _BYTES)
        ]
        found += _plans(tail, lanes, ring_degree, others, bits, precise, known, most)
    good = [plan for plan in found if objective.admits(plan.costs)]
    if not good:
        raise NoPlan(_unreachable(objective, found))
    return sorted(good, key=lambda plan: (objective.value(plan.costs), plan.costs.key_bytes))


def costs_of(program: Program) -> Costs:
    """The same costs of a compiled program, from its operations."""
    spec, n = program.spec, program.spec.parameters.ring_degree
    linear = [op for op in program.ops if isinstance(op, Linear)]
    plain = sum(sum(1 for _ in op.steps()) * (op.level + 2) + op.level for op in linear)
    if program.is_chain:
        counts = cost.count_part(program.ops, "online")
        online = cost.seconds(schedule.BACKEND, n, counts[:2], one=cost.BARE, part="online")
        online += cost.seconds(schedule.BACKEND, n, counts[2:], request=False)
    else:
        online = program.predicted_s(schedule.BACKEND, part="online")
    expanded = sum(_expanded_bytes(n, key.level) for key in spec.keys)
    return Costs(
        total_s=program.predicted_s(schedule.BACKEND),
        online_s=online,
        uplink_bytes=spec.uplink_bytes,
        key_bytes=spec.key_bytes,
        memory_bytes=plain * n * schedule.WORD_BYTES + expanded,
    )


def fastest(tail: Normal, ring_degree: int | None = None, budget: int | None = None) -> Objective:
    """The least time within a budget of keys, in bytes; without it the usual one of the smallest ring.

    A byte of uplink counts as `UPLINK_S`: more ciphertexts save the server less than the link loses.
    """
    limit = budget or schedule.default_budget(rings(tail.depth, ring_degree)[0])
    return Objective({"total_s": 1.0, "uplink_bytes": UPLINK_S}, {"key_bytes": limit}, usual_primes=True)


def rings(levels: int, ring_degree: int | None = None, bits: int = PRIME_BITS) -> list[Parameters]:
    """Parameter sets worth a look: the smallest ring that is secure, and those above.

    One ring up doubles slots and uplink: it pays when the activation needs it. Raises `ModelError`.
    """
    found = [Parameters.create(levels, ring_degree, bits)]
    while ring_degree is None and 2 * found[-1].ring_degree in MAX_LOG2_Q_128:
        found.append(Parameters.create(levels, 2 * found[-1].ring_degree, bits))
    return found


def ways_in(
    tail: Normal, parameters: Parameters, lanes: int
) -> tuple[list[tuple[Layout, slotmaps.Arrangement]], int]:
    """Layouts at the cut with the first map's arrangement, and the period of the logits, in positions.

    The last map is always an outer sum, of the period that replies are cut to.
    """
    last = _last_period(tail, lanes)
    return grids.Ways(tail, parameters.slots, lanes).firsts(last), last


def _last_period(tail: Normal, lanes: int) -> int:
    return max(slotmaps.power_of_two(len(tail.maps[-1].bias)), REPLY_PERIOD // lanes)


def _periods(tail: Normal, last: int, positions: int) -> list[int]:
    """Of replies: the usual one, larger ones, and that of the last map's input: nothing to fold."""
    inputs = max(weight.shape[1] for _, weight in tail.sources(len(tail.maps) - 1))
    widest = max(last, min(slotmaps.power_of_two(inputs), positions))
    return sorted({widest, *(p for p in (last * 4**i for i in range(8)) if p < widest)})


def _plans(
    tail: Normal,
    lanes: int,
    ring_degree: int | None,
    prices: Sequence[Weights],
    bits: int = PRIME_BITS,
    precise: bool = False,
    known: dict[int, grids.Ways] | None = None,
    most_uplink: float = math.inf,
) -> Iterator[Plan]:
    problem: ModelError | None = None
    known = {} if known is None else known
    for number, parameters in enumerate(rings(tail.depth, ring_degree, bits)):
        try:
            slots, last = parameters.slots, _last_period(tail, lanes)
            ways = known.get(slots) or grids.Ways(tail, slots, lanes)
            known[slots] = ways
            ways.firsts(last)
            if (uplink := _uplink_bytes(parameters)) > most_uplink:
                raise NoPlan(_short([("uplink_bytes", most_uplink, uplink)]))  # before anything is searched
            if most_uplink < math.inf and bits < PRIME_BITS:
                # A bit more for some primes makes errors smaller.
                spare = int((most_uplink - uplink) // (parameters.ring_degree // 8))
                levels = parameters.max_level
                parameters = Parameters.create(levels, parameters.ring_degree, bits, spare)
            found = [
                _plan(state, parameters, schedule.relinearisation(tail, parameters.max_level))
                for period in (_periods(tail, last, slots // lanes) if precise else [last])
                for weights in prices
                for state in schedule.search(
                    tail,
                    ways.firsts(period),
                    parameters,
                    period,
                    weights=weights,
                    ways=ways,
                    periodic=precise,
                )
            ]
        except ModelError as error:
            problem = error
            if isinstance(error, NoPlan) or (number and not isinstance(error, slotmaps.TooWide)):
                break
            continue
        # A larger ring costs more of everything: it is for what does not fit.
        yield from found
        return
    assert problem is not None
    raise problem


def _plan(state: State, parameters: Parameters, relinearised: int) -> Plan:
    n = parameters.ring_degree
    expanded = sum(_expanded_bytes(n, level) for level in state.needs.values())
    if relinearised:
        expanded += _expanded_bytes(n, relinearised)
    costs = Costs(
        total_s=state.spent.total_s,
        online_s=state.spent.online_s,
        uplink_bytes=_uplink_bytes(parameters),
        key_bytes=state.key_bytes,
        memory_bytes=state.spent.plain_bytes + expanded,
    )
    return Plan(parameters, state.first, state.steps, costs)


def _expanded_bytes(n: int, level: int) -> int:
    """A key in memory: both halves of each digit, modulo each prime."""
    return 2 * (level + 2) * (level + 1) * n * schedule.WORD_BYTES


def _weights(objective: Objective) -> Weights:
    """What can be weighed from map to map; a grain of time decides where only the rest counts."""
    told = objective.weights
    total = told.get("total_s", 0.0)
    return Weights(max(total, 1e-12), told.get("online_s", 0.0), told.get("memory_bytes", 0.0))


def _unreachable(objective: Objective, found: Sequence[Plan]) -> str:
    """Which bounds no plan keeps even alone, or else that they contradict each other."""
    short = []
    for name, bound in objective.at_most.items():
        least = min(plan.costs.of(name) for plan in found) if name in METRICS else 0.0
        if least > bound:
            short.append((name, bound, least))
    if short:
        return _short(short)
    told = ", ".join(f"{name} <= {bound:g}" for name, bound in objective.at_most.items())
    return f"no plan keeps {told} at once, though each can be kept alone: relax one of them"


def _short(found: Sequence[tuple[str, float, float]]) -> str:
    told = ", ".join(f"{name} <= {bound:g} (the least is {least:.4g})" for name, bound, least in found)
    return f"no plan keeps {told}: allow more, make layers smaller, or cut later"


def _by_total(plan: Plan) -> tuple[float, int]:
    return plan.costs.total_s, plan.costs.key_bytes


__all__ = [
    "REPLY_PERIOD",
    "Plan",
    "best",
    "costs_of",
    "fastest",
    "fitting",
    "front",
    "ranked",
    "rings",
    "sizes",
    "ways_in",
]
