"""Results that the documentation quotes, and the sources each depends on.

An item's checked-in file carries the hash of its sources; tests fail when they
have changed since. `python -m bench evidence` runs the stale ones again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import agreement, fuzz, he, kernels, lint, networks, plans, properties, results, weights


@dataclass(frozen=True)
class Item:
    """bench  name of the benchmark; its result is bench/results/BENCH.json
    sources  globs, relative to the repository, of everything the numbers depend on
    arguments  given to the benchmark
    """

    bench: str
    sources: tuple[str, ...]
    arguments: tuple[str, ...] = ()


#: What docs/ and README quote.
ITEMS: tuple[Item, ...] = tuple(
    Item(module.__name__.removeprefix("bench."), module.SOURCES)
    for module in (agreement, fuzz, he, kernels, lint, networks, plans, properties, weights)
)


def stale(items: Sequence[Item] | None = None, folder: Path = results.RESULTS) -> list[tuple[Item, str]]:
    """Items whose result is missing or older than its sources, with the reason."""
    found = []
    for item in ITEMS if items is None else items:
        path = folder / f"{item.bench}.json"
        if not path.exists():
            found.append((item, "no result yet"))
        elif results.load(path)["source_sha256"] != results.source_hash(item.sources):
            found.append((item, "its sources have changed"))
    return found
