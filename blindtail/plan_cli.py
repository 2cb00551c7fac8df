"""`blindtail plan cloud.bt` or a network: what its tails could cost, and what an objective would choose."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blindtail.bundle import CloudBundle
from blindtail.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from blindtail.he.layers import Layer
    from blindtail.he.objective import Objective
    from blindtail.he.program import Program

#: Called with the cut whose plans are looked for.
Progress = Callable[[str], None]
#: Rows of a front that a table shows; JSON has all.
_SHOWN = 12


def register(app: typer.Typer) -> None:
    """Add the command `plan`."""
    app.command("plan", no_args_is_help=True)(plan_command)


def plan_command(
    model: Annotated[
        str,
        typer.Argument(
            help="A cloud.bt, or a network: file.py:NAME or package.module:NAME; its code is run.",
            metavar="cloud.bt|MODEL",
        ),
    ],
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", help="Shape of one image for MODEL, 3,32,32. Again for each further input."),
    ] = None,
    cut: Annotated[
        str | None,
        typer.Option(
            help="The tail after this: a name from `blindtail lint`, or a stage's number.  "
            "[default: the first that lint advises, of a file all]"
        ),
    ] = None,
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
        int | None,
        typer.Option(min=1, help="images per ciphertext, a power of two  [default: the file's, or 1]"),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="draw the front into this .png or .svg")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Show what plans there are for encrypted tails, before any key exists.

    METRIC is total_s (server seconds of an evaluation), online_s (with a ticket, made ahead),
    uplink_bytes (a request), key_bytes (uploaded once) or memory_bytes (plaintexts and one
    device's expanded keys). Seconds are predicted for the reference core.

    Prints the plan in the file, the one that the objective chooses, and the front: plans that
    no other beats everywhere. Where a value does not fit one ciphertext of the smallest ring, a few
    that cut it into several are among them (N "4,096x3"). `compile_tail` and `pack` take the same
    objective. Without one they choose the least total_s as well, but within a budget of keys (30 MB
    at N = 8192), and count 80 ns for a byte of uplink where values could lie over several ciphertexts.
    There, --at-most also takes error and disagreement, which need calibration data and stand aside here.

    Of a network, trained or not, the tail after --cut is planned as its layers' sizes and zeros make
    it, and with the rewrites that `blindtail lint` advises where it needs some. THE FILE'S CODE IS
    RUN, with your rights.

    \b
      blindtail plan cloud.bt
      blindtail plan net.py:WardNet --input 1,28,28 --cut features.8
      blindtail plan cloud.bt --at-most key_bytes=5e6
      blindtail plan cloud.bt --minimise online_s --minimise total_s=0.1 --plot front.png
    """
    from blindtail.he.objective import Objective

    wanted = Objective.parse(minimise or (), at_most or ())
    if lanes is not None and lanes & (lanes - 1):
        raise ConfigError(f"--lanes must be a power of two, not {lanes}")
    from rich.console import Console
    from rich.markup import escape

    with Console(stderr=True).status("reading the layers") as status:

        def planning(after: str) -> None:
            status.update(f"looking for plans for the tail after {after}")

        def folding(done: int, total: int, what: str) -> None:
            status.update(escape(f"reading the layers: {what}"))

        if model.endswith(".py"):
            raise ConfigError(f"{model}: say which network of it: {Path(model).name}:NAME")
        if ":" in model and not Path(model).exists():
            from blindtail.models import plan_network

            tails = plan_network.tails(model, inputs or (), cut, folding)
            report = describe_tails(
                tails.model, tails.layers, wanted, lanes=lanes or 1, ring_degree=ring, progress=planning
            )
            report["rewrites"] = list(tails.rewrites)
        else:
            if inputs:
                raise ConfigError("--input is for a network, file.py:NAME: a cloud.bt knows its shapes")
            bundle = CloudBundle.open(Path(model))
            report = describe(bundle, wanted, lanes=lanes, ring_degree=ring, cut=cut, progress=planning)
    if plot is not None:
        draw(report, plot)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    console = Console()
    for found in report["cuts"].values():
        console.print(_table(found))
        if len(found["front"]) > _SHOWN:
            console.print(f"{_SHOWN} of {len(found['front'])} plans of the front; --json prints all")
    if report.get("rewrites"):
        console.print(f"after the rewrites that `blindtail lint` tells of: {', '.join(report['rewrites'])}")


