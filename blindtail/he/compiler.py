"""From layers and calibration data to a `Program`.

Steps: rewrite quadratics so that plain squares stand between affine maps;
choose the ring and the primes for the levels needed; choose outer or inner sums,
baby steps and fold groups (`blindtail.he.schedule`); choose scales that minimise
the predicted output error while every value fits its modulus with room
(|value| * scale < q / 4 at every step, from calibration data); size the reply.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from blindtail.errors import ConfigError, ModelError
from blindtail.he import noise, plan, schedule
from blindtail.he.compatible import differences
from blindtail.he.container import HEADER_BYTES
from blindtail.he.layers import Affine, FloatArray, Layer, evaluate_clear, squares_only
from blindtail.he.objective import NoPlan, Objective
from blindtail.he.operations import MapOp, Op, SquareOp, fold, landing_scale
from blindtail.he.packing import packed_bytes
from blindtail.he.params import MAX_LOG2_Q_128, Parameters
from blindtail.he.plan import REPLY_PERIOD
from blindtail.he.program import Program, finish
from blindtail.he.scales import HEADROOM, Stats, choose_scales, propagate
from blindtail.he.schedule import KeysTooLarge, Step
from blindtail.he.spec import Layout, ReplyForm, TailSpec
from blindtail.he.stability import check, enforce

#: A reply may lose low bits of c1 as long as the error they cause stays below the
#: noise, or below this share of the largest logit (one standard deviation).
REPLY_PRECISION = 2.0**-15
#: Two bits fewer are lost where the reply then still fits these bytes (at N = 8192).
REPLY_BYTES, FINER_BITS = 26_000, 2
_SAMPLES = 64


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
    allow_unstable: bool = False,
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
    objective    in place of the budget: what to have little of, and bounds (`blindtail.he.plan`)
    held_out     other activations, (m, features): with them the stability gate runs first
                 (`blindtail.he.stability`); it warns, and refuses a tail whose values escape
                 unless `allow_unstable`. The program is the same with and without

    Levels consumed: one a map, one a square. Raises `ModelError` with the
    layer's name and the way out, `KeysTooLarge` when no choice fits the budget,
    `NoPlan` when none keeps the objective's bounds.
    """
    maps = squares_only(layers)
    x = _checked(calibration, maps[0])
    if held_out is not None:
        others = _checked(held_out, maps[0], "held-out")
        enforce(check(layers, x, others), "the tail", allow_unstable=allow_unstable)
    if like is not None:
        if objective is not None:
            raise ConfigError("devices hold the keys: a tail that takes another's place has no objective")
        return _checked_like(_compile(maps, x, like.lanes, like.parameters, like), like)
    if lanes < 1 or lanes & (lanes - 1):
        raise ModelError(f"lanes must be a power of two, not {lanes}")
    _check_depth(layers, 2 * len(maps) - 1)
    if objective is not None:
        if key_budget_bytes is not None:
            raise ConfigError("give the budget of keys as a bound of the objective: at_most key_bytes")
        made = plan.best(layers, objective, lanes=lanes, ring_degree=ring_degree)
        return compile_plan(layers, x, made)
    problem: ModelError | None = None
    for parameters in plan.rings(2 * len(maps) - 1, ring_degree):
        try:
            return _compile(maps, x, lanes, parameters, budget=key_budget_bytes)
        except KeysTooLarge:
            raise  # a larger ring has larger keys
        except ModelError as error:
            problem = error
    assert problem is not None
    raise problem


def compile_plan(layers: Sequence[Layer], calibration: FloatArray, chosen: plan.Plan) -> Program:
    """Compile what `blindtail.he.plan` made for these very layers; otherwise like `compile_tail`.

    Raises `ModelError` when the plan is not for layers of these sizes.
    """
    maps = squares_only(layers)
    x = _checked(calibration, maps[0])
    sizes = [step.arrangement.out_layout.size for step in chosen.steps]
    if chosen.first.size != x.shape[1] or sizes != [step.weight.shape[0] for step in maps]:
        raise ModelError("this plan was made for layers of other sizes: plan again")
    return _arranged(maps, x, chosen.parameters, chosen.first, chosen.steps)


