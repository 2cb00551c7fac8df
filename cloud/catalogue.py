"""What a cell serves, as one value that is replaced as a whole: versions, shares, what was withdrawn.

A *compatible* version can answer what was encrypted for another version's edges
(`blindtail.he.compatible`). Which share of those requests it gets is a `Rule`.
Every change makes a new `Catalogue` or raises `ConfigError`; nothing here reads
a disk, waits, or knows evaluators.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from blindtail.bundle import CloudBundle
from blindtail.errors import ConfigError
from blindtail.he.compatible import differences
from blindtail.he.container import HEADER_BYTES
from blindtail.he.program import Program
from blindtail.he.spec import TailSpec

#: Changes of a model's shares that can be undone; versions that are remembered as withdrawn.
MOST_HISTORY, MOST_WITHDRAWN = 16, 1000

Name = tuple[str, str]  # model, version


def container_bytes(spec: TailSpec, backend: str) -> int:
    """Exact size of the container that a backend accepts for evaluation."""
    if backend != "clear":
        return spec.uplink_bytes
    complex_slots = spec.input_layout.imaginary is not None
    return HEADER_BYTES + (16 if complex_slots else 8) * spec.input_layout.slots


@dataclass(frozen=True, eq=False)
class Entry:
    """One program of one model's version, with the sizes that its bytes must have.

    A refreshed tail has one for each segment; keys are those of its first.
    """

    model: str
    version: str
    cut: int
    program: Program
    container_bytes: int
    key_bytes: int

    @property
    def place(self) -> tuple[int, int]:
        """Its cut, and which of the tail's segments it is."""
        segment = self.program.spec.segment
        return self.cut, 0 if segment is None else segment.index

    @property
    def program_id(self) -> str:
        return self.program.spec.program_id

    @property
    def keys_id(self) -> str:
        """The program id under which its keys are uploaded and kept, and sessions are opened."""
        return self.program.spec.keys_id


@dataclass(frozen=True, eq=False)
class Version:
    """One version of a model. `entries` by program id.

    allow   patterns of identities that may use it; empty = every edge
    pushed  by an operator, so that the file with this `sha256` (hex) is in the cell's state
    """

    model: str
    version: str
    entries: Mapping[str, Entry]
    allow: tuple[str, ...] = ()
    pushed: bool = False
    sha256: str = ""
    bytes: int = 0

    @classmethod
    def of(cls, bundle: CloudBundle, backend: str) -> Version:
        """With the sizes of every program."""
        entries = {}
        listed = [(cut, program) for cut in sorted(bundle.programs) for program in bundle.segments(cut)]
        for cut, program in listed:
            spec = program.spec
            entries[spec.program_id] = Entry(
                bundle.model,
                bundle.version,
                cut,
                program,
                container_bytes(spec, backend),
                spec.key_bytes,
            )
        return cls(bundle.model, bundle.version, MappingProxyType(entries))

    @property
    def name(self) -> Name:
        return self.model, self.version

    @property
    def programs(self) -> tuple[str, ...]:
        return tuple(self.entries)

    def counterpart(self, entry: Entry, other: Version) -> Entry | None:
        """The program here that can answer for `entry` of the other version: same cut, same for an edge.

        A refreshed tail is answered whole or not at all: None where another of its segments has none.
        """
        segments = [e for e in other.entries.values() if e.keys_id == entry.keys_id]
        found = {e.program_id: self._same(e) for e in segments}
        return found[entry.program_id] if all(found.values()) else None

    def _same(self, entry: Entry) -> Entry | None:
        for own in self.entries.values():
            if own.cut == entry.cut and not differences(own.program.spec, entry.program.spec):
                return own
        return None

    def answers_for(self, other: Version) -> bool:
        """True when it can answer some of the other version's edges."""
        return any(self.counterpart(entry, other) is not None for entry in other.entries.values())


