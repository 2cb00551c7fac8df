"""The models of a cell: which programs it holds, by name, version and program id."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from blindtail.bundle import CloudBundle
from blindtail.errors import BundleError, ConfigError, ProgramMismatch
from blindtail.he.container import HEADER_BYTES
from blindtail.he.program import Program
from blindtail.he.spec import TailSpec


def container_bytes(spec: TailSpec, backend: str) -> int:
    """Exact size of the container that a backend accepts for evaluation."""
    return HEADER_BYTES + 8 * spec.parameters.slots if backend == "clear" else spec.uplink_bytes


@dataclass(frozen=True)
class Entry:
    """One program of one model's version, with the sizes that its bytes must have."""

    model: str
    version: str
    cut: int
    program: Program
    container_bytes: int
    key_bytes: int

    @property
    def program_id(self) -> str:
        return self.program.spec.program_id


class Registry:
    """Immutable after construction. Raises `ConfigError` when two files contradict each other."""

    def __init__(self, bundles: Iterable[CloudBundle], backend: str) -> None:
        self._versions: dict[tuple[str, str], dict[str, Entry]] = {}
        self._programs: dict[str, Entry] = {}
        for bundle in bundles:
            name = (bundle.model, bundle.version)
            if name in self._versions:
                raise ConfigError(
                    f"model {bundle.model!r}, version {bundle.version!r} is given twice: "
                    "name each cloud.bt once"
                )
            self._versions[name] = {}
            for cut, program in bundle.programs.items():
                spec = program.spec
                entry = Entry(
                    bundle.model, bundle.version, cut, program, container_bytes(spec, backend), spec.key_bytes
                )
                self._versions[name][entry.program_id] = entry
                self._programs.setdefault(entry.program_id, entry)
        if not self._programs:
            raise ConfigError("a cell needs at least one cloud.bt to serve")

    @property
    def programs(self) -> dict[str, Program]:
        """Program id -> program."""
        return {program_id: entry.program for program_id, entry in self._programs.items()}

    @property
    def entries(self) -> Sequence[Entry]:
        return [entry for entries in self._versions.values() for entry in entries.values()]

    @property
    def models(self) -> list[tuple[str, str]]:
        """(model, version) of everything served."""
        return list(self._versions)

    @property
    def largest_container_bytes(self) -> int:
        return max(entry.container_bytes for entry in self._programs.values())

    def find(self, model: str, version: str, program_id: str) -> Entry:
        """Raises `ProgramMismatch` with both sides' versions and what to do."""
        here = sorted(v for m, v in self._versions if m == model)
        if not here:
            known = ", ".join(sorted({m for m, _ in self._versions}))
            raise ProgramMismatch(
                f"the cloud does not serve model {model!r} (it serves {known}): load its cloud.bt there, "
                "or dial a cell that has it"
            )
        entries = self._versions.get((model, version))
        if entries is None:
            raise ProgramMismatch(
                f"the edge holds {model!r} version {version}, the cloud holds version {', '.join(here)}: "
                "give both sides the edge.bt and cloud.bt of one packing"
            )
        entry = entries.get(program_id)
        if entry is None:
            held = ", ".join(known_id[:12] for known_id in entries)
            raise ProgramMismatch(
                f"edge and cloud both hold {model!r} version {version}, but the edge's tail is program "
                f"{program_id[:12]} and the cloud's is {held}: pack the model again and give both files out"
            )
        return entry

    def by_program(self, program_id: str) -> Entry:
        """Raises `ProgramMismatch` when no model here has this program."""
        entry = self._programs.get(program_id)
        if entry is None:
            raise ProgramMismatch(
                f"the cloud holds no program {program_id[:12]}: register first, it says what is held instead"
            )
        return entry


def open_bundles(paths: Sequence[Path]) -> list[CloudBundle]:
    """Raises `BundleError` naming the file, `ConfigError` when there is none."""
    if not paths:
        raise ConfigError("name at least one cloud.bt to serve")
    bundles = []
    for path in paths:
        if not path.is_file():
            raise BundleError(f"there is no file {path}: give the path of a cloud.bt")
        bundles.append(CloudBundle.open(path))
    return bundles


__all__ = ["Entry", "Registry", "container_bytes", "open_bundles"]
