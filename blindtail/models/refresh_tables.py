"""Refreshed tails for people: what each costs, and each round trip of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

CLOSING = (
    "Between round trips the edge decrypts, applies what CKKS cannot, and encrypts again: THE DEVICE SEES "
    "these activations. Weights stay in the cloud. ms: predicted for one image on the reference core, "
    "backend native, without network; keys are uploaded once, for all segments."
)


def render_refreshed(rows: Sequence[Mapping[str, Any]], *, segments: bool = False) -> list[RenderableType]:
    """A table of the cuts, and one of each cut's round trips if `segments`. rows: `RefreshedCut.to_json`."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Where to cut with refreshing", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, column in enumerate(
        ("cut after", "values", "round trips", "N", "ms", "up KB", "down KB", "keys MB")
    ):
        table.add_column(column, justify="right" if i else "left", overflow="fold")
    parts: list[RenderableType] = [table]
    for row in rows:
        values, costs = 1, row["costs"]
        for n in row["shape"]:
            values *= n
        name = Text(row["name"])
        if costs is None:
            table.add_row(name, str(values), *[""] * 6)
            parts.append(Text(f"after {row['name']}: {row['note']}"))
            continue
        numbers = [f"{costs['round_trips']}", f"{costs['ring_degree']}", f"{1e3 * costs['predicted_s']:.1f}"]
        numbers += [f"{costs[name] / 1e3:.0f}" for name in ("uplink_bytes", "reply_bytes")]
        table.add_row(name, str(values), *numbers, f"{costs['key_bytes'] / 1e6:.1f}")
        if segments:
            parts.append(_segment_table(row["name"], costs))
    return [*parts, Text(CLOSING)]


def _segment_table(name: str, costs: Mapping[str, Any]) -> RenderableType:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"Round trips of the tail after {name}", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, column in enumerate(("segment", "in", "out", "levels", "ms", "up KB", "down KB")):
        table.add_column(column, justify="right" if i else "left", overflow="fold")
    for i, s in enumerate(costs["segments"]):
        table.add_row(
            Text(f"{i}  {s['name']}"),
            *(str(s[key]) for key in ("inputs", "outputs", "levels")),
            f"{1e3 * s['predicted_s']:.2f}",
            f"{s['uplink_bytes'] / 1e3:.0f}",
            f"{s['reply_bytes'] / 1e3:.0f}",
        )
    return table


__all__ = ["CLOSING", "render_refreshed"]
