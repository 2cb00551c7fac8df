"""The models of a cell: which program answers which request, and for whom.

Holds one `Catalogue` at a time and tables made of it. Lives on the gateway's
loop: a lookup sees the old catalogue or the new one, never a mixture.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from blindtail.bundle import CloudBundle
from blindtail.errors import AccessDenied, BundleError, ModelWithdrawn, ProgramMismatch
from blindtail.he.backends import settle
from blindtail.he.program import Program
from blindtail.identity import Identity, allowed
from cloud.catalogue import Catalogue, Entry, Version, container_bytes


@dataclass(frozen=True, slots=True)
class Serving:
    """Who answers: a program under the id that an edge encrypted for.

    `name` is what evaluators know it by: the program's id, or "EDGE'S-ID:OWN-ID"
    when it stands in for another version's.
    """

    name: str
    version: str


def draw(model: str, version: str, request_id: bytes) -> float:
    """A number in [0, 1) that belongs to a request for good; independent for every canary."""
    digest = hashlib.sha256(f"{model}\0{version}\0".encode() + request_id).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / (1 << 53)


class Registry:
    """What is served now. Raises `ConfigError` when two of the `bundles` contradict each other."""

    def __init__(self, bundles: Iterable[CloudBundle] = (), backend: str = "auto") -> None:
        self.largest_container_bytes = 0
        self.adopt(Catalogue.of(bundles, settle(backend)))

    def adopt(self, catalogue: Catalogue) -> None:
        """From now on this is served."""
        self.catalogue = catalogue
        self._by_program: dict[str, list[Version]] = {}
        self._servings: dict[str, Serving] = {}
        self._programs: dict[str, Program] = {}
        # (model, version, program id) -> (share, who gets it), in the order they are asked.
        self._canaries: dict[tuple[str, str, str], list[tuple[float, Serving]]] = {}
        for version in catalogue.versions.values():
            for program_id, entry in version.entries.items():
                if entry.keys_id == program_id:  # later segments have neither keys nor sessions of their own
                    self._by_program.setdefault(program_id, []).append(version)
                self._add(program_id, entry)
        for model in {m for m, _ in catalogue.versions}:
            self._add_canaries(model)
        # Never falls: edges of a version that was dropped shall hear that, not that they send too much.
        largest = max((entry.container_bytes for entry in self.entries), default=0)
        self.largest_container_bytes = max(largest, self.largest_container_bytes)

    def _add(self, name: str, entry: Entry) -> Serving:
        self._programs.setdefault(name, entry.program)
        return self._servings.setdefault(name, Serving(name, entry.version))

    def _add_canaries(self, model: str) -> None:
        versions = self.catalogue.of_model(model)
        for rule in self.catalogue.rules(model):
            for over in rule.over:
                for entry in versions[over].entries.values():
                    own = versions[rule.version].counterpart(entry, versions[over])
                    if own is None:
                        continue
                    name = own.program_id
                    if name != entry.program_id:
                        name = f"{entry.program_id}:{name}"
                    self._add(name, own)
                    serving = Serving(name, own.version)
                    self._canaries.setdefault((model, over, entry.program_id), []).append(
                        (rule.share, serving)
                    )

    @property
    def programs(self) -> dict[str, Program]:
        """What evaluators must hold: name of a serving -> program."""
        return dict(self._programs)

    @property
    def entries(self) -> Sequence[Entry]:
        return [entry for version in self.catalogue.versions.values() for entry in version.entries.values()]

    @property
    def models(self) -> list[tuple[str, str]]:
        """(model, version) of everything served."""
        return list(self.catalogue.versions)

    def program(self, name: str) -> Program | None:
        """Of a serving, by name; None for one that is served no more."""
        return self._programs.get(name)

    def find(self, model: str, version: str, program_id: str) -> Entry:
        """Raises `ModelWithdrawn` or `ProgramMismatch` with both sides' versions and what to do."""
        found = self.catalogue.versions.get((model, version))
        if found is None:
            raise self._unknown(model, version)
        entry = found.entries.get(program_id)
        if entry is None or entry.keys_id != program_id:
            held = ", ".join(e.program_id[:12] for e in found.entries.values() if e.keys_id == e.program_id)
            raise ProgramMismatch(
                f"edge and cloud both hold {model!r} version {version}, but the edge's tail is program "
                f"{program_id[:12]} and the cloud's is {held}: pack the model again and give both files out"
            )
        return entry

    def segment(self, lead: Entry, program_id: str) -> Entry:
        """The program that a request of a session means: the session's own, or a later segment of its tail.

        Raises `ProgramMismatch` for any other.
        """
        if program_id in ("", lead.program_id):
            return lead
        found = self.catalogue.versions[lead.model, lead.version].entries.get(program_id)
        if found is None or found.keys_id != lead.program_id:
            raise ProgramMismatch(
                f"program {program_id[:12]} is no segment of this session's tail: use the edge.bt and "
                "cloud.bt of one version"
            )
        return found

    def _unknown(self, model: str, version: str) -> ProgramMismatch:
        here = sorted(self.catalogue.of_model(model))
        if (model, version) in self.catalogue.withdrawn:
            instead = f"version {', '.join(here)} is served instead" if here else "no other version is served"
            return ModelWithdrawn(
                f"the cloud's operator has withdrawn {model!r} version {version}; {instead}. The device goes "
                "on answering from its exits: give it the edge.bt of a version that is served"
            )
        if here:
            return ProgramMismatch(
                f"the edge holds {model!r} version {version}, the cloud holds version {', '.join(here)}: "
                "give both sides the edge.bt and cloud.bt of one packing"
            )
        known = ", ".join(sorted({m for m, _ in self.catalogue.versions}))
        if not known:
            return ProgramMismatch(
                f"the cloud does not serve model {model!r}, nor any other yet: its operator pushes one with "
                "`blindtail model push cloud.bt`"
            )
        return ProgramMismatch(
            f"the cloud does not serve model {model!r} (it serves {known}): load its cloud.bt there, "
            "or dial a cell that has it"
        )

    def by_program(self, program_id: str) -> Entry:
        """Raises `ModelWithdrawn` or `ProgramMismatch` when no model here has this program."""
        versions = self._by_program.get(program_id)
        if versions is not None:
            return versions[0].entries[program_id]
        for (model, version), programs in self.catalogue.withdrawn.items():
            if program_id in programs:
                raise self._unknown(model, version)
        raise ProgramMismatch(
            f"the cloud holds no program {program_id[:12]}: register first, it says what is held instead"
        )

    # -- who may, and who answers -----------------------------------------------------

    def admit(self, identity: str, model: str, version: str) -> None:
        """Raises `AccessDenied` unless the version is for this identity."""
        found = self.catalogue.versions.get((model, version))
        if found is not None and not allowed(Identity(None, identity), found.allow):
            raise AccessDenied(
                f"{model!r} version {version} is not for {identity}: ask the cloud's operator to push it "
                "with an --allow pattern that matches"
            )

    def admit_to_program(self, identity: str, program_id: str) -> Entry:
        """As `admit`, for calls that name a program alone: some version that has it must be allowed."""
        entry = self.by_program(program_id)
        versions = self._by_program[program_id]
        if not any(allowed(Identity(None, identity), version.allow) for version in versions):
            self.admit(identity, versions[0].model, versions[0].version)
        return entry

    def answers_itself(self, entry: Entry) -> bool:
        """False when another version's program answers all requests of an edge that holds `entry`."""
        canaries = self._canaries.get((entry.model, entry.version, entry.program_id), ())
        return not any(share >= 1 and serving.name != entry.program_id for share, serving in canaries)

    def route(self, entry: Entry, request_id: bytes) -> Serving:
        """Who answers this request of an edge that holds `entry`. The same id gets the same answer
        as long as shares stay as they are."""
        for share, serving in self._canaries.get((entry.model, entry.version, entry.program_id), ()):
            if draw(entry.model, serving.version, request_id) < share:
                return serving
        return Serving(entry.program_id, entry.version)


def open_bundles(paths: Sequence[Path]) -> list[CloudBundle]:
    """Raises `BundleError` naming the file."""
    bundles = []
    for path in paths:
        if not path.is_file():
            raise BundleError(f"there is no file {path}: give the path of a cloud.bt")
        bundles.append(CloudBundle.open(path))
    return bundles


__all__ = ["Entry", "Registry", "Serving", "container_bytes", "draw", "open_bundles"]
