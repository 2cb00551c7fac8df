"""From layers and calibration data to a `Program`.

Steps: rewrite quadratics so that plain squares stand between affine maps;
choose the ring and the primes for the levels needed; choose outer or inner sums,
baby steps and fold groups (`blindtail.he.schedule`); choose scales that minimise
the predicted output error while every value fits its modulus with room
(|value| * scale < q / 4 at every step, from calibration data); size the reply.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from blindtail.errors import ConfigError, ModelError
from blindtail.he import choice, plan, precision, schedule
from blindtail.he.assemble import drafted
from blindtail.he.compatible import differences
from blindtail.he.completion import checked, completed
from blindtail.he.layers import FloatArray, Layer
from blindtail.he.layout import Layout
from blindtail.he.normal import Normal, normalised
from blindtail.he.objective import Costs, NoPlan, Objective
from blindtail.he.operations import MapOp, Term
from blindtail.he.params import MAX_LOG2_Q_128, Parameters
from blindtail.he.plan import REPLY_PERIOD
from blindtail.he.program import Program
from blindtail.he.scales import HEADROOM
from blindtail.he.schedule import KeysTooLarge, Step
from blindtail.he.slotmaps import TooWide
from blindtail.he.sparse import Sparse, compact
from blindtail.he.spec import TailSpec
from blindtail.he.stability import check, enforce
from blindtail.he.tiled_compiler import compile_tiling, compile_tiling_with_error
from blindtail.he.tiling import Tiling
from blindtail.progress import Progress, Span


def compile_tail(
    layers: Sequence[Layer],
    calibration: FloatArray,
    *,
    lanes: int = 1,
    ring_degree: int | None = None,
    like: TailSpec | None = None,
    key_budget_bytes: int | None = None,
    objective: Objective | None = None,
    held_out: FloatArray | None = None,
    margins: FloatArray | None = None,
    allow_unstable: bool = False,
    progress: Progress | Span | None = None,
) -> Program:
    """Compile alternating affine maps and quadratics into an encrypted program.

    calibration  activations at the cut, (n, features), n >= 1: they bound values
                 and weigh the noise; take them from training or validation data
    lanes        independent images per ciphertext, a power of two
    ring_degree  N; without it the smallest ring that is 128-bit secure and wide enough
    like         the tail that devices hold: the new program takes its place (`he.compatible`);
                 lanes and ring are then its own. Its layers must have the same sizes, and its
                 logits may be up to a quarter larger than those `like` was compiled for.
    key_budget_bytes  most bytes that the evaluation keys' container may have: more keys, less
                 time. Without it 30 MB for N = 8192 (`schedule.default_budget`), or as few as
                 possible where that is too little; of no effect with `like`
    objective    in place of the budget: what to have little of, and bounds (`blindtail.he.plan`). Where it
                 bounds or weighs uplink or bounds "disagreement", primes may be smaller; bounds on
                 "error" and "disagreement" are kept (`blindtail.he.precision`)
    held_out     other activations, (m, features): with them the stability gate runs first
                 (`blindtail.he.stability`); it warns, and refuses a tail whose values escape
                 unless `allow_unstable`. The program is the same with and without
    margins      activations whose margins a bound on "disagreement" is held against, (m, features): of
                 images that were not trained on, which are less sure of themselves. Without it those
                 held out, or else the calibration data
    progress     called with (done, total, what) at each stage; `done` never falls and ends at `total`.
                 What it raises ends the compile (`blindtail.progress`)

    Levels consumed: one a map, one a square. Raises `ModelError` with the
    layer's name and the way out, `KeysTooLarge` when no choice fits the budget,
    `NoPlan` when none keeps the objective's bounds.
    """
    tail = normalised(layers)
    x, whole = checked(calibration, tail.maps[0]), Span.of(progress)
    if held_out is not None:
        others = checked(held_out, tail.maps[0], "held-out")
        enforce(check(layers, x, others), "the tail", allow_unstable=allow_unstable)
    if like is not None:
        if objective is not None:
            raise ConfigError("devices hold the keys: a tail that takes another's place has no objective")
        return whole.ended(
            _checked_like(_compile(tail, x, like.lanes, like.parameters, like, span=whole), like)
        )
    if lanes < 1 or lanes & (lanes - 1):
        raise ModelError(f"lanes must be a power of two, not {lanes}")
    _check_depth(tail)
    if objective is not None:
        if key_budget_bytes is not None:
            raise ConfigError("give the budget of keys as a bound of the objective: at_most key_bytes")
        if precision.wanted(objective):
            rows = next((given for given in (margins, held_out) if given is not None), x)
            objective = precision.resolved(objective, tail(checked(rows, tail.maps[0], "held-out")))
            return whole.ended(_precise(tail, x, objective, lanes, ring_degree, whole))
    looking, making = whole.parts(1, 3)
    several, plans = looking.parts(1, 1)
    several.at(0.0, "looking at plans")
    wanted = objective or plan.fastest(tail, ring_degree, key_budget_bytes)
    one, rest = making.parts(3, 1)

    def in_one() -> tuple[float, Program | plan.Plan]:
        if objective is None:
            program = _in_one(tail, x, lanes, ring_degree, key_budget_bytes, one)
            return wanted.value(plan.costs_of(program)), program
        plans.at(0.0, "looking at plans")
        made = plan.best(layers, objective, lanes=lanes, ring_degree=ring_degree)
        return objective.value(made.costs), made

    found = choice.cheaper(tail, wanted, lanes, ring_degree, in_one, several)
    if isinstance(found, Tiling):
        return whole.ended(compile_tiling(tail, x, found, rest))
    return whole.ended(found if isinstance(found, Program) else compile_plan(layers, x, found, making))


def _in_one(
    tail: Normal, x: FloatArray, lanes: int, ring_degree: int | None, budget: int | None, span: Span
) -> Program:
    """With every value in one ciphertext, in the smallest ring that takes that."""
    problem: ModelError | None = None
    for number, parameters in enumerate(plan.rings(tail.depth, ring_degree)):
        try:
            return _compile(tail, x, lanes, parameters, budget=budget, span=span)
        except KeysTooLarge:
            raise  # a larger ring has larger keys
        except ModelError as error:
            problem = error
            if number and not isinstance(error, TooWide):
                break
    assert problem is not None
    raise problem


def _precise(
    tail: Normal, x: FloatArray, objective: Objective, lanes: int, ring_degree: int | None, span: Span
) -> Program:
    """The cheapest program in one ciphertext or several that keeps the bound on the error, as compiled."""
    one_span, several_span = span.parts(2, 1)
    one: Program | None = None
    problem, value = ModelError(""), math.inf
    try:
        one, costs = _precise_in_one(tail, x, objective, lanes, ring_degree, one_span)
        value = objective.value(costs)
    except (TooWide, NoPlan) as refused:
        problem = refused
    if one is not None and choice.is_large(tail):
        return one
    only = isinstance(problem, TooWide)
    several, least = _precise_in_several(
        tail, x, objective, lanes, ring_degree, value, several_span, only=only
    )
    found = several or one
    if found is None:
        raise precision.too_coarse(objective, least) if least < math.inf else problem
    return found


def _precise_in_one(
    tail: Normal, x: FloatArray, objective: Objective, lanes: int, ring_degree: int | None, span: Span
) -> tuple[Program, Costs]:
    """The first of `precision.candidates` whose compiled program keeps the bound on the error."""
    largest, least, off, coarse = float(np.abs(tail(x)).max()), math.inf, 1.0, 0
    span.at(0.0, "looking at plans")
    for made, estimate in precision.candidates(tail, x, objective, lanes, ring_degree):
        accepted, prime = precision.bound(objective, made.parameters), made.parameters.primes[-1]
        if estimate * off > accepted or (not estimate and prime <= coarse):
            continue
        program, deviation = _arranged_with_error(
            tail, x, made.parameters, made.first, made.steps, span=span.parts(1, 3)[1]
        )
        error = precision.judged(objective, program, deviation, largest)
        if error <= accepted:
            return program, made.costs
        least, off = min(least, error), max(off, error / estimate if estimate else 1.0)
        coarse = max(coarse, prime)  # where nothing is estimated, such primes do not do
    raise precision.too_coarse(objective, least)


def _precise_in_several(
    tail: Normal,
    x: FloatArray,
    objective: Objective,
    lanes: int,
    ring_degree: int | None,
    below: float,
    span: Span,
    *,
    only: bool,
) -> tuple[Program | None, float]:
    """The same over several ciphertexts, where such a program is worth less than `below`; the least error."""
    largest, least, coarse = float(np.abs(tail(x)).max()), math.inf, 0
    looking, making = span.parts(1, 2)
    every = choice.tilings(tail, objective, lanes, ring_degree, looking, only=only)
    found: Iterable[Tiling] = (made for made in every if objective.value(made.costs) < below)
    if precision.all_compete(objective):
        found = sorted(found, key=lambda made: objective.value(made.costs))
    for made in found:
        prime = made.parameters.primes[-1]
        if prime <= coarse:  # larger ones are too coarse already
            continue
        program, deviation = compile_tiling_with_error(tail, x, made, making)
        error = precision.judged(objective, program, deviation, largest)
        if error <= precision.bound(objective, made.parameters):
            return program, error
        least, coarse = min(least, error), max(coarse, prime)
    return None, least


def compile_plan(
    layers: Sequence[Layer],
    calibration: FloatArray,
    chosen: plan.Plan,
    progress: Progress | Span | None = None,
) -> Program:
    """Compile what `blindtail.he.plan` made for these very layers; otherwise like `compile_tail`.

    Raises `ModelError` when the plan is not for layers of these sizes.
    """
    tail = normalised(layers)
    x = checked(calibration, tail.maps[0])
    sizes = [step.arrangement.out_layout.size for step in chosen.steps]
    if chosen.first.size != x.shape[1] or sizes != [len(step.bias) for step in tail.maps]:
        raise ModelError("this plan was made for layers of other sizes: plan again")
    whole = Span.of(progress)
    return whole.ended(_arranged(tail, x, chosen.parameters, chosen.first, chosen.steps, span=whole))


def check_depth(layers: Sequence[Layer]) -> None:
    """Raises `ModelError` naming the activation to cut after, where no ring holds the levels of these."""
    _check_depth(normalised(layers))


def _check_depth(tail: Normal) -> None:
    most = max(MAX_LOG2_Q_128[n] for n in MAX_LOG2_Q_128) // 30 - 2
    if tail.depth > most:
        depths = tail.depths[1][1:]
        left = [a.name for a, at in zip(tail.activations, depths, strict=True) if tail.depth - at <= most]
        raise ModelError(
            f"tail layer {left[0]}: with the {len(tail.activations)} activations of this tail it consumes "
            f"{tail.depth} levels, and the largest ring holds {most} at 128 bits: cut the network later "
            f"(after {left[0]}), or use fewer activations, or of lower degree"
        )


def _checked_like(program: Program, like: TailSpec) -> Program:
    differing = differences(program.spec, like)
    if differing:
        raise ModelError(
            f"this tail cannot take the place of the one that devices hold: it differs in "
            f"{', '.join(differing)}; keep the sizes of its layers, or hand out a new edge.bt"
        )
    return program


def _compile(
    tail: Normal,
    x: FloatArray,
    lanes: int,
    parameters: Parameters,
    like: TailSpec | None = None,
    budget: int | None = None,
    span: Span | None = None,
) -> Program:
    if like is not None and parameters.max_level != tail.depth:
        raise ModelError(
            f"the tail consumes {tail.depth} levels, the one that devices hold "
            f"{parameters.max_level}: keep the number of its layers, or hand out a new edge.bt"
        )
    looking, rest = Span.of(span).parts(1, 2)
    looking.at(0.0, "looking at plans")
    first, steps = _schedule(tail, lanes, parameters, like, budget)
    return _arranged(tail, x, parameters, first, steps, like, rest)


def _arranged(
    tail: Normal,
    x: FloatArray,
    parameters: Parameters,
    first: Layout,
    steps: Sequence[Step],
    like: TailSpec | None = None,
    span: Span | None = None,
) -> Program:
    """The program of a choice that is made: scales, operations, the form of the reply."""
    return _arranged_with_error(tail, x, parameters, first, steps, like, span)[0]


def _arranged_with_error(
    tail: Normal,
    x: FloatArray,
    parameters: Parameters,
    first: Layout,
    steps: Sequence[Step],
    like: TailSpec | None = None,
    span: Span | None = None,
) -> tuple[Program, float]:
    """And the standard deviation of a logit on `native`, in the noisiest slot."""
    arranged = [step.arrangement for step in steps]
    scattered = arranged[-1].scattered
    drafting, rest = Span.of(span).parts(1, 1)
    drafting.at(0.0, "layouts")
    draft = drafted(tail, _maps(tail, steps, first), arranged, first, parameters.max_level, x, drafting)
    last = steps[-1].arrangement
    return completed(
        draft,
        parameters,
        first,
        last.out_layout,
        last.period * first.lanes,
        x,
        rest,
        like=like,
        scattered=scattered,
    )


def _schedule(
    tail: Normal, lanes: int, parameters: Parameters, like: TailSpec | None, budget: int | None
) -> tuple[Layout, list[Step]]:
    firsts, last = plan.ways_in(tail, parameters, lanes)
    if like is None:
        return schedule.choose(tail, firsts, parameters, last, budget=budget)
    # Zeros among the new weights may offer another layout: devices keep theirs.
    firsts = [way for way in firsts if way[0] == like.input_layout] or firsts
    return schedule.choose(tail, firsts, parameters, last, held=like.keys)


def _maps(tail: Normal, steps: Sequence[Step], first: Layout) -> list[MapOp]:
    """Each map with its layouts, not at its level yet, nor with its scales."""
    layouts = [first, *(how.arrangement.out_layout for how in steps)]
    found = []
    for index, (step, how) in enumerate(zip(tail.maps, steps, strict=True)):
        made = how.arrangement
        (value, weight), *others = [(at, compact(w)) for at, w in tail.sources(index)]
        # A convolution's, for planning again; dense maps have no use for them.
        told = isinstance(weight, Sparse) or made.kind == "grid"
        found.append(
            MapOp(
                name=step.name,
                level=0,
                weight=weight,
                bias=step.bias,
                in_layout=layouts[value],
                out_layout=made.out_layout,
                rows=made.rows,
                offsets=made.offsets,
                stride=made.stride,
                baby=how.baby,
                folds=how.folds,
                in_scale=2.0,
                out_scale=2.0,
                others=tuple(
                    Term(1, other, layouts[at], offsets[-1] + 1, 1, 2.0)
                    for (at, other), offsets in zip(others, made.more, strict=True)
                ),
                shapes=step.shapes if told and value == index else None,
            )
        )
    return found


__all__ = [
    "HEADROOM",
    "REPLY_PERIOD",
    "KeysTooLarge",
    "NoPlan",
    "Objective",
    "check_depth",
    "compile_plan",
    "compile_tail",
]
