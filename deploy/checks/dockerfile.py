"""Container files: read into stages and instructions, and held to our rules."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

#: Every instruction that ours use; another one is refused, so that none is silently skipped.
INSTRUCTIONS = frozenset(
    {
        *("ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL", "RUN"),
        *("STOPSIGNAL", "USER", "VOLUME", "WORKDIR"),
    }
)
FIRST_USER_ID = 1000
_SECRET = re.compile(
    r"(?i)(password|passwd|secret|token|api_?key|private_?key)\s*=\s*\S|BEGIN [A-Z ]*PRIVATE KEY"
)
#: What a build stage may install and the final stage may not.
_BUILD = re.compile(
    r"(?<![\w+-])(gcc|g\+\+|clang|cmake|ninja-build|make|build-essential|(?:lib)?python3-dev)(?![\w+-])"
)
_ELSEWHERE = re.compile(r"(?<![\w+-])(git|curl|wget)(?![\w+-])")


@dataclass(frozen=True)
class Instruction:
    """One instruction; continuation lines are joined, flags (`--from=x`) are apart."""

    name: str
    value: str
    line: int
    flags: dict[str, str] = field(default_factory=dict)

    def words(self) -> list[str]:
        """The value as a list: JSON form, or words."""
        return json_form(self.value) or shlex.split(self.value)

    def pairs(self) -> dict[str, str]:
        """NAME=VALUE pairs of ENV, LABEL and ARG; an ARG without a default is ""."""
        return {k: v for k, _, v in (word.partition("=") for word in shlex.split(self.value))}


@dataclass
class Stage:
    """From one FROM to the next."""

    base: str
    name: str
    instructions: list[Instruction] = field(default_factory=list)

    def all(self, name: str) -> list[Instruction]:
        return [i for i in self.instructions if i.name == name]

    def last(self, name: str) -> Instruction | None:
        found = self.all(name)
        return found[-1] if found else None


def json_form(value: str) -> list[str]:
    """The strings of a value in exec form (a JSON list), [] for any other."""
    if not value.startswith("["):
        return []
    try:
        found = json.loads(value)
    except json.JSONDecodeError:
        return []
    return found if all(isinstance(word, str) for word in found) else []


def read(path: Path) -> list[Stage]:
    """The stages of a container file. Raises `ValueError` with the line for what is not understood."""
    return parse(path.read_text(encoding="utf-8"))


def parse(text: str) -> list[Stage]:
    stages: list[Stage] = []
    joined, start = "", 0
    for number, raw in enumerate([*text.splitlines(), ""], 1):
        line = raw.strip()
        if line.startswith("#") or (not line and not joined):
            continue
        start = start or number
        joined += line.removesuffix("\\").rstrip() + " "
        if line.endswith("\\"):
            continue
        name, _, rest = joined.strip().partition(" ")
        joined, at, start = "", start, 0
        name = name.upper()
        if name not in INSTRUCTIONS:
            raise ValueError(f"line {at}: {name} is not an instruction that the checks know")
        flags, value = _flags(rest.strip())
        if name == "FROM":
            base, _, alias = value.partition(" ")
            stages.append(Stage(base, alias.strip().removeprefix("AS ").removeprefix("as ").strip()))
        elif not stages:
            raise ValueError(f"line {at}: {name} before the first FROM")
        else:
            stages[-1].instructions.append(Instruction(name, value, at, flags))
    if not stages:
        raise ValueError("there is no FROM")
    return stages


def _flags(value: str) -> tuple[dict[str, str], str]:
    flags: dict[str, str] = {}
    while match := re.match(r"--([a-z-]+)=(\S+)\s+", value):
        flags[match[1]] = match[2]
        value = value[match.end() :]
    return flags, value


def problems(stages: list[Stage]) -> list[str]:
    """What breaks our rules: pinned bases, constraints, no root, no compiler, no secret, clean signals."""
    found = []
    names = {stage.name for stage in stages if stage.name}
    for stage in stages:
        if stage.base not in names:
            tag = stage.base.rpartition("@")[0] or stage.base
            version = tag.rpartition("/")[2].partition(":")[2]
            if not re.match(r"\d+\.\d+", version):
                found.append(
                    f"FROM {stage.base}: pin the base to a release (debian:12.11-slim), not a moving tag"
                )
        found += [f"line {i.line}: {p}" for i in stage.instructions for p in _instruction_problems(i)]
    return found + _final_problems(stages[-1])


def _instruction_problems(instruction: Instruction) -> list[str]:
    found, value = [], instruction.value
    if _SECRET.search(value):
        found.append("this looks like a secret: pass it at run time, as a mounted file")
    if instruction.name == "RUN":
        for command in re.split(r"&&|;|\|\|", value):
            if re.search(r"\bpip3? install\b", command) and "-c constraints.txt" not in command:
                found.append("pip installs without the constraints: add -c constraints.txt")
            if "apt-get install" in command:
                if "--no-install-recommends" not in command:
                    found.append("apt-get install brings recommended packages: add --no-install-recommends")
                if tools := _ELSEWHERE.findall(command):
                    found.append(f"{', '.join(sorted(set(tools)))} has no place in these images")
        if "apt-get update" in value and "rm -rf /var/lib/apt/lists" not in value:
            found.append("apt's package lists stay in the layer: remove /var/lib/apt/lists/*")
        if "--trusted-host" in value or "--index-url" in value or "http://" in value:
            found.append(
                "an index in a container file: it belongs into pip's settings where the image is built"
            )
    if instruction.name == "COPY" and {".", "./"} & set(instruction.words()[:-1]):
        found.append("COPY of the whole folder: name what the image needs")
    return found


def _final_problems(final: Stage) -> list[str]:
    found = []
    user = final.last("USER")
    uid = user.value.partition(":")[0] if user else "root"
    if not uid.isdecimal() or int(uid) < FIRST_USER_ID:
        found.append(f"the final stage runs as {uid}: give USER a fixed number of {FIRST_USER_ID} or more")
    elif user and any(i.name == "RUN" for i in final.instructions[final.instructions.index(user) :]):
        found.append("RUN after USER: what it writes belongs to the user who will run")
    for run in final.all("RUN"):
        if "apt-get install" in run.value and (tools := sorted(set(_BUILD.findall(run.value)))):
            found.append(f"line {run.line}: {', '.join(tools)} belongs into the build stage")
    if not any(i.flags.get("from") for i in final.all("COPY")):
        found.append("the final stage copies nothing from a build stage: it would carry pip and the sources")
    for name in ("ENTRYPOINT", "CMD", "HEALTHCHECK"):
        instruction = final.last(name)
        value = "" if instruction is None else instruction.value
        value = value.removeprefix("CMD ") if name == "HEALTHCHECK" else value
        if instruction is None:
            found.append(f"no {name}")
        elif not json_form(value):
            found.append(f"{name} in shell form, which swallows signals: write a JSON list")
    signal = final.last("STOPSIGNAL")
    if signal is None or signal.value != "SIGTERM":
        found.append("no STOPSIGNAL SIGTERM")
    for name in ("EXPOSE", "LABEL", "VOLUME"):
        if final.last(name) is None:
            found.append(f"no {name}")
    return found


__all__ = ["Instruction", "Stage", "json_form", "parse", "problems", "read"]
