"""Where a cell's evaluation keys lie on disk, and programs in the forms that its processes read.

    STATE/lock                   held while a cell runs on this directory
    STATE/programs/ID.bt         what the checking process needs of a program
    STATE/BACKEND/partial/NAME   bytes that have arrived, in order; resumable
    STATE/BACKEND/ready/NAME     prepared keys: whole or absent (renamed into place)
    STATE/BACKEND/raw/NAME       the container that they were made of, for other cells
    STATE/BACKEND/encoded/ID.*   a program's weights as evaluators map them: `blindtail.he.encoded`

A NAME is 64 hexadecimal digits: 16 of the program's id, then 48 of a hash over
(identity, program, SHA-256 of the container). So the files of a program can be
told, and nobody reaches another's keys, not even by knowing their hash.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from blindtail.bundle import save_program
from blindtail.errors import BlindtailError, ConfigError
from blindtail.he import encoded
from cloud.registry import Entry

_log = logging.getLogger(__name__)
_PROGRAM_DIGITS, _NAME_DIGITS = 16, 64
_ENCODED = "encoded"
#: A file of encoded weights takes seconds to write.
_ABANDONED_S = 600.0


def program_path(root: Path, program_id: str) -> Path:
    """Where evaluators and checks find one program below the state directory `root`."""
    return root / "programs" / f"{program_id}.bt"


def encoded_folder(root: Path, backend: str) -> Path:
    """Where evaluators share encoded weights, below the state directory `root`."""
    return root / backend / _ENCODED


@dataclass(frozen=True)
class Found:
    """What an earlier run left: whole key sets, least recently used first, and partial uploads."""

    ready: dict[str, int]  # name -> bytes, container included
    partial: dict[str, int]  # name -> bytes that have arrived


class KeyFolder:
    """One state directory, locked. Raises `ConfigError` when it cannot be used."""

    def __init__(self, root: Path, backend: str, entries: Iterable[Entry]) -> None:
        self._root = root
        self._programs = root / "programs"
        self._partial, self._ready, self._raw = (root / backend / n for n in ("partial", "ready", "raw"))
        self._encoded = encoded_folder(root, backend)
        self._lock = self._open()
        try:
            for entry in entries:
                self.add_program(entry)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        self._lock.close()

    # -- names ---------------------------------------------------------------------

    @staticmethod
    def name(identity: str, program_id: str, sha256: bytes) -> str:
        digest = hashlib.sha256(b"blindtail-keys-2")
        for part in (identity.encode(), program_id.encode(), sha256):
            digest.update(len(part).to_bytes(8, "little") + part)
        return program_id[:_PROGRAM_DIGITS] + digest.hexdigest()[: _NAME_DIGITS - _PROGRAM_DIGITS]

    @staticmethod
    def is_of(name: str, program_id: str) -> bool:
        """True for the keys of a program, whoever they belong to."""
        return name.startswith(program_id[:_PROGRAM_DIGITS])

    def program(self, program_id: str) -> Path:
        return program_path(self._root, program_id)

    def partial(self, name: str) -> Path:
        return self._partial / name

    def ready(self, name: str) -> Path:
        return self._ready / name

    def raw(self, name: str) -> Path:
        return self._raw / name

    # -- files -----------------------------------------------------------------------

    def add_program(self, entry: Entry) -> None:
        """Raises `ConfigError` when the directory cannot be written."""
        try:
            save_program(self.program(entry.program_id), entry.program)
        except (OSError, BlindtailError) as error:
            raise ConfigError(f"cannot write to the state directory {self._root}: {error}") from error

    def drop_program(self, program_id: str) -> None:
        """Evaluators that map its weights keep them until they unload it."""
        _unlink(self.program(program_id))
        for path in self._root.glob(f"*/{_ENCODED}/{program_id}.*"):  # another backend's too
            _unlink(path)

    def tidy(self, program_ids: Collection[str], *, starting: bool = False) -> None:
        """Removes encoded weights of other programs and formats than evaluators here may ask for.

        starting  files that nobody finished writing too: no evaluator of this cell runs yet.
                  Later those go that nobody has written to for long: whoever began them is gone
        """
        for path in self._root.glob(f"*/{_ENCODED}/*"):
            of = encoded.program_of(path.name)
            unfinished = of is None and path.name.startswith(".")
            if unfinished and not starting:
                with contextlib.suppress(OSError):
                    unfinished = time.time() - path.stat().st_mtime < _ABANDONED_S
            if of not in program_ids and (starting or not unfinished):
                _unlink(path)

    def keep(self, name: str) -> int:
        """The check has passed: the upload becomes the container kept beside the prepared keys.

        Returns the bytes of both. Raises `OSError`.
        """
        os.replace(self.partial(name), self.raw(name))
        return self.ready(name).stat().st_size + self.raw(name).stat().st_size

    def drop_ready(self, name: str) -> None:
        _unlink(self.ready(name))
        _unlink(self.raw(name))

    def drop_partial(self, name: str) -> None:
        _unlink(self.partial(name))

    def scan(self) -> Found:
        """Takes over what is whole and removes the rest. Raises `ConfigError`."""
        try:
            return self._scan()
        except OSError as error:
            raise ConfigError(f"cannot use the state directory {self._root}: {error.strerror}") from error

    def _scan(self) -> Found:
        ready: dict[str, int] = {}
        for path in sorted(self._ready.iterdir(), key=lambda p: p.stat().st_mtime):
            if len(path.name) != _NAME_DIGITS:  # a temporary file of a check that died
                _unlink(path)
                continue
            if self.partial(path.name).exists():  # the cell died between the check and its `keep`
                os.replace(self.partial(path.name), self.raw(path.name))
            raw = self.raw(path.name)
            ready[path.name] = path.stat().st_size + (raw.stat().st_size if raw.exists() else 0)
        for path in self._raw.iterdir():
            if path.name not in ready:
                _unlink(path)
        return Found(ready, {path.name: path.stat().st_size for path in self._partial.iterdir()})

    def _open(self) -> IO[bytes]:
        root = self._root
        try:
            for folder in (root, self._programs, self._partial, self._ready, self._raw, self._encoded):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = open(root / "lock", "wb")  # noqa: SIM115
        except OSError as error:
            raise ConfigError(
                f"cannot use the state directory {root}: {error.strerror}; name another with --state-dir"
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            raise ConfigError(
                f"another cell runs on the state directory {root}: stop it, or name another with --state-dir"
            ) from error
        return lock


def write_at(path: Path, offset: int, piece: bytes) -> None:
    """Puts `piece` at `offset`, whatever a write that was cut short left behind it."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        os.ftruncate(handle, offset)
        view = memoryview(piece)
        while view:
            written = os.pwrite(handle, view, offset)
            offset += written
            view = view[written:]
    finally:
        os.close(handle)


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        _log.error("cannot remove a file of the key store: %s", error.strerror)


__all__ = ["Found", "KeyFolder", "encoded_folder", "program_path", "write_at"]
