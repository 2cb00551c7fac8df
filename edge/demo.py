"""`blindtail demo`: the whole system on one machine, every part real, one part broken on purpose.

Three processes: the cloud (its own Ray cluster, two evaluators), the edge site (a Ray
cluster of its own, two actors), and this one, which holds the shaped link between
them, watches, kills an evaluator half-way and writes the report.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blindtail.errors import BlindtailError, ConfigError, DataError
from blindtail.link import ShapedLink
from blindtail.machine import machine, versions
from edge.demo_report import Answered, build_report, demo_page, plots, reference, summary_tables, targets
from edge.pages import write_reports
from edge.processes import Child, ChildFailed, free_port

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edge.stats import Ints

ZOO = Path(__file__).resolve().parent.parent / "blindtail" / "models" / "zoo"
_POLL_S = 0.1


@dataclass(frozen=True)
class DemoConfig:
    """What the demo runs. `out` gets logs/, report.json, report.html and the plots."""

    out: Path = Path("out/demo")
    edge_bt: Path = ZOO / "fashion" / "edge.bt"
    cloud_bt: Path = ZOO / "fashion" / "cloud.bt"
    data: str = "fashion"
    images: int = 1000
    actors: int = 2
    evaluators: int = 2
    rate_bps: float = 20e6
    delay_s: float = 0.020
    backend: str = "seal"
    policy: str = "deadline"
    kill: bool = True  # an evaluator, half-way
    start_timeout_s: float = 120.0
    answer_timeout_s: float = 480.0  # for all images
    stall_timeout_s: float = 60.0  # without one more answer

    def __post_init__(self) -> None:
        if self.images < 1 or self.actors < 1 or self.evaluators < 1:
            raise ConfigError("the demo needs at least one image, one actor and one evaluator")


@dataclass
class Progress:
    """What to show while it runs; `show` is called after every change."""

    show: Callable[[Progress], None] = lambda progress: None
    step: str = ""
    images: int = 0
    answered: int = 0
    routes: Counter[str] = field(default_factory=Counter)
    offloads: int = 0
    fallbacks: int = 0
    killed: str = ""

    def say(self, step: str) -> None:
        self.step = step
        self.show(self)


def register(app: typer.Typer) -> None:
    """Add the command `demo`."""
    app.command("demo")(demo_command)


def demo_command(
    images: Annotated[int, typer.Option("--images", min=1, help="Test images to answer.")] = 1000,
    out: Annotated[Path, typer.Option("--out", help="Folder for report, plots and logs.")] = Path("out/demo"),
    rate: Annotated[float, typer.Option("--rate", help="The link's rate, Mbit/s.")] = 20.0,
    delay: Annotated[float, typer.Option("--delay", help="The link's delay each way, ms.")] = 20.0,
    policy: Annotated[str, typer.Option("--policy", help="Policy of the edge site.")] = "deadline",
    kill: Annotated[
        bool, typer.Option("--kill/--no-kill", help="Kill one of the two evaluators half-way.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Run the whole system on this machine, and show what it does.

    Starts a cloud and an edge site as separate processes, each with a Ray cluster
    of its own, and a link of 20 Mbit/s and 20 ms between them. The site makes its keys,
    uploads them, and answers Fashion-MNIST's test images; early exits answer
    the easy ones, the encrypted tail the others. Half-way an evaluator is killed.

    Prints who answered, how accurately and how fast, and writes report.json,
    report.html and plots to the folder given by --out; the processes' logs lie in
    logs/ below it. Takes a few minutes and about 4 GB of memory.

    \b
      blindtail demo
      blindtail demo --images 200 --rate 100 --delay 5 --out out/fast
    """
    from rich.console import Console

    config = DemoConfig(
        out=out, images=images, rate_bps=rate * 1e6, delay_s=delay / 1e3, policy=policy, kill=kill
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
            bars.update(task, description=text + p.killed, completed=p.answered, total=p.images or None)
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


def run_demo(config: DemoConfig, progress: Progress | None = None) -> dict[str, Any]:
    """The demo without its terminal: runs, writes `config.out`, returns the report.

    Every process it starts has ended when it returns or raises. Raises
    `ChildFailed` naming the log to look at.
    """
    from edge.pair import ModelPair

    started_s = time.monotonic()
    progress = progress or Progress()
    for path in (config.edge_bt, config.cloud_bt):
        if not path.exists():
            raise DataError(
                f"{path} is missing: make the pair with 'blindtail train fashion --out {path.parent}'"
            )
    pair = ModelPair.open(config.edge_bt, config.cloud_bt)
    pixels, labels = _images(config)
    for name in ("report.json", "report.html"):
        (config.out / name).unlink(missing_ok=True)  # a failed run must not show an older one's
    progress.images = len(labels)
    with ExitStack() as stack:
        # Private and gone afterwards: the site's secret key lies below it.
        state = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="btdemo-")))
        answers, run = _run(config, state, progress, stack, len(labels))
    progress.say("writing the report")
    # The demo owns both files, so it can compare with the tail in the clear. A device cannot.
    clear = reference(pair, pixels, labels)
    report = {
        **build_report(pair, answers, clear),
        **run,
        "policy": config.policy,
        "backend": config.backend,
        "link": {"rate_bps": config.rate_bps, "delay_s": config.delay_s},
        "wall_s": time.monotonic() - started_s,
        "machine": machine(),
        "versions": versions(),
    }
    report["targets"] = targets(report)
    pictures = plots(report, answers, config.out)
    write_reports(config.out, report, demo_page(report, pictures))
    return report


