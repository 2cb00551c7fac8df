"""The one form of a result: a list of rows.

A row is `{"name", "value", "unit", "target", "holds", "n", "spread", "note"}`.
Rows of an encrypted net add `net, backend, threads, eval_s, uplink_bytes,
key_bytes, reply_bytes, max_abs_err`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Row = dict[str, Any]

FIELDS = ("name", "value", "unit", "target", "holds", "n", "spread", "note")
NET_FIELDS = (
    "net",
    "backend",
    "threads",
    "eval_s",
    "uplink_bytes",
    "key_bytes",
    "reply_bytes",
    "max_abs_err",
)


def row(
    name: str,
    value: float,
    unit: str,
    *,
    target: float | None = None,
    at_most: bool = True,
    n: int = 1,
    spread: float | None = None,
    note: str = "",
    **net: Any,
) -> Row:
    """One row. `holds` follows from `target`: value <= target, or >= with at_most=False.

    spread: 95th less 5th percentile of the n measurements, in the unit of the value.
    """
    holds = None if target is None else (value <= target if at_most else value >= target)
    made: Row = {
        "name": name,
        "value": value,
        "unit": unit,
        "target": target,
        "holds": holds,
        "n": n,
        "spread": spread,
        "note": note,
        **net,
    }
    check(made)
    return made


def check(made: Mapping[str, Any]) -> None:
    """Raises `ValueError` when a row has not the one form."""
    missing = [f for f in FIELDS if f not in made]
    unknown = [f for f in made if f not in FIELDS and f not in NET_FIELDS]
    if missing or unknown:
        raise ValueError(f"row {made.get('name')!r}: missing {missing}, unknown {unknown}")
    if any(f in made for f in NET_FIELDS) and not all(f in made for f in NET_FIELDS):
        raise ValueError(f"row {made['name']!r}: a net's row has all of {NET_FIELDS}")


def text(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows for a terminal, one line each."""
    lines = []
    for r in rows:
        spread = "" if r["spread"] is None else f" +- {r['spread'] / 2:.3g}"
        target = (
            "" if r["target"] is None else f"  target {r['target']:g}: {'holds' if r['holds'] else 'MISSED'}"
        )
        value = f"{r['value']:,.0f}" if abs(r["value"]) >= 10_000 else f"{r['value']:.4g}"
        lines.append(
            f"{r['name']:<44} {value:>12}{spread} {r['unit']}  (n = {r['n']}){target}  {r['note']}".rstrip()
        )
    return "\n".join(lines)
