"""Plans for a tail: what each way to arrange it would cost, and the one that an objective wants.

Nothing here looks at values: a plan needs the sizes of the layers and which weights
are zero, no calibration data and no keys. Searching is `blindtail.he.schedule`'s; it
keeps what no other choice beats in price and keys. Where more than these two count,
it runs for several prices: a bound on something else is met by weighing it (Everett,
Operations Research 1963: what a price makes best is best for the amount it uses).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from blindtail.errors import ModelError
from blindtail.he import cost, schedule, slotmaps
from blindtail.he.container import HEADER_BYTES, SEED_BYTES
from blindtail.he.layers import Affine, Layer, squares_only
from blindtail.he.objective import METRICS, Costs, NoPlan, Objective
from blindtail.he.operations import MapOp
from blindtail.he.packing import packed_bytes
from blindtail.he.params import Parameters
from blindtail.he.program import Program
from blindtail.he.schedule import State, Step, Weights
from blindtail.he.spec import Layout

#: Smallest period of a reply: 2 * 16 coefficients of c0 travel.
REPLY_PERIOD = 16
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
    found = sorted(_plans(squares_only(layers), lanes, ring_degree, prices), key=_by_total)
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
    maps = squares_only(layers)
    wanted = _weights(objective)
    found = list(_plans(maps, lanes, ring_degree, [wanted]))
    if {"online_s", "memory_bytes", "total_s"} & set(objective.at_most):
        # What the wanted price makes best may break these bounds: look for what else there is.
        others = [
            Weights(wanted.total_s + total, wanted.online_s + online, wanted.plain_bytes + plain)
            for total, online, plain in itertools.product((0.0, 1.0), _ONLINE, _BYTES)
        ]
        found += _plans(maps, lanes, ring_degree, others)
    fitting = [plan for plan in found if objective.admits(plan.costs)]
    if not fitting:
        raise NoPlan(_unreachable(objective, found))
    return sorted(fitting, key=lambda plan: (objective.value(plan.costs), plan.costs.key_bytes))


def costs_of(program: Program) -> Costs:
    """The same costs of a compiled program, from its operations."""
    spec, n = program.spec, program.spec.parameters.ring_degree
    maps = [op for op in program.ops if isinstance(op, MapOp)]
    plain = sum(len(op.diagonals) * (op.level + 2) + op.level for op in maps)
    counts = cost.count_part(program.ops, "online")
    online = cost.seconds(schedule.BACKEND, n, counts[:2], one=cost.BARE, part="online")
    online += cost.seconds(schedule.BACKEND, n, counts[2:], request=False)
    expanded = sum(_expanded_bytes(n, key.level) for key in spec.keys)
    return Costs(
        total_s=program.predicted_s(schedule.BACKEND),
        online_s=online,
        uplink_bytes=spec.uplink_bytes,
        key_bytes=spec.key_bytes,
        memory_bytes=plain * n * schedule.WORD_BYTES + expanded,
    )


def rings(levels: int, ring_degree: int | None = None) -> list[Parameters]:
    """Parameter sets worth a look: the smallest ring that is secure, and the one above.

    One ring up doubles slots and uplink: it pays when the activation needs it. Raises `ModelError`.
    """
    first = Parameters.create(levels, ring_degree)
    bigger = first.ring_degree * 2
    if ring_degree is not None or bigger > 32768:
        return [first]
    return [first, Parameters.create(levels, bigger)]


def ways_in(
    maps: Sequence[Affine], parameters: Parameters, lanes: int
) -> tuple[list[tuple[Layout, slotmaps.Arrangement]], int]:
    """Layouts at the cut with the first map's arrangement, and the period of the logits, in positions.

    The last map is always an outer sum, of the period that replies are cut to.
    """
    last = max(slotmaps.power_of_two(maps[-1].weight.shape[0]), REPLY_PERIOD // lanes)
    only = last if len(maps) == 1 else None
    return slotmaps.first_maps(maps[0].weight, parameters.slots, lanes, only), last


def _plans(
    maps: Sequence[Affine], lanes: int, ring_degree: int | None, prices: Sequence[Weights]
) -> Iterator[Plan]:
    problem: ModelError | None = None
    for parameters in rings(2 * len(maps) - 1, ring_degree):
        try:
            firsts, last = ways_in(maps, parameters, lanes)
            found = [
                _plan(state, parameters, len(maps) > 1)
                for weights in prices
                for state in schedule.search(maps, firsts, parameters, last, weights=weights)
            ]
        except ModelError as error:
            problem = error
            continue
        # A larger ring costs more of everything: it is for what does not fit.
        yield from found
        return
    assert problem is not None
    raise problem


def _plan(state: State, parameters: Parameters, squares: bool) -> Plan:
    n = parameters.ring_degree
    residues = sum(packed_bytes(n, q.bit_length()) for q in parameters.primes)
    expanded = sum(_expanded_bytes(n, level) for level in state.needs.values())
    if squares:
        expanded += _expanded_bytes(n, parameters.max_level - 1)
    costs = Costs(
        total_s=state.spent.total_s,
        online_s=state.spent.online_s,
        uplink_bytes=HEADER_BYTES + SEED_BYTES + residues,
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
        least = min(plan.costs.of(name) for plan in found)
        if least > bound:
            short.append(f"{name} <= {bound:g} (the least is {least:.4g})")
    if short:
        return f"no plan keeps {', '.join(short)}: allow more, make layers smaller, or cut later"
    told = ", ".join(f"{name} <= {bound:g}" for name, bound in objective.at_most.items())
    return f"no plan keeps {told} at once, though each can be kept alone: relax one of them"


def _by_total(plan: Plan) -> tuple[float, int]:
    return plan.costs.total_s, plan.costs.key_bytes


__all__ = ["REPLY_PERIOD", "Plan", "best", "costs_of", "front", "ranked", "rings", "ways_in"]
