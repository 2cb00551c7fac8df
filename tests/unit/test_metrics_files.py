"""The metrics' page, rules and dashboard name what the table has, and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from blindtail.metrics.document import markdown
from blindtail.metrics.metric import Metric
from blindtail.metrics.table import TABLE

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "deploy" / "prometheus" / "rules" / "blindtail.yml"
DASHBOARD = ROOT / "deploy" / "grafana" / "blindtail.json"

#: Words of PromQL that are neither a function (a name before a parenthesis) nor a metric.
KEYWORDS = {
    "by",
    "without",
    "on",
    "ignoring",
    "group_left",
    "group_right",
    "or",
    "and",
    "unless",
    "offset",
    "bool",
}
#: Labels that Prometheus adds to whatever it scrapes.
SCRAPED = {"job", "instance"}
_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
_MATCHER = re.compile(rf'({_NAME})\s*(=~|!~|!=|=)\s*"([^"]*)"')
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")


def exported() -> dict[str, tuple[Metric | None, set[str]]]:
    """Name in a query -> metric and its labels."""
    found: dict[str, tuple[Metric | None, set[str]]] = {
        "up": (None, SCRAPED),
        "ALERTS": (None, SCRAPED | {"alertname", "alertstate", "severity"}),
    }
    for metric in TABLE:
        labels = {label.name for label in metric.labels} | SCRAPED
        if metric.kind == "histogram":
            found[f"{metric.name}_bucket"] = (metric, labels | {"le"})
            found[f"{metric.name}_sum"] = found[f"{metric.name}_count"] = (metric, labels)
        else:
            found[metric.exported] = (metric, labels)
    for rule in rules():
        if "record" in rule:
            # What it may keep of its sources' labels; promtool's tests show what it does keep.
            used = check(rule["expr"], found)
            found[rule["record"]] = (None, used)
    return found


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def check(expression: str, known: dict[str, tuple[Metric | None, set[str]]]) -> set[str]:
    """Labels that an expression's metrics have. Fails for a name, label or value that does not exist."""
    bare = re.sub(r"\[[^\]]*\]", "", expression)
    for name, body in re.findall(rf"({_NAME})\s*\{{([^}}]*)\}}", bare):
        assert name in known, f"no metric {name} in: {expression}"
        metric, labels = known[name]
        for label, operator, value in _MATCHER.findall(body):
            assert label in labels, f"{name} has no label {label}: {expression}"
            fixed = [x.values for x in metric.labels if x.name == label and x.values] if metric else []
            if operator == "=" and fixed:
                assert value in fixed[0], f"{label} of {name} is never {value!r}"
    bare = re.sub(r"\{[^}]*\}", "", bare)
    bare = re.sub(r'"[^"]*"', "", bare)
    grouped = {g.strip() for group in _GROUPING.findall(bare) for g in group.split(",") if g.strip()}
    bare = _GROUPING.sub(" ", bare)
    bare = re.sub(r"\boffset\s+\w+", "", bare)
    names = set(re.findall(rf"(?<![\w.$])({_NAME})(?!\s*\(|[\w:])", bare)) - KEYWORDS
    assert names, f"no metric in: {expression}"
    unknown = names - set(known)
    assert not unknown, f"no metric {unknown} in: {expression}"
    labels = set().union(*(known[name][1] for name in names))
    assert grouped <= labels, f"no label {grouped - labels} in: {expression}"
    return labels


def targets() -> Iterator[tuple[str, dict[str, Any]]]:
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target


def test_the_page_is_what_the_table_makes() -> None:
    assert (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8") == markdown(), "run 'make docs'"


def test_the_page_has_every_metric_and_whole_tables() -> None:
    text = markdown()
    for metric in TABLE:
        assert text.count(f"\n| `{metric.exported}` | {metric.kind} |") == 1
    columns: set[int] = set()
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            columns.add(line.count("|"))
            continue
        assert len(columns) <= 1, f"a table before {line!r} has rows of {columns} columns"
        columns = set()


@pytest.mark.parametrize("rule", rules(), ids=lambda r: r.get("alert") or r.get("record"))
def test_rule_names_what_exists(rule: dict[str, Any]) -> None:
    labels = check(rule["expr"], exported())
    if "alert" in rule:
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert set(rule["annotations"]) == {"summary", "action"}
        for name in re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"])):
            assert name in labels


def test_dashboard_names_what_exists() -> None:
    known = exported()
    for title, target in targets():
        labels = check(target["expr"], known) | {"alertname"}
        for name in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
            assert name in labels, f"{title}: no label {name}"
        assert target["datasource"]["uid"] == "${datasource}"


def test_dashboard_shows_every_metric_and_every_role() -> None:
    shown = " ".join(target["expr"] for _, target in targets())
    recorded = {rule["record"]: rule["expr"] for rule in rules() if "record" in rule}
    shown += " ".join(expression for name, expression in recorded.items() if name in shown)
    used = {re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(_NAME, shown)}
    missing = {m.exported for m in TABLE} - used
    assert not missing
    board = json.loads(DASHBOARD.read_text())
    rows = [p["title"] for p in board["panels"] if p["type"] == "row"]
    assert {"Edges", "Cells", "Orchestrator"} <= set(rows)
    assert board["templating"]["list"][0]["type"] == "datasource"
    assert len({p["id"] for p in board["panels"]}) == len(board["panels"])


def test_dashboard_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        g = panel["gridPos"]
        cells = {(x, y) for x in range(g["x"], g["x"] + g["w"]) for y in range(g["y"], g["y"] + g["h"])}
        assert g["x"] + g["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ("blindtail_edge_request_total", "no metric"),
        ("rate(blindtail_edge_requests[5m])", "no metric"),
        ("blindtail_edge_latency_seconds > 1", "no metric"),
        ("sum by (devise) (blindtail_edge_requests_total)", "no label"),
        ('blindtail_cloud_requests_total{route="tail"}', "has no label"),
        ('blindtail_cloud_requests_total{outcome="overloaded"}', "is never"),
        ("blindtail_cloud_queue_depth / blindtail:cloud_limit:ratio", "no metric"),
        ("1 > 0", "no metric"),
    ],
)
def test_the_check_finds_what_is_wrong(wrong: str, reason: str) -> None:
    with pytest.raises(AssertionError, match=reason):
        check(wrong, exported())
