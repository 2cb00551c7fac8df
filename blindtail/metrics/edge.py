"""What one edge process counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry

from blindtail.metrics.series import RoleMetrics, Values
from blindtail.metrics.table import TAIL_STATES


class EdgeMetrics(RoleMetrics):
    """`model` is the bundle's name. Thread-safe; a few microseconds an answer."""

    def __init__(self, registry: CollectorRegistry, model: str) -> None:
        super().__init__("edge", registry)
        self._model = model
        families = self._families
        self._requests = families["blindtail_edge_requests"]
        self._latency = families["blindtail_edge_latency_seconds"]
        self._fallbacks = families["blindtail_edge_fallbacks"]
        self._updates = families["blindtail_edge_policy_updates"]
        self._uplink = families["blindtail_edge_uplink_bytes"].at(model)
        self._reply = families["blindtail_edge_reply_bytes"].at(model)
        self._key_upload = families["blindtail_edge_key_upload_seconds"].at(model)

    def watch(self, tails: Callable[[], Mapping[int, str]]) -> None:
        """`tails` is asked at each scrape: cut -> its tail's state, one of `table.TAIL_STATES`."""
        model = self._model

        def states() -> Values:
            return {
                (model, str(cut), state): float(state == now)
                for cut, now in tails().items()
                for state in dict.fromkeys((*TAIL_STATES, now))
            }

        self._lives["blindtail_edge_tail_state"].read_from(states)

    def watch_control(self, *, policy_version: Callable[[], int], attached: Callable[[], bool]) -> None:
        """For an edge with an orchestrator; both are asked at each scrape.

        policy_version  of the orchestrator's policy in force; 0 = the edge's own
        attached        whether the orchestrator's stream stands
        """
        model, lives = self._model, self._lives
        lives["blindtail_edge_policy_version"].read_from(lambda: {(model,): float(policy_version())})
        lives["blindtail_edge_orchestrator_attached"].read_from(lambda: {(model,): float(attached())})

    def answered(
        self, route: str, latency_s: float, fallback: str | None, uplink_bytes: int, reply_bytes: int
    ) -> None:
        """One answer. `route` is "exit1", ..., or "tail"."""
        self._requests.at(self._model, route).inc()
        self._latency.at(self._model, route).observe(latency_s)
        if fallback is not None:
            self._fallbacks.at(self._model, fallback).inc()
        if uplink_bytes:
            self._uplink.inc(uplink_bytes)
        if reply_bytes:
            self._reply.inc(reply_bytes)

    def keys_uploaded(self, seconds: float) -> None:
        self._key_upload.observe(seconds)

    def policy_update(self, applied: bool) -> None:
        """A policy came from the orchestrator and was applied, or refused."""
        self._updates.at(self._model, "applied" if applied else "refused").inc()


__all__ = ["EdgeMetrics"]