@dataclass(frozen=True, slots=True)
class Rule:
    """`version` answers `share` (above 0, up to 1) of the requests of the versions `over`."""

    version: str
    share: float
    over: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Shares:
    """Of one model: rules in force, the newest first, and those before each change, the oldest first."""

    rules: tuple[Rule, ...] = ()
    history: tuple[tuple[Rule, ...], ...] = ()

    @property
    def versions(self) -> set[str]:
        """All that are named in them."""
        states = (self.rules, *self.history)
        return {v for rules in states for rule in rules for v in (rule.version, *rule.over)}

    def changed(self, rules: tuple[Rule, ...]) -> Shares:
        return Shares(rules, (*self.history, self.rules)[-MOST_HISTORY:])

    def without(self, version: str) -> Shares:
        """Forgets a version, in the history too; changes that become none are dropped from it."""

        def cleaned(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
            kept = (
                replace(rule, over=tuple(v for v in rule.over if v != version))
                for rule in rules
                if rule.version != version
            )
            return tuple(rule for rule in kept if rule.over)

        states = [cleaned(rules) for rules in (*self.history, self.rules)]
        distinct = [rules for i, rules in enumerate(states) if i == 0 or rules != states[i - 1]]
        return Shares(distinct[-1], tuple(distinct[:-1]))


@dataclass(frozen=True, eq=False)
class Catalogue:
    """Immutable. `withdrawn`: versions that an operator dropped, with their program ids."""

    versions: Mapping[Name, Version] = field(default_factory=dict)
    withdrawn: Mapping[Name, tuple[str, ...]] = field(default_factory=dict)
    shares: Mapping[str, Shares] = field(default_factory=dict)

    @classmethod
    def of(cls, bundles: Iterable[CloudBundle], backend: str) -> Catalogue:
        """Raises `ConfigError` when two of them have one name."""
        versions: dict[Name, Version] = {}
        for bundle in bundles:
            if (bundle.model, bundle.version) in versions:
                raise ConfigError(
                    f"model {bundle.model!r}, version {bundle.version!r} is given twice: "
                    "name each cloud.bt once"
                )
            versions[bundle.model, bundle.version] = Version.of(bundle, backend)
        return cls(versions)

    def of_model(self, model: str) -> dict[str, Version]:
        return {v: found for (m, v), found in self.versions.items() if m == model}

    def rules(self, model: str) -> tuple[Rule, ...]:
        return self.shares.get(model, Shares()).rules

    def share_of(self, version: Version) -> float:
        """Of its model's other versions' requests, what this one answers too; 0 = its own edges' alone."""
        return next((r.share for r in self.rules(version.model) if r.version == version.version), 0.0)

    @property
    def program_ids(self) -> set[str]:
        return {program_id for version in self.versions.values() for program_id in version.entries}

    def compatible_with(self, version: Version) -> list[str]:
        """The model's other versions whose edges this one can answer."""
        others = self.of_model(version.model)
        return [v for v, other in others.items() if v != version.version and version.answers_for(other)]

    # -- changes: each gives a new catalogue, or itself when nothing changes ------------

    def with_version(self, new: Version) -> Catalogue:
        """Adds a version, or gives one that is here with the same content its new `allow` and file.

        Raises `ConfigError` when another content has this name.
        """
        old = self.versions.get(new.name)
        if old is not None and set(old.entries) != set(new.entries):
            raise ConfigError(
                f"{new.model} {new.version} is here already, with other programs: give the new one another "
                "version, or drop the old one first"
            )
        if old is not None:
            if (old.allow, old.pushed, old.sha256) == (new.allow, new.pushed, new.sha256):
                return self
            new = replace(new, entries=old.entries)
        withdrawn = {name: ids for name, ids in self.withdrawn.items() if name != new.name}
        return replace(self, versions={**self.versions, new.name: new}, withdrawn=withdrawn)

    def with_share(self, model: str, version: str, share: float) -> Catalogue:
        """`version` answers `share` of the requests that it can answer, of versions here now; 0 ends that."""
        if not (math.isfinite(share) and 0 <= share <= 1):
            raise ConfigError(f"a share is a number from 0 to 1, not {share}")
        canary = self._existing(model, version)
        shares = self.shares.get(model, Shares())
        others = tuple(rule for rule in shares.rules if rule.version != version)
        if share > 0:
            over = tuple(self.compatible_with(canary))
            if not over:
                raise ConfigError(self._why_nothing_to_share(canary))
            # Whoever is given others' requests answers its own edges, whatever was said before.
            older = (replace(rule, over=tuple(v for v in rule.over if v != version)) for rule in others)
            others = (Rule(version, share, over), *older)
        rules = _effective(others)
        if rules == shares.rules:
            return self
        return replace(self, shares={**self.shares, model: shares.changed(rules)})

    def rolled_back(self, model: str) -> Catalogue:
        """Undoes the last change of the model's shares."""
        if not self.of_model(model):
            raise ConfigError(self._no_model(model))
        shares = self.shares.get(model, Shares())
        if not shares.history:
            raise ConfigError(
                f"nothing to roll back: the shares of {model} have not been changed, or all of the last "
                f"{MOST_HISTORY} changes have been undone"
            )
        undone = Shares(shares.history[-1], shares.history[:-1])
        return replace(self, shares={**self.shares, model: undone})

    def without(self, model: str, version: str) -> Catalogue:
        """Withdraws a version. Raises `ConfigError` while a canary depends on it."""
        dropped = self._existing(model, version)
        for rule in self.rules(model):
            if rule.version == version:
                raise ConfigError(
                    f"{model} {version} answers a share of {rule.share:g} of version {_listed(rule.over)}'s "
                    f"requests: roll back, or set its share to 0, then drop it"
                )
            if version in rule.over and rule.share < 1:
                raise ConfigError(
                    f"{model} {version} answers what the canary {rule.version} (share {rule.share:g}) does "
                    "not: set the canary's share to 1 or to 0, then drop this version"
                )
        versions = {name: v for name, v in self.versions.items() if name != dropped.name}
        withdrawn = [*((n, p) for n, p in self.withdrawn.items() if n != dropped.name)]
        withdrawn.append((dropped.name, dropped.programs))
        shares = {m: s.without(version) if m == model else s for m, s in self.shares.items()}
        return Catalogue(
            versions, dict(withdrawn[-MOST_WITHDRAWN:]), {m: s for m, s in shares.items() if s != Shares()}
        )

    # -- messages -----------------------------------------------------------------------

    def _existing(self, model: str, version: str) -> Version:
        found = self.versions.get((model, version))
        if found is None:
            here = self.of_model(model)
            if not here:
                raise ConfigError(self._no_model(model))
            raise ConfigError(f"this cell has no {model} {version}; it has {_listed(here)}")
        return found

    def _no_model(self, model: str) -> str:
        known = sorted({m for m, _ in self.versions})
        has = f"it has {_listed(known)}" if known else "it has none: push one with `blindtail model push`"
        return f"this cell has no model {model}; {has}"

    def _why_nothing_to_share(self, canary: Version) -> str:
        others = [v for v in self.of_model(canary.model).values() if v is not canary]
        if not others:
            return (
                f"{canary.model} {canary.version} is the only version here and answers all of its own edges: "
                "push the version first whose requests it should share"
            )
        reasons = "; ".join(f"from {other.version} in {_difference(canary, other)}" for other in others)
        return (
            f"{canary.model} {canary.version} cannot answer for edges of another version, since it differs "
            f"{reasons}: compile it for the older edge.bt (`like`), or hand out its own edge.bt; until then "
            "the versions are served side by side"
        )


def _effective(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Without what newer rules of share 1 leave nothing for."""
    taken: set[str] = set()
    kept = []
    for rule in rules:
        over = tuple(v for v in rule.over if v not in taken)
        if over:
            kept.append(replace(rule, over=over))
        if rule.share == 1:
            taken.update(over)
    return tuple(kept)


def _difference(one: Version, other: Version) -> str:
    """Fields in which two versions differ for an edge, of the first tail that both have, or its segment."""
    for entry in other.entries.values():
        for own in one.entries.values():
            if own.place == entry.place and (found := differences(own.program.spec, entry.program.spec)):
                return _listed(found)
    return "their cuts"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


__all__ = [
    "MOST_HISTORY",
    "MOST_WITHDRAWN",
    "Catalogue",
    "Entry",
    "Name",
    "Rule",
    "Shares",
    "Version",
    "container_bytes",
]
