"""What the demo computes from its answers: the report, its plots, its page, its summary."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edge.pages import heading, machine_line, milliseconds, page, paragraph, percent, picture, table
from edge.stats import Floats, Ints, accuracy, gain_share, offload_curve, quantiles

if TYPE_CHECKING:
    from rich.table import Table

    from edge.pair import ModelPair

FALLBACK = "fallback"
#: An answer may outlive its deadline by this much.
LATE_S = 0.050


@dataclass(frozen=True)
class Answered:
    """One image's answer as the demo keeps it. `index` is into the demo's images.

    ended_s         when it was answered, on this host's monotonic clock
    policy_version  of the orchestrator's policy that decided; 0 = the edge's own
    """

    index: int
    label: int
    route: str  # "exit1", ..., "tail"
    fallback: str | None
    latency_s: float
    steps_s: Mapping[str, float]  # name of a step -> seconds, as in `Timings`
    uplink_bytes: int
    reply_bytes: int
    ended_s: float = 0.0
    policy_version: int = 0

    @property
    def began_s(self) -> float:
        return self.ended_s - self.latency_s

    @property
    def route_key(self) -> str:
        """The route it is counted under: an answer that had to fall back is kept apart."""
        return self.route if self.fallback is None else FALLBACK


@dataclass(frozen=True)
class Reference:
    """The owner's clear view of the demo's images.

    exit_labels and exit_confidences (n, exits), tail_labels (n,), labels (n,)
    """

    exit_labels: Ints
    exit_confidences: Floats
    tail_labels: Ints
    labels: Ints


def reference(pair: ModelPair, pixels: NDArray[Any], labels: Ints) -> Reference:
    """Every exit and the clear tail on every image.

    The demo owns both files. A device in the field has no cloud.bt and cannot do this.
    """
    head = pair.run_head(pixels)
    tail_labels = pair.clear_tail(head.activations).argmax(axis=1)
    return Reference(
        head.exit_probabilities.argmax(axis=2), head.exit_probabilities.max(axis=2), tail_labels, labels
    )


def build_report(pair: ModelPair, answers: Sequence[Answered], clear: Reference) -> dict[str, Any]:
    """All figures that follow from the answers; the driver adds those of the run itself."""
    n = len(clear.labels)
    index = np.array([a.index for a in answers], np.int64)
    predicted = np.array([a.label for a in answers], np.int64)
    truth = clear.labels[index]
    sent = [a for a in answers if a.uplink_bytes > 0]
    by_tail = [a for a in answers if a.route == "tail"]
    agree = [a.label == int(clear.tail_labels[a.index]) for a in by_tail]
    exits = [
        accuracy(clear.exit_labels[:, i], clear.labels) or 0.0 for i in range(clear.exit_labels.shape[1])
    ]
    tail = accuracy(clear.tail_labels, clear.labels) or 0.0
    overall = accuracy(predicted, truth)
    offloaded_share = len(sent) / n
    return {
        "model": pair.edge.model,
        "version": pair.edge.version,
        "images": n,
        "answered": len({a.index for a in answers}),
        "offloaded_share": offloaded_share,
        "fallbacks": sum(a.fallback is not None for a in answers),
        "fallback_reasons": dict(Counter(a.fallback for a in answers if a.fallback is not None)),
        "agreement": float(np.mean(agree)) if agree else None,
        "disagreements": len(agree) - sum(agree),
        "accuracy": {
            "overall": overall,
            "exit1_only": exits[0],
            "best_exit_only": max(exits),
            "tail_for_all": tail,
        },
        "gain_share": None if overall is None else gain_share(overall, max(exits), tail),
        "accuracy_offload_curve": offload_curve(
            clear.exit_confidences,
            clear.exit_labels,
            clear.tail_labels,
            clear.labels,
            [e.threshold for e in pair.edge.exits],
        ),
        "operating_point": {"offloaded_share": offloaded_share, "accuracy": overall},
        "routes": _routes(answers, clear.labels),
        "steps_of_offload_s": _steps(by_tail),
        "uplink_bytes_per_offload": _mean([a.uplink_bytes for a in sent]),
        "reply_bytes_per_offload": _mean([a.reply_bytes for a in by_tail]),
        "key_bytes": pair.spec.key_bytes,
        "edge_budget": dict(pair.edge.edge_budget),
    }


def phases(
    answers: Sequence[Answered], clear: Reference, objectives: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """What changed with each objective: one row for the answers that each policy version decided."""
    rows = []
    for number, objective in enumerate(objectives):
        later = objectives[number + 1]["version"] if number + 1 < len(objectives) else math.inf
        # What was decided before the first version arrived counts with it.
        from_version = objective["version"] if number else 0
        mine = [a for a in answers if from_version <= a.policy_version < later]
        index = np.array([a.index for a in mine], np.int64)
        predicted = np.array([a.label for a in mine], np.int64)
        overall = accuracy(predicted, clear.labels[index])
        exits = [
            accuracy(clear.exit_labels[index, i], clear.labels[index])
            for i in range(clear.exit_labels.shape[1])
        ]
        best = max((e for e in exits if e is not None), default=None)
        tail = accuracy(clear.tail_labels[index], clear.labels[index])
        known = overall is not None and best is not None and tail is not None
        rows.append(
            {
                **objective,
                "images": len(mine),
                "offloaded_share": sum(a.uplink_bytes > 0 for a in mine) / len(mine) if mine else None,
                "routes": dict(sorted(Counter(a.route_key for a in mine).items())),
                "accuracy": overall,
                "gain_share": gain_share(overall, best, tail) if known else None,  # type: ignore[arg-type]
                "latency_s": quantiles([a.latency_s for a in mine]),
                "late": sum(a.latency_s > objective["deadline_s"] + LATE_S for a in mine),
            }
        )
    return rows


def _mean(values: Sequence[int]) -> float | None:
    return float(np.mean(values)) if values else None


def _routes(answers: Sequence[Answered], labels: Ints) -> dict[str, Any]:
    routes: dict[str, Any] = {}
    for name in sorted({a.route_key for a in answers}):
        mine = [a for a in answers if a.route_key == name]
        routes[name] = {
            "count": len(mine),
            "accuracy": float(np.mean([a.label == labels[a.index] for a in mine])),
            "latency_s": quantiles([a.latency_s for a in mine]),
            "uplink_bytes": sum(a.uplink_bytes for a in mine),
            "reply_bytes": sum(a.reply_bytes for a in mine),
        }
    return routes


def _steps(by_tail: Sequence[Answered]) -> dict[str, Any]:
    """Where an offload's time goes: quantiles of each step."""
    names = sorted({name for a in by_tail for name in a.steps_s})
    return {name: quantiles([a.steps_s.get(name, 0.0) for a in by_tail]) for name in names}


