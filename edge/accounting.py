"""What a runtime counts: answers by route, fallbacks by reason, bytes. For its status and for reports."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from blindtail.metrics import EdgeMetrics
from blindtail.records import Answer, LatencyEstimate
from blindtail.wire.control import MOST_ITEMS, Report, StepTiming
from edge.ranges import NOTES
from edge.tail import TailState


@dataclass
class Sums:
    """Counts since some moment. Nothing of an image, a confidence or a label is in them."""

    routes: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)
    uplink_bytes: int = 0
    reply_bytes: int = 0
    by_ticket: int = 0

    def add(self, answer: Answer) -> None:
        self.routes[answer.route] += 1
        if answer.fallback is not None:
            self.fallbacks[answer.fallback] += 1
        self.uplink_bytes += answer.uplink_bytes
        self.reply_bytes += answer.reply_bytes
        self.by_ticket += "ticket" in answer.extra


def seen_from_outside(answer: Answer, *, awaiting: bool = False) -> Answer:
    """The answer as reports and metrics may show it. `awaiting`: it fell back while a reply was owed.

    Whether a reply opened as it should is a fact about a decryption, and those stay on the
    device (docs/threat-model.md): an answer that fell back although its reply had come in
    time is shown as the tail's. Notes of values out of range are left out for the same
    reason. `Answer` and `status()` tell the device's own people the truth.
    """
    if any(note in answer.extra for note in NOTES):
        answer = replace(answer, extra={k: v for k, v in answer.extra.items() if k not in NOTES})
    if answer.fallback in (None, "deadline") or awaiting or not answer.reply_bytes:
        return answer
    return replace(answer, route="tail", fallback=None)


class Accounting:
    """Thread-safe. Every answer is counted once: for `status()`, for reports, and in metrics if any."""

    def __init__(self, metrics: EdgeMetrics | None = None) -> None:
        self._metrics = metrics
        self._lock = threading.Lock()
        self._total, self._since = Sums(), Sums()
        self._noted: Counter[str] = Counter()  # never part of what `take` hands out

    def count(self, answer: Answer, *, awaiting: bool = False) -> Answer:
        """Counts an answer; hands it back. `awaiting`: see `seen_from_outside`."""
        outward = seen_from_outside(answer, awaiting=awaiting)
        with self._lock:
            self._total.add(answer)
            self._noted.update(note for note in NOTES if note in answer.extra)
            self._since.add(outward)
        if self._metrics is not None:
            self._metrics.answered(
                outward.route,
                outward.timings.total_s,
                outward.fallback,
                outward.uplink_bytes,
                outward.reply_bytes,
            )
        return answer

    def totals(self) -> tuple[dict[str, int], dict[str, int]]:
        """(routes, fallbacks) since the start."""
        with self._lock:
            return dict(self._total.routes), dict(self._total.fallbacks)

    @property
    def by_ticket(self) -> int:
        """Answers that a ticket made shorter, since the start."""
        with self._lock:
            return self._total.by_ticket

    @property
    def out_of_range(self) -> dict[str, int]:
        """Answers by note (`edge.ranges`), since the start; for the device's own people."""
        with self._lock:
            return dict(self._noted)

    def take(self) -> Sums:
        """The sums since the last `take`; they start again from zero."""
        with self._lock:
            taken, self._since = self._since, Sums()
        return taken


def report_of(
    sums: Sums, interval_s: float, latencies: Mapping[str, LatencyEstimate], states: Iterable[TailState]
) -> Report:
    """What leaves the edge for its orchestrator: counts, bytes, learned timings, the tails' states."""
    learned = [(step, e) for step, e in latencies.items() if e.samples]
    return Report(
        interval_s=interval_s,
        routes=dict(sums.routes),
        fallbacks=dict(sums.fallbacks),
        steps=tuple(StepTiming(step, e.samples, e.p50_s, e.p95_s) for step, e in learned[:MOST_ITEMS]),
        uplink_bytes=sums.uplink_bytes,
        reply_bytes=sums.reply_bytes,
        tail=", ".join(sorted({state.value for state in states})),
    )
