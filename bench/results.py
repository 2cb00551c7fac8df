"""Results as files: bench/results/NAME.json with machine, date, versions and source hash.

The hash covers the sources a result depends on, so that a quoted number whose
code has changed is noticed (`bench.evidence`).
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from blindtail.machine import machine, versions

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def source_files(globs: Iterable[str], root: Path = ROOT) -> list[Path]:
    """Files that match, sorted. Raises `ValueError` for a glob that matches nothing."""
    found: set[Path] = set()
    for pattern in globs:
        matches = {p for p in root.glob(pattern) if p.is_file() and "__pycache__" not in p.parts}
        if not matches:
            raise ValueError(f"the source pattern {pattern!r} matches no file")
        found |= matches
    return sorted(found)


def source_hash(globs: Iterable[str], root: Path = ROOT) -> str:
    """Hex SHA-256 over names and contents of the matching files."""
    digest = hashlib.sha256()
    for path in source_files(globs, root):
        for part in (path.relative_to(root).as_posix().encode(), path.read_bytes()):
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def save(
    name: str, rows: Sequence[Mapping[str, Any]], sources: Sequence[str] = (), folder: Path = RESULTS
) -> Path:
    """Writes `folder`/NAME.json atomically and returns its path."""
    made = {
        "name": name,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "sources": list(sources),
        "source_sha256": source_hash(sources) if sources else None,
        "rows": list(rows),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(made, indent=1, allow_nan=False) + "\n")
    part.replace(path)
    return path


def load(path: Path) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(path.read_text())
    return made
