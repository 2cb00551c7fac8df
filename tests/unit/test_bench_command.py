"""`blindtail bench` runs the benchmarks of a checkout, and says so where there is none."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from bench import __main__ as command
from blindtail import bench_cli, cli


@pytest.fixture(autouse=True)
def only_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        name = "bench"

        def load(self) -> object:
            return bench_cli.register

    monkeypatch.setattr(metadata, "entry_points", lambda group: [Entry()])


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as left:
        cli.main(["bench", *words])
    return int(left.value.code or 0)


def test_forwards_everything(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("list") == 0
    assert capfd.readouterr().out.split() == command.names()
    assert run("--help") == 0
    assert "--peer NAME=PYTHON" in capfd.readouterr().out
    assert run("he", "--nets", "Z") == 2
    assert "no net 'Z'" in capfd.readouterr().err


def test_a_checkout_in_the_current_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench_cli, "__file__", str(tmp_path / "site" / "blindtail" / "bench_cli.py"))
    monkeypatch.chdir(tmp_path)
    assert bench_cli.checkout() is None
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "__main__.py").touch()
    assert bench_cli.checkout() is None, "somebody else's bench"
    (tmp_path / "bench" / "rows.py").touch()
    assert bench_cli.checkout() == tmp_path


def test_without_a_checkout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_cli, "__file__", str(tmp_path / "blindtail" / "bench_cli.py"))
    monkeypatch.chdir(tmp_path)
    assert run("he", "--json") == 2
    said = capsys.readouterr().err
    assert "benchmarks run from a checkout" in said
    assert len(said.splitlines()) == 1


def test_helpers_are_no_benchmarks() -> None:
    assert {"he", "kernels", "properties", "agreement"} <= set(command.names())
    assert not {"peers", "interleave", "tails", "rows"} & set(command.names())


def test_threads_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["he", "--threads", "0"])
    assert "between 1 and 256" in capsys.readouterr().err
