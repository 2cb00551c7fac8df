"""The demo's pictures: exit mix, accuracies, the accuracy-offload curve, latencies."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edge.demo_report import Answered


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
    shown = [o for o in report["objectives"] if o["images"]]
    labels = [f"deadline {o['deadline_s']:g} s\n{o['images']} images" for o in shown]
    plt.figure(figsize=(6, 1.4 + 0.7 * len(shown)))
    left = np.zeros(len(shown))
    for name in names:
        shares = np.array([100 * o["routes"].get(name, 0) / o["images"] for o in shown])
        bars = plt.barh(labels, shares, left=left, color=colours[name], label=name)
        plt.bar_label(bars, [f"{v:.0f}" if v >= 4 else "" for v in shares], label_type="center")
        left += shares
    plt.gca().invert_yaxis()
    plt.xlabel("share of the images, %")
    plt.legend(ncols=len(names), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
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