def targets(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the demo is expected to show, and whether it did."""
    first, last = report["objectives"][0], report["objectives"][-1]
    rows = [
        (
            "every image answered",
            report["answered"],
            f"= {report['images']}",
            report["answered"] == report["images"],
        ),
        _target("encrypted and clear labels agree", report["agreement"], ">=", 0.995),
        _target(f"offloaded share, deadline {first['deadline_s']:g} s", first["offloaded_share"], "<=", 0.35),
        _target("uplink bytes per offload", report["uplink_bytes_per_offload"], "<=", 125_000),
        _target("reply bytes per offload", report["reply_bytes_per_offload"], "<=", 30_000),
    ]
    if not {"gateway", "raylet"} & {r["victim"] for r in report["recoveries"]}:  # no tail for a while
        name = f"share of the tail's gain, deadline {first['deadline_s']:g} s"
        rows.append(_target(name, first["gain_share"], ">=", 0.85))
    if last is not first:
        name = f"offloaded share, deadline {last['deadline_s']:g} s"
        rows.append(_target(name, last["offloaded_share"], "<=", 0.05))
    late = sum(o["late"] for o in report["objectives"])
    rows.append((f"answers later than deadline + {1000 * LATE_S:g} ms", late, "= 0", late == 0))
    recoveries = report["recoveries"]
    if recoveries:
        back = sum(r["recovered_s"] is not None for r in recoveries)
        rows.append(("recoveries", back, f"= {len(recoveries)}", back == len(recoveries)))
    return [{"name": n, "value": v, "target": t, "holds": h} for n, v, t, h in rows]


def _target(name: str, value: float | None, sign: str, bound: float) -> tuple[str, float | None, str, bool]:
    holds = value is not None and (value >= bound if sign == ">=" else value <= bound)
    return name, value, f"{sign} {bound:g}" if bound < 1000 else f"{sign} {bound:,.0f}", holds


def demo_page(report: Mapping[str, Any], pictures: Sequence[Path]) -> str:
    """One page with all of it, pictures inside."""
    link = report["link"]
    return page(
        f"blindtail demo: {report['model']} {report['version']}",
        [
            paragraph(
                f"{report['answered']} of {report['images']} images answered in {report['wall_s']:.0f} s, "
                f"{percent(report['offloaded_share'])} through the encrypted tail, over a link of "
                f"{link['rate_bps'] / 1e6:g} Mbit/s with {1000 * link['delay_s']:g} ms each way. "
                + "".join(f"Killed on the way: {r['victim']}. " for r in report["recoveries"])
            ),
            table(
                ("expected", "found", "target", "holds"),
                [
                    (t["name"], _number(t["value"]), t["target"], "yes" if t["holds"] else "NO")
                    for t in report["targets"]
                ],
            ),
            heading("What the objective changed"),
            table(*_objective_table(report)),
            *(
                [heading("Recoveries"), table(_RECOVERY_COLUMNS, _recovery_rows(report))]
                if report["recoveries"]
                else []
            ),
            heading("Routes"),
            table(_ROUTE_COLUMNS, _route_rows(report)),
            heading("Accuracy of all images"),
            table(
                ("answered by", "accuracy"),
                [(k.replace("_", " "), percent(v)) for k, v in report["accuracy"].items()],
            ),
            heading("Where an offload's time goes"),
            table(
                ("step", "p50", "p95"),
                [
                    (k, milliseconds(v["p50"]), milliseconds(v["p95"]))
                    for k, v in report["steps_of_offload_s"].items()
                ],
            ),
            *(picture(path, path.stem.replace("_", " ")) for path in pictures),
            machine_line(report),
        ],
    )


_ROUTE_COLUMNS = ("route", "images", "accuracy", "p50 ms", "p95 ms", "p99 ms", "KB up", "KB down")


def _route_rows(report: Mapping[str, Any]) -> list[list[str]]:
    return [
        [
            name,
            str(r["count"]),
            percent(r["accuracy"]),
            *(f"{1000 * r['latency_s'][q]:.1f}" for q in ("p50", "p95", "p99")),
            f"{r['uplink_bytes'] / 1000:,.0f}",
            f"{r['reply_bytes'] / 1000:,.0f}",
        ]
        for name, r in report["routes"].items()
    ]


def _objective_table(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: who answered under each objective."""
    routes = sorted(report["routes"])
    rows = [
        [
            f"{o['deadline_s']:g} s",
            str(o["images"]),
            *(str(o["routes"].get(name, 0)) for name in routes),
            percent(o["offloaded_share"]),
            percent(o["accuracy"]),
            _ms(o["latency_s"]["p95"]),
            str(o["late"]),
        ]
        for o in report["objectives"]
    ]
    return ["deadline", "images", *routes, "offloaded", "accuracy", "p95 ms", "late"], rows


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{1000 * value:.1f}"


_RECOVERY_COLUMNS = ("killed", "at image", "whole again, s", "encrypted again, s", "fallbacks")


def _recovery_rows(report: Mapping[str, Any]) -> list[list[str]]:
    def seconds(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    return [
        [
            r["victim"],
            str(r["at_image"]),
            seconds(r["recovered_s"]),
            seconds(r["first_encrypted_answer_s"]),
            str(r["fallbacks_meanwhile"]),
        ]
        for r in report["recoveries"]
    ]


def _number(value: float | int | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4f}"


def summary_tables(report: Mapping[str, Any]) -> list[Table]:
    """For a terminal."""
    from rich.box import SIMPLE
    from rich.table import Table

    def filled(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
        made = Table(title=title, box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
        for number, column in enumerate(columns):
            made.add_column(column, justify="right" if number else "left")
        for cells in rows:
            made.add_row(*cells)
        return made

    shown = [
        filled("Routes", _ROUTE_COLUMNS, _route_rows(report)),
        filled("What the objective changed", *_objective_table(report)),
    ]
    if report["recoveries"]:
        shown.append(filled("Recoveries", _RECOVERY_COLUMNS, _recovery_rows(report)))
    accuracies = [[name.replace("_", " "), percent(value)] for name, value in report["accuracy"].items()]
    expected = [
        [t["name"], _number(t["value"]), t["target"], "yes" if t["holds"] else "[red]no[/red]"]
        for t in report["targets"]
    ]
    return [
        *shown,
        filled("Accuracy of all images", ("answered by", "accuracy"), accuracies),
        filled("Expected of this demo", ("what", "found", "target", "holds"), expected),
    ]
