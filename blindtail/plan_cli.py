"""`blindtail plan cloud.bt`: what else its tails could cost, and what an objective would choose."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from blindtail.bundle import CloudBundle
from blindtail.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from blindtail.he.objective import Objective
    from blindtail.he.program import Program

#: Rows of a front that a table shows; JSON has all.
_SHOWN = 12


def register(app: typer.Typer) -> None:
    """Add the command `plan`."""
    app.command("plan", no_args_is_help=True)(plan_command)


def plan_command(
    file: Annotated[Path, typer.Argument(help="A cloud.bt.", metavar="cloud.bt")],
    minimise: Annotated[
        list[str] | None,
        typer.Option(
            help="METRIC or METRIC=WEIGHT, repeatable: the weighted sum is to be least [default: total_s]"
        ),
    ] = None,
    at_most: Annotated[
        list[str] | None, typer.Option(help="METRIC=BOUND, repeatable, in seconds or bytes")
    ] = None,
    ring: Annotated[int | None, typer.Option(help="ring degree N, a power of two")] = None,
    lanes: Annotated[
        int | None, typer.Option(min=1, help="images per ciphertext, a power of two  [default: the file's]")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="draw the front into this .png or .svg")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Show what plans there are for encrypted tails, before any key exists.

    METRIC is total_s (server seconds of an evaluation), online_s (with a ticket, made ahead),
    uplink_bytes (a request), key_bytes (uploaded once) or memory_bytes (plaintexts and one
    device's expanded keys). Seconds are predicted for the reference core.

    Prints the plan in the file, the one that the objective chooses, and the front: plans that
    no other beats everywhere. `compile_tail` and `pack` take the same objective. Without one they
    choose the least total_s as well, but within a budget of keys (30 MB at N = 8192).

    \b
      blindtail plan cloud.bt
      blindtail plan cloud.bt --at-most key_bytes=5e6
      blindtail plan cloud.bt --minimise online_s --minimise total_s=0.1 --plot front.png
    """
    from blindtail.he.objective import Objective

    wanted = Objective.parse(minimise or (), at_most or ())
    if lanes is not None and lanes & (lanes - 1):
        raise ConfigError(f"--lanes must be a power of two, not {lanes}")
    from rich.console import Console

    with Console(stderr=True).status("looking for plans"):
        report = describe(CloudBundle.open(file), wanted, lanes=lanes, ring_degree=ring)
    if plot is not None:
        draw(report, plot)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    console = Console()
    for cut, found in report["cuts"].items():
        console.print(_table(cut, found))
        if len(found["front"]) > _SHOWN:
            console.print(f"{_SHOWN} of {len(found['front'])} plans of the front; --json prints all")


def describe(
    bundle: CloudBundle, objective: Objective, *, lanes: int | None = None, ring_degree: int | None = None
) -> dict[str, Any]:
    """Everything that the command shows, as JSON; with the lanes of the file unless told others.

    Raises `ModelError`, `NoPlan` among them.
    """
    return {
        "model": bundle.model,
        "version": bundle.version,
        "objective": objective.to_json(),
        "predicted_for": "native",
        "cuts": {
            str(cut): _cut(program, objective, lanes or program.spec.lanes, ring_degree)
            for cut, program in sorted(bundle.programs.items())
        },
    }


def _cut(program: Program, objective: Objective, lanes: int, ring_degree: int | None) -> dict[str, Any]:
    from blindtail.he import plan
    from blindtail.he.layers import Affine, Layer, Quadratic
    from blindtail.he.objective import METRICS
    from blindtail.he.operations import MapOp

    layers: list[Layer] = []
    for op in program.ops:
        if isinstance(op, MapOp):
            layers.append(Affine(op.weight, op.bias, op.name))
        else:
            one = np.ones(op.layout.size)
            layers.append(Quadratic(one, 0 * one, 0 * one, op.name))
    costs = plan.costs_of(program)
    return {
        "present": {name: costs.of(name) for name in METRICS},
        "chosen": plan.best(layers, objective, lanes=lanes, ring_degree=ring_degree).describe(),
        "front": [p.describe() for p in plan.front(layers, lanes=lanes, ring_degree=ring_degree)],
    }


def _table(cut: str, found: Mapping[str, Any]) -> Table:
    from rich.table import Table

    table = Table(title=f"Plans for the tail after stage {cut}")
    for i, column in enumerate(("", "total", "online", "uplink", "keys", "memory", "N", "slots")):
        table.add_column(column, justify="right" if i else "left")

    def add(name: str, row: Mapping[str, Any], style: str = "") -> None:
        slots = "" if "complex_slots" not in row else "complex" if row["complex_slots"] else "real"
        table.add_row(
            name,
            f"{row['total_s'] * 1e3:.2f} ms",
            f"{row['online_s'] * 1e3:.2f} ms",
            f"{row['uplink_bytes'] / 1e3:,.0f} KB",
            f"{row['key_bytes'] / 1e6:.2f} MB",
            f"{row['memory_bytes'] / 1e6:.1f} MB",
            f"{row['ring_degree']:,}" if "ring_degree" in row else "",
            slots,
            style=style,
        )

    add("in the file", found["present"])
    add("chosen", found["chosen"], "bold")
    table.add_section()
    for row in _spread(found["front"]):
        add("", row)
    return table


def _spread(rows: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """At most `_SHOWN`, evenly over the front; its ends stay."""
    if len(rows) <= _SHOWN:
        return rows
    return [rows[i * (len(rows) - 1) // (_SHOWN - 1)] for i in range(_SHOWN)]


def draw(report: Mapping[str, Any], target: Path) -> None:
    """Seconds against bytes of keys for each cut. Raises `ConfigError` when it cannot be drawn or written."""
    if target.suffix not in (".png", ".svg"):
        raise ConfigError("--plot writes .png or .svg: give a file name that ends so")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: install blindtail[demo]") from error
    cuts = report["cuts"]
    figure = Figure(figsize=(6.5, 4.2 * len(cuts)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (cut, found) in zip(figure.subplots(len(cuts), squeeze=False)[:, 0], cuts.items(), strict=True):
        for key, label, mark in (("total_s", "total", "o"), ("online_s", "with a ticket", "s")):
            front = [(row["key_bytes"] / 1e6, row[key] * 1e3) for row in found["front"]]
            axes.plot(*zip(*front, strict=True), mark, markersize=3, alpha=0.6, label=label)
            chosen = found["chosen"]
            axes.plot(chosen["key_bytes"] / 1e6, chosen[key] * 1e3, "kx", markersize=8)
        axes.set(xscale="log", yscale="log", xlabel="evaluation keys, MB", ylabel="predicted server time, ms")
        axes.set_title(f"{report['model']}, cut after stage {cut} (x: chosen)")
        axes.legend()
    try:
        figure.savefig(target, dpi=130)
    except OSError as error:
        raise ConfigError(
            f"--plot cannot write {target.name}: {error.strerror or 'no such folder'}"
        ) from error


__all__ = ["describe", "draw", "plan_command", "register"]