def _check_depth(layers: Sequence[Layer], levels: int) -> None:
    """Raises `ModelError` naming the activation to cut after, where no ring holds so many levels."""
    most = max(MAX_LOG2_Q_128[n] for n in MAX_LOG2_Q_128) // 30 - 2
    squares = [layer.name for layer in layers if not isinstance(layer, Affine)]
    if levels > most:
        first = squares[-((most - 1) // 2) - 1]
        raise ModelError(
            f"{first}: with the {len(squares)} squares of this tail it consumes {levels} levels, and the "
            f"largest ring holds {most} at 128 bits: cut the network later (after {first}), or use fewer "
            "squares"
        )


def _checked(calibration: FloatArray, first: Affine, kind: str = "calibration") -> FloatArray:
    x, features = np.asarray(calibration, np.float64), first.weight.shape[1]
    if x.ndim != 2 or x.shape[1] != features or not len(x):
        raise ModelError(
            f"{kind} data has shape {x.shape}; the tail takes (n, {features}) activations at the cut, "
            f"n of 1 or more: what goes into {first.name}, one flattened activation a row"
        )
    if not np.isfinite(x).all():
        raise ModelError(f"{kind} data holds NaN or infinity; check the images it was computed from")
    return x


def _checked_like(program: Program, like: TailSpec) -> Program:
    differing = differences(program.spec, like)
    if differing:
        raise ModelError(
            f"this tail cannot take the place of the one that devices hold: it differs in "
            f"{', '.join(differing)}; keep the sizes of its layers, or hand out a new edge.bt"
        )
    return program


def _compile(
    maps: Sequence[Affine],
    x: FloatArray,
    lanes: int,
    parameters: Parameters,
    like: TailSpec | None = None,
    budget: int | None = None,
) -> Program:
    if like is not None and parameters.max_level != 2 * len(maps) - 1:
        raise ModelError(
            f"the tail consumes {2 * len(maps) - 1} levels, the one that devices hold "
            f"{parameters.max_level}: keep the number of its layers, or hand out a new edge.bt"
        )
    first, steps = _schedule(maps, lanes, parameters, like, budget)
    return _arranged(maps, x, parameters, first, steps, like)


def _arranged(
    maps: Sequence[Affine],
    x: FloatArray,
    parameters: Parameters,
    first: Layout,
    steps: Sequence[Step],
    like: TailSpec | None = None,
) -> Program:
    """The program of a choice that is made: scales, operations, the form of the reply."""
    lanes = first.lanes
    stats = _statistics(maps, steps, first, x)
    scales = choose_scales(maps, stats, parameters, like)
    ops = _build(maps, steps, first, scales, parameters, like)
    left = propagate(stats, scales, parameters)
    last = steps[-1].arrangement.period
    period = last * lanes
    # Of a reply's noise, only that of the 2 * period coefficients that are read remains.
    dropped = _dropped_bits(parameters, period, left.typical, stats[-1].max_out * scales[-1])
    if like is not None:
        dropped = like.reply.c1_dropped_bits
    cut = period * noise.truncated(parameters, dropped)
    draft = TailSpec(
        parameters=parameters,
        input_layout=first,
        input_level=parameters.max_level,
        input_scale=scales[0],
        keys=(),
        output_layout=steps[-1].arrangement.out_layout,
        reply=ReplyForm(period, dropped, ops[-1].out_scale),
        predicted_noise=math.sqrt(left.typical + cut) / scales[-1],
        predicted_worst_noise=math.sqrt(left.worst + cut) / scales[-1],
        input_bound=float(np.abs(x).max()),
        program_id="0" * 64,
    )
    return Program(finish(ops, draft), ops)


def _schedule(
    maps: Sequence[Affine], lanes: int, parameters: Parameters, like: TailSpec | None, budget: int | None
) -> tuple[Layout, list[Step]]:
    firsts, last = plan.ways_in(maps, parameters, lanes)
    if like is None:
        return schedule.choose(maps, firsts, parameters, last, budget=budget)
    # Zeros among the new weights may offer another layout: devices keep theirs.
    firsts = [way for way in firsts if way[0] == like.input_layout] or firsts
    return schedule.choose(maps, firsts, parameters, last, held=like.keys)


def _dropped_bits(parameters: Parameters, period: int, noise_variance: float, largest: float) -> int:
    """Lowest bits of c1 that a reply goes without; both numbers in units of its scale."""
    accepted = max(noise_variance, (REPLY_PRECISION * largest) ** 2)
    most = 0
    while most < 16 and period * noise.truncated(parameters, most + 1) <= accepted:
        most += 1

    def size(bits: int) -> int:
        width = parameters.primes[0].bit_length()
        c1 = packed_bytes(parameters.ring_degree, width - bits)
        return HEADER_BYTES + packed_bytes(2 * period, width) + c1

    fits = [
        bits
        for bits in range(max(0, most - FINER_BITS), most)
        if size(bits) <= REPLY_BYTES * parameters.ring_degree / 8192
    ]
    return min(fits, default=most)


def _statistics(
    maps: Sequence[Affine],
    steps: Sequence[Step],
    first: Layout,
    x: FloatArray,
) -> list[Stats]:
    found: list[Stats] = []
    values = x
    layout = first
    pick = x[:: max(1, len(x) // _SAMPLES)][:_SAMPLES]
    slots = np.stack([one_lane(layout).place(row) for row in pick])  # (samples, positions)
    for index, (step, how) in enumerate(zip(maps, steps, strict=True)):
        op = _map_op(step, how, layout, 0, 2.0, 2.0)
        diagonals = op.diagonals
        out = np.zeros_like(slots)
        for k, multipliers in diagonals.items():
            out += multipliers * np.roll(slots, -k, axis=1)
        out = fold(out, op.folds).real + op.bias_slots()
        values = step(values)
        used = {divmod(k, op.baby) for k in diagonals}
        found.append(
            Stats(
                rms_in=float(np.sqrt((np.abs(slots) ** 2).mean())),
                power=float(sum((np.abs(m) ** 2).mean() for m in diagonals.values())),
                weight_power=float((step.weight**2).mean()),
                products=len(used),
                baby_turns=len({b for _, b in used if b}),
                giant_turns=max((g for g, _ in used), default=0),
                folds=tuple((len(group), min(group) < 0) for group in op.folds),
                copies=len(layout.content) // how.arrangement.period,
                max_out=max(float(np.abs(values).max()), float(np.abs(out).max())),
                rms_out=float(np.sqrt((out**2).mean())),
            )
        )
        slots, layout = out, op.out_layout
        if index < len(maps) - 1:
            slots, values = slots**2, values**2
    return found


def one_lane(layout: Layout) -> Layout:
    """The same layout for one lane: positions stand for slots."""
    return replace(layout, lanes=1)


def _map_op(step: Affine, how: Step, layout: Layout, level: int, in_scale: float, out_scale: float) -> MapOp:
    return MapOp(
        name=step.name,
        level=level,
        weight=step.weight,
        bias=step.bias,
        in_layout=layout,
        out_layout=how.arrangement.out_layout,
        rows=how.arrangement.rows,
        offsets=how.arrangement.offsets,
        stride=how.arrangement.stride,
        baby=how.baby,
        folds=how.folds,
        in_scale=in_scale,
        out_scale=out_scale,
    )


def _build(
    maps: Sequence[Affine],
    steps: Sequence[Step],
    first: Layout,
    scales: Sequence[float],
    parameters: Parameters,
    like: TailSpec | None = None,
) -> tuple[Op, ...]:
    ops: list[Op] = []
    layout, scale, level = first, scales[0], parameters.max_level
    for index, (step, how, target) in enumerate(zip(maps, steps, scales[1:], strict=True)):
        landed = landing_scale(scale, target, parameters.primes[level])
        if like is not None and index == len(maps) - 1:
            landed = like.reply.scale
        ops.append(_map_op(step, how, layout, level, scale, landed))
        layout, scale, level = how.arrangement.out_layout, landed, level - 1
        if index < len(maps) - 1:
            squared = scale * scale / parameters.primes[level]
            ops.append(SquareOp(f"square{index}", level, layout, scale, squared))
            scale, level = squared, level - 1
    return tuple(ops)


__all__ = [
    "HEADROOM",
    "REPLY_PERIOD",
    "KeysTooLarge",
    "NoPlan",
    "Objective",
    "compile_plan",
    "compile_tail",
    "evaluate_clear",
]
