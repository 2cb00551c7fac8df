"""Evaluation keys on disk: uploaded in parts, checked aside, kept within a budget.

A key set is named by a hash over (identity, program, SHA-256 of the container):
nobody reaches another's keys, not even by knowing their hash. Layout:

    STATE/lock                   held while a cell runs on this directory
    STATE/programs/ID.bt         what the checking process needs of a program
    STATE/BACKEND/partial/NAME   bytes that have arrived, in order; resumable
    STATE/BACKEND/ready/NAME     prepared keys: whole or absent (renamed into place)

Everything here runs on the gateway's loop, except file writes and checks, which
run on threads; a check itself is a child process. Files survive restarts. The
least recently used go first when the budget is full; keys in use stay.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import logging
import os
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from blindtail.bundle import CloudBundle
from blindtail.errors import (
    BlindtailError,
    ConfigError,
    ContainerError,
    KeysMissing,
    Overloaded,
    TailUnavailable,
)
from blindtail.wire import KeyState, KeyStatus
from cloud import keycheck
from cloud.config import KeyLimits
from cloud.registry import Registry

_log = logging.getLogger(__name__)
#: For how long the reason of a refusal is remembered.
_REFUSAL_S = 300.0
_FULL = (errno.ENOSPC, errno.EDQUOT)

Check = Callable[[keycheck.Order, float], int]


@dataclass
class _Ready:
    bytes: int
    used_s: float
    pins: int = 0


@dataclass
class _Partial:
    identity: str
    received: int
    moved_s: float
    writer: object = None  # the upload that may write; a later one takes over
    checking: bool = False
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)


class KeyStore:
    """One cell's keys. Raises `ConfigError` when the directory cannot be used.

    `check` is `keycheck.run`; tests pass another. `clock` is monotonic seconds.
    """

    def __init__(
        self,
        root: Path,
        backend: str,
        registry: Registry,
        limits: KeyLimits,
        clock: Callable[[], float],
        *,
        check: Check = keycheck.run,
    ) -> None:
        self._limits, self._clock, self._check = limits, clock, check
        self._backend, self._registry = backend, registry
        self._programs = root / "programs"
        self._partials_dir = root / backend / "partial"
        self._ready_dir = root / backend / "ready"
        self._lock_file = self._prepare(root)
        self._ready: dict[str, _Ready] = {}
        self._partials: dict[str, _Partial] = {}
        self._refused: dict[str, tuple[str, float]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._checkers = ThreadPoolExecutor(1, thread_name_prefix="key-check")
        try:
            self._scan()
        except OSError as error:
            self.release()
            raise ConfigError(f"cannot use the state directory {root}: {error.strerror}") from error

    # -- what the gateway asks -------------------------------------------------

    @property
    def stored_bytes(self) -> int:
        return sum(entry.bytes for entry in self._ready.values())

    def status(self, identity: str, program_id: str, sha256: bytes) -> KeyStatus:
        name = self._name(identity, program_id, sha256)
        if name in self._ready:
            return KeyStatus(KeyState.READY, self._registry.by_program(program_id).key_bytes)
        partial = self._partials.get(name)
        if partial is not None:
            state = KeyState.CHECKING if partial.checking else KeyState.MISSING
            return KeyStatus(state, partial.received)
        refusal = self._refused.get(name)
        if refusal is not None and self._clock() - refusal[1] <= _REFUSAL_S:
            return KeyStatus(KeyState.REFUSED, 0, refusal[0])
        return KeyStatus(KeyState.MISSING, 0)

    def pin(self, identity: str, program_id: str, sha256: bytes) -> Path:
        """The prepared file, kept until `unpin`. Raises `KeysMissing`."""
        name = self._name(identity, program_id, sha256)
        entry = self._ready.get(name)
        path = self._ready_dir / name
        if entry is not None and not path.exists():  # removed behind our back
            del self._ready[name]
            entry = None
        if entry is None:
            raise KeysMissing("the cloud does not hold these evaluation keys (any more): upload them again")
        entry.pins += 1
        entry.used_s = self._clock()
        return path

    def unpin(self, path: Path) -> None:
        entry = self._ready.get(path.name)
        if entry is not None:
            entry.pins -= 1
            entry.used_s = self._clock()
            with contextlib.suppress(OSError):
                os.utime(path)  # the order of use survives a restart
            self._evict()

    async def receive(
        self,
        identity: str,
        program_id: str,
        sha256: bytes,
        total_bytes: int,
        offset: int,
        pieces: AsyncIterator[bytes],
    ) -> KeyStatus:
        """Takes an upload's bytes from `offset` on; what arrived stays when it breaks off.

        Raises `ContainerError` (wrong size or offset), `Overloaded` (no room),
        `TailUnavailable` (a later upload of the same keys took over).
        """
        entry = self._registry.by_program(program_id)
        if total_bytes != entry.key_bytes:
            raise ContainerError(
                f"the key container has {total_bytes} bytes, this program's have {entry.key_bytes}: "
                "make the keys again from the edge.bt of this version"
            )
        name = self._name(identity, program_id, sha256)
        status = self.status(identity, program_id, sha256)
        if status.state in (KeyState.READY, KeyState.CHECKING):
            return status
        partial = self._open_partial(name, identity)
        if offset != partial.received:
            raise ContainerError(
                f"the upload starts at byte {offset}, but {partial.received} bytes are here: ask for the "
                "key status and go on from there"
            )
        writer = partial.writer = object()
        self._refused.pop(name, None)
        async for piece in pieces:
            await self._append(name, partial, writer, piece, total_bytes)
        if partial.received == total_bytes and partial.writer is writer:
            partial.checking = True
            task = asyncio.create_task(self._verify(name, program_id, sha256))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return self.status(identity, program_id, sha256)

    def evict_all(self) -> None:
        """Drops every key set that is not in use (an operator's tool, and tests')."""
        for name in [n for n, e in self._ready.items() if e.pins == 0]:
            self._remove(name)

    def sweep(self) -> None:
        """Drops uploads that have not moved for long, and old refusals."""
        now = self._clock()
        for name, partial in list(self._partials.items()):
            if not partial.checking and now - partial.moved_s > self._limits.partial_idle_s:
                self._drop_partial(name)
        for name, (_, since_s) in list(self._refused.items()):
            if now - since_s > _REFUSAL_S:
                del self._refused[name]

    async def close(self) -> None:
        """Waits for a check that runs, then releases the directory."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.release()

    def release(self) -> None:
        self._checkers.shutdown(wait=False, cancel_futures=True)
        self._lock_file.close()

    # -- uploads -----------------------------------------------------------------

    def _open_partial(self, name: str, identity: str) -> _Partial:
        partial = self._partials.get(name)
        if partial is None:
            own = [n for n, p in self._partials.items() if p.identity == identity and not p.checking]
            if len(own) >= self._limits.partial_per_identity:
                self._drop_partial(min(own, key=lambda n: self._partials[n].moved_s))
            partial = self._partials[name] = _Partial(identity, 0, self._clock())
        partial.identity = identity  # unknown after a restart
        return partial

    async def _append(
        self, name: str, partial: _Partial, writer: object, piece: bytes, total_bytes: int
    ) -> None:
        async with partial.writing:
            if partial.writer is not writer or self._partials.get(name) is not partial:
                raise TailUnavailable("a later upload of the same keys took over")
            if partial.received + len(piece) > total_bytes:
                self._drop_partial(name)
                raise ContainerError(f"more than the announced {total_bytes} bytes of keys were sent")
            if not piece:
                return
            try:
                await asyncio.to_thread(_write_at, self._partials_dir / name, partial.received, piece)
            except OSError as error:
                self._drop_partial(name)
                raise self._no_room(error) from error
            partial.received += len(piece)
            partial.moved_s = self._clock()

    def _no_room(self, error: OSError) -> BlindtailError:
        _log.error("the key store cannot write: %s", error.strerror)
        if error.errno in _FULL:
            return Overloaded("the cloud's key store has no room left on its disk: try again later", 30.0)
        return Overloaded("the cloud's key store cannot be written: its operator must look", 30.0)

    def _drop_partial(self, name: str) -> None:
        self._partials.pop(name, None)
        _unlink(self._partials_dir / name)

    async def _verify(self, name: str, program_id: str, sha256: bytes) -> None:
        order = keycheck.Order(
            bundle=str(self._programs / f"{program_id}.bt"),
            backend=self._backend,
            source=str(self._partials_dir / name),
            target=str(self._ready_dir / name),
            sha256=sha256.hex(),
            cpu_s=int(self._limits.check_timeout_s) + 1,
            memory_bytes=self._limits.check_memory_bytes,
        )
        loop = asyncio.get_running_loop()
        try:
            size = await loop.run_in_executor(
                self._checkers, self._check, order, self._limits.check_timeout_s
            )
            size = (self._ready_dir / name).stat().st_size
            if size > self._limits.budget_bytes:
                _unlink(self._ready_dir / name)
                _log.error("one key set takes %d bytes, more than keys.budget_bytes", size)
                raise ContainerError("prepared, the keys are larger than this cell's whole key budget")
        except (BlindtailError, OSError) as error:
            _unlink(self._ready_dir / name)
            reason = str(error) if isinstance(error, BlindtailError) else "the cloud could not store the keys"
            self._refused[name] = (reason[:500], self._clock())
        except BaseException:
            _unlink(self._ready_dir / name)
            raise
        else:
            self._ready[name] = _Ready(size, self._clock())
            self._evict(keep=name)
        finally:
            self._drop_partial(name)

    # -- the budget ----------------------------------------------------------------

    def _evict(self, keep: str = "") -> None:
        total = self.stored_bytes
        if total <= self._limits.budget_bytes:
            return
        for name in sorted(self._ready, key=lambda n: self._ready[n].used_s):
            if total <= self._limits.budget_bytes:
                return
            if self._ready[name].pins == 0 and name != keep:
                total -= self._ready[name].bytes
                self._remove(name)

    def _remove(self, name: str) -> None:
        self._ready.pop(name, None)
        _unlink(self._ready_dir / name)

    # -- the directory -------------------------------------------------------------

    def _name(self, identity: str, program_id: str, sha256: bytes) -> str:
        digest = hashlib.sha256(b"blindtail-keys-1")
        for part in (identity.encode(), program_id.encode(), sha256):
            digest.update(len(part).to_bytes(8, "little") + part)
        return digest.hexdigest()

    def _prepare(self, root: Path) -> IO[bytes]:
        try:
            for folder in (root, self._programs, self._partials_dir, self._ready_dir):
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
        try:
            for entry in self._registry.entries:
                path = self._programs / f"{entry.program_id}.bt"
                CloudBundle(entry.model, entry.version, {0: entry.program}).save(path)
        except (OSError, BlindtailError) as error:
            lock.close()
            raise ConfigError(f"cannot write to the state directory {root}: {error}") from error
        return lock

    def _scan(self) -> None:
        """What an earlier run left: whole files are taken over, the rest is removed."""
        now = self._clock()
        found = sorted((p for p in self._ready_dir.iterdir()), key=lambda p: p.stat().st_mtime)
        for index, path in enumerate(found):
            if len(path.name) != 64:  # a temporary file of a check that died
                _unlink(path)
                continue
            self._ready[path.name] = _Ready(path.stat().st_size, now - 1e-3 * (len(found) - index))
        for path in self._partials_dir.iterdir():
            # Its owner is not in the name; bytes are kept for whoever can name them.
            self._partials[path.name] = _Partial("", path.stat().st_size, now)
        self._evict()


def _write_at(path: Path, offset: int, piece: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        os.ftruncate(handle, offset)  # bytes of a write that was cut short
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


__all__ = ["Check", "KeyStore"]
