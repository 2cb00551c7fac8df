"""What `blindtail cloud` says of a cell without a model: a hint, not a failure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import cloud.supervisor
from cloud.cli import register
from cloud.config import CloudConfig


@pytest.mark.parametrize(
    ("models", "text"),
    [
        ([], "ready: no model yet (`blindtail model push cloud.bt` brings one) on 127.0.0.1:5"),
        ([{"model": "toy", "version": "1"}], "ready: toy 1 on 127.0.0.1:5"),
    ],
    ids=["none", "one"],
)
def test_the_ready_line(
    models: list[dict[str, str]], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    announced = {"models": models, "address": "127.0.0.1:5", "evaluators": [], "backend": "seal"}
    given: list[CloudConfig] = []

    def serve(config: CloudConfig, *, on_ready: Callable[[Mapping[str, Any]], None], **_: object) -> int:
        given.append(config)
        on_ready(announced)
        return 0

    monkeypatch.setattr(cloud.supervisor, "serve", serve)
    app = typer.Typer()
    app.callback()(lambda: None)
    register(app)
    done = CliRunner().invoke(app, ["cloud", "--state-dir", str(tmp_path)])
    assert done.exit_code == 0
    assert text in done.output
    assert given[0].models == ()
