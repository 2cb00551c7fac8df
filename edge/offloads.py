"""What an offload takes, with a ticket and without: learned from the answers, for the policies."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace

from blindtail.bundle import EdgeBundle
from blindtail.records import LatencyEstimate, TailTimings
from edge.latency import LatencyBook
from edge.priors import predicted_eval_s

#: Weight of the newest evaluation.
_WEIGHT = 0.2
#: A cloud that had not got round to some tickets is trusted again with this half-life, seconds.
_FORGIVE_S = 5.0


class Offloads:
    """Thread-safe. Times `now_s` come from the caller's monotonic clock.

    latencies  its step "offload1" is an offload at cut 1 whose evaluation was done in full: what a
               ticket saves in the cloud is put back before an answer is learned from, and taken off
               again where a ticket is at hand. So one window serves both, and a slow link is
               noticed by either
    predicted  cut -> seconds of an evaluation before any answer, with and without a ticket
    """

    def __init__(self, latencies: LatencyBook, predicted: Mapping[int, float]) -> None:
        self._latencies, self._predicted = latencies, dict(predicted)
        self._lock = threading.Lock()
        self._eval_s: dict[tuple[int, bool], float] = {}  # (cut, by ticket), smoothed
        self._missed: dict[int, tuple[float, float]] = {}  # cut -> (share of tickets, smoothed; when)

    @classmethod
    def of(cls, bundle: EdgeBundle, latencies: LatencyBook) -> Offloads:
        return cls(latencies, {cut: predicted_eval_s(bundle, cut) for cut in bundle.cuts})

    def observe(
        self, cut: int, seconds: float, timings: TailTimings, now_s: float, *, sent: bool = False
    ) -> None:
        """An offload at `cut` that took `seconds`, and what the cloud says about it. `sent`: it was
        encrypted with a ticket, whether the cloud had that one ready or not."""
        with self._lock:
            if sent:
                before = self._missed_at(cut, now_s)
                missed = before + _WEIGHT * ((not timings.ticket) - before)
                self._missed[cut] = (missed, now_s)
            kind = (cut, timings.ticket)
            before_s = self._eval_s.get(kind, timings.eval_s)
            self._eval_s[kind] = before_s + _WEIGHT * (timings.eval_s - before_s)
        if timings.ticket:
            seconds += self.saved_s(cut)
        self._latencies.observe(f"offload{cut}", seconds, now_s)

    def gave_up(self, cut: int, seconds: float, now_s: float) -> None:
        """An offload whose reply had not come after `seconds`."""
        self._latencies.observe(f"offload{cut}", seconds, now_s, censored=True)

    def eval_total_s(self, cut: int) -> float:
        """An evaluation without a ticket, on the cloud's clock."""
        return self._known(cut, False)

    def eval_online_s(self, cut: int) -> float:
        """What a ticket leaves of an evaluation. Before any such answer: as without one."""
        with self._lock:
            online_s = self._eval_s.get((cut, True))
        return self.eval_total_s(cut) if online_s is None else online_s

    def saved_s(self, cut: int) -> float:
        return max(0.0, self.eval_total_s(cut) - self.eval_online_s(cut))

    def estimate(self, cut: int, ticket: bool, now_s: float) -> LatencyEstimate:
        """From the decision to the tail's answer, with or without a ticket at hand.

        A ticket counts for a quantile only where the cloud has lately had so many ready that it
        would: one in two for the p50, all but one in twenty for the p95.
        """
        whole = self._latencies.estimate(f"offload{cut}", now_s)
        if not ticket:
            return whole
        with self._lock:
            missed = self._missed_at(cut, now_s)
        least_s, saved_s = self.eval_online_s(cut), self.saved_s(cut)
        p50_s, p95_s = (max(least_s, q - saved_s) for q in (whole.p50_s, whole.p95_s))
        return replace(
            whole,
            p50_s=p50_s if missed <= 0.5 else whole.p50_s,
            p95_s=p95_s if missed <= 0.05 else whole.p95_s,
        )

    def _missed_at(self, cut: int, now_s: float) -> float:
        share, when_s = self._missed.get(cut, (0.0, now_s))
        return float(share * 0.5 ** (max(0.0, now_s - when_s) / _FORGIVE_S))

    def _known(self, cut: int, ticket: bool) -> float:
        with self._lock:
            return self._eval_s.get((cut, ticket), self._predicted.get(cut, 0.0))


__all__ = ["Offloads"]
