"""A device's keys on disk: one directory per program, private to its owner.

    <state_dir>/<first 16 hex digits of the program id>/   mode 0700
        secret.key        mode 0600; never leaves the device
        evaluation.keys   the container that is uploaded
        keys.json         hash and size of both: written last, so it means "complete"
        lock              held by the one process that makes or uploads keys
        damaged-N/        what was found damaged, moved aside

Several runtimes of one device share a directory, and with it one key set.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from blindtail.errors import ConfigError, ContainerError
from blindtail.he.spec import TailSpec

_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class KeySet:
    """A complete, undamaged key set: where it lies, and the evaluation keys' SHA-256 and size."""

    secret: Path
    evaluation: Path
    sha256: bytes
    bytes: int


class KeyFiles:
    """The key directory of one program. `backend` other than "seal" gets a directory of its own."""

    def __init__(self, state_dir: Path, spec: TailSpec, backend: str = "seal") -> None:
        suffix = "" if backend == "seal" else f"-{backend}"
        self.directory = state_dir / (spec.program_id[:16] + suffix)
        self.secret = self.directory / "secret.key"
        self.evaluation = self.directory / "evaluation.keys"
        self._manifest = self.directory / "keys.json"
        self._spec = spec

    def prepare(self) -> None:
        """Makes the directory, mode 0700. Raises `ConfigError` when that is impossible."""
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.directory.chmod(0o700)
        except OSError as error:
            raise ConfigError(
                f"the state directory {self.directory} cannot be used ({error.strerror}): "
                "choose another with state_dir"
            ) from error

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Waits for, then holds, the directory's lock; the system frees it if the holder dies."""
        handle = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def find(self) -> KeySet | None:
        """The key set, or None when there is none yet. Raises `ContainerError` when it is damaged."""
        try:
            stated = json.loads(self._manifest.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise ContainerError("the list of this device's keys is damaged: they are made again") from error
        try:
            keys, found = self._measure()
        except OSError as error:
            raise ContainerError("a key file of this device is missing: keys are made again") from error
        if stated != found:
            raise ContainerError("a key file of this device is damaged: keys are made again")
        return keys

    def complete(self) -> KeySet:
        """Declares the two files in place a key set; called after both are written."""
        keys, stated = self._measure()
        part = self._manifest.with_name("keys.json.part")
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "w") as file:
            json.dump(stated, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self._manifest)
        return keys

    def _measure(self) -> tuple[KeySet, dict[str, object]]:
        """The files as they are, and what the manifest of such files says."""
        keys = KeySet(self.secret, self.evaluation, _sha256(self.evaluation), self.evaluation.stat().st_size)
        return keys, {
            "program_id": self._spec.program_id,
            "bytes": keys.bytes,
            "sha256": keys.sha256.hex(),
            "secret_sha256": _sha256(self.secret).hex(),
        }

    def set_aside(self) -> None:
        """Moves whatever is there into `damaged-N`, so that new keys can be made."""
        present = [p for p in (self._manifest, self.secret, self.evaluation) if p.exists()]
        if not present:
            return
        number = 1
        while (target := self.directory / f"damaged-{number}").exists():
            number += 1
        target.mkdir(mode=0o700)
        for path in present:
            path.replace(target / path.name)

    def discard_partial(self) -> None:
        """Removes what an interrupted generation left: files without a manifest."""
        for path in (self.secret, self.evaluation):
            path.unlink(missing_ok=True)


def default_state_dir() -> Path:
    """$XDG_STATE_HOME/blindtail, or ~/.local/state/blindtail."""
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "blindtail"


def _sha256(path: Path) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)  # lets other threads run
    return digest.digest()