def _images(config: DemoConfig) -> tuple[NDArray[Any], Ints]:
    from blindtail.models.data import load

    found = load(config.data, "test")
    if config.images > len(found):
        raise ConfigError(f"{config.data} has {len(found)} test images, {config.images} were asked for")
    first = found.take(slice(0, config.images))
    return first.pixels, first.labels


def _run(
    config: DemoConfig, state: Path, progress: Progress, stack: ExitStack, images: int
) -> tuple[list[Answered], dict[str, Any]]:
    """Starts everything, follows the answers, kills an evaluator, stops everything."""
    logs = config.out / "logs"
    # The port is chosen here so that cloud and site can start side by side.
    port = free_port()
    progress.say("starting the cloud and the edge site, a Ray cluster each")
    cloud = stack.enter_context(Child("cloud", _cloud_command(config, state, port), logs / "cloud.log"))
    link = stack.enter_context(
        ShapedLink(f"127.0.0.1:{port}", rate_bps=config.rate_bps, delay_s=config.delay_s)
    )
    site = stack.enter_context(Child("edge", _edge_command(config, state, link.address), logs / "edge.log"))
    cell = cloud.announcement(state / "cloud.json", config.start_timeout_s)
    progress.say("cloud ready; the site makes its keys and uploads them")
    # The site announces itself once it is ready, or has given up waiting.
    here = site.announcement(state / "edge.json", 1.5 * config.start_timeout_s)
    if cell["cluster_id"] == here["cluster_id"]:
        raise BlindtailError("edge and cloud run on one Ray cluster: refusing to go on")
    if not here["ready"]:
        raise ChildFailed(f"the site's keys were not ready in time; {site.hint()} and {cloud.log}")
    uploaded = link.counts()
    began_s = time.monotonic()
    progress.say("answering")
    answers, killed = _follow(config, state / "answers.jsonl", images, site, cloud, cell, progress)
    answering_s = time.monotonic() - began_s
    counts = link.counts()
    cloud.check()
    progress.say("stopping")
    site.wait(60.0)
    site.check()
    cloud.stop()
    return answers, {
        "answering_s": answering_s,
        "images_per_s": len(answers) / answering_s,
        "killed_evaluator": killed,
        "clusters": {"cloud": cell["cluster_id"], "edge": here["cluster_id"]},
        "link_bytes": {
            "before_images_up": uploaded.up_bytes,
            "before_images_down": uploaded.down_bytes,
            "up": counts.up_bytes,
            "down": counts.down_bytes,
        },
    }


