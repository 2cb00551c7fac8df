"""One run of the demo: orchestrator, cloud, link and edge site, and what happens to them.

Four processes, each a real command of blindtail, and this one, which holds the
shaped link, follows the answers, kills what is to be killed and sets what is to
be set through `blindtail policy`.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blindtail.errors import BlindtailError, ConfigError, DataError
from blindtail.link import ShapedLink
from blindtail.machine import machine, versions
from blindtail.ports import free_port
from edge.demo_events import Events, Operator
from edge.demo_plots import plots
from edge.demo_report import Answered, build_report, demo_page, phases, reference, targets
from edge.demo_stage import (
    DemoConfig,
    Stage,
    chaos,
    cloud_command,
    edge_command,
    note_first_encrypted,
    orchestrator_command,
    usual,
)
from edge.pages import write_reports
from edge.processes import Child, ChildFailed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edge.stats import Ints

_POLL_S = 0.1


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
    event: str = ""

    def say(self, step: str) -> None:
        self.step = step
        self.show(self)


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
        "objectives": phases(answers, clear, run["objectives"]),
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
    """Starts everything, follows the answers, lets things happen, stops everything."""
    logs = config.out / "logs"
    # Ports are chosen here so that the processes can start side by side.
    port, control = free_port(), f"127.0.0.1:{free_port()}"
    progress.say("starting orchestrator, cloud and edge site, the last two with a Ray cluster each")

    def orchestrator() -> Child:
        command = orchestrator_command(state, control)
        return stack.enter_context(Child("orchestrator", command, logs / "orchestrator.log"))

    operator = Operator(control)
    first = orchestrator()
    cloud = stack.enter_context(
        Child("cloud", cloud_command(config, state, port, control), logs / "cloud.log")
    )
    link = stack.enter_context(
        ShapedLink(f"127.0.0.1:{port}", rate_bps=config.rate_bps, delay_s=config.delay_s)
    )
    site = stack.enter_context(
        Child("edge", edge_command(config, state, link.address, control), logs / "edge.log")
    )
    stage = Stage(config, state, control, first, cloud, site, operator)
    first.announcement(state / "orchestrator.json", config.start_timeout_s)
    stage.set_deadline(config.deadline_s, "as the demo begins", 0)
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
    happening = chaos(stage, orchestrator) if config.chaos else usual(stage)
    events = Events(happening, images, one_by_one=config.chaos, pause_s=3.0)
    answers = _follow(config, state / "answers.jsonl", images, stage, events, progress)
    answering_s = time.monotonic() - began_s
    events.finish(config.start_timeout_s)
    counts = link.counts()
    stage.check()
    progress.say("stopping")
    site.wait(60.0)
    site.check()
    cloud.stop()
    note_first_encrypted(stage.recoveries, answers)
    return answers, {
        "answering_s": answering_s,
        "images_per_s": len(answers) / answering_s,
        "objectives": stage.objectives,
        "recoveries": [r.to_json() for r in stage.recoveries],
        "clusters": {"cloud": cell["cluster_id"], "edge": here["cluster_id"]},
        "link_bytes": {
            "before_images_up": uploaded.up_bytes,
            "before_images_down": uploaded.down_bytes,
            "up": counts.up_bytes,
            "down": counts.down_bytes,
        },
    }


# -- the answers --------------------------------------------------------------------


def _follow(
    config: DemoConfig, path: Path, images: int, stage: Stage, events: Events, progress: Progress
) -> list[Answered]:
    """Reads answers as the site writes them, until all are there or the site has ended."""
    answers: list[Answered] = []
    end_s = time.monotonic() + config.answer_timeout_s
    moved_s = time.monotonic()
    for lines in _new_lines(path):
        stage.check()
        for line in lines:
            answer = read_answer(json.loads(line))
            answers.append(answer)
            progress.answered += 1
            progress.routes[answer.route_key] += 1
            progress.offloads += answer.uplink_bytes > 0
            progress.fallbacks += answer.fallback is not None
        now_s = time.monotonic()
        if lines:
            progress.show(progress)
        if lines or events.happening:
            moved_s = now_s
        name = events.due(len(answers))
        if name is not None:
            progress.event = f"; {name}"
            progress.show(progress)
        if len(answers) >= images or (stage.site.code is not None and not lines):
            return answers
        if now_s > end_s or now_s - moved_s > config.stall_timeout_s:
            raise ChildFailed(
                f"{len(answers)} of {images} images were answered in time; {stage.site.hint()}; "
                f"{stage.cloud.hint()}"
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
        ended_s=float(record["monotonic_s"]),
        policy_version=int(record["extra"].get("policy_version", 0)),
    )


__all__ = ["DemoConfig", "Progress", "Stage", "read_answer", "run_demo"]
