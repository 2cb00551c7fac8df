"""Latencies as the edge learns them: sliding-window quantiles per step, with priors.

Every step ("stage0", "exit1", "offload1", "decrypt", ...) keeps its last samples
of the last `memory_s` seconds. An estimate answers three needs of a policy:

* With no traffic yet it is the prior. Below `settled` samples the prior's two
  quantiles count as samples, so that one lucky sample does not decide alone.
* A bad spell must not last for ever: when a policy stops offloading because the
  p95 is high, no samples arrive. An estimate above the prior then decays towards
  it with `half_life_s`, until one request tries again; and a sample that arrives
  after a silence of `half_life_s` starts a new window. So a spell costs one slow
  request per few half-lives, and one good sample ends it.
* A step that was given up (`censored`) took at least as long as it was given:
  it counts as `CENSORED_FACTOR` times that, or as the p95 so far if larger.

Policies stay pure: all of this state lives here, behind one lock.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Mapping

from blindtail.records import LatencyEstimate

CENSORED_FACTOR = 1.5
_NO_PRIOR = LatencyEstimate(0.0, 0.0)


class LatencyBook:
    """Thread-safe. Times `now_s` come from the caller's monotonic clock.

    priors       step -> estimate before any sample (`samples` = 0)
    window       samples kept per step
    memory_s     a sample older than this is forgotten
    half_life_s  decay of a high estimate while no samples arrive
    settled      from this many samples on the prior no longer counts
    """

    def __init__(
        self,
        priors: Mapping[str, LatencyEstimate] | None = None,
        *,
        window: int = 128,
        memory_s: float = 120.0,
        half_life_s: float = 5.0,
        settled: int = 8,
    ) -> None:
        self._priors = dict(priors or {})
        self._window = window
        self._memory_s = memory_s
        self._half_life_s = half_life_s
        self._settled = settled
        self._samples: dict[str, deque[tuple[float, float]]] = {}
        self._lock = threading.Lock()

    def observe(self, step: str, seconds: float, now_s: float, *, censored: bool = False) -> None:
        """Adds one sample. `censored`: the step was given up after `seconds`."""
        with self._lock:
            held = self._samples.setdefault(step, deque(maxlen=self._window))
            if held and now_s - held[-1][0] > self._half_life_s:
                held.clear()
            if censored:
                prior_s = self._priors.get(step, _NO_PRIOR).p95_s
                worst = _quantile(sorted(v for _, v in held), 0.95) if held else prior_s
                seconds = max(seconds * CENSORED_FACTOR, worst)
            held.append((now_s, seconds))

    def estimate(self, step: str, now_s: float) -> LatencyEstimate:
        """p50 and p95 of `step` as of `now_s`; the prior (or zeros) when nothing is known."""
        prior = self._priors.get(step, _NO_PRIOR)
        with self._lock:
            held = self._samples.get(step)
            while held and now_s - held[0][0] > self._memory_s:
                held.popleft()
            if not held:
                return prior
            values = [v for _, v in held]
            age_s = max(0.0, now_s - held[-1][0])
        count = len(values)
        if count < self._settled and step in self._priors:
            values += [prior.p50_s, prior.p95_s]
        values.sort()
        keep = 0.5 ** (age_s / self._half_life_s)
        return LatencyEstimate(
            _towards(prior.p50_s, _quantile(values, 0.50), keep),
            _towards(prior.p95_s, _quantile(values, 0.95), keep),
            count,
        )

    def sum(self, steps: tuple[str, ...], now_s: float) -> LatencyEstimate:
        """Steps one after the other: quantiles add (an upper bound for the p95)."""
        parts = [self.estimate(s, now_s) for s in steps]
        return LatencyEstimate(
            math.fsum(p.p50_s for p in parts),
            math.fsum(p.p95_s for p in parts),
            min((p.samples for p in parts), default=0),
        )

    def snapshot(self, now_s: float) -> dict[str, LatencyEstimate]:
        """Every step's estimate, for `status()`; holds timings only."""
        with self._lock:
            steps = sorted({*self._priors, *self._samples})
        return {step: self.estimate(step, now_s) for step in steps}


def _quantile(ordered: list[float], q: float) -> float:
    """Nearest rank: the smallest value that at least a share `q` does not exceed."""
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)]


def _towards(prior_s: float, learned_s: float, keep: float) -> float:
    return prior_s + (learned_s - prior_s) * keep if learned_s > prior_s else learned_s
