"""Every metric of blindtail. A registry is passed in; a test gives a fresh one.

Prefix `blindtail_`, base units (seconds, bytes), labels of a few fixed values:
a model's name, a route, an outcome. Never an identity, a device or a session.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_LATENCY_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
#: Label values beyond these fold into "other", so that no peer can grow a series.
_OUTCOMES = frozenset(
    {
        "ok",
        "AccessDenied",
        "ContainerError",
        "DeadlineExceeded",
        "EvaluationFailed",
        "KeysMissing",
        "Overloaded",
        "ProgramMismatch",
        "SessionLost",
        "TailUnavailable",
    }
)
_FALLBACKS = frozenset({"deadline", "unavailable", "overloaded", "session", "keys", "evaluation", "refused"})
_MAX_ROUTES = 64


class EdgeMetrics:
    """What one edge process counts. `model` is the bundle's name."""

    def __init__(self, registry: CollectorRegistry, model: str) -> None:
        self._routes: set[str] = set()
        self._model = model
        self._requests = Counter(
            "blindtail_edge_requests", "Answers, by route.", ["model", "route"], registry=registry
        )
        self._fallbacks = Counter(
            "blindtail_edge_fallbacks",
            "Offloads that an exit answered instead, by reason.",
            ["model", "reason"],
            registry=registry,
        )
        self._latency = Histogram(
            "blindtail_edge_latency_seconds",
            "From the call of infer to its answer, by route.",
            ["model", "route"],
            buckets=_LATENCY_S,
            registry=registry,
        )
        self._uplink = Counter(
            "blindtail_edge_uplink_bytes", "Encrypted activations sent.", ["model"], registry=registry
        )
        self._reply = Counter(
            "blindtail_edge_reply_bytes", "Encrypted logits received.", ["model"], registry=registry
        )
        self._key_upload = Histogram(
            "blindtail_edge_key_upload_seconds",
            "From the start of an upload of evaluation keys until they are usable.",
            ["model"],
            buckets=(0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0),
            registry=registry,
        )

    def answered(
        self, route: str, latency_s: float, fallback: str | None, uplink_bytes: int, reply_bytes: int
    ) -> None:
        """One answer. `route` is "exit1", ..., or "tail"."""
        if route not in self._routes and len(self._routes) >= _MAX_ROUTES:
            route = "other"
        self._routes.add(route)
        self._requests.labels(self._model, route).inc()
        self._latency.labels(self._model, route).observe(latency_s)
        if fallback is not None:
            reason = fallback if fallback in _FALLBACKS else "other"
            self._fallbacks.labels(self._model, reason).inc()
        if uplink_bytes:
            self._uplink.labels(self._model).inc(uplink_bytes)
        if reply_bytes:
            self._reply.labels(self._model).inc(reply_bytes)

    def keys_uploaded(self, seconds: float) -> None:
        self._key_upload.labels(self._model).observe(seconds)


class CloudMetrics:
    """What one cell counts. Gauges are read when scraped, from the functions given to `watch`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._requests = Counter(
            "blindtail_cloud_requests",
            "Evaluations asked for, by outcome.",
            ["model", "outcome"],
            registry=registry,
        )
        self._queue = Histogram(
            "blindtail_cloud_queue_seconds",
            "From the arrival of a request to the start of its evaluation.",
            buckets=_LATENCY_S,
            registry=registry,
        )
        self._eval = Histogram(
            "blindtail_cloud_evaluation_seconds",
            "One evaluation, container in to container out.",
            ["model"],
            buckets=_LATENCY_S,
            registry=registry,
        )
        self._uploads = Counter(
            "blindtail_cloud_key_uploads", "Uploads of keys, by outcome.", ["outcome"], registry=registry
        )
        self._depth = Gauge("blindtail_cloud_queue_depth", "Requests that wait.", registry=registry)
        self._backlog = Gauge(
            "blindtail_cloud_backlog_seconds",
            "Predicted evaluation time of all that waits or runs.",
            registry=registry,
        )
        self._sessions = Gauge("blindtail_cloud_sessions", "Sessions that are open.", registry=registry)
        self._key_bytes = Gauge(
            "blindtail_cloud_key_store_bytes", "Prepared evaluation keys on disk.", registry=registry
        )
        self._evaluators = Gauge("blindtail_cloud_evaluators", "Evaluators that are up.", registry=registry)
        self._restarts = Gauge(
            "blindtail_cloud_evaluator_restarts",
            "Evaluators started again since the cell started.",
            registry=registry,
        )

    def watch(
        self,
        *,
        queue_depth: Callable[[], float],
        backlog_s: Callable[[], float],
        sessions: Callable[[], float],
        key_store_bytes: Callable[[], float],
        evaluators: Callable[[], float],
        restarts: Callable[[], float],
    ) -> None:
        self._depth.set_function(queue_depth)
        self._backlog.set_function(backlog_s)
        self._sessions.set_function(sessions)
        self._key_bytes.set_function(key_store_bytes)
        self._evaluators.set_function(evaluators)
        self._restarts.set_function(restarts)

    def waited(self, queue_s: float) -> None:
        self._queue.observe(queue_s)

    def evaluated(self, model: str, outcome: str, eval_s: float | None = None) -> None:
        """`model` "" when the request was refused before its model was known."""
        name = outcome if outcome in _OUTCOMES else "other"
        self._requests.labels(model, name).inc()
        if eval_s is not None:
            self._eval.labels(model).observe(eval_s)

    def uploaded(self, outcome: str) -> None:
        self._uploads.labels(outcome if outcome in _OUTCOMES else "other").inc()


__all__ = ["CloudMetrics", "EdgeMetrics"]
