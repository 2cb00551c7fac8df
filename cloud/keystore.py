"""Evaluation keys of a cell's clients: uploaded in parts, checked aside, kept within a budget.

A key set is named by a hash over (identity, program, SHA-256 of the container):
nobody reaches another's keys, not even by knowing their hash. Where the files lie
is `cloud.keyfolder`'s business, bytes that have not all arrived are
`cloud.partials`'s; beside the prepared keys the container stays, so that another
cell can be given it.

Everything here runs on the gateway's loop, except file writes and checks, which
run on threads; a check itself is a child process. Files survive restarts. The
least recently used go first when the budget is full; keys in use stay.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from blindtail.errors import BlindtailError, ContainerError, KeysMissing
from blindtail.wire import KeyState, KeyStatus
from cloud import keycheck
from cloud.config import KeyLimits
from cloud.keyfolder import KeyFolder
from cloud.partials import Partials
from cloud.registry import Entry, Registry

_log = logging.getLogger(__name__)
#: For how long the reason of a refusal is remembered.
_REFUSAL_S = 300.0

Check = Callable[[keycheck.Order, float], int]


@dataclass
class _Ready:
    bytes: int  # prepared keys and their container
    used_s: float
    pins: int = 0
    dropped: bool = False  # with its program; goes when the last pin does


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
        self._ready: dict[str, _Ready] = {}
        self._refused: dict[str, tuple[str, float]] = {}
        self._awaited: set[str] = set()  # asked of other cells
        self._tasks: set[asyncio.Task[None]] = set()
        #: Called on the loop with (identity, program id, sha256) when an edge's upload is READY.
        self.on_ready: Callable[[str, str, bytes], None] = lambda identity, program_id, sha256: None
        #: Called with the name of keys that have gone.
        self.on_removed: Callable[[str], None] = lambda name: None
        self._folder = KeyFolder(root, backend, registry.entries)
        self._partials = Partials(self._folder, limits, clock)
        self._known = {entry.program_id for entry in registry.entries}
        self._checkers = ThreadPoolExecutor(1, thread_name_prefix="key-check")
        try:
            self._scan()
        except BaseException:
            self.release()
            raise

    # -- programs ------------------------------------------------------------------

    def know(self, entry: Entry) -> None:
        """A program is served from now on: its keys can be checked. Blocks; raises `ConfigError`."""
        self._folder.add_program(entry)
        self._known.add(entry.program_id)

    def forget_program(self, program_id: str) -> None:
        """A program is served no more: its keys go, those in use when the last request is done."""
        self._known.discard(program_id)
        self._folder.drop_program(program_id)
        self._partials.drop_program(program_id)
        for name in [n for n in self._ready if self._folder.is_of(n, program_id)]:
            entry = self._ready[name]
            if entry.pins:
                entry.dropped = True
            else:
                self._remove(name)

    def tidy(self) -> None:
        """At the start, when all programs are known: weights encoded for others go."""
        self._folder.tidy(self._known, starting=True)

    async def withdraw_program(self, program_id: str) -> None:
        """As `forget_program`, but one key set at a time: to remove a large file takes milliseconds."""
        names = [n for n in self._ready if self._folder.is_of(n, program_id)]
        for name in names:
            self._ready[name].dropped = True
        for name in names:
            entry = self._ready.get(name)
            if entry is not None and not entry.pins:
                self._remove(name)
                await asyncio.sleep(0)
        self.forget_program(program_id)

    # -- what the gateway asks -------------------------------------------------

    @property
    def stored_bytes(self) -> int:
        return sum(entry.bytes for entry in self._ready.values())

    def name(self, identity: str, program_id: str, sha256: bytes) -> str:
        """What these keys are called here: nobody else's have the same name."""
        return self._folder.name(identity, program_id, sha256)

    def status(self, identity: str, program_id: str, sha256: bytes) -> KeyStatus:
        name = self._folder.name(identity, program_id, sha256)
        held = self._held(name)
        if held.state is KeyState.MISSING and name in self._awaited:
            return KeyStatus(KeyState.CHECKING, held.received_bytes)
        if held.state is KeyState.READY:
            return KeyStatus(KeyState.READY, self._registry.by_program(program_id).key_bytes)
        return held

    def _held(self, name: str) -> KeyStatus:
        """As `status`, but keys that are on their way from another cell are still MISSING."""
        entry = self._ready.get(name)
        if entry is not None and not entry.dropped:
            return KeyStatus(KeyState.READY, 0)
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
        name = self._folder.name(identity, program_id, sha256)
        entry = self._ready.get(name)
        path = self._folder.ready(name)
        if entry is not None and not path.exists():  # removed behind our back
            self._remove(name)
            entry = None
        if entry is None or entry.dropped:
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
            if entry.dropped and entry.pins == 0:
                self._remove(path.name)
            self._evict()

    def container(self, identity: str, program_id: str, sha256: bytes) -> Path:
        """The container of READY keys, for another cell. Raises `KeysMissing`.

        It may be evicted while it is read: open it once, then read on.
        """
        name = self._folder.name(identity, program_id, sha256)
        path = self._folder.raw(name)
        if self._held(name).state is not KeyState.READY or not path.exists():
            raise KeysMissing("this cell does not hold these evaluation keys")
        return path

    @contextlib.contextmanager
    def awaiting(self, identity: str, program_id: str, sha256: bytes) -> Iterator[None]:
        """Inside, these keys are CHECKING to their edge: another cell is asked for them."""
        name = self._folder.name(identity, program_id, sha256)
        self._awaited.add(name)
        try:
            yield
        finally:
            self._awaited.discard(name)

    async def receive(
        self,
        identity: str,
        program_id: str,
        sha256: bytes,
        total_bytes: int,
        offset: int,
        pieces: AsyncIterator[bytes],
        *,
        from_cell: bool = False,
    ) -> KeyStatus:
        """Takes an upload's bytes from `offset` on; what arrived stays when it breaks off.

        from_cell  another cell sends them for `identity`: checked like any, but neither given on
                   nor, when they are refused, held against the edge

        Raises `ContainerError` (wrong size or offset), `Overloaded` (no room),
        `TailUnavailable` (a later upload of the same keys took over).
        """
        entry = self._registry.by_program(program_id)
        if total_bytes != entry.key_bytes:
            raise ContainerError(
                f"the key container has {total_bytes} bytes, this program's have {entry.key_bytes}: "
                "make the keys again from the edge.bt of this version"
            )
        name = self._folder.name(identity, program_id, sha256)
        status = self.status(identity, program_id, sha256)
        settled = self._held(name).state if from_cell else status.state
        if settled in (KeyState.READY, KeyState.CHECKING):
            return status
        partial = self._partials.open(name, identity)
        if offset != partial.received:
            raise ContainerError(
                f"the upload starts at byte {offset}, but {partial.received} bytes are here: ask for the "
                "key status and go on from there"
            )
        writer = partial.writer = object()
        self._refused.pop(name, None)
        async for piece in pieces:
            await self._partials.append(name, partial, writer, piece, total_bytes)
        if partial.received == total_bytes and partial.writer is writer:
            partial.checking = True
            owner = None if from_cell else identity
            task = asyncio.create_task(self._verify(name, program_id, sha256, owner))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return self._held(name) if from_cell else self.status(identity, program_id, sha256)

    def evict_all(self) -> None:
        """Drops every key set that is not in use (an operator's tool, and tests')."""
        for name in [n for n, e in self._ready.items() if e.pins == 0]:
            self._remove(name)

    def sweep(self) -> None:
        """Drops uploads that have not moved for long, old refusals, and what an evaluator that was starting
        has encoded of a program that was dropped meanwhile."""
        now = self._clock()
        self._folder.tidy(self._known)
        self._partials.sweep()
        for name, (_, since_s) in list(self._refused.items()):
            if now - since_s > _REFUSAL_S:
                del self._refused[name]

    async def checked(self) -> None:
        """Waits until no check runs."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def close(self) -> None:
        """Waits for a check that runs, then releases the directory."""
        await self.checked()
        self.release()

    def release(self) -> None:
        self._checkers.shutdown(wait=False, cancel_futures=True)
        self._folder.release()

    # -- the check -----------------------------------------------------------------

    async def _verify(self, name: str, program_id: str, sha256: bytes, owner: str | None) -> None:
        order = keycheck.Order(
            bundle=str(self._folder.program(program_id)),
            backend=self._backend,
            source=str(self._folder.partial(name)),
            target=str(self._folder.ready(name)),
            sha256=sha256.hex(),
            cpu_s=int(self._limits.check_timeout_s) + 1,
            memory_bytes=self._limits.check_memory_bytes,
        )
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._checkers, self._check, order, self._limits.check_timeout_s)
            if program_id not in self._known:
                raise ContainerError("the cloud has withdrawn the model that these keys are for")
            size = self._folder.keep(name)
            if size > self._limits.budget_bytes:
                _log.error("one key set takes %d bytes, more than keys.budget_bytes", size)
                raise ContainerError("prepared, the keys are larger than this cell's whole key budget")
        except (BlindtailError, OSError) as error:
            self._folder.drop_ready(name)
            reason = str(error) if isinstance(error, BlindtailError) else "the cloud could not store the keys"
            if owner is not None:
                self._refused[name] = (reason[:500], self._clock())
            else:  # bytes of another cell say nothing about the edge, which may upload its own
                _log.warning("keys from another cell were refused: %s", reason)
        except BaseException:
            self._folder.drop_ready(name)
            raise
        else:
            self._ready[name] = _Ready(size, self._clock())
            self._evict(keep=name)
            if owner is not None:
                self.on_ready(owner, program_id, sha256)
        finally:
            self._partials.drop(name)

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
        self._folder.drop_ready(name)
        self.on_removed(name)

    def _scan(self) -> None:
        """Takes over what an earlier run left. Raises `ConfigError`."""
        now = self._clock()
        found = self._folder.scan()
        for index, (name, size) in enumerate(found.ready.items()):
            self._ready[name] = _Ready(size, now - 1e-3 * (len(found.ready) - index))
        self._partials.take_over(found.partial)
        self._evict()


__all__ = ["Check", "KeyStore"]
