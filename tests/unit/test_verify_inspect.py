"""`inspect` and `verify` on the bundled pair."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blindtail import cli
from blindtail.bundle import CloudBundle, EdgeBundle
from blindtail.errors import BundleError, InputError
from blindtail.he.backends import settle
from edge.pages import verify_page
from edge.pair import ModelPair
from edge.verify import read_images, summary_lines, verify
from tests.he_cases import Case, program

ZOO = Path(cli.__file__).parent / "models" / "zoo" / "fashion"

EDGE, CLOUD = ZOO / "edge.bt", ZOO / "cloud.bt"

Run = Callable[..., str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*argv: object, code: int = 0) -> str:
        with pytest.raises(SystemExit) as left:
            cli.main([str(a) for a in argv])
        captured = capsys.readouterr()
        assert left.value.code == code, captured.err
        return captured.out if code == 0 else captured.err

    return call


def test_inspect_says_what_it_costs(run: Run) -> None:
    edge = json.loads(run("inspect", EDGE, "--json"))
    cloud = json.loads(run("inspect", CLOUD, "--json"))
    (cut, spec), (cloud_cut, program) = *edge["cuts"].items(), *cloud["cuts"].items()
    assert (edge["kind"], cloud["kind"], cut) == ("edge", "cloud", cloud_cut)
    bundle = EdgeBundle.open(EDGE)
    for name in ("uplink_bytes", "reply_bytes", "key_bytes", "program_id"):
        assert spec[name] == program[name] == getattr(bundle.cuts[int(cut)], name)
    assert program["depth"] == spec["depth"] == len(program["operations"]) == spec["levels"] - 1
    assert program["predicted_s"] == pytest.approx(
        sum(o["predicted_s"] for o in program["operations"]), rel=0.5
    )
    assert edge["edge_budget"]["macs"] == sum(p["macs"] for p in (*edge["stages"], *edge["exits"]))
    # A cloud.bt's tables hold no weight: every array of numbers is short.
    assert max(len(m) for m in re.findall(r"\[[^\]]*\]", json.dumps(cloud))) < 2000
    text = run("inspect", CLOUD)
    for word in ("depth", "levels", "rotations", "predicted seconds", "uplink", "keys"):
        assert word in text


@pytest.mark.parametrize("cut_off", [0, 10, 1000])
def test_inspect_of_a_damaged_file_is_one_line(run: Run, tmp_path: Path, cut_off: int) -> None:
    path = tmp_path / "edge.bt"
    path.write_bytes(EDGE.read_bytes()[:cut_off])
    assert len(run("inspect", path, code=2).splitlines()) == 1


def test_verify_with_encryption(run: Run, tmp_path: Path) -> None:
    argv = ["verify", EDGE, CLOUD, "--data", "fashion", "--images", 8, "--out", tmp_path, "--json"]
    report = json.loads(run(*argv))
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert (report["images"], report["backend"], report["agreement"]) == (8, settle("auto"), 1.0)
    error = report["logit_error"]
    assert 0 < error["mean"] <= error["max"] < 0.05
    page = (tmp_path / "report.html").read_text()
    assert "100.00%" in page
    assert not re.search(r"(src|href)=['\"](?!data:)", page), "the page must load nothing"
    assert list(tmp_path.glob("**/*key*")) == []


def test_verify_lists_every_disagreement(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positive control: a tail that answers wrongly is reported, with margins."""
    pair = ModelPair.open(EDGE, CLOUD)
    pixels, labels = read_images(pair, "fashion", "test", 6)

    def wrong(program: Any, activations: Any, backend: str, progress: Any) -> tuple[Any, list[float]]:
        logits = pair.clear_tail(activations)
        logits[2] = np.roll(logits[2], 1)
        return logits, [0.1] * 6

    monkeypatch.setattr("edge.verify.evaluate_encrypted", wrong)
    report = verify(pair, pixels, labels)
    (row,) = report["disagreements"]
    assert report["agreement"] == pytest.approx(5 / 6)
    assert row["image"] == 2
    assert row["clear_class"] != row["encrypted_class"]
    assert row["clear_margin"] == pytest.approx(row["encrypted_margin"]) != 0
    assert row["max_logit_error"] > 0
    assert row["clear_class"] in verify_page(report)
    assert "image 2" in "\n".join(summary_lines(report))


def test_the_clear_tail_is_what_the_clear_backend_computes() -> None:
    pair = ModelPair.open(EDGE, CLOUD)
    pixels, labels = read_images(pair, "fashion", "test", 4)
    report = verify(pair, pixels, labels, backend="clear")
    assert report["logit_error"]["max"] < 1e-9


def test_images_of_a_folder(tmp_path: Path) -> None:
    from PIL import Image

    pair = ModelPair.open(EDGE, CLOUD)
    pixels, labels = read_images(pair, "fashion", "test", 5)
    for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        folder = tmp_path / pair.edge.class_names[label]
        folder.mkdir(exist_ok=True)
        Image.fromarray(image[0]).save(folder / f"{i}.png")
    found, found_labels = read_images(pair, str(tmp_path), "test", 100)
    assert sorted(found_labels) == sorted(labels)
    assert {x.tobytes() for x in found} == {x.tobytes() for x in pixels}


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    cloud = CloudBundle.open(CLOUD)
    other = tmp_path / "cloud.bt"
    (cut,) = cloud.programs
    CloudBundle(cloud.model, "another", {cut: program(Case((64, 32, 10)))}).save(other)
    with pytest.raises(BundleError, match="written together"):
        ModelPair.open(EDGE, other)
    CloudBundle("someone's", cloud.version, cloud.programs).save(other)
    with pytest.raises(BundleError, match="of one model"):
        ModelPair.open(EDGE, other)
    with pytest.raises(InputError, match="no cut 0"):
        ModelPair.open(EDGE, CLOUD, 0)
    with pytest.raises(BundleError):
        ModelPair.open(CLOUD, EDGE)
