"""What one cell counts, its evaluators' own counts included."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from prometheus_client import CollectorRegistry

from blindtail.metrics.series import Labels, RoleMetrics, Values


class EvaluatorCounters(NamedTuple):
    """What an evaluator's process counts since it started; it comes with each of its replies."""

    evaluations: int = 0
    key_loads: int = 0
    loaded_key_bytes: int = 0
    resident_bytes: int = 0


class CloudMetrics(RoleMetrics):
    """Counted on the gateway's loop; what `watch` is given is asked at each scrape."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__("cell", registry)
        families = self._families
        self._requests = families["blindtail_cloud_requests"]
        self._queue = families["blindtail_cloud_queue_seconds"].at()
        self._eval = families["blindtail_cloud_evaluation_seconds"]
        self._uploads = families["blindtail_cloud_key_uploads"]
        self._transfers = families["blindtail_cloud_key_transfers"]
        self._tickets = families["blindtail_cloud_tickets"]

    def watch(
        self,
        *,
        queue_depth: Callable[[], float],
        backlog_s: Callable[[], float],
        sessions: Callable[[], float],
        key_store_bytes: Callable[[], float],
        evaluators: Callable[[], float],
        restarts: Callable[[], float],
        queue_limit: Callable[[], float] | None = None,
        key_store_budget_bytes: Callable[[], float] | None = None,
        evaluators_wanted: Callable[[], float] | None = None,
        draining: Callable[[], bool] | None = None,
        shares: Callable[[], Mapping[tuple[str, str], float]] | None = None,
        counters: Callable[[], Mapping[int, EvaluatorCounters]] | None = None,
        ticket_bytes: Callable[[], Mapping[str, float]] | None = None,
    ) -> None:
        """Functions that are asked at each scrape; one that is left out leaves its metric absent.

        shares        (model, version) -> share of the other versions' requests that it answers too
        counters      evaluator's place -> its counters, of those that are up
        ticket_bytes  model -> bytes of tickets that evaluators hold
        """
        given: dict[str, Callable[[], float] | None] = {
            "queue_depth": queue_depth,
            "queue_limit": queue_limit,
            "backlog_seconds": backlog_s,
            "sessions": sessions,
            "key_store_bytes": key_store_bytes,
            "key_store_budget_bytes": key_store_budget_bytes,
            "evaluators": evaluators,
            "evaluators_wanted": evaluators_wanted,
            "evaluator_restarts": restarts,
            "draining": draining,
        }
        for name, read in given.items():
            if read is not None:
                self._lives[f"blindtail_cloud_{name}"].read_from(read)
        if shares is not None:
            self._lives["blindtail_cloud_model_share"].read_from(lambda: dict(shares().items()))
        if ticket_bytes is not None:
            held = ticket_bytes
            self._lives["blindtail_cloud_ticket_bytes"].read_from(
                lambda: {(model,): float(size) for model, size in held().items()}
            )
        if counters is not None:
            for field in EvaluatorCounters._fields:
                live = self._lives[f"blindtail_cloud_evaluator_{field}"]
                live.read_from(_column(counters, field))

    def watch_control(self, attached: Callable[[], bool]) -> None:
        """For a cell with an orchestrator: whether its stream stands, asked at each scrape."""
        self._lives["blindtail_cloud_orchestrator_attached"].read_from(attached)

    def waited(self, queue_s: float) -> None:
        self._queue.observe(queue_s)

    def evaluated(self, model: str, outcome: str, eval_s: float | None = None, version: str = "") -> None:
        """`model` "" when the request was refused before its model was known."""
        self._requests.at(model, version, outcome).inc()
        if eval_s is not None:
            self._eval.at(model).observe(eval_s)

    def uploaded(self, outcome: str) -> None:
        """An edge's upload of keys: "ok" or an error's class."""
        self._uploads.at(outcome).inc()

    def tickets(self, model: str, event: str, number: int = 1) -> None:
        """Seeds "announced", tickets "made"; and what became of seeds: "used", "missed", "dropped"."""
        self._tickets.at(model, event).inc(number)

    def key_transfer(self, direction: str, outcome: str) -> None:
        """A key set "fetched" from or "given" to another cell: "ok" or an error's class."""
        self._transfers.at(direction, outcome).inc()


def _column(read: Callable[[], Mapping[int, EvaluatorCounters]], field: str) -> Callable[[], Values]:
    def values() -> Values:
        rows: dict[Labels, float] = {
            (str(place),): float(getattr(row, field)) for place, row in read().items()
        }
        # Nothing is known of a process's memory before its first reply.
        return {k: v for k, v in rows.items() if v} if field == "resident_bytes" else rows

    return values


__all__ = ["CloudMetrics", "EvaluatorCounters"]
