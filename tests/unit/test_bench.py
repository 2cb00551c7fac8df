"""The form of results, their source hashes, and that quoted results are of the present sources."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import __main__ as command
from bench import evidence, results
from bench.rows import check, row, text


def test_row_form() -> None:
    made = row("warm p50", 0.12, "s", target=0.15, n=100, spread=0.01)
    assert made["holds"] is True
    assert row("share", 0.5, "1", target=0.9, at_most=False)["holds"] is False
    assert row("x", 1.0, "s")["holds"] is None
    assert "MISSED" in text([row("x", 2.0, "s", target=1.0)])
    with pytest.raises(ValueError, match="unknown"):
        row("x", 1.0, "s", colour="red")
    with pytest.raises(ValueError, match="has all of"):
        row("x", 1.0, "s", net="n", backend="seal")
    with pytest.raises(ValueError, match="missing"):
        check({"name": "x"})


def test_source_hash_follows_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("1")
    (tmp_path / "b.py").write_text("2")
    first = results.source_hash(["*.py"], tmp_path)
    assert results.source_hash(["a.py", "b.py"], tmp_path) == first
    (tmp_path / "b.py").write_text("3")
    assert results.source_hash(["*.py"], tmp_path) != first
    (tmp_path / "b.py").write_text("2")
    (tmp_path / "b.py").rename(tmp_path / "c.py")
    assert results.source_hash(["*.py"], tmp_path) != first
    with pytest.raises(ValueError, match="matches no file"):
        results.source_hash(["*.cpp"], tmp_path)


def test_stale_results_are_found(tmp_path: Path) -> None:
    item = evidence.Item("demo", ("bench/rows.py",))
    assert evidence.stale([item], tmp_path) == [(item, "no result yet")]
    path = results.save("demo", [row("x", 1.0, "s")], item.sources, tmp_path)
    assert evidence.stale([item], tmp_path) == []
    made = json.loads(path.read_text())
    assert {"machine", "versions", "date", "rows"} <= set(made)
    path.write_text(json.dumps({**made, "source_sha256": "0" * 64}))
    assert evidence.stale([item], tmp_path) == [(item, "its sources have changed")]


def test_quoted_results_are_of_the_present_sources() -> None:
    found = [f"{item.bench}: {reason}" for item, reason in evidence.stale()]
    assert not found, f"run 'make evidence': {found}"


def test_checked_in_results_have_the_form() -> None:
    for path in results.RESULTS.glob("*.json"):
        for made in results.load(path)["rows"]:
            check(made)


@pytest.mark.parametrize("name", command.names())
def test_every_benchmark_says_what_it_measures(name: str) -> None:
    import importlib

    module = importlib.import_module(f"bench.{name}")
    assert callable(module.rows)
    assert module.__doc__
