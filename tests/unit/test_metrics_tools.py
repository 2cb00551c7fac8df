"""Where Prometheus cannot be had, its tests are skipped and say so, and fail with CI=true."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tools


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without apt, Prometheus or anything else."""
    monkeypatch.setattr(tools, "FOLDER", tmp_path / "tools")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr("sys.argv", ["tools"])
    return tmp_path


def test_without_the_program_a_test_is_skipped(bare: Path) -> None:
    with pytest.raises(pytest.skip.Exception, match="make tools"):
        tools.require("promtool")


def test_in_ci_it_fails(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="make tools"):
        tools.require("promtool")


def test_fetching_says_what_is_missing(
    bare: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no apt-get" in tools.fetch()
    assert tools.main() == 0
    assert "are skipped" in capsys.readouterr().err
    monkeypatch.setenv("CI", "true")
    assert tools.main() == 1


def test_apt_that_fails_is_named(bare: Path) -> None:
    for name, text in (("apt-get", "echo 'E: Unable to locate package' >&2; exit 100"), ("dpkg-deb", "true")):
        (bare / name).write_text(f"#!/bin/sh\n{text}\n")
        (bare / name).chmod(0o755)
    assert tools.fetch() == "apt-get did not deliver the package prometheus: E: Unable to locate package"
    assert list((bare / "tools").iterdir()) == []


def test_a_program_on_the_path_is_used(bare: Path) -> None:
    (bare / "promtool").write_text("#!/bin/sh\n")
    (bare / "promtool").chmod(0o755)
    assert tools.require("promtool") == bare / "promtool"
