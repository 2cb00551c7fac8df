"""docs/metrics.md, made from the table."""

from __future__ import annotations

from blindtail.metrics.metric import MOST_COMBINATIONS, OTHER, Label, Metric, Role
from blindtail.metrics.table import TABLE

_INTRO = f"""# Metrics

This page is made from the table in `blindtail/metrics/table.py`: `make docs` writes it, `make check`
compares.

| role | how it is turned on | where |
|---|---|---|
| cell | `metrics_port = 9100` (`blindtail cloud --metrics-port 9100`) | the cell's `host` |
| edge site | `metrics_port = 9200`; the second actor has 9201, and so on | `metrics_host`, else loopback |
| orchestrator | `metrics_port = 9300` | the orchestrator's `host` |
| `EdgeRuntime` in your own program | `EdgeRuntime.open(..., metrics=EdgeMetrics(registry, model))` | yours |

`deploy/prometheus/` holds a scrape configuration, recording rules and alerts, `deploy/grafana/` a dashboard.

**What a metrics port shows.** Plain HTTP, no login: whoever reaches it reads counts, times and sizes by
model, version, route and outcome. No client, device, address, session, key, confidence or answer is in it.
Route counts over time still tell how busy a site is and how often it offloads. The port may listen on more
than loopback; let only the Prometheus server reach it (a firewall, or the NetworkPolicy in `deploy/`).

**Bounds.** Every label has fixed values or a cap; what does not fit counts as `{OTHER}`. Combinations of
several labels end at {MOST_COMBINATIONS}: from there on a new one has `{OTHER}` for its open labels. So
neither a peer nor a model file can grow the number of series. Counters are exported with `_total`,
histograms as `_bucket`, `_sum` and `_count`; `_created` beside them is the time of a series' first value.
"""

_TITLES: tuple[tuple[Role | None, str], ...] = (
    (None, "Every role"),
    ("edge", "Edge"),
    ("cell", "Cell"),
    ("orchestrator", "Orchestrator"),
)


def markdown() -> str:
    """The whole page."""
    parts = [_INTRO]
    for role, title in _TITLES:
        found = [m for m in TABLE if (m.roles == (role,) if role else len(m.roles) > 1)]
        rows = [_row(m) for m in found]
        head = "| metric | type | unit | labels | most series | meaning |\n|---|---|---|---|---|---|"
        parts.append(f"## {title}\n\n{head}\n" + "\n".join(rows) + "\n")
    labels = {_key(label): label for metric in TABLE for label in metric.labels}
    rows = [f"| `{label.name}` | {_bound(label)} |" for _, label in sorted(labels.items())]
    parts.append("## Labels\n\n| label | values |\n|---|---|\n" + "\n".join(rows) + "\n")
    buckets = {m.exported: m.buckets for m in TABLE if m.buckets}
    rows = [f"| `{name}` | {', '.join(f'{b:g}' for b in bounds)} |" for name, bounds in buckets.items()]
    parts.append("## Histograms\n\n| metric | upper bounds, seconds |\n|---|---|\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def _row(metric: Metric) -> str:
    labels = ", ".join(f"`{label.name}`" for label in metric.labels)
    cells = (f"`{metric.exported}`", metric.kind, metric.unit, labels, str(metric.most_series), metric.help)
    return f"| {' | '.join(cells)} |"


def _key(label: Label) -> tuple[str, int, tuple[str, ...]]:
    return label.name, label.cap, label.values


def _bound(label: Label) -> str:
    if label.cap:
        return f"open: the first {label.cap}, then `{OTHER}`"
    return ", ".join(f"`{value}`" for value in (*label.values, OTHER))


__all__ = ["markdown"]
