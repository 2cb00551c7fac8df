"""What the demo computes from its answers: the report, its plots, its page, its summary."""

from __future__ import annotations

import logging
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


@dataclass(frozen=True)
class Answered:
    """One image's answer as the demo keeps it. `index` is into the demo's images."""

    index: int
    label: int
    route: str  # "exit1", ..., "tail"
    fallback: str | None
    latency_s: float
    steps_s: Mapping[str, float]  # name of a step -> seconds, as in `Timings`
    uplink_bytes: int
    reply_bytes: int

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
    rows = [
        (
            "every image answered",
            report["answered"],
            f"= {report['images']}",
            report["answered"] == report["images"],
        ),
        _target("encrypted and clear labels agree", report["agreement"], ">=", 0.995),
        _target("offloaded share", report["offloaded_share"], "<=", 0.35),
        _target("share of the tail's gain reached", report["gain_share"], ">=", 0.85),
        _target("uplink bytes per offload", report["uplink_bytes_per_offload"], "<=", 125_000),
        _target("reply bytes per offload", report["reply_bytes_per_offload"], "<=", 30_000),
    ]
    return [{"name": n, "value": v, "target": t, "holds": h} for n, v, t, h in rows]


def _target(name: str, value: float | None, sign: str, bound: float) -> tuple[str, float | None, str, bool]:
    holds = value is not None and (value >= bound if sign == ">=" else value <= bound)
    return name, value, f"{sign} {bound:g}" if bound < 1000 else f"{sign} {bound:,.0f}", holds


def plots(report: Mapping[str, Any], answers: Sequence[Answered], folder: Path) -> list[Path]:
    """Four PNG files: exit mix, accuracy by route, accuracy against offloads, latency."""
    import matplotlib as mpl

    # Without a home folder to write to it uses a temporary one, and says so at length.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    paths = []

    def finish(name: str) -> None:
        plt.tight_layout()
        plt.savefig(folder / name, dpi=110)
        plt.close()
        paths.append(folder / name)

    names = list(report["routes"])
    colours = {name: f"C{i}" for i, name in enumerate(names)}
    counts = [report["routes"][name]["count"] for name in names]
    plt.figure(figsize=(6, 3.2))
    bars = plt.bar(names, counts, color=[colours[name] for name in names])
    plt.bar_label(bars)
    plt.ylabel("images")
    plt.title("Who answered")
    finish("exit_mix.png")

    values = report["accuracy"]
    rows = [(name, report["routes"][name]["accuracy"], colours[name]) for name in names]
    rows += [(k.replace("_", " "), v, "0.6") for k, v in values.items() if v is not None]
    plt.figure(figsize=(7.5, 3.6))
    bars = plt.barh(
        [r[0] for r in rows][::-1], [100 * r[1] for r in rows][::-1], color=[r[2] for r in rows][::-1]
    )
    plt.bar_label(bars, fmt="%.1f", padding=2)
    plt.xlim(0, 112)
    plt.xlabel("accuracy, %")
    plt.title("Accuracy by route (colour) and of all images (grey)")
    finish("accuracy_by_route.png")

    curve, point = report["accuracy_offload_curve"], report["operating_point"]
    plt.figure(figsize=(6, 3.8))
    plt.plot(
        [100 * p["offloaded_share"] for p in curve],
        [100 * p["accuracy"] for p in curve],
        label="threshold sweep",
    )
    plt.plot(100 * point["offloaded_share"], 100 * point["accuracy"], "o", label="this run")
    plt.axhline(100 * values["tail_for_all"], ls=":", c="0.4", label="tail for all")
    plt.axhline(100 * values["best_exit_only"], ls="--", c="0.4", label="best exit only")
    plt.xlabel("offloaded, % of images")
    plt.ylabel("accuracy, %")
    plt.legend(loc="lower right")
    finish("accuracy_offload.png")

    plt.figure(figsize=(6, 3.8))
    for name in names:
        seconds = np.sort([a.latency_s for a in answers if a.route_key == name])
        plt.step(
            1000 * seconds, np.arange(1, len(seconds) + 1) / len(seconds), label=name, color=colours[name]
        )
    plt.xscale("log")
    plt.xlabel("latency, ms")
    plt.ylabel("share of the route's answers")
    plt.legend()
    plt.title("Latency by route")
    finish("latency_cdf.png")
    return paths


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
                + ("An evaluator was killed half-way." if report["killed_evaluator"] else "")
            ),
            table(
                ("expected", "found", "target", "holds"),
                [
                    (t["name"], _number(t["value"]), t["target"], "yes" if t["holds"] else "NO")
                    for t in report["targets"]
                ],
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


def _number(value: float | int | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4f}"


def summary_tables(report: Mapping[str, Any]) -> list[Table]:
    """For a terminal."""
    from rich.table import Table

    routes = Table(title="Routes")
    for i, column in enumerate(_ROUTE_COLUMNS):
        routes.add_column(column, justify="right" if i else "left")
    for row in _route_rows(report):
        routes.add_row(*row)
    accuracies = Table(title="Accuracy of all images")
    accuracies.add_column("answered by")
    accuracies.add_column("accuracy", justify="right")
    for name, value in report["accuracy"].items():
        accuracies.add_row(name.replace("_", " "), percent(value))
    expected = Table(title="Expected of this demo")
    for column in ("what", "found", "target", "holds"):
        expected.add_column(column, justify="left" if column == "what" else "right")
    for t in report["targets"]:
        expected.add_row(
            t["name"], _number(t["value"]), t["target"], "yes" if t["holds"] else "[red]no[/red]"
        )
    return [routes, accuracies, expected]
