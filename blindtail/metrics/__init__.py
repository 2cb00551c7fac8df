"""Every metric of blindtail. A registry is passed in; a test gives a fresh one.

metric.py        what a declared metric is
table.py         the one list of metrics, with labels and their bounds
series.py        series made from it
edge.py, cloud.py, orchestrator.py    what each role counts
exporter.py      Prometheus over HTTP
certificate.py   when a TLS certificate ends
document.py      docs/metrics.md; `python -m blindtail.metrics` prints it
"""

from __future__ import annotations

from blindtail.metrics.certificate import expiry
from blindtail.metrics.cloud import CloudMetrics, EvaluatorCounters
from blindtail.metrics.edge import EdgeMetrics
from blindtail.metrics.exporter import check_metrics_port, serve_metrics
from blindtail.metrics.orchestrator import OrchestratorMetrics

__all__ = [
    "CloudMetrics",
    "EdgeMetrics",
    "EvaluatorCounters",
    "OrchestratorMetrics",
    "check_metrics_port",
    "expiry",
    "serve_metrics",
]
