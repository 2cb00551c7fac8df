"""Prometheus' own tool on the shipped files: they are valid, and each alert fires when it should."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests import tools

pytestmark = pytest.mark.timeout(90)
FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "prometheus"


@pytest.fixture(scope="module")
def promtool() -> Path:
    return tools.require("promtool")


def run(promtool: Path, *arguments: str | Path, folder: Path = FOLDER) -> subprocess.CompletedProcess[str]:
    command = [str(promtool), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def alerts(folder: Path) -> list[str]:
    content = yaml.safe_load((folder / "rules" / "blindtail.yml").read_text())
    return [rule["alert"] for group in content["groups"] for rule in group["rules"] if "alert" in rule]


def test_the_configuration_and_its_rules_are_valid(promtool: Path) -> None:
    done = run(promtool, "check", "config", "prometheus.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rules found" in done.stdout
    assert run(promtool, "check", "rules", "rules/blindtail.yml").returncode == 0


def test_each_alert_fires_when_it_should_and_not_otherwise(promtool: Path) -> None:
    done = run(promtool, "test", "rules", "blindtail_test.yml", folder=FOLDER / "rules" / "tests")
    assert done.returncode == 0, done.stdout + done.stderr
    content = yaml.safe_load((FOLDER / "rules" / "tests" / "blindtail_test.yml").read_text())
    cases = [
        (r["alertname"], bool(r["exp_alerts"]))
        for t in content["tests"]
        for r in t.get("alert_rule_test", [])
    ]
    for name in alerts(FOLDER):
        assert {fires for alert, fires in cases if alert == name} == {True, False}
    recorded = [r["expr"] for t in content["tests"] for r in t.get("promql_expr_test", [])]
    rules = yaml.safe_load((FOLDER / "rules" / "blindtail.yml").read_text())["groups"]
    assert {r["record"] for g in rules for r in g["rules"] if "record" in r} == set(recorded)


@pytest.mark.parametrize("always", [False, True])
def test_the_tests_notice_an_alert_that_never_or_always_fires(
    promtool: Path, tmp_path: Path, always: bool
) -> None:
    """Every alert's condition is replaced; its own test must then fail."""
    shutil.copytree(FOLDER / "rules", tmp_path / "rules")
    path = tmp_path / "rules" / "blindtail.yml"
    content = yaml.safe_load(path.read_text())
    for group in content["groups"]:
        for rule in group["rules"]:
            if "alert" in rule:
                rule["expr"] = "vector(1)" if always else "vector(1) > 2"
    path.write_text(yaml.safe_dump(content))
    done = run(promtool, "test", "rules", "blindtail_test.yml", folder=tmp_path / "rules" / "tests")
    assert done.returncode != 0
    failed = done.stdout + done.stderr
    for name in alerts(FOLDER):
        # The case that shows it: no alert expected and one got, or the other way round.
        wrong = r"exp:\[\],\s+got:\[\s" if always else r"exp:\[\s[^\]]*\],\s+got:\[\]"
        assert re.search(rf"alertname: {name}, time: \w+,\s+{wrong}", failed), name
