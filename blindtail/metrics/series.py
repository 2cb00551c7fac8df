"""Series made from the table: bounded, bound once, cheap on the hot path.

`Family` counts as things happen; `Live` asks when it is scraped. Both fold label
values that do not fit their label into "other".
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from blindtail.machine import release
from blindtail.metrics.metric import OTHER, Label, Metric, Role
from blindtail.metrics.table import of_role

#: A value longer than this is counted as "other".
_VALUE_CHARS = 100

Labels = tuple[str, ...]
#: A live metric's values: by labels, or one without labels; None = absent.
Values = Mapping[Labels, float] | float | None


class _Fold:
    """One label's values so far."""

    def __init__(self, label: Label) -> None:
        self._fixed = frozenset(label.values)
        self._cap = label.cap
        self._seen: set[str] = set()

    def __call__(self, value: str) -> str:
        if value in self._fixed or value in self._seen:
            return value
        if len(self._seen) < self._cap and len(value) <= _VALUE_CHARS:
            self._seen.add(value)
            return value
        return OTHER


class Family:
    """A metric's series in one registry. `at(*label values)` is the series to count on.

    Thread-safe. A combination seen before costs one look into a dictionary.
    """

    def __init__(self, metric: Metric, registry: CollectorRegistry) -> None:
        names = [label.name for label in metric.labels]
        self._labels, self._limit = metric.labels, metric.limit
        self._folds = [_Fold(label) for label in metric.labels]
        self._all: Any
        if metric.kind == "histogram":
            self._all = Histogram(metric.name, metric.help, names, registry=registry, buckets=metric.buckets)
        elif metric.kind == "counter":
            self._all = Counter(metric.name, metric.help, names, registry=registry)
        else:
            self._all = Gauge(metric.name, metric.help, names, registry=registry)
        self._bound: dict[Labels, Any] = {} if names else {(): self._all}
        self._binding = threading.Lock()

    def at(self, *values: str) -> Any:
        """The prometheus_client object of these label values, or of what they are folded into."""
        bound = self._bound.get(values)
        return self._bind(values) if bound is None else bound

    def _bind(self, values: Labels) -> Any:
        with self._binding:
            folded = tuple(fold(value) for fold, value in zip(self._folds, values, strict=True))
            if folded not in self._bound and len(self._bound) >= self._limit:
                folded = tuple(
                    OTHER if label.cap else value for label, value in zip(self._labels, folded, strict=True)
                )
            bound = self._bound.get(folded)
            if bound is None:
                # Only what is exported is remembered: the dictionary is bounded as the series are.
                bound = self._bound[folded] = self._all.labels(*folded)
            return bound


class Live:
    """A metric that is read when scraped, from the function given to `read_from`."""

    def __init__(self, metric: Metric, registry: CollectorRegistry) -> None:
        self._metric = metric
        self._read: Callable[[], Values] = lambda: None
        registry.register(self)

    def read_from(self, read: Callable[[], Values]) -> None:
        """`read` is called on the exporter's thread at each scrape."""
        self._read = read

    def describe(self) -> Iterable[Any]:
        yield self._family()

    def collect(self) -> Iterable[Any]:
        family = self._family()
        values = self._now()
        if isinstance(values, Mapping):
            for labels, value in bounded(self._metric, values).items():
                family.add_metric(labels, value)
        elif values is not None:
            family.add_metric((), float(values))
        yield family

    def _family(self) -> Any:
        make = CounterMetricFamily if self._metric.kind == "counter" else GaugeMetricFamily
        return make(
            self._metric.name, self._metric.help, labels=[label.name for label in self._metric.labels]
        )

    def _now(self) -> Values:
        """What is read belongs to another thread's loop: a container may change under the reader."""
        for _ in range(3):
            try:
                return self._read()
            except RuntimeError:
                continue
        return None


def bounded(metric: Metric, values: Mapping[Labels, float]) -> dict[Labels, float]:
    """At most `metric.most_series` rows. Of an open label the largest values keep their names: a
    live metric starts afresh at each scrape, so a flood of names cannot push a busy one out for long."""
    folds = [_Fold(label) for label in metric.labels]
    made: dict[Labels, float] = {}
    for labels, value in sorted(values.items(), key=lambda item: (-item[1], item[0])):
        folded = tuple(fold(text) for fold, text in zip(folds, labels, strict=True))
        if folded not in made and len(made) >= metric.limit:
            folded = tuple(
                OTHER if label.cap else text for label, text in zip(metric.labels, folded, strict=True)
            )
        old = made.get(folded)
        if old is None:
            made[folded] = float(value)
        else:
            made[folded] = old + value if metric.merge == "sum" else max(old, value)
    return made


class RoleMetrics:
    """What every role's metrics have: their registry, its series, and who this process is."""

    def __init__(self, role: Role, registry: CollectorRegistry) -> None:
        self.registry = registry
        metrics = of_role(role)
        self._families = {n: Family(m, registry) for n, m in metrics.items() if not m.live}
        self._lives = {n: Live(m, registry) for n, m in metrics.items() if m.live}
        self._families["blindtail_build_info"].at(role, release()).set(1)

    def watch_certificate(self, expiry_unix_s: Callable[[], float | None]) -> None:
        """`expiry_unix_s` is asked at each scrape, so that a renewed certificate shows; see `expiry`."""
        self._lives["blindtail_certificate_expiry_timestamp_seconds"].read_from(expiry_unix_s)


def count(value: float) -> float:
    """A peer's count, fit for a counter: not negative, not infinite, no more than a billion at once."""
    return min(max(float(value), 0.0), 1e9) if math.isfinite(value) else 0.0


__all__ = ["Family", "Labels", "Live", "RoleMetrics", "Values", "bounded", "count"]
