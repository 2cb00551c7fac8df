"""Prometheus' rules as an object for its operator: `python -m deploy.checks.rules` writes the copy.

deploy/prometheus/rules is where they are written and tested; the check holds the
copy in deploy/kubernetes against it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).resolve().parents[1]
SOURCES = DEPLOY / "prometheus" / "rules"
COPY = DEPLOY / "kubernetes" / "base" / "rules.yaml"
_HEAD = "# Written by `python -m deploy.checks.rules` from deploy/prometheus/rules: edit there.\n"


def manifest() -> dict[str, Any]:
    """The PrometheusRule of all rule files."""
    groups: list[Any] = []
    for path in sorted(SOURCES.glob("*.yml")):
        groups += yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "blindtail", "labels": {"app.kubernetes.io/name": "blindtail"}},
        "spec": {"groups": groups},
    }


def problems() -> list[str]:
    """What differs between the copy and the rules."""
    there = yaml.safe_load(COPY.read_text(encoding="utf-8")) if COPY.exists() else None
    if there == manifest():
        return []
    return [f"{COPY.name} is not what deploy/prometheus/rules says: run 'python -m deploy.checks.rules'"]


def main() -> int:
    text = yaml.safe_dump(manifest(), sort_keys=False, width=1000, allow_unicode=True)
    COPY.write_text(_HEAD + text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
