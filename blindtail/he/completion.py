"""What is left to do for a draft of a program: its scales, the form of its reply, its predicted noise."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from blindtail.errors import ModelError
from blindtail.he import noise
from blindtail.he.container import HEADER_BYTES
from blindtail.he.dataflow import finish
from blindtail.he.elementwise import Op
from blindtail.he.error_growth import largest_error
from blindtail.he.layers import Affine, FloatArray
from blindtail.he.layout import Layout
from blindtail.he.packing import packed_bytes
from blindtail.he.params import Parameters
from blindtail.he.program import Program
from blindtail.he.propagation import propagate
from blindtail.he.scales import Draft, choose_scales, with_scales
from blindtail.he.spec import ReplyForm, TailSpec
from blindtail.progress import Span

#: A reply may lose low bits of c1 as long as the error they cause stays below the
#: noise, or below this share of the largest logit (one standard deviation).
REPLY_PRECISION = 2.0**-15
#: Two bits fewer are lost where the reply then still fits these bytes (at N = 8192).
REPLY_BYTES, FINER_BITS = 26_000, 2


def checked(calibration: FloatArray, first: Affine, kind: str = "calibration") -> FloatArray:
    x, features = np.asarray(calibration, np.float64), first.weight.shape[1]
    if x.ndim != 2 or x.shape[1] != features or not len(x):
        raise ModelError(
            f"{kind} data has shape {x.shape}; the tail takes (n, {features}) activations at the cut, "
            f"n of 1 or more: what goes into {first.name}, one flattened activation a row"
        )
    if not np.isfinite(x).all():
        raise ModelError(f"{kind} data holds NaN or infinity; check the images it was computed from")
    return x


def completed(
    draft: Draft,
    parameters: Parameters,
    first: Layout,
    last: Layout,
    period: int,
    x: FloatArray,
    span: Span | None = None,
    *,
    like: TailSpec | None = None,
    scattered: bool = False,
) -> tuple[Program, float]:
    """The program of a draft: scales, the form of the reply, predicted noise.

    And the standard deviation of a logit on `native`, in the noisiest slot.

    first, last  layouts of the activation and of the logits; these repeat after `period` slots
    x            calibration data (n, features)
    like         the tail whose scales and reply the program takes over
    """
    whole = Span.of(span)
    whole.at(0.0, "scales")
    scales = choose_scales(draft, parameters, like, scattered)
    ops = with_scales(draft, scales, parameters, like is not None)
    every, stats, results = draft.scales(scales, parameters), draft.stats, draft.results
    left = propagate(ops, stats, every, parameters, results=results)
    largest = max(s.max_out for s in stats[-results:])
    # Of a reply's noise, only that of the 2 * period coefficients that are read remains.
    dropped = 0 if scattered else _dropped_bits(parameters, period, left.typical, largest * scales[-1])
    if like is not None:
        dropped = like.reply.c1_dropped_bits
    cut = period * noise.truncated(parameters, dropped)
    spec = TailSpec(
        parameters=parameters,
        input_layout=first,
        input_level=parameters.max_level,
        input_scale=scales[0],
        keys=(),
        output_layout=last,
        reply=ReplyForm(period, dropped, ops[-1].out_scale),
        predicted_noise=math.sqrt(left.typical) / scales[-1],
        predicted_worst_noise=math.sqrt(left.worst) / scales[-1],
        input_bound=float(np.abs(x).max()),
        program_id="0" * 64,
    )
    whole.at(0.1, "error bounds")
    spec = _with_noise(spec, ops, x, math.sqrt(cut) / scales[-1])
    own = propagate(ops, stats, every, parameters, hoisted=True, results=results)
    whole.at(0.6, "encoding")
    return Program(finish(ops, spec), ops), math.sqrt(own.worst + cut) / scales[-1]


def _with_noise(draft: TailSpec, ops: tuple[Op, ...], x: FloatArray, of_reply: float) -> TailSpec:
    """Noise of the noisiest logit in the place of the average that scales were chosen by.

    of_reply  standard deviation of what the reply's lost bits add, in logits
    """
    average, worst = draft.predicted_noise, draft.predicted_worst_noise
    program = Program(draft, ops)
    largest = largest_error(program, x)
    if program.is_chain:  # elsewhere the average counts noise as shared that is not
        largest = max(largest, average)
    # What hits one slot alone may be amplified on its way as all the rest is. It is not less than on
    # average: most of it is of the last folds, which nothing comes after.
    excess = math.sqrt(worst**2 - average**2) * max(1.0, largest / average if average else 1.0)
    peak = math.hypot(largest, excess)
    return replace(
        draft,
        predicted_noise=math.hypot(largest, of_reply),
        predicted_worst_noise=math.hypot(peak, of_reply),
    )


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


__all__ = ["checked", "completed"]
