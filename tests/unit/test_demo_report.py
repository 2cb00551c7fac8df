"""The demo's report from known answers, its files, and how it follows a site."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge import demo, demo_events, demo_run, demo_stage
from edge.demo_events import Event, Events, Recovery, alive, kill, until
from edge.demo_plots import plots
from edge.demo_report import (
    Answered,
    Reference,
    build_report,
    demo_page,
    phases,
    summary_tables,
    targets,
)
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


OBJECTIVES = [
    {"version": 1, "deadline_s": 1.0, "at_image": 0, "edges": 2, "in_force_after_s": 0.1},
    {"version": 2, "deadline_s": 0.01, "at_image": 5, "edges": 2, "in_force_after_s": 0.1},
]


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
        down, version = 24_784 if route == "tail" else 0, 0 if i == 9 else 2 if i in (5, 6) else 1
        spent = {"head_s": 0.001}
        return Answered(i, int(label), route, fallback, 0.01 * (i + 1), spent, up, down, 10.0 + i, version)

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
        "objectives": phases(answers, clear, OBJECTIVES),
        "recoveries": [Recovery("evaluator", 1, 3, 0.0, "2 evaluators are up", 1.5, 1.75, 1).to_json()],
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
    assert not holds["share of the tail's gain, deadline 1 s"]
    assert holds["uplink bytes per offload"]
    assert holds["offloaded share, deadline 0.01 s"]
    assert not holds["answers later than deadline + 50 ms"]
    assert holds["recoveries"]
    report["recoveries"][0] |= {"recovered_s": None, "victim": "gateway"}
    assert "share of the tail's gain, deadline 1 s" not in {t["name"] for t in targets(report)}
    assert not {t["name"]: t["holds"] for t in targets(report)}["recoveries"]


def test_each_objective_has_the_answers_that_it_decided(pair: ModelPair) -> None:
    report, _ = _report(pair)
    first, second = report["objectives"]
    assert (first["images"], second["images"]) == (8, 2)  # image 9 came before any policy
    assert second["routes"] == {"exit2": 2}
    assert second["offloaded_share"] == 0.0
    assert second["late"] == 1  # 70 ms for a deadline of 10: more than 50 ms too late
    assert first["late"] == 0
    assert first["offloaded_share"] == pytest.approx(3 / 8)
    assert first["gain_share"] is not None


def test_a_missing_or_doubled_answer_is_no_answer(pair: ModelPair) -> None:
    answers, clear = _case()
    report = build_report(pair, [*answers[:-1], answers[0]], clear)
    report |= {"objectives": phases(answers, clear, OBJECTIVES), "recoveries": []}
    assert report["answered"] == 9
    assert not targets(report)[0]["holds"]


def test_without_offloads_nothing_is_invented(pair: ModelPair) -> None:
    answers, clear = _case()
    report = build_report(pair, answers[:7], clear)
    assert report["agreement"] is None
    assert report["uplink_bytes_per_offload"] is None
    report |= {"objectives": phases([], clear, OBJECTIVES), "recoveries": []}
    assert report["objectives"][0]["accuracy"] is None
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
    assert len(summary_tables(report)) == 5
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
            "monotonic_s": 5.0 + i,
            "extra": {"policy_version": 3.0},
        }
    )


def _follow(
    path: Path, config: demo.DemoConfig, site: FakeChild, events: Events | None = None
) -> list[Answered]:
    stage = demo_stage.Stage(config, path.parent, "", FakeChild(), FakeChild(), site, None)  # type: ignore[arg-type]
    return demo_run._follow(config, path, 4, stage, events or Events([], 4), demo.Progress())


@pytest.mark.timeout(30)
def test_answers_are_followed_as_they_come_and_events_happen_in_time(tmp_path: Path) -> None:
    path, happened = tmp_path / "answers.jsonl", []

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
    events = Events([Event(0.5, "first", happened.append), Event(0.75, "second", happened.append)], 4)
    answers = _follow(path, demo.DemoConfig(), FakeChild(), events)
    thread.join()
    events.finish(5.0)
    assert [a.index for a in answers] == [0, 1, 2, 3]
    assert (answers[1].policy_version, answers[1].began_s) == (3, pytest.approx(5.99))
    assert len(happened) == 2
    assert 2 <= happened[0] <= happened[1]


@pytest.mark.timeout(30)
def test_a_site_that_stalls_or_dies_ends_the_demo(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(_line(0) + "\n")
    config = demo.DemoConfig(stall_timeout_s=0.3)
    with pytest.raises(ChildFailed, match=r"1 of 4 images.*see x.log"):
        _follow(path, config, FakeChild())
    with pytest.raises(ChildFailed, match="ended"):
        _follow(path, config, FakeChild(3))
    answers = _follow(path, config, FakeChild(0))  # an orderly end, too early: counted as it is
    assert len(answers) == 1


@pytest.mark.timeout(30)
def test_events_can_wait_for_each_other_and_their_failures_surface() -> None:
    gate = threading.Event()
    done: list[str] = []

    def fail(answered: int) -> None:
        raise ChildFailed(f"no recovery at {answered}")

    events = Events(
        [Event(0.1, "slow", lambda n: (gate.wait(10), done.append("slow"))[0]), Event(0.1, "bad", fail)],
        images=10,
        one_by_one=True,
    )
    assert events.due(0) is None
    assert events.due(1) == "slow"
    assert events.due(9) is None  # the first one is not over
    assert not events.all_done
    gate.set()
    events.finish(5.0)
    assert done == ["slow"]
    assert events.due(9) == "bad"
    with pytest.raises(ChildFailed, match="no recovery at 9"):
        events.finish(5.0)
    assert events.all_done


@pytest.mark.timeout(30)
def test_a_recovery_is_timed_and_one_that_never_comes_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    recoveries: list[Recovery] = []
    recovery = kill(recoveries, "sleeper", victim.pid, 7, "it is gone")
    until(lambda: not alive(victim.pid), recovery)
    victim.wait()
    assert recoveries == [recovery]
    assert recovery.recovered_s is not None
    assert 0 < recovery.recovered_s < 10
    assert alive(os.getpid())
    monkeypatch.setattr(demo_events, "_RECOVERY_S", 0.2)
    with pytest.raises(ChildFailed, match="sleeper was killed: not it is gone"):
        until(lambda: False, recovery)


def test_the_first_encrypted_answer_after_a_casualty() -> None:
    def answer(began_s: float, took_s: float, route: str, fallback: str | None = None) -> Answered:
        return Answered(0, 0, route, fallback, took_s, {}, 0, 0, began_s + took_s, 1)

    recovery = Recovery("gateway", 1, 0, 100.0, "back")
    answers = [
        answer(99.9, 0.3, "tail"),  # was on its way already
        answer(100.1, 0.2, "exit2", "unavailable"),
        answer(101.0, 0.5, "tail"),
        answer(102.0, 0.1, "exit2", "unavailable"),
    ]
    demo_stage.note_first_encrypted([recovery], answers)
    assert recovery.encrypted_s == pytest.approx(1.5)
    assert recovery.fallbacks == 1
