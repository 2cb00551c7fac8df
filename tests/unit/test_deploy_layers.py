"""Roots that several container files share are made once, and kept no longer than they are needed."""

from pathlib import Path

import pytest

from deploy.checks import dockerfile
from deploy.checks.layers import Layers, Link, chains

FILE = """FROM debian AS build
RUN compiler
ARG EXTRAS=""
RUN pip "$EXTRAS"
FROM debian
RUN apt
COPY --from=build /opt /opt
RUN check
"""


def links(extras: str = "", text: str = FILE) -> list[list[Link]]:
    return chains(dockerfile.parse(text), {"EXTRAS": extras} if extras else {})


def play(layers: Layers, stage: list[Link], folder: Path) -> list[int]:
    """Take a stage and do what is left of it; the numbers of the instructions that were run."""
    taken = layers.take(stage, folder)
    run = [n for n in range(taken + 1, len(stage)) if stage[n].runs]
    for n in run:
        (folder / f"ran-{n}").touch()
        layers.keep(n, folder)
    return run


def start(work: Path, ahead: list[list[Link]]) -> Layers:
    layers = Layers(work, ahead)
    layers.base = work / "base"
    layers.base.mkdir()
    return layers


def kept(work: Path) -> int:
    return len([p for p in work.iterdir() if p.name.startswith("layer-")])


def test_what_two_files_share_is_run_once_and_then_given_up(tmp_path: Path) -> None:
    first, second = links(), links("cluster")
    layers = start(tmp_path, [*first, *second])
    runs = [play(layers, stage, tmp_path / f"root-{i}") for i, stage in enumerate([*first, *second])]
    # The compilers once, pip with each file's extras; apt once, and what follows the copy again.
    assert runs == [[1, 3], [1, 3], [3], [3]]
    assert sorted(p.name for p in (tmp_path / "root-2").iterdir()) == ["ran-1", "ran-3"]
    assert kept(tmp_path) == 0


def test_a_layer_stays_as_long_as_a_stage_ahead_starts_from_it(tmp_path: Path) -> None:
    files = [links(), links("a"), links("b")]
    layers = start(tmp_path, [stage for file in files for stage in file])
    counts = []
    for i, stage in enumerate(stage for file in files for stage in file):
        play(layers, stage, tmp_path / f"root-{i}")
        counts.append(kept(tmp_path))
    assert counts == [1, 2, 2, 2, 1, 0]


def test_what_is_copied_from_another_stage_counts_with_what_that_stage_ran() -> None:
    one, other = links(), links("cluster")
    assert one[1][1] == other[1][1]  # apt: the same for both
    assert one[1][2] != other[1][2]
    assert one[1][3] != other[1][3]
    assert links() == one


def test_a_build_that_failed_does_not_stop_the_next(tmp_path: Path) -> None:
    first, second = links(), links("cluster")
    layers = start(tmp_path, [*first, *second])
    play(layers, first[0], tmp_path / "root-0")
    assert play(layers, second[0], tmp_path / "root-1") == [3]
    with pytest.raises(ValueError, match="not announced"):
        layers.take(first[1], tmp_path / "root-2")


def test_a_copy_that_fails_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    stage = links()[0]
    layers = Layers(tmp_path, [stage])
    layers.base = tmp_path / "missing"
    with pytest.raises(OSError, match=r"copying missing: .*No such file.* GB are free now"):
        layers.take(stage, tmp_path / "root")
    assert not (tmp_path / "root").exists()
