"""Roots after install steps that a later build takes up again, so that each step runs once."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.checks.dockerfile import Stage


@dataclass(frozen=True)
class Link:
    """A stage up to an instruction: equal links are equal roots."""

    digest: str
    runs: bool  # the instruction is a RUN: worth a copy


def chains(stages: Sequence[Stage], arguments: Mapping[str, str]) -> list[list[Link]]:
    """Of each stage: FROM first, then one link an instruction, each with the digest of all before it.

    What is copied from another stage counts with that stage's whole chain.
    """
    made: dict[str, list[Link]] = {}
    for stage in stages:
        links = [Link(_digest(stage.base), False)]
        for i in stage.instructions:
            given = sorted(arguments.items()) if i.name == "ARG" else ""
            origin = made[i.flags["from"]][-1].digest if i.name == "COPY" and "from" in i.flags else ""
            text = f"{links[-1].digest} {i.name} {i.flags} {i.value} {given} {origin}"
            links.append(Link(_digest(text), i.name == "RUN"))
        made[stage.name] = links
    return list(made.values())


class Layers:
    """Copies of roots, each kept only while a stage ahead will start from it: a root is over a gigabyte.

    work     folder of the copies
    ahead    the chains of all stages to come, in order
    """

    def __init__(self, work: Path, ahead: Sequence[Sequence[Link]]) -> None:
        self._work = work
        self._ahead = [list(links) for links in ahead]
        self._kept: dict[str, Path] = {}
        self._current: Sequence[Link] = ()
        #: What a stage with no layer of its own starts from; set before the first `take`.
        self.base: Path | None = None

    def take(self, links: Sequence[Link], folder: Path) -> int:
        """Make `folder` the deepest kept root of this stage, the next ahead; how many instructions it has.

        Layers that no further stage starts from are given up. Raises `OSError` when the disk is full.
        """
        if list(links) not in self._ahead:
            raise ValueError("a stage that was not announced")
        # Those that were announced before it and not taken are of a build that failed.
        del self._ahead[: self._ahead.index(list(links)) + 1]
        self._current = links
        assert self.base is not None
        number = self._deepest(links)
        source = self._kept[links[number].digest] if number else self.base
        wanted = {after[n].digest for after in self._ahead if (n := self._deepest(after))}
        if links[number].digest in wanted or not number:
            _copy(source, folder)
        else:
            source.rename(folder)
            del self._kept[links[number].digest]
        for digest in self._kept.keys() - wanted:
            shutil.rmtree(self._kept.pop(digest), ignore_errors=True)
        return number

    def keep(self, number: int, folder: Path) -> None:
        """`folder` is the stage taken last after instruction `number`: copied if one ahead starts from it.

        Raises `OSError` when the disk is full.
        """
        if any(self._shared(after) == number for after in self._ahead):
            digest = self._current[number].digest
            self._kept[digest] = self._work / f"layer-{digest[:12]}"
            _copy(folder, self._kept[digest])

    def _shared(self, links: Sequence[Link]) -> int:
        """The last RUN that these and the current stage have in common, 0 for none."""
        same = [ours == theirs for ours, theirs in zip(self._current, links, strict=False)]
        common = same.index(False) if False in same else len(same)
        return max((n for n in range(common) if links[n].runs), default=0)

    def _deepest(self, links: Sequence[Link]) -> int:
        return max((n for n, link in enumerate(links) if n and link.digest in self._kept), default=0)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _copy(source: Path, target: Path) -> None:
    done = subprocess.run(
        ["cp", "-a", "--reflink=auto", str(source), str(target)], capture_output=True, text=True
    )
    if done.returncode:
        shutil.rmtree(target, ignore_errors=True)
        last = (done.stderr.strip().splitlines() or ["cp said nothing"])[-1]
        free_gb = shutil.disk_usage(target.parent).free / 1e9
        raise OSError(f"copying {source.name}: {last} ({free_gb:.1f} GB are free now)")
