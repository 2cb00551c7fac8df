"""`blindtail lint MODEL`: what of a PyTorch network can run encrypted, and where to cut it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blindtail.errors import ConfigError, ModelError
from blindtail.models import named

if TYPE_CHECKING:
    from rich.console import RenderableType
    from torch import nn

    from blindtail.progress import Progress


def register(app: typer.Typer) -> None:
    """Add the command `lint`."""
    app.command("lint", no_args_is_help=True)(lint_command)


def lint_command(
    model: Annotated[
        str,
        typer.Argument(help="file.py:NAME or package.module:NAME; its code is run.", metavar="MODEL"),
    ],
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", help="Shape of one image, 3,32,32. Again for each further input."),
    ] = None,
    cut: Annotated[
        str | None, typer.Option("--cut", help="Only this cut: what runs encrypted is all after it.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option("--weights", help="Trained weights of it, a .safetensors file.")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", help="Preprocessed inputs (n, ...) in a .npy file: bounds values."),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Layers that run and cuts not worth it, too.")] = False,
    refresh: Annotated[
        bool,
        typer.Option(
            "--refresh",
            help="Cost tails that the edge decrypts and encrypts again in between: THE DEVICE SEES those "
            "activations; ReLU, max pooling and skips run exactly.",
        ),
    ] = False,
    refresh_after: Annotated[
        list[str] | None, typer.Option("--refresh-after", help="With --refresh: after this layer as well.")
    ] = None,
    plans: Annotated[bool, typer.Option("--plan/--no-plan", help="Compile each tail for its costs.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Say which layers of a network cannot run encrypted, why, what to write instead, and where to cut.

    MODEL names a torch.nn.Module, a class of one or a function that returns one, both without
    arguments. THE FILE'S CODE IS RUN, with your rights: lint what you trust.

    Everything after a cut is the tail, which runs encrypted; everything before it stays at the
    edge. For each cut: levels consumed, the ring, and what a request costs, compiled as `pack`
    would. Where layers must be rewritten first, costs are those after the rewrites.

    Leaves with 0 when some tail (or that of --cut) runs as it is, with 1 when rewrites are needed or
    none can run, with 2 when the request was wrong.

    With --refresh, what tails cost instead whose activations the edge may see: round trips, and
    the sums over them. `pack` and `compile_model` make such a tail with refresh=Refresh().

    \b
      blindtail lint net.py:WardNet --input 1,28,28
      blindtail lint net.py:build --input 3,32,32 --weights ward.safetensors --cut features.8
      blindtail lint net.py:LeNet --input 1,28,28 --refresh --cut input
    """
    shapes = [named.shape(text) for text in inputs or []]
    network, shapes = named.network(model, shapes)
    if weights is not None:
        named.load_weights(network, weights)
    from blindtail.models.lint import lint

    if refresh_after and not refresh:
        raise ConfigError("--refresh-after goes with --refresh: the device sees what is refreshed")
    values = None if calibration is None else named.array(calibration)
    if refresh:
        _lint_refreshed(network, shapes, values, cut, tuple(refresh_after or ()), as_json)
        return
    with _bar(quiet=as_json) as progress:
        try:
            report = lint(network, shapes, values, cut=cut, plans=plans, progress=progress)
        except ModelError as error:
            raise ConfigError(str(error)) from error
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=2))
    else:
        from rich.console import Console

        console = Console()
        for part in render(report.to_json(), every=every or cut is not None):
            console.print(part)
    raise typer.Exit(0 if report.verdict == "runs" else 1)


def _lint_refreshed(
    network: nn.Module,
    shapes: list[tuple[int, ...]],
    calibration: Any,
    cut: str | None,
    at: tuple[str, ...],
    as_json: bool,
) -> None:
    from blindtail.models.lint import lint_refreshed
    from blindtail.models.refresh import Refresh

    with _bar(quiet=as_json) as progress:
        try:
            found = lint_refreshed(
                network, shapes, calibration, cut=cut, refresh=Refresh(at), progress=progress
            )
        except ModelError as error:
            raise ConfigError(str(error)) from error
    rows = [one.to_json() for one in found]
    if as_json:
        typer.echo(json.dumps({"network": type(network).__name__, "refreshed": rows}, indent=2))
    else:
        from rich.console import Console

        from blindtail.models.refresh_tables import render_refreshed

        console = Console()
        for part in render_refreshed(rows, segments=cut is not None):
            console.print(part)
    raise typer.Exit(0 if any(one.costs is not None for one in found) else 1)


@contextlib.contextmanager
def _bar(quiet: bool) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
    )
    with Progress(*columns, console=Console(stderr=True), disable=quiet, transient=True) as bar:
        task = bar.add_task("reading the network", total=None)

        def advance(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, description=f"planning the tail after {name}")

        yield advance