def describe(
    bundle: CloudBundle,
    objective: Objective,
    *,
    lanes: int | None = None,
    ring_degree: int | None = None,
    cut: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Everything that the command shows of a cloud.bt, as JSON; with its lanes unless told others.

    cut  the stage of one tail; without it all

    Raises `ModelError`, `NoPlan` among them, and `ConfigError` for a cut that it has not.
    """
    from blindtail.he import plan
    from blindtail.he.objective import METRICS
    from blindtail.he.recover import layers_of

    cuts = [str(stage) for stage in sorted(bundle.programs)]
    if cut is not None and cut not in cuts:
        raise ConfigError(f"--cut {cut}: {bundle.model} is cut after stages {', '.join(cuts)}")
    report: dict[str, Any] = {
        "model": bundle.model,
        "version": bundle.version,
        "objective": objective.to_json(),
        "predicted_for": "native",
        "cuts": {},
    }
    for at in cuts:
        for stage, program, ring in _programs(bundle, int(at), ring_degree) if cut in (None, at) else ():
            wanted = lanes or program.spec.lanes
            found = _planned(f"stage {stage}", layers_of(program), objective, wanted, ring, progress)
            costs = plan.costs_of(program)
            report["cuts"][stage] = {"present": {name: costs.of(name) for name in METRICS}, **found}
    return report


def describe_tails(
    model: str,
    tails: Mapping[str, Sequence[Layer]],
    objective: Objective,
    *,
    lanes: int = 1,
    ring_degree: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The same for tails that no file holds yet: layers by where the network is cut.

    Raises `ModelError`, `NoPlan` among them.
    """
    return {
        "model": model,
        "version": None,
        "objective": objective.to_json(),
        "predicted_for": "native",
        "cuts": {
            after: {"present": None, **_planned(after, layers, objective, lanes, ring_degree, progress)}
            for after, layers in tails.items()
        },
    }


def _programs(
    bundle: CloudBundle, cut: int, ring_degree: int | None
) -> Iterator[tuple[str, Program, int | None]]:
    """A tail, or each segment of a refreshed one ("1.0", "1.1", ...), which share a ring."""
    programs = bundle.segments(cut)
    for i, program in enumerate(programs):
        if len(programs) == 1:
            yield str(cut), program, ring_degree
        else:
            yield f"{cut}.{i}", program, ring_degree or program.spec.parameters.ring_degree


def _planned(
    after: str,
    layers: Sequence[Layer],
    objective: Objective,
    lanes: int,
    ring_degree: int | None,
    progress: Progress | None,
) -> dict[str, Any]:
    from blindtail.he import choice

    if progress is not None:
        progress(after)
    chosen = choice.best(layers, objective, lanes=lanes, ring_degree=ring_degree)
    return {
        "after": after,
        "chosen": choice.describe(chosen),
        "front": [choice.describe(p) for p in choice.front(layers, lanes=lanes, ring_degree=ring_degree)],
    }


def _table(found: Mapping[str, Any]) -> Table:
    from rich.table import Table

    table = Table(title=f"Plans for the tail after {found['after']}")
    for i, column in enumerate(("", "total", "online", "uplink", "keys", "memory", "N", "slots")):
        # What a narrow terminal cuts off is told nowhere else.
        table.add_column(
            column, justify="right" if i else "left", overflow="fold" if column == "N" else "ellipsis"
        )

    def add(name: str, row: Mapping[str, Any], style: str = "") -> None:
        slots = "" if "complex_slots" not in row else "complex" if row["complex_slots"] else "real"
        table.add_row(
            name,
            f"{row['total_s'] * 1e3:.2f} ms",
            f"{row['online_s'] * 1e3:.2f} ms",
            f"{row['uplink_bytes'] / 1e3:,.0f} KB",
            f"{row['key_bytes'] / 1e6:.2f} MB",
            f"{row['memory_bytes'] / 1e6:.1f} MB",
            _ring(row),
            slots,
            style=style,
        )

    if found["present"] is not None:
        add("in the file", found["present"])
    add("chosen", found["chosen"], "bold")
    table.add_section()
    for row in _spread(found["front"]):
        add("", row)
    if any("ciphertexts" in row for row in (found["chosen"], *found["front"])):
        table.caption = "Nxk: values are cut into tiles, up to k ciphertexts each; --json has their shapes"
    return table


def _ring(row: Mapping[str, Any]) -> str:
    """The ring's degree, with the ciphertexts of the value that takes the most where values are cut."""
    if "ring_degree" not in row:
        return ""
    degree = f"{row['ring_degree']:,}"
    return f"{degree}x{max(row['ciphertexts'])}" if "ciphertexts" in row else degree


def _spread(rows: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """At most `_SHOWN`: all over several ciphertexts, of others evenly over the front; its ends stay."""
    if len(rows) <= _SHOWN:
        return rows
    others = [i for i, row in enumerate(rows) if "ciphertexts" not in row]
    room = _SHOWN - (len(rows) - len(others))
    dropped = set(others) - {others[i * (len(others) - 1) // (room - 1)] for i in range(room)}
    return [row for i, row in enumerate(rows) if i not in dropped]


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
    for axes, found in zip(figure.subplots(len(cuts), squeeze=False)[:, 0], cuts.values(), strict=True):
        for key, label, mark in (("total_s", "total", "o"), ("online_s", "with a ticket", "s")):
            front = [(row["key_bytes"] / 1e6, row[key] * 1e3) for row in found["front"]]
            axes.plot(*zip(*front, strict=True), mark, markersize=3, alpha=0.6, label=label)
            cut = [at for at, row in zip(front, found["front"], strict=True) if "ciphertexts" in row]
            if cut:
                told = "over several ciphertexts" if key == "total_s" else None
                axes.plot(*zip(*cut, strict=True), "ko", markersize=8, fillstyle="none", label=told)
            chosen = found["chosen"]
            axes.plot(chosen["key_bytes"] / 1e6, chosen[key] * 1e3, "kx", markersize=8)
        axes.set(xscale="log", yscale="log", xlabel="evaluation keys, MB", ylabel="predicted server time, ms")
        axes.set_title(f"{report['model']}, cut after {found['after']} (x: chosen)")
        axes.legend()
    try:
        figure.savefig(target, dpi=130)
    except OSError as error:
        raise ConfigError(
            f"--plot cannot write {target.name}: {error.strerror or 'no such folder'}"
        ) from error


__all__ = ["describe", "describe_tails", "draw", "plan_command", "register"]
