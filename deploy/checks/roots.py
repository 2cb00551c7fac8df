"""Each container file's install steps, run in a clean root directory made by debootstrap.

NO IMAGE IS BUILT HERE: no engine runs, no layers are made, nothing is pushed. What
is shown is that the steps of the container files work on a bare Debian, that what
they leave starts as the user they name with the root directory read-only, that
the file's own HEALTHCHECK says yes, and that SIGTERM ends it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deploy.checks import dockerfile
from deploy.checks.dockerfile import Instruction, Stage
from deploy.checks.host import RELEASE, SHARED, Handed, debootstrap, handed, mirror, sources
from deploy.checks.layers import Layers, Link, chains

REPOSITORY = Path(__file__).resolve().parents[2]
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_STEP_S = 600.0
#: Free space: up to 3.5 GB in the work folder at a time (a shared layer, a stage, its result) and the cache.
NEEDED_GB = 5.0


class StepFailed(Exception):
    """A step did not end with 0; the message has the end of what it said."""


@dataclass(frozen=True)
class Build:
    """A container file and the values of its ARGs."""

    path: Path
    arguments: Mapping[str, str] = field(default_factory=dict)


def why_not(work: Path) -> str:
    """Why roots cannot be made in `work` on this machine; "" when they can."""
    if os.geteuid() != 0:
        return "this needs root (chroot, mounts, file owners), and you are not"
    if missing := [t for t in ("apt-get", "dpkg-deb", "unshare", "mount") if shutil.which(t) is None]:
        return f"this machine has no {missing[0]}: a Debian is needed"
    if not mirror():
        return f"apt on this machine has no source for {RELEASE}"
    probe = ["unshare", "--mount", "--pid", "--net", "--fork", "true"]
    if subprocess.run(probe, capture_output=True).returncode:
        return "this machine refuses new namespaces (a container without the right to mount?)"
    if (free_gb := shutil.disk_usage(work).free / 1e9) < NEEDED_GB:
        return f"{free_gb:.1f} GB are free in {work}, and this takes {NEEDED_GB:.0f}: set TMPDIR elsewhere"
    return ""


@dataclass
class Root:
    """A root directory and what the image would remember: environment, user, folder, commands."""

    folder: Path
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": _PATH})
    uid: int = 0
    gid: int = 0
    cwd: str = "/"
    entry: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    health: list[str] = field(default_factory=list)

    def run(
        self,
        argv: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        mounts: Sequence[tuple[str, str, bool]] = (),
        tmpfs: Sequence[tuple[str, str, str]] = (),
        installs: bool = False,
        timeout_s: float = _STEP_S,
    ) -> str:
        """Standard output. `installs`: as root, writable, with the network; otherwise as the image's
        user, read-only but for its volume, and alone with its loopback. Raises `StepFailed`."""
        plan = {
            "root": str(self.folder),
            "read_only": not installs,
            "mounts": list(mounts),
            "tmpfs": [
                ("/run", "64m", "0755"),
                ("/tmp", "512m", "1777"),
                ("/dev/shm", "256m", "1777"),
                *tmpfs,
            ],
            "loopback": not installs,
            "uid": 0 if installs else self.uid,
            "gid": 0 if installs else self.gid,
            "cwd": self.cwd,
            "env": {"HOME": "/root", **self.environment, **(environment or {})},
            "argv": list(argv),
        }
        isolated = ["unshare", "--mount", "--pid", "--fork", "--kill-child", *([] if installs else ["--net"])]
        script = str(Path(__file__).with_name("inside.py"))
        try:
            done = subprocess.run(
                [*isolated, sys.executable, script, json.dumps(plan)],
                capture_output=True,
                text=True,
                timeout=timeout_s,
                stdin=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired as error:
            raise StepFailed(f"{argv[-1]}: no end after {timeout_s:.0f} s") from error
        if done.returncode:
            said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-25:])
            raise StepFailed(f"{' '.join(argv)[:300]}\nended with {done.returncode}:\n{said}")
        return done.stdout


class Builder:
    """Runs container files' stages. What several files install alike is installed once.

    work      folder for roots and layers
    cache     folder that stays for the next run: the packed base, pip's cache
    builds    what `build` will be called with, in this order: only what these share is kept
    say       a line at a time, of what was done
    """

    def __init__(self, work: Path, cache: Path, builds: Sequence[Build], say: Callable[[str], None]) -> None:
        self.work = work
        self.cache = cache
        self.say = say
        self.given: Handed = handed()
        self._layers = Layers(
            work, [links for b in builds for links in chains(dockerfile.read(b.path), b.arguments)]
        )
        self._made = 0

    def base(self) -> Path:
        """A minimal Debian, kept in `cache` for the next run."""
        packed = self.cache / f"{RELEASE}.tar"
        folder = self.work / "base"
        if not packed.exists():
            start_s = time.monotonic()
            command, environment = debootstrap(self.cache)
            made = self.work / "made"
            done = subprocess.run(
                [*command, "--variant=minbase", RELEASE, str(made), mirror()],
                capture_output=True,
                text=True,
                env={**os.environ, **environment},
                timeout=_STEP_S,
            )
            if done.returncode:
                raise StepFailed("debootstrap failed:\n" + "\n".join(done.stdout.splitlines()[-15:]))
            (made / "etc" / "apt" / "sources.list").write_text("\n".join([*sources(), ""]))
            shutil.rmtree(made / "var" / "cache" / "apt" / "archives", ignore_errors=True)
            part = packed.with_suffix(".part")
            subprocess.run(["tar", "-C", str(made), "-cf", str(part), "."], check=True)
            part.rename(packed)
            shutil.rmtree(made)
            self.say(f"debootstrap {RELEASE} (minbase): {time.monotonic() - start_s:.0f} s")
        folder.mkdir()
        subprocess.run(["tar", "-C", str(folder), "-xpf", str(packed)], check=True)
        self._layers.base = folder
        return folder

    def build(self, build: Build) -> Root:
        """The final stage's root; the other stages' are gone. Raises `StepFailed` and `ValueError`."""
        stages: dict[str, Root] = {}
        root: Root | None = None
        try:
            read = dockerfile.read(build.path)
            for stage, links in zip(read, chains(read, build.arguments), strict=True):
                root = self._stage(stage, links, stages, build.arguments)
                stages[stage.name] = root
        except OSError as error:
            raise StepFailed(f"{build.path.name}: {error}") from error
        finally:
            for other in stages.values():
                if other is not root:
                    shutil.rmtree(other.folder, ignore_errors=True)
        assert root is not None  # `read` gives a stage or raises
        return root

    def _stage(
        self, stage: Stage, links: list[Link], stages: Mapping[str, Root], arguments: Mapping[str, str]
    ) -> Root:
        self._made += 1
        root = Root(self.work / f"root-{self._made}")
        taken = self._layers.take(links, root.folder)
        values: dict[str, str] = {}
        for number, instruction in enumerate(stage.instructions, 1):
            self._step(instruction, root, stages, arguments, values, number <= taken)
            if number > taken:
                self._layers.keep(number, root.folder)
        return root

    def _step(
        self,
        instruction: Instruction,
        root: Root,
        stages: Mapping[str, Root],
        arguments: Mapping[str, str],
        values: dict[str, str],
        done_before: bool,
    ) -> None:
        name = instruction.name
        if name == "ENV":
            root.environment.update(instruction.pairs())
        elif name == "ARG":
            for key, value in instruction.pairs().items():
                values[key] = arguments.get(key, value)
        elif name == "WORKDIR":
            root.cwd = instruction.value
            (root.folder / instruction.value.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif name == "USER":
            uid, _, gid = instruction.value.partition(":")
            root.uid, root.gid = int(uid), int(gid or uid)
        elif name == "ENTRYPOINT":
            root.entry = instruction.words()
        elif name == "CMD":
            root.command = instruction.words()
        elif name == "HEALTHCHECK":
            root.health = dockerfile.json_form(instruction.value.removeprefix("CMD "))
        elif name == "COPY" and not done_before:
            self._copy(instruction, root, stages)
        elif name == "RUN" and not done_before:
            self._install(instruction, root, values)

    def _copy(self, instruction: Instruction, root: Root, stages: Mapping[str, Root]) -> None:
        *froms, to = instruction.words()
        stage = instruction.flags.get("from")
        origin = stages[stage].folder if stage else REPOSITORY
        target = root.folder / (to if to.startswith("/") else f"{root.cwd}/{to}").lstrip("/")
        if to.endswith("/") or len(froms) > 1:
            target.mkdir(parents=True, exist_ok=True)
        for name in froms:
            source = origin / name.lstrip("/")
            if source.is_dir():
                ignore = None if stage else shutil.ignore_patterns("__pycache__", "*.pyc")
                shutil.copytree(source, target, symlinks=True, ignore=ignore, dirs_exist_ok=True)
            else:
                shutil.copy2(source, target / source.name if target.is_dir() else target)

    def _install(self, instruction: Instruction, root: Root, values: Mapping[str, str]) -> None:
        start_s = time.monotonic()
        mounts = [*self.given.mounts]
        kind = dict(part.partition("=")[::2] for part in instruction.flags.get("mount", "").split(","))
        if kind.get("type") == "cache":
            shared = self.cache / kind["target"].strip("/").replace("/", "-")
            shared.mkdir(parents=True, exist_ok=True)
            mounts.append((str(shared), kind["target"], True))
        files = self.work / "handed"
        files.mkdir(exist_ok=True)
        for name, text in self.given.files.items():
            (files / name).write_text(text)
            mounts.append((str(files / name), f"{SHARED}/{name}", False))
        mounts.append(("/etc/resolv.conf", "/etc/resolv.conf", False))
        environment = {**values, **self.given.environment}
        root.run(["/bin/sh", "-c", instruction.value], environment=environment, mounts=mounts, installs=True)
        self.say(f"  RUN line {instruction.line}: {time.monotonic() - start_s:.0f} s")


def size_mb(folder: Path) -> float:
    """Bytes of a tree on disk, in MB."""
    done = subprocess.run(["du", "-sxB1", str(folder)], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[0]) / 1e6


def temporary(parent: Path | None = None) -> tempfile.TemporaryDirectory[str]:
    """A work folder that other users may walk through, since the image's user must."""
    made = tempfile.TemporaryDirectory(prefix="bt-roots-", dir=parent, ignore_cleanup_errors=True)
    os.chmod(made.name, 0o755)
    return made


__all__ = ["REPOSITORY", "Builder", "Root", "StepFailed", "size_mb", "temporary", "why_not"]
