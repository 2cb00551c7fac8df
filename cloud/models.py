"""Models on disk: files that operators pushed, and what they decided about them.

    STATE/models/SHA256.bt    a pushed cloud.bt, whole or absent (renamed into place)
    STATE/models/.push-*      a push that is under way
    STATE/models.json         versions, patterns, shares with their history, withdrawn versions

`models.json` is replaced as a whole after the files it names are on disk, and
before anybody is told: a process that is killed at any moment has lost nothing
that was answered. Only the holder of the state directory's lock writes here.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from blindtail.bundle import CloudBundle
from blindtail.errors import BlindtailError, BundleError, ConfigError
from blindtail.he.backends import write_atomically
from blindtail.he.spec import canonical_json
from blindtail.wire.cell import ModelHeader
from cloud.catalogue import Catalogue, Rule, Shares, Version

_log = logging.getLogger(__name__)
_FORMAT = 1
_PUSH = ".push-"
#: Left free on the disk by a push, for keys and logs.
_SPARE_BYTES = 64_000_000
_FULL = (errno.ENOSPC, errno.EDQUOT)


class ModelStore:
    """One cell's models below `root`. Methods that are not `async` block: call them on a thread."""

    def __init__(self, root: Path, backend: str) -> None:
        self._root, self._backend = root, backend
        self._folder, self._index = root / "models", root / "models.json"
        #: What the operator should know of the last `load`, one sentence each.
        self.notes: list[str] = []

    # -- at the start -------------------------------------------------------------

    def load(self, named: Sequence[CloudBundle]) -> Catalogue:
        """What was here when the cell ended, and the models `named` in the settings beside it.

        Only reads. A withdrawn version stays withdrawn, also when the settings name it. Raises
        `ConfigError` when the state is damaged, or contradicts the settings.
        """
        catalogue = self._read()
        for name, version in Catalogue.of(named, self._backend).versions.items():
            if name in catalogue.withdrawn:
                self.notes.append(
                    f"{' '.join(name)} is named in the settings, but an operator dropped it: it stays "
                    "withdrawn until it is pushed again"
                )
                continue
            old = catalogue.versions.get(name)
            if old is None:
                catalogue = catalogue.with_version(version)
            elif old.programs != version.programs:
                raise ConfigError(
                    f"{' '.join(name)} was pushed to this cell with other programs than the file in the "
                    "settings has: take that file out of the settings, or give it another version"
                )
        return self._without_lost_versions(catalogue)

    def tidy(self, catalogue: Catalogue) -> None:
        """At the start, once the directory is locked: removes pushes that broke off too."""
        for path in self._folder.glob(f"{_PUSH}*"):
            self.discard(path)
        if self._index.exists():  # else somebody took it away to repair: the files are wanted again
            self.clean(catalogue)

    def clean(self, catalogue: Catalogue) -> None:
        """Removes files of versions that are gone."""
        kept = {f"{version.sha256}.bt" for version in catalogue.versions.values() if version.pushed}
        for path in self._folder.glob("*.bt"):
            if path.name not in kept:
                self.discard(path)

    # -- changes ------------------------------------------------------------------

    def save(self, catalogue: Catalogue) -> None:
        """Replaces models.json. Raises `ConfigError` when the disk does not take it."""
        content = _to_json(catalogue)
        document = {**content, "sha256": hashlib.sha256(canonical_json(content)).hexdigest()}
        try:
            write_atomically(self._index, [json.dumps(document, indent=1).encode()])
            _sync(self._root)
        except OSError as error:
            raise self._no_room(error) from error

    async def receive(self, header: ModelHeader, pieces: AsyncIterator[bytes]) -> Path:
        """Takes a pushed file's bytes into a temporary file, which has the announced size and hash.

        Raises `ConfigError` (no room), `BundleError` (other bytes than announced).
        """
        file, path = await asyncio.to_thread(self._begin, header.total_bytes)
        digest, received = hashlib.sha256(), 0

        def write(piece: bytes) -> None:
            digest.update(piece)
            file.write(piece)

        def end() -> None:
            file.flush()
            os.fsync(file.fileno())

        try:
            async for piece in pieces:
                received += len(piece)
                if received > header.total_bytes:
                    raise BundleError(f"more than the announced {header.total_bytes} bytes were sent")
                await asyncio.to_thread(write, piece)
            if received != header.total_bytes:
                raise BundleError(f"{received} of {header.total_bytes} bytes arrived: push the file again")
            if digest.digest() != header.sha256:
                raise BundleError("what arrived does not have the announced SHA-256: push the file again")
            await asyncio.to_thread(end)
        except OSError as error:
            self.discard(path)
            raise self._no_room(error) from error
        except BaseException:
            self.discard(path)
            raise
        finally:
            file.close()
        return path

    def open(self, path: Path, sha256: str, allow: tuple[str, ...]) -> Version:
        """Checks a received file in full. Raises `BundleError`, in words fit for its sender."""
        try:
            bundle = CloudBundle.open(path)
        except BundleError as error:
            text = str(error).replace(str(path), path.name).replace(path.name, "the pushed file")
            raise BundleError(text) from error
        version = Version.of(bundle, self._backend)
        return replace(version, allow=allow, pushed=True, sha256=sha256, bytes=path.stat().st_size)

    def keep(self, path: Path, sha256: str) -> None:
        """Gives a received file its lasting name."""
        try:
            os.replace(path, self._folder / f"{sha256}.bt")
            _sync(self._folder)
        except OSError as error:
            raise self._no_room(error) from error

    def discard(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            _log.error("cannot remove a model's file: %s", error.strerror)

    # -- details ------------------------------------------------------------------

    def _begin(self, total_bytes: int) -> tuple[IO[bytes], Path]:
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            free_bytes = shutil.disk_usage(self._folder).free
            if free_bytes < total_bytes + _SPARE_BYTES:
                raise ConfigError(
                    f"the cell's disk has {free_bytes / 1e6:.0f} MB free, and this model needs "
                    f"{(total_bytes + _SPARE_BYTES) / 1e6:.0f}: drop a version, or give the cell more room"
                )
            handle, name = tempfile.mkstemp(prefix=_PUSH, dir=self._folder)
        except OSError as error:
            raise self._no_room(error) from error
        return os.fdopen(handle, "wb"), Path(name)

    def _no_room(self, error: OSError) -> ConfigError:
        _log.error("the models' directory cannot be written: %s", error.strerror)
        if error.errno in _FULL:
            return ConfigError("the cell's disk is full: drop a version, or give the cell more room")
        return ConfigError(f"the cell cannot write to its state directory ({error.strerror})")

    def _read(self) -> Catalogue:
        try:
            data = self._index.read_bytes()
        except FileNotFoundError:
            return Catalogue()
        except OSError as error:
            raise ConfigError(f"cannot read {self._index}: {error.strerror}") from error
        try:
            content = json.loads(data)
            expected = content.pop("sha256")
            if content["format"] != _FORMAT:
                raise ValueError(f"format {content['format']!r}, this release reads {_FORMAT}")
            if hashlib.sha256(canonical_json(content)).hexdigest() != expected:
                raise ValueError("its checksum does not fit")
            return self._from_json(content)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(
                f"{self._index} is damaged ({error}): put a copy of it back; or remove it, start the cell, "
                "and push its models again"
            ) from error

    def _from_json(self, content: Mapping[str, Any]) -> Catalogue:
        versions = {}
        for item in content["models"]:
            version = self._stored(str(item["sha256"]), tuple(str(p) for p in item["allow"]))
            if [version.model, version.version] != [item["model"], item["version"]]:
                raise ValueError("a file holds another model than it should")
            versions[version.name] = version
        withdrawn = {
            (str(item["model"]), str(item["version"])): tuple(map(str, item["programs"]))
            for item in content["withdrawn"]
        }
        shares = {
            str(model): Shares(_rules(item["rules"]), tuple(map(_rules, item["history"])))
            for model, item in content["shares"].items()
        }
        return Catalogue(versions, withdrawn, shares)

    def _without_lost_versions(self, catalogue: Catalogue) -> Catalogue:
        """Ends shares of versions that the settings named once, and name no more."""
        shares = dict(catalogue.shares)
        for model, found in catalogue.shares.items():
            for version in sorted(found.versions - set(catalogue.of_model(model))):
                self.notes.append(f"shares of {model} {version} end: the settings name it no more")
                found = found.without(version)
            shares[model] = found
        return replace(catalogue, shares=shares)

    def _stored(self, sha256: str, allow: tuple[str, ...]) -> Version:
        path = self._folder / f"{sha256}.bt"
        try:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            if digest != sha256:
                raise BundleError(f"{path.name}: its SHA-256 is {digest}")
            return self.open(path, sha256, allow)
        except (BlindtailError, OSError) as error:
            raise ConfigError(
                f"the pushed model {path} cannot be used ({error}): put its file back; or remove "
                f"{self._index}, start the cell, and push its models again"
            ) from error


def _to_json(catalogue: Catalogue) -> dict[str, Any]:
    def rules(listed: tuple[Rule, ...]) -> list[dict[str, Any]]:
        return [{"version": r.version, "share": r.share, "over": list(r.over)} for r in listed]

    return {
        "format": _FORMAT,
        "models": [
            {"model": v.model, "version": v.version, "sha256": v.sha256, "allow": list(v.allow)}
            for v in catalogue.versions.values()
            if v.pushed
        ],
        "withdrawn": [
            {"model": model, "version": version, "programs": list(programs)}
            for (model, version), programs in catalogue.withdrawn.items()
        ],
        "shares": {
            model: {"rules": rules(s.rules), "history": [rules(r) for r in s.history]}
            for model, s in catalogue.shares.items()
        },
    }


def _rules(listed: Any) -> tuple[Rule, ...]:
    found = []
    for item in listed:
        share = float(item["share"])
        if not 0 < share <= 1:
            raise ValueError("a share is not between 0 and 1")
        found.append(Rule(str(item["version"]), share, tuple(str(v) for v in item["over"])))
    return tuple(found)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


__all__ = ["ModelStore"]
