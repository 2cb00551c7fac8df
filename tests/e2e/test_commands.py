"""The commands as a user runs them: a real cloud, a real edge site, a slow link, one casualty."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edge.demo import DemoConfig, Progress, run_demo
from edge.processes import ChildFailed

pytestmark = pytest.mark.timeout(280)
IMAGES = 40


def _marked(mark: str) -> set[str]:
    """Processes whose environment holds `mark`, which children and their children inherit."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if mark.encode() in (entry / "environ").read_bytes():
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    found.add(f"{entry.name} {line}")
            except OSError:
                continue
    return found


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, list[str], set[str]]:
    """A short demo; with it the steps shown and the processes that it left behind."""
    out = tmp_path_factory.mktemp("demo")
    steps: list[str] = []
    seen: set[str] = set()
    mark = secrets.token_hex(16)

    def show(progress: Progress) -> None:
        steps.append(progress.step)
        if not seen and progress.step == "answering":
            seen.update(_marked(mark))

    # A deadline that offloads meet on a busy machine too, then one that none can: exits answer the rest.
    config = DemoConfig(
        out=out,
        images=IMAGES,
        rate_bps=100e6,
        delay_s=0.002,
        deadline_s=30.0,
        tighter_s=0.02,
        images_per_s=12,
        start_timeout_s=200.0,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLINDTAIL_TEST_MARK", mark)
        report = run_demo(config, Progress(show))
    assert len(seen) > 10  # two Ray clusters: the mark is inherited, the search works
    return report, out, steps, _marked(mark)


def test_every_image_is_answered_though_an_evaluator_dies(demo: Any) -> None:
    report = demo[0]
    assert report["answered"] == report["images"] == IMAGES
    (casualty,) = report["recoveries"]
    assert casualty["victim"] == "evaluator"
    assert casualty["at_image"] >= IMAGES // 4
    assert casualty["recovered_s"] is not None
    assert report["routes"]["tail"]["count"] > 0
    assert report["agreement"] == 1.0
    assert report["uplink_bytes_per_offload"] <= 125_000
    assert report["reply_bytes_per_offload"] <= 30_000


def test_the_exit_mix_follows_the_objective(demo: Any) -> None:
    first, second = demo[0]["objectives"]
    assert first["version"] < second["version"]
    assert second["edges"] == 2
    assert first["routes"]["tail"] > 0
    # However long the operator's command takes, the other half comes after it.
    assert first["images"] == second["images"] == IMAGES // 2
    assert second["offloaded_share"] == 0.0
    assert "tail" not in second["routes"]


def test_edge_and_cloud_run_on_different_ray_clusters(demo: Any) -> None:
    clusters = demo[0]["clusters"]
    assert clusters["edge"]
    assert clusters["cloud"]
    assert clusters["edge"] != clusters["cloud"]


def test_files_of_the_demo(demo: Any) -> None:
    report, out = demo[0], demo[1]
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report))
    names = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert names == {
        "report.json",
        "report.html",
        "exit_mix.png",
        "accuracy_by_route.png",
        "accuracy_offload.png",
        "latency_cdf.png",
        "logs/cloud.log",
        "logs/edge.log",
        "logs/orchestrator.log",
    }
    assert {"wall_s", "backend", "machine", "versions", "policy", "link"} <= set(report)


def test_keys_are_there_before_the_first_image(demo: Any) -> None:
    report, steps = demo[0], demo[2]
    assert report["link_bytes"]["before_images_up"] > report["key_bytes"]
    assert steps.index("cloud ready; the site makes its keys and uploads them") < steps.index("answering")


def test_no_process_stays_behind(demo: Any) -> None:
    assert demo[3] == set()


def test_infer_without_a_cloud(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "blindtail", "infer", str(DemoConfig.edge_bt), "fashion:7", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path, check=True)
    answer = json.loads(done.stdout)
    assert answer["route"].startswith("exit")
    assert answer["label"] == 6


@pytest.mark.timeout(60)
def test_a_cloud_that_cannot_start_is_named_with_its_log(tmp_path: Path) -> None:
    mark = secrets.token_hex(16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLINDTAIL_TEST_MARK", mark)
        with pytest.raises(ChildFailed, match=r"the cloud process ended.*logs/cloud\.log: .*backend"):
            run_demo(DemoConfig(out=tmp_path, images=2, backend="nonsense"))
    assert _marked(mark) == set()
    assert not (tmp_path / "report.json").exists()
