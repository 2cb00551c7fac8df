"""The demo's report from known answers, its files, and how it follows a site."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge import demo
from edge.demo_report import Answered, Reference, build_report, demo_page, plots, summary_tables, targets
from edge.pair import ModelPair
from edge.processes import ChildFailed

#: What the report must at least hold.
FIELDS = {
    "images",
    "answered",
    "offloaded_share",
    "fallbacks",
    "agreement",
    "accuracy",
    "accuracy_offload_curve",
    "routes",
    "uplink_bytes_per_offload",
    "reply_bytes_per_offload",
    "key_bytes",
    "edge_budget",
}


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    return ModelPair.open(demo.DemoConfig.edge_bt, demo.DemoConfig.cloud_bt)


def _case() -> tuple[list[Answered], Reference]:
    """Ten images: exit 1 right on five, exit 2 on seven, the tail on nine."""
    labels = np.arange(10)
    wrong = (labels + 1) % 10
    exit1 = np.where(labels < 5, labels, wrong)
    exit2 = np.where(labels < 7, labels, wrong)
    tail = np.where(labels < 9, labels, wrong)
    confidences = np.stack([np.linspace(0.9, 0.1, 10), np.linspace(0.95, 0.2, 10)], axis=1)
    clear = Reference(np.stack([exit1, exit2], axis=1), confidences, tail, labels)

    def answer(i: int, label: int, route: str, fallback: str | None = None, up: int = 0) -> Answered:
        down = 24_784 if route == "tail" else 0
        return Answered(i, int(label), route, fallback, 0.01 * (i + 1), {"head_s": 0.001}, up, down)

    answers = [answer(i, exit1[i], "exit1") for i in range(5)]
    answers += [answer(i, exit2[i], "exit2") for i in (5, 6)]
    answers += [answer(7, tail[7], "tail", up=123_032), answer(9, wrong[9] + 3, "tail", up=123_032)]
    answers.append(answer(8, exit2[8], "exit2", "unavailable", up=123_032))
    return answers, clear


def _report(pair: ModelPair) -> tuple[dict[str, Any], list[Answered]]:
    answers, clear = _case()
    report = build_report(pair, answers, clear)
    report |= {
        "wall_s": 1.0,
        "link": {"rate_bps": 20e6, "delay_s": 0.02},
        "killed_evaluator": None,
        "machine": {"processor": "p", "cores": 2},
        "versions": {"python": "3"},
    }
    report["targets"] = targets(report)
    return report, answers


def test_every_figure(pair: ModelPair) -> None:
    report, _ = _report(pair)
    assert set(report) >= FIELDS
    assert (report["images"], report["answered"], report["fallbacks"]) == (10, 10, 1)
    assert report["offloaded_share"] == pytest.approx(0.3)  # sent, answered in time or not
    assert report["fallback_reasons"] == {"unavailable": 1}
    assert report["agreement"] == pytest.approx(0.5)  # image 9: clear and encrypted differ
    assert report["accuracy"] == {
        "overall": pytest.approx(0.8),
        "exit1_only": pytest.approx(0.5),
        "best_exit_only": pytest.approx(0.7),
        "tail_for_all": pytest.approx(0.9),
    }
    assert report["gain_share"] == pytest.approx(0.5)
    assert {k: v["count"] for k, v in report["routes"].items()} == {
        "exit1": 5,
        "exit2": 2,
        "tail": 2,
        "fallback": 1,
    }
    assert report["routes"]["exit1"]["latency_s"]["p50"] == pytest.approx(0.03)
    assert report["uplink_bytes_per_offload"] == 123_032
    assert report["reply_bytes_per_offload"] == 24_784


def test_targets_say_what_is_missed(pair: ModelPair) -> None:
    report, _ = _report(pair)
    holds = {t["name"]: t["holds"] for t in report["targets"]}
    assert holds["every image answered"]
    assert not holds["encrypted and clear labels agree"]
    assert not holds["share of the tail's gain reached"]
    assert holds["uplink bytes per offload"]


def test_a_missing_or_doubled_answer_is_no_answer(pair: ModelPair) -> None:
    answers, clear = _case()
    report = build_report(pair, [*answers[:-1], answers[0]], clear)
    assert report["answered"] == 9
    assert not targets(report)[0]["holds"]


def test_without_offloads_nothing_is_invented(pair: ModelPair) -> None:
    answers, clear = _case()
    report = build_report(pair, answers[:7], clear)
    assert report["agreement"] is None
    assert report["uplink_bytes_per_offload"] is None
    assert not {t["name"]: t["holds"] for t in targets(report)}["encrypted and clear labels agree"]


@pytest.mark.filterwarnings("default::DeprecationWarning")
def test_plots_page_and_tables(pair: ModelPair, tmp_path: Path) -> None:
    report, answers = _report(pair)
    pictures = plots(report, answers, tmp_path)
    assert {p.name for p in pictures} == {
        "exit_mix.png",
        "accuracy_by_route.png",
        "accuracy_offload.png",
        "latency_cdf.png",
    }
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in pictures)
    page = demo_page(report, pictures)
    assert page.count("data:image/png;base64,") == 4
    assert "http" not in page
    assert len(summary_tables(report)) == 3
    json.dumps(report, allow_nan=False)


class FakeChild:
    """Stands for a process that runs, or has ended with a status."""

    log = Path("x.log")

    def __init__(self, code: int | None = None) -> None:
        self.code = code

    def check(self) -> None:
        if self.code not in (None, 0):
            raise ChildFailed("ended")

    def hint(self) -> str:
        return "see x.log"


def _line(i: int) -> str:
    return json.dumps(
        {
            "index": i,
            "predicted": i % 10,
            "route": "exit1",
            "fallback": None,
            "timings": {"total_s": 0.01, "head_s": 0.002},
            "uplink_bytes": 0,
            "reply_bytes": 0,
        }
    )


def _follow(path: Path, config: demo.DemoConfig, site: FakeChild, cell: dict[str, Any]) -> Any:
    return demo._follow(config, path, 4, site, FakeChild(), cell, demo.Progress())  # type: ignore[arg-type]


@pytest.mark.timeout(30)
def test_answers_are_followed_as_they_come_and_an_evaluator_dies_halfway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, kills = tmp_path / "answers.jsonl", []
    monkeypatch.setattr(demo.os, "kill", lambda pid, number: kills.append((pid, number)))

    def write() -> None:
        with path.open("w") as file:
            for i in range(4):
                text = _line(i) + "\n"
                file.write(text[:20])  # a line in two pieces
                file.flush()
                time.sleep(0.15)
                file.write(text[20:])
                file.flush()

    thread = threading.Thread(target=write)
    thread.start()
    cell = {"evaluators": [{"name": "e0", "pid": 12345}, {"name": "e1", "pid": 12346}]}
    answers, killed = _follow(path, demo.DemoConfig(), FakeChild(), cell)
    thread.join()
    assert [a.index for a in answers] == [0, 1, 2, 3]
    assert killed is not None
    assert killed["name"] == "e0"
    assert 2 <= killed["at_image"] <= 3
    assert kills == [(12345, 9)]


@pytest.mark.timeout(30)
def test_a_site_that_stalls_or_dies_ends_the_demo(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(_line(0) + "\n")
    config = demo.DemoConfig(kill=False, stall_timeout_s=0.3)
    with pytest.raises(ChildFailed, match=r"1 of 4 images.*see x.log"):
        _follow(path, config, FakeChild(), {})
    with pytest.raises(ChildFailed, match="ended"):
        _follow(path, config, FakeChild(3), {})
    answers, _ = _follow(path, config, FakeChild(0), {})  # an orderly end, too early: counted as it is
    assert len(answers) == 1
