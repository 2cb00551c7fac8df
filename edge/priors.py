"""What latencies to assume before anything was measured."""

from __future__ import annotations

from blindtail.bundle import EdgeBundle
from blindtail.records import LatencyEstimate

#: Stated defaults, replaced by measurements after a few requests.
DEFAULT_UPLINK_BPS = 10e6
DEFAULT_EVAL_S = 0.2
DEFAULT_ROUND_TRIP_S = 0.05
HEAD_MACS_PER_S = 1e9
STEP_OVERHEAD_S = 0.0005
CRYPTO_S = 0.01
#: p95 over p50 of a prior.
SPREAD = 2.0


def priors_of(bundle: EdgeBundle, uplink_bps: float | None = None) -> dict[str, LatencyEstimate]:
    """Step -> prior. An offload is its bytes over the link, its round trips, and the evaluation.

    The evaluation's seconds come from the manifest's `metrics["predicted_eval_s"]`
    (a number, or one per cut as {"1": seconds}) when the model's owner stored them.
    """
    priors = {}
    for i, stage in enumerate(bundle.stages):
        priors[f"stage{i}"] = _spread(stage.macs / HEAD_MACS_PER_S + STEP_OVERHEAD_S)
    for i, leaving in enumerate(bundle.exits):
        priors[f"exit{i}"] = _spread(leaving.macs / HEAD_MACS_PER_S + STEP_OVERHEAD_S)
    priors["encrypt"] = priors["decrypt"] = _spread(CRYPTO_S)
    rate_bps = uplink_bps or DEFAULT_UPLINK_BPS
    for cut in bundle.cuts:
        trips = bundle.segments(cut)
        wire_s = sum(s.uplink_bytes + s.reply_bytes for s in trips) * 8 / rate_bps
        own_s = len(trips) * (DEFAULT_ROUND_TRIP_S + 2 * CRYPTO_S)
        priors[f"offload{cut}"] = _spread(wire_s + own_s + predicted_eval_s(bundle, cut))
    return priors


def predicted_eval_s(bundle: EdgeBundle, cut: int) -> float:
    """Of the tail at `cut`, as the model's owner stated it."""
    stated = bundle.metrics.get("predicted_eval_s")
    if isinstance(stated, dict):
        stated = stated.get(str(cut))
    if isinstance(stated, int | float) and 0 < stated < 3600:
        return float(stated)
    return DEFAULT_EVAL_S


def _spread(p50_s: float) -> LatencyEstimate:
    return LatencyEstimate(p50_s, p50_s * SPREAD)
