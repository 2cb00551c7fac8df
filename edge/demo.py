"""`blindtail demo`: the whole system on one machine, every part real, one part broken on purpose."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from blindtail.errors import BlindtailError
from edge.demo_report import summary_tables
from edge.demo_run import DemoConfig, Progress, run_demo

#: Slow enough that there are images left when the slowest recovery is over.
_CHAOS_PACE = 25.0


def register(app: typer.Typer) -> None:
    """Add the command `demo`."""
    app.command("demo")(demo_command)


def demo_command(
    images: Annotated[int, typer.Option("--images", min=1, help="Test images to answer.")] = 1000,
    out: Annotated[Path, typer.Option("--out", help="Folder for report, plots and logs.")] = Path("out/demo"),
    rate: Annotated[float, typer.Option("--rate", help="The link's rate, Mbit/s.")] = 20.0,
    delay: Annotated[float, typer.Option("--delay", help="The link's delay each way, ms.")] = 20.0,
    policy: Annotated[str, typer.Option("--policy", help="Policy of the edge site.")] = "deadline",
    deadline: Annotated[float, typer.Option("--deadline", help="The objective at first, seconds.")] = 2.0,
    tighter: Annotated[
        float, typer.Option("--tighter", help="The objective from half-way on, seconds.")
    ] = 0.15,
    kill: Annotated[
        bool, typer.Option("--kill/--no-kill", help="Kill one of the two evaluators after a quarter.")
    ] = True,
    chaos: Annotated[
        bool,
        typer.Option(
            "--chaos",
            help="Kill orchestrator, gateway, raylet and evaluator in turn, and time the recoveries.",
        ),
    ] = False,
    pace: Annotated[
        float | None,
        typer.Option(
            "--pace", help="Images a second; 0 = as fast as they are answered.  [default: 50; chaos: 25]"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Run the whole system on this machine, and show what it does.

    Starts an orchestrator, a cloud and an edge site as separate processes, the last
    two with a Ray cluster of their own, and a link of 20 Mbit/s and 20 ms between cloud
    and site. The site makes its keys, uploads them, and answers Fashion-MNIST's test
    images; early exits answer the easy ones, the encrypted tail the others. After a
    quarter an evaluator is killed. Half-way the operator sets a tighter deadline, which
    no offload can meet; once it is in force the other half comes, and the exits answer all of it.

    Prints who answered, how accurately and how fast, and writes report.json,
    report.html and plots to the folder given by --out; the processes' logs lie in
    logs/ below it. Takes a few minutes and about 4 GB of memory.

    \b
      blindtail demo
      blindtail demo --images 200 --rate 100 --delay 5 --out out/fast
      blindtail demo --chaos --images 3000 --out out/chaos
    """
    from rich.console import Console

    config = DemoConfig(
        out=out,
        images=images,
        rate_bps=rate * 1e6,
        delay_s=delay / 1e3,
        policy=policy,
        deadline_s=deadline,
        tighter_s=min(tighter, deadline),
        kill=kill,
        chaos=chaos,
        images_per_s=(_CHAOS_PACE if chaos else DemoConfig.images_per_s) if pace is None else pace or None,
    )
    console = Console(stderr=True)
    with _shown(console) as progress, _terminable():
        report = run_demo(config, progress)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        printer = Console()
        for part in summary_tables(report):
            printer.print(part)
        printer.print(f"{report['wall_s']:.0f} s in all; report, page, plots and logs: {out}")
    if report["answered"] != report["images"]:
        raise BlindtailError(
            f"only {report['answered']} of {report['images']} images were answered; see {out}/logs"
        )


@contextmanager
def _shown(console: Any) -> Iterator[Progress]:
    """Live progress on a terminal; a line for each step elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Bars(*columns, console=console, disable=not console.is_terminal) as bars:
        task = bars.add_task("starting", total=None)
        last = ""

        def show(p: Progress) -> None:
            nonlocal last
            mix = ", ".join(f"{name} {count}" for name, count in sorted(p.routes.items()))
            text = p.step + (f": {mix}; offloads {p.offloads}, fallbacks {p.fallbacks}" if mix else "")
            bars.update(task, description=text + p.event, completed=p.answered, total=p.images or None)
            if p.step != last:
                last = p.step
                console.print(p.step)

        yield Progress(show)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the demo as Ctrl-C does: with its processes stopped."""

    def end(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


__all__ = ["DemoConfig", "Progress", "demo_command", "register", "run_demo"]
