"""The names users import exist, and nothing else is promised."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import blindtail
from blindtail import errors


@pytest.mark.parametrize("module", ["blindtail", "blindtail.bundle", "blindtail.config", "blindtail.errors"])
def test_all_is_complete_and_sorted(module: str) -> None:
    loaded = importlib.import_module(module)
    names = loaded.__all__
    assert len(set(names)) == len(names)
    assert all(hasattr(loaded, name) for name in names)


def test_every_error_is_at_the_top() -> None:
    raised = {name for name in errors.__all__ if name != "STATUS_OF"}
    assert raised <= set(blindtail.__all__)
    assert all(issubclass(getattr(blindtail, name), blindtail.BlindtailError) for name in raised)


@pytest.mark.timeout(60)
def test_onnx_runtime_does_not_report_to_its_maker(tmp_path: Path) -> None:
    """Its telemetry leaves an identifier of the device in the home folder as soon as it is loaded."""
    # A bare environment: it reports nothing either where it sees signs of a build machine.
    env = {"PATH": os.environ.get("PATH", "")}

    def files_after(module: str) -> list[Path]:
        home = tmp_path / module
        home.mkdir()
        code = f"import {module}"
        subprocess.run([sys.executable, "-c", code], env={**env, "HOME": str(home)}, check=True, timeout=50)
        return list(home.rglob("*deviceid*"))

    assert files_after("onnxruntime") != []  # positive control
    assert files_after("edge.executor") == []
