"""Documentation: links lead somewhere, commands exist, pages load nothing, nothing private slipped in."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("deploy/*.md")])
COMMANDS = {"lint", "train", "inspect", "plan", "verify", "cloud", "edge", "infer", "demo"} | {
    *("model", "cell", "orchestrator", "policy", "certs", "health", "bench"),
}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_page(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"
    for word in re.findall(r"^blindtail ([a-z]+)", text, re.MULTILINE):
        assert word in COMMANDS, f"{page.name} names the command {word!r}"
    for target in re.findall(r"^make ([a-z]+)", text, re.MULTILINE):
        assert f"\n{target}:" in (ROOT / "Makefile").read_text(), f"{page.name} names 'make {target}'"
    # Paths of somebody's machine do not belong here.
    assert not re.search(r"(?<![\w.])/(work|root|home|tmp/w)/", text)


def test_readme_names_every_guide() -> None:
    text = (ROOT / "README.md").read_text()
    for guide in (ROOT / "docs" / "guide").glob("*.md"):
        assert guide.relative_to(ROOT).as_posix() in text


def test_commands_are_registered() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    entries = project["entry-points"]["blindtail.commands"]
    assert {name for key in entries for name in key.split("+")} == COMMANDS


def test_constraints_pin_every_dependency() -> None:
    configuration = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = configuration["project"]
    wanted = [
        *configuration["build-system"]["requires"],
        *(f"{tool}{configuration['tool']['scikit-build'][tool]['version']}" for tool in ("cmake", "ninja")),
        *project["dependencies"],
        *(d for extra in project["optional-dependencies"].values() for d in extra),
    ]
    pins = dict(
        line.lower().replace("_", "-").split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    names = {re.split(r"[\[<>=~!; ]", w, maxsplit=1)[0].lower().replace("_", "-") for w in wanted} - {
        "blindtail"
    }
    assert names <= set(pins)
    grpc = {pins[name] for name in pins if name.startswith("grpcio")}
    assert len(grpc) == 1, "grpcio and its companions are of one version"
    assert "+" not in "".join(pins.values()), "a local build cannot be found elsewhere"


def test_picture_loads_nothing() -> None:
    svg = (ROOT / "docs" / "overview.svg").read_text()
    assert "href" not in svg
    assert "<script" not in svg
