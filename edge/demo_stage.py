"""Who is on the demo's stage, with which command each is started, and what befalls them."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blindtail.errors import ConfigError
from blindtail.models.zoo import bundle_paths
from edge.demo_events import Event, Operator, Recovery, alive, announced, kill, raylet_of, until
from edge.demo_report import Answered
from edge.processes import Child

_EDGE_BT, _CLOUD_BT = bundle_paths("fashion")
#: Share of the images that the first objective decides.
_HALF = 0.5
#: Edges answer within milliseconds where nothing else runs.
_ACK_S = 60.0


@dataclass(frozen=True)
class DemoConfig:
    """What the demo runs. `out` gets logs/, report.json, report.html and the plots.

    deadline_s, tighter_s  the objective at first, and from half-way on
    kill                   an evaluator, after a quarter of the images
    chaos                  kill orchestrator, gateway, raylet and evaluator one after another; the
                           objective stays
    images_per_s           how fast images come; None = as fast as they are answered
    """

    out: Path = Path("out/demo")
    edge_bt: Path = _EDGE_BT
    cloud_bt: Path = _CLOUD_BT
    data: str = "fashion"
    images: int = 1000
    actors: int = 2
    evaluators: int = 2
    rate_bps: float = 20e6
    delay_s: float = 0.020
    backend: str = "auto"
    policy: str = "deadline"
    deadline_s: float = 2.0
    tighter_s: float = 0.15
    kill: bool = True
    chaos: bool = False
    images_per_s: float | None = 50.0
    start_timeout_s: float = 120.0
    answer_timeout_s: float = 480.0  # for all images
    stall_timeout_s: float = 60.0  # without one more answer

    def __post_init__(self) -> None:
        if self.images < 1 or self.actors < 1 or self.evaluators < 1:
            raise ConfigError("the demo needs at least one image, one actor and one evaluator")
        if not 0 < self.tighter_s <= self.deadline_s:
            raise ConfigError("the tighter deadline must be above 0 and no longer than the first one")


@dataclass
class Stage:
    """The processes of one run, and what became of them."""

    config: DemoConfig
    state: Path
    address: str  # of the orchestrator
    orchestrator: Child
    cloud: Child
    site: Child
    operator: Operator
    recoveries: list[Recovery] = field(default_factory=list)
    objectives: list[dict[str, Any]] = field(default_factory=list)

    @property
    def gate(self) -> Path:
        return gate_file(self.state)

    @property
    def cell(self) -> dict[str, Any]:
        return announced(self.state / "cloud.json")

    def check(self) -> None:
        """Raises `ChildFailed` when a process has ended that should not have."""
        self.site.check()
        self.cloud.check()
        if not any(r.victim == "orchestrator" for r in self.recoveries):
            self.orchestrator.check()

    def set_deadline(self, deadline_s: float, note: str, answered: int) -> None:
        """As the operator does; notes when every attached edge had it in force."""
        start_s = time.monotonic()
        said = self.operator.set_deadline(self.config.policy, deadline_s, note, _ACK_S)
        self.objectives.append(
            {
                "version": int(said["version"]),
                "deadline_s": deadline_s,
                "at_image": answered,
                "edges": said.get("applied", 0),
                "in_force_after_s": time.monotonic() - start_s,
            }
        )


def gate_file(state: Path) -> Path:
    """Holds back the images that the later objective is to decide, until it is in force."""
    return state / "gate"


def orchestrator_command(state: Path, address: str) -> list[str]:
    return [
        *("blindtail", "orchestrator", "--port", address.rpartition(":")[2]),
        *("--state-dir", str(state / "orchestrator"), "--announce", str(state / "orchestrator.json")),
    ]


def cloud_command(config: DemoConfig, state: Path, port: int, control: str) -> list[str]:
    return [
        *("blindtail", "cloud", str(config.cloud_bt), "--port", str(port), "--orchestrator", control),
        *("--evaluators", str(config.evaluators), "--backend", config.backend),
        *("--state-dir", str(state / "cloud"), "--announce", str(state / "cloud.json")),
    ]


def edge_command(config: DemoConfig, state: Path, address: str, control: str) -> list[str]:
    # The cloud may need a while to start, and keys pass the link at half its rate.
    settings = f"ready_timeout_s = {config.start_timeout_s}\n"
    if config.images_per_s is not None:
        settings += f"images_per_s = {config.images_per_s}\n"
    if not config.chaos:
        gate_file(state).write_text(str(math.ceil(_HALF * config.images)))
        settings += f"gate = {json.dumps(str(gate_file(state)))}\n"
    (state / "edge.toml").write_text(settings)
    return [
        *("blindtail", "edge", str(config.edge_bt), "--cloud", address, "--plaintext"),
        *("--orchestrator", control),
        *(
            "--actors",
            str(config.actors),
            "--policy",
            config.policy,
            "--backend",
            "clear" if config.backend == "clear" else "seal",
        ),
        *("--data", config.data, "--images", str(config.images)),
        *("--uplink-bps", str(config.rate_bps), "--config", str(state / "edge.toml")),
        *("--state-dir", str(state / "edge"), "--announce", str(state / "edge.json")),
        *("--out", str(state / "answers.jsonl")),
    ]


def usual(stage: Stage) -> list[Event]:
    """An evaluator dies after a quarter; half-way the objective changes, and the other half comes then.

    The command is a process that takes seconds where other work goes on: images that came
    meanwhile would be the first objective's, and there might be none left for the second.
    """
    config = stage.config

    def tighter(answered: int) -> None:
        stage.set_deadline(config.tighter_s, "half-way: a tighter deadline", answered)
        stage.gate.unlink(missing_ok=True)

    events = [Event(_HALF, f"deadline {config.tighter_s:g} s", tighter)]
    if config.kill:
        events.insert(0, Event(0.25, "evaluator killed", lambda n: _kill_evaluator(stage, n)))
    return events


def chaos(stage: Stage, orchestrator: Callable[[], Child]) -> list[Event]:
    """One casualty of each kind, each when the system has recovered from the one before."""
    return [
        Event(0.05, "orchestrator killed", lambda n: _kill_orchestrator(stage, orchestrator, n)),
        Event(0.2, "gateway killed", lambda n: _kill_gateway(stage, n)),
        Event(0.35, "raylet killed", lambda n: _kill_raylet(stage, n)),
        Event(0.8, "evaluator killed", lambda n: _kill_evaluator(stage, n)),
    ]


def _kill_evaluator(stage: Stage, answered: int) -> None:
    victim = stage.cell["evaluators"][0]
    wanted = stage.config.evaluators
    recovery = kill(
        stage.recoveries, "evaluator", int(victim["pid"]), answered, f"{wanted} evaluators are up"
    )

    def whole() -> bool:
        pids = [int(e["pid"]) for e in stage.cell.get("evaluators", [])]
        return len(pids) == wanted and int(victim["pid"]) not in pids and all(map(alive, pids))

    until(whole, recovery)


def _kill_gateway(stage: Stage, answered: int) -> None:
    pid = int(stage.cell["gateway_pid"])
    recovery = kill(stage.recoveries, "gateway", pid, answered, "another gateway serves")
    until(lambda: stage.cell.get("gateway_pid", pid) != pid, recovery)


def _kill_raylet(stage: Stage, answered: int) -> None:
    before = stage.cell["cluster_id"]
    pid = raylet_of(stage.cloud.pid)
    recovery = kill(stage.recoveries, "raylet", pid, answered, "the cell serves on a new Ray cluster")
    until(lambda: stage.cell.get("cluster_id", before) != before, recovery)


def _kill_orchestrator(stage: Stage, start: Callable[[], Child], answered: int) -> None:
    """Starts it again, as a service manager would."""
    edges = stage.config.actors
    recovery = kill(
        stage.recoveries,
        "orchestrator",
        stage.orchestrator.pid,
        answered,
        f"cell and {edges} edges are attached again",
    )
    stage.orchestrator.wait(10.0)
    stage.orchestrator = start()

    def attached() -> bool:
        kinds = Counter(str(peer["kind"]) for peer in stage.operator.fleet())
        return kinds["edge"] == edges and kinds["cell"] == 1

    until(attached, recovery)


def note_first_encrypted(recoveries: list[Recovery], answers: list[Answered]) -> None:
    """For each casualty: the first tail answer to a later image, and the fallbacks until then."""
    for recovery in recoveries:
        killed_s = recovery.killed_at_s
        later = sorted((a for a in answers if a.began_s >= killed_s), key=lambda a: a.ended_s)
        first = next((a for a in later if a.route == "tail"), None)
        if first is not None:
            recovery.encrypted_s = first.ended_s - killed_s
        end_s = float("inf") if first is None else first.ended_s
        recovery.fallbacks = sum(a.fallback is not None and killed_s <= a.ended_s <= end_s for a in answers)


__all__ = [
    "DemoConfig",
    "Stage",
    "chaos",
    "cloud_command",
    "edge_command",
    "note_first_encrypted",
    "orchestrator_command",
    "usual",
]
