"""The site and its commands as processes: own Ray cluster, shared keys, JSON lines, clean end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from blindtail.bundle import CloudBundle
from cloud.local import LocalCell
from tests.cell_process import alive, wait_for
from tests.edge_fakes import NAMES, bundle_of, image, program

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "edge.bt"
    bundle_of(spec=program().spec).save(path)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve dim pictures and four bright ones; bright ones are sure at the first exit."""
    folder = tmp_path_factory.mktemp("pictures")
    for label, name in enumerate(NAMES):
        (folder / name).mkdir()
        for number, brightness in enumerate((40, 50, 60, 250)):
            pixels = image(label, brightness)[0]
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def cell() -> Iterator[LocalCell]:
    with LocalCell([CloudBundle("toy", "1", {2: program()})], backend="clear") as made:
        yield made


def blindtail(*arguments: str | Path, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "blindtail", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)


def settings(cell: LocalCell, state: Path) -> list[str]:
    return [
        *("--cloud", cell.address, "--plaintext", "--backend", "clear"),
        *("--policy", "threshold", "--state-dir", str(state)),
    ]


def test_a_site_answers_a_folder_through_the_tail(
    model: Path, pictures: Path, cell: LocalCell, tmp_path: Path
) -> None:
    out, announce = tmp_path / "answers.jsonl", tmp_path / "site.json"
    done = blindtail(
        *("edge", model, "--data", pictures, "--actors", "2", "--out", out, "--announce", announce, "--json"),
        *settings(cell, tmp_path / "state"),
    )
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(r["index"] for r in records) == list(range(16))
    routes = [r["route"] for r in records]
    assert routes.count("exit1") == 4
    assert routes.count("tail") == 12
    assert {r["actor"] for r in records} == {0, 1}
    assert all(r["predicted"] == r["label"] for r in records if r["route"] == "exit1")
    assert {"total_s", "encrypt_s", "eval_s"} <= set(records[0]["timings"])
    summary = json.loads(done.stdout.splitlines()[-1])["summary"]
    assert summary["answered"] == 16
    assert summary["fallbacks"] == {}
    site = json.loads(announce.read_text())
    assert len(site["cluster_id"]) >= 32
    assert site["ready"] is True
    assert len({a["pid"] for a in site["actors"]}) == 2
    # Both actors used one key set.
    assert len(list((tmp_path / "state").iterdir())) == 1
    # Ray kills its workers and does not wait for them.
    left = (site["pid"], *(a["pid"] for a in site["actors"]))
    wait_for(lambda: not any(alive(pid) for pid in left), "processes stayed", 10)


def test_a_site_ends_in_order_on_sigterm(model: Path, pictures: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    command = [sys.executable, "-m", "blindtail", "edge", str(model), "--data", str(pictures)]
    flags = ["--cloud", "127.0.0.1:9", "--plaintext", "--backend", "clear", "--state-dir", str(state)]
    process = subprocess.Popen([*command, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        end_s = time.monotonic() + 90
        while not list(state.glob("*/keys.json")):  # then the actor waits for a cloud that is not there
            assert process.poll() is None
            assert time.monotonic() < end_s
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, errors.decode()


def test_infer_prints_how_the_answer_came_about(model: Path, cell: LocalCell, tmp_path: Path) -> None:
    picture = tmp_path / "dim.npy"
    np.save(picture, image(1, 60))
    done = blindtail("infer", model, picture, "--json", *settings(cell, tmp_path / "state"))
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    assert answer["route"] == "tail"
    assert answer["fallback"] is None
    assert answer["problems"] == {}
    text = blindtail("infer", model, picture, *settings(cell, tmp_path / "state"))
    assert "by tail" in text.stdout
    assert "KB up" in text.stdout


def test_infer_without_a_cloud_answers_from_an_exit(model: Path, tmp_path: Path) -> None:
    picture = tmp_path / "bright.png"
    Image.fromarray(image(2, 250)[0]).save(picture)
    done = blindtail("infer", model, picture)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("two (class 2)")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--deadline", "-1"], "deadline_s"),
        (["--policy", "dedline"], "deadline"),
        (["--set", "safety=0"], "safety"),
        (["--set", "speed=1"], "speed"),
        (["--cloud", "nowhere"], "host:port"),
        (["--cloud", "cloud.example:50051", "--plaintext"], "loopback"),
        (["--cloud", "127.0.0.1:1", "--ca", "ca.pem"], "--certificate"),
        (["--cloud", "127.0.0.1:1", "--backend", "sael"], "seal"),
        (["--config", "missing.toml"], "missing.toml"),
    ],
)
def test_wrong_settings_are_one_clear_line(
    model: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    np.save(tmp_path / "x.npy", image())
    done = blindtail("infer", model, tmp_path / "x.npy", *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((3, 2, 4), np.uint8), "(3, 2, 4)"),
        (np.zeros((1, 2, 4), np.float64), "float64"),
        (None, "missing or no .npy"),
    ],
)
def test_wrong_images_are_one_clear_line(model: Path, tmp_path: Path, array: Any, words: str) -> None:
    if array is not None:
        np.save(tmp_path / "x.npy", array)
    done = blindtail("infer", model, tmp_path / "x.npy")
    assert done.returncode == 2
    assert words in done.stderr


def test_a_config_file_with_an_unknown_field_names_it(model: Path, tmp_path: Path) -> None:
    config = tmp_path / "site.toml"
    config.write_text('polcy = "deadline"\n')
    done = blindtail("edge", model, "--config", config)
    assert done.returncode == 2
    assert "polcy" in done.stderr
    assert "policy" in done.stderr
