"""What the orchestrator counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry

from blindtail.metrics.series import RoleMetrics, Values, count


class OrchestratorMetrics(RoleMetrics):
    """Counts of peers are bounded before they are added; names beyond a label's cap become "other"."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__("orchestrator", registry)
        families = self._families
        self._set = families["blindtail_orchestrator_policies_set"]
        self._acks = families["blindtail_orchestrator_acks"]
        self._rollbacks = families["blindtail_orchestrator_rollbacks"]
        self._reports = families["blindtail_orchestrator_reports"]
        self._answers = families["blindtail_orchestrator_answers"]
        self._fallbacks = families["blindtail_orchestrator_fallbacks"]
        self._errors = families["blindtail_orchestrator_stream_errors"]

    def watch(
        self,
        *,
        peers: Callable[[], Mapping[tuple[str, str], int]],
        policy_versions: Callable[[], Mapping[str, int]],
    ) -> None:
        """Functions that are asked at each scrape.

        peers            ("edge" or "cell", model) -> how many are attached
        policy_versions  model, or "" for all others -> version in force
        """

        def attached() -> Values:
            return {labels: float(number) for labels, number in peers().items()}

        def versions() -> Values:
            return {(model,): float(number) for model, number in policy_versions().items()}

        self._lives["blindtail_orchestrator_peers"].read_from(attached)
        self._lives["blindtail_orchestrator_policy_version"].read_from(versions)

    def policy_set(self, accepted: bool) -> None:
        """An operator sent a policy."""
        self._set.at("accepted" if accepted else "refused").inc()

    def acked(self, model: str, applied: bool) -> None:
        """An edge applied a policy, or refused it."""
        self._acks.at(model, "applied" if applied else "refused").inc()

    def rolled_back(self, model: str) -> None:
        self._rollbacks.at(model).inc()

    def reported(
        self,
        kind: str,
        model: str = "",
        routes: Mapping[str, int] | None = None,
        fallbacks: Mapping[str, int] | None = None,
    ) -> None:
        """A report of an "edge" or a "cell", with what an edge counted since its last one."""
        self._reports.at(kind).inc()
        for route, number in (routes or {}).items():
            self._answers.at(model, route).inc(count(number))
        for reason, number in (fallbacks or {}).items():
            self._fallbacks.at(model, reason).inc(count(number))

    def stream_error(self, error: str) -> None:
        """A stream ended with an error: its class, or "broken" for a connection that broke."""
        self._errors.at(error).inc()


__all__ = ["OrchestratorMetrics"]