def _cloud_command(config: DemoConfig, state: Path, port: int) -> list[str]:
    return [
        *("blindtail", "cloud", str(config.cloud_bt), "--port", str(port)),
        *("--evaluators", str(config.evaluators), "--backend", config.backend),
        *("--state-dir", str(state / "cloud"), "--announce", str(state / "cloud.json")),
    ]


def _edge_command(config: DemoConfig, state: Path, address: str) -> list[str]:
    # The cloud may need a while to start, and keys pass the link at half its rate.
    (state / "edge.toml").write_text(f"ready_timeout_s = {config.start_timeout_s}\n")
    return [
        *("blindtail", "edge", str(config.edge_bt), "--cloud", address, "--plaintext"),
        *("--actors", str(config.actors), "--policy", config.policy, "--backend", config.backend),
        *("--data", config.data, "--images", str(config.images)),
        *("--uplink-bps", str(config.rate_bps), "--config", str(state / "edge.toml")),
        *("--state-dir", str(state / "edge"), "--announce", str(state / "edge.json")),
        *("--out", str(state / "answers.jsonl")),
    ]


def _follow(
    config: DemoConfig,
    path: Path,
    images: int,
    site: Child,
    cloud: Child,
    cell: dict[str, Any],
    progress: Progress,
) -> tuple[list[Answered], dict[str, Any] | None]:
    """Reads answers as the site writes them, until all are there or the site has ended."""
    answers: list[Answered] = []
    killed: dict[str, Any] | None = None
    end_s = time.monotonic() + config.answer_timeout_s
    moved_s = time.monotonic()
    for lines in _new_lines(path):
        site.check()
        cloud.check()
        for line in lines:
            answer = read_answer(json.loads(line))
            answers.append(answer)
            progress.answered += 1
            progress.routes[answer.route_key] += 1
            progress.offloads += answer.uplink_bytes > 0
            progress.fallbacks += answer.fallback is not None
        now_s = time.monotonic()
        if lines:
            moved_s = now_s
            progress.show(progress)
        if config.kill and killed is None and 2 * len(answers) >= images:
            killed = _kill_evaluator(cell, len(answers))
            progress.killed = f"; evaluator {killed['name']} killed"
            progress.show(progress)
        if len(answers) >= images or (site.code is not None and not lines):
            return answers, killed
        if now_s > end_s or now_s - moved_s > config.stall_timeout_s:
            raise ChildFailed(
                f"{len(answers)} of {images} images were answered in time; {site.hint()}; {cloud.hint()}"
            )
    raise AssertionError("unreachable")


def _new_lines(path: Path) -> Iterator[list[str]]:
    """Complete lines appended since the last time, again and again; waits in between."""
    at, rest = 0, b""
    while True:
        lines: list[str] = []
        with suppress(FileNotFoundError), path.open("rb") as file:
            file.seek(at)
            data = file.read()
            at += len(data)
            *whole, rest = (rest + data).split(b"\n")
            lines = [line.decode() for line in whole if line.strip()]
        yield lines
        if not lines:
            time.sleep(_POLL_S)


def read_answer(record: dict[str, Any]) -> Answered:
    """A line of the site's answers (`edge.app.answer_fields`)."""
    steps = {name: float(s) for name, s in record["timings"].items() if name != "total_s"}
    return Answered(
        index=int(record["index"]),
        label=int(record["predicted"]),
        route=str(record["route"]),
        fallback=record["fallback"],
        latency_s=float(record["timings"]["total_s"]),
        steps_s=steps,
        uplink_bytes=int(record["uplink_bytes"]),
        reply_bytes=int(record["reply_bytes"]),
    )


def _kill_evaluator(cell: dict[str, Any], answered: int) -> dict[str, Any]:
    """SIGKILL, as the kernel does when memory runs out."""
    victim = cell["evaluators"][0]
    os.kill(int(victim["pid"]), signal.SIGKILL)
    return {"name": victim["name"], "pid": victim["pid"], "at_image": answered}


__all__ = ["DemoConfig", "Progress", "demo_command", "read_answer", "register", "run_demo"]
