"""What people see of refreshed tails: verify, inspect, plan and lint."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from blindtail.bundle import CloudBundle
from blindtail.errors import ConfigError, InputError
from blindtail.he.objective import Objective
from blindtail.inspect import describe, render
from blindtail.models.lint_cli import register
from blindtail.plan_cli import describe as plans
from edge.pair import ModelPair
from edge.verify import summary_lines, verify
from tests.refresh_cases import TRIPS, expected, images, packed, saved

NET = """
from torch import nn

def build():
    return nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)).eval()
"""


@pytest.mark.parametrize("backend", ["clear", "auto"])
def test_verify_runs_every_round_trip(backend: str, tmp_path: Path) -> None:
    pair, pixels = ModelPair.open(*saved(tmp_path)), images(4, seed=7)
    report = verify(pair, pixels, np.zeros(4, np.int64), backend=backend)
    specs = packed()[0].segments(0)
    assert report["round_trips"] == TRIPS
    assert report["uplink_bytes"] == sum(s.uplink_bytes for s in specs)
    assert report["logit_error"]["max"] < (1e-9 if backend == "clear" else 0.02)
    assert report["agreement"] == 1.0
    assert summary_lines(report)
    head = pair.run_head(pixels)
    np.testing.assert_allclose(pair.clear_tail(head.activations), expected(pixels), atol=1e-4)


def test_files_whose_segments_differ_are_no_pair(tmp_path: Path) -> None:
    _, cloud = packed()
    saved(tmp_path)
    alone = CloudBundle(cloud.model, "2", {1: cloud.programs[0]}, {1: cloud.following[0]})
    alone.save(tmp_path / "cloud.bt")
    with pytest.raises(InputError, match="has no cut 0"):
        ModelPair.open(tmp_path / "edge.bt", tmp_path / "cloud.bt")


def test_inspect_tells_each_round_trip(tmp_path: Path) -> None:
    for path in saved(tmp_path):
        tail = describe(path)["cuts"]["0"]
        assert tail["round_trips"] == len(tail["segments"]) == TRIPS
        assert tail["uplink_bytes"] == sum(s["uplink_bytes"] for s in tail["segments"])
        assert tail["key_bytes"] == tail["segments"][1]["key_bytes"]
        console = Console(record=True, width=140)
        for part in render(describe(path)):
            console.print(part)
        assert "THE EDGE SEES THE VALUES IN THE CLEAR" in console.export_text()


def test_plans_are_made_for_each_segment_in_its_ring(tmp_path: Path) -> None:
    _, cloud = packed()
    report = plans(cloud, Objective())
    assert list(report["cuts"]) == [f"0.{i}" for i in range(TRIPS)]
    n = cloud.programs[0].spec.parameters.ring_degree
    assert {cut["chosen"]["ring_degree"] for cut in report["cuts"].values()} == {n}


def test_lint_tells_costs_with_refreshing_only_where_asked(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NET)
    model = [f"{tmp_path / 'net.py'}:build", "--input", "12"]
    app, runner = typer.Typer(), CliRunner()
    register(app)
    app.callback()(lambda: None)  # so that the command keeps its name
    done = runner.invoke(app, ["lint", *model, "--refresh", "--json"])
    assert done.exit_code == 0, done.output
    rows = {row["name"]: row["costs"] for row in json.loads(done.stdout)["refreshed"]}
    assert {name: costs["round_trips"] for name, costs in rows.items()} == {"input": 3, "1": 2, "3": 1}
    assert rows["input"]["uplink_bytes"] == sum(s["uplink_bytes"] for s in rows["input"]["segments"])
    shown = runner.invoke(app, ["lint", *model, "--refresh", "--cut", "input"])
    assert "THE DEVICE SEES" in shown.stdout
    assert "Round trips of the tail after input" in shown.stdout
    assert "refreshed" not in runner.invoke(app, ["lint", *model, "--json", "--no-plan"]).stdout
    wrong = runner.invoke(app, ["lint", *model, "--refresh-after", "0"])
    assert isinstance(wrong.exception, ConfigError)
