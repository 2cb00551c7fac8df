"""docs/coverage.md: every symbol that it names can be imported, every test that it names is there."""

from __future__ import annotations

import ast
import importlib
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "coverage.md"
COLUMNS = ["leaf", "status", "what there is, or why not", "code", "shown by"]
#: Leaves of each source, by words that one row's leaf must hold.
LEAVES = {
    "2": (
        *("square", "polynomial approximation", "trainable", "pooling", "batch normalisation"),
        *("convolution", "not interactive", "interactive refresh", "inference", "training on ciphertext"),
        *("overhead", "usability", "scheme limit"),
    ),
}


class Leaf(NamedTuple):
    """One row of the page, under its source's number."""

    source: str
    leaf: str
    status: str
    why: str
    code: tuple[str, ...]
    tests: tuple[str, ...]


def read(text: str) -> list[Leaf]:
    """Rows of all tables. Raises `ValueError` for a table or a row of another form."""
    found, source = list[Leaf](), ""
    for line in text.splitlines():
        if heading := re.match(r"## (\d+)\.", line):
            source = heading[1]
        if not line.startswith("|"):
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells == COLUMNS or set(line) <= set("|-"):
            continue
        if len(cells) != len(COLUMNS):
            raise ValueError(f"{len(cells)} cells: {line}")
        code, tests = (tuple(re.findall(r"`([^`]+)`", cell)) for cell in cells[3:])
        found.append(Leaf(source, *cells[:3], code, tests))
    return found


def faults(rows: list[Leaf]) -> list[str]:
    """What is wrong with rows, in words."""
    found = []
    for row in rows:
        at = f"source {row.source}, {row.leaf}"
        if row.status not in ("here", "in part", "out of scope"):
            found.append(f"{at}: no such status {row.status!r}")
        if (row.status == "out of scope") == bool(row.code or row.tests):
            found.append(f"{at}: {row.status}, but code {row.code}, tests {row.tests}")
        if row.status != "out of scope" and not (row.code and row.tests):
            found.append(f"{at}: needs code and a test")
        if len(row.why) < 20:
            found.append(f"{at}: says nothing")
        found += [f"{at}: there is no {name}" for name in row.code if not _importable(name)]
        found += [f"{at}: there is no test {name}" for name in row.tests if not _test_there(name)]
    return found


def _importable(name: str) -> bool:
    """module.symbol or module.Class.member, the longest module first."""
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            value: object = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        fields: set[str] = set()
        for part in parts[cut:]:
            if not hasattr(value, part) and part not in fields:
                return False
            value = getattr(value, part, None)
            fields = set(getattr(value, "__dataclass_fields__", ()))
        return True
    return False


def _test_there(name: str) -> bool:
    path, _, function = name.partition("::")
    return function in _functions(path)


@cache
def _functions(path: str) -> frozenset[str]:
    if not (ROOT / path).is_file():
        return frozenset()
    nodes = ast.walk(ast.parse((ROOT / path).read_text()))
    return frozenset(n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


def test_every_symbol_and_test_is_there() -> None:
    assert faults(read(PAGE.read_text())) == []


@pytest.mark.parametrize("source", LEAVES)
def test_every_leaf_has_a_row(source: str) -> None:
    leaves = [row.leaf for row in read(PAGE.read_text()) if row.source == source]
    assert [word for word in LEAVES[source] if not any(word in leaf for leaf in leaves)] == []
    assert len(set(leaves)) == len(leaves)


GOOD = (
    "| x | here | words that say what there is | `blindtail.models.layers.Square` "
    "| `tests/unit/test_coverage.py::test_every_leaf_has_a_row` |"
)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("layers.Square", "layers.Cube", "there is no blindtail.models.layers.Cube"),
        ("models.layers.Square", "models.gone.Square", "there is no blindtail.models.gone.Square"),
        ("layers.Square", "layers.Square.gone", "there is no blindtail.models.layers.Square.gone"),
        ("test_every_leaf_has_a_row", "test_gone", "there is no test"),
        ("test_coverage.py", "test_gone.py", "there is no test"),
        ("here", "out of scope", "out of scope, but code"),
        ("here", "soon", "no such status"),
        ("`blindtail.models.layers.Square`", "", "needs code and a test"),
        ("words that say what there is", "", "says nothing"),
    ],
)
def test_a_planted_fault_is_found(old: str, new: str, words: str) -> None:
    assert faults(read(f"## 2. A survey\n{GOOD}")) == []
    assert words in "\n".join(faults(read(f"## 2. A survey\n{GOOD.replace(old, new)}")))


def test_a_row_of_another_form_is_refused() -> None:
    with pytest.raises(ValueError, match="4 cells"):
        read("| a | here | b | c |")