def render(report: Mapping[str, Any], *, every: bool = False) -> list[RenderableType]:
    """The report as rich tables and lines."""
    from rich.text import Text

    parts: list[RenderableType] = []
    shapes = ", ".join(_times(s) for s in report["input_shapes"])
    parts.append(Text(f"{report['network']}, input {shapes}: {_SAID[report['verdict']]}"))
    shown = [f for f in report["findings"] if every or f["verdict"] != "runs"]
    if shown:
        parts.append(_finding_table(shown))
        advised: dict[str, list[str]] = {}
        for f in shown:
            if f["advice"]:
                advised.setdefault(f["advice"], []).append(f["kind"])
        parts += [Text(f"{', '.join(dict.fromkeys(kinds))}: {text}") for text, kinds in advised.items()]
    cuts = [c for c in report["cuts"] if every or (c["worthwhile"] and c["verdict"] != "edge")]
    if cuts:
        parts.append(_cut_table(cuts))
    told = {c["name"]: (*c["problems"][:1], c["note"])[0] for c in cuts}
    parts += [Text(f"after {name}: {text}") for name, text in told.items() if text]
    ruled_out = [c for c in report["cuts"] if c["verdict"] == "edge"]
    if ruled_out and not cuts:
        parts += [Text(f"after {c['name']}: {c['problems'][0]}") for c in ruled_out[-3:]]
    elif ruled_out:
        last = ruled_out[-1]
        parts.append(Text(f"not after {last['name']} or earlier as it stands: {last['problems'][0]}"))
    parts += [Text(line) for line in _closing(report)]
    return parts


_SAID = {
    "runs": "part of it runs encrypted as it is",
    "rewrite": "part of it runs encrypted after rewrites",
    "edge": "no tail of it can run encrypted",
}


def _times(shape: Any) -> str:
    return " x ".join(map(str, shape))


def _finding_table(findings: list[Mapping[str, Any]]) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Layers", show_lines=True)
    for column in ("layer", "verdict", "why", "instead"):
        table.add_column(column, overflow="fold", no_wrap=column == "verdict")
    for f in findings:
        where = f"{f['layer']} ({f['kind']})" + (f"\n{f['line']}" if f["line"] else "")
        where += f"\n{f['calls']} times" if f["calls"] > 1 else ""
        why = f["reason"] or f"{f['levels']} level{'s' if f['levels'] != 1 else ''}"
        table.add_row(*(Text(text) for text in (where, f["verdict"], why, f["rewrite"])))
    return table


def _cut_table(cuts: list[Mapping[str, Any]]) -> RenderableType:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title="Where to cut: the tail after it runs encrypted", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    columns = ("cut after", "values", "verdict", "levels", "N", "ms", "up KB", "down KB", "keys MB")
    for i, column in enumerate(columns):
        wide = 14 if i == 0 else None
        side: Any = "left" if i in (0, 2) else "right"
        table.add_column(column, justify=side, overflow="fold", no_wrap=i > 0, min_width=wide)
    for c in cuts:
        verdict = c["verdict"] + (f" ({len(c['rewrites'])})" if c["verdict"] == "rewrite" else "")
        row = [c["name"], str(c["values"]), verdict]
        row += [str(c["depth"]), *[""] * 5] if c["plan"] is None else _numbers(c["plan"])
        table.add_row(*(Text(text) for text in row))
    return table


def _numbers(plan: Mapping[str, Any]) -> list[str]:
    return [
        f"{plan['depth']} of {plan['ring_levels']}",
        f"{plan['ring_degree']}",
        f"{1e3 * plan['predicted_s']:.1f}",
        f"{plan['uplink_bytes'] / 1e3:.0f}",
        f"{plan['reply_bytes'] / 1e3:.0f}",
        f"{plan['key_bytes'] / 1e6:.1f}",
    ]


def _closing(report: Mapping[str, Any]) -> Iterator[str]:
    planned = [c for c in report["cuts"] if c["plan"] is not None]
    if planned:
        yield (
            "Levels: consumed, of the most that the ring (N) holds at 128 bits. ms: predicted for one "
            "image on the reference core, backend native. Up, down: a request and its reply; keys are "
            "uploaded once."
        )
        if any(not c["plan"]["own_weights"] for c in planned):
            yield "Costs after rewrites are those of the layers' sizes; weights are to be trained again."
        yield f"Activations: {report['calibration']}."
    able = [c for c in report["cuts"] if c["worthwhile"] and c["verdict"] != "edge"]
    for verdict, words in (("runs", "As it is"), ("rewrite", "After the rewrites")):
        first = next((c for c in able if c["verdict"] == verdict), None)
        if first is not None:
            where = (
                "encrypting the input itself" if first["name"] == "input" else f"a cut after {first['name']}"
            )
            levels = "1 level" if first["depth"] == 1 else f"{first['depth']} levels"
            yield f"{words}, {where} keeps most of the network hidden: {levels}."


__all__ = ["lint_command", "register", "render"]
