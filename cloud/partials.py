"""Uploads of evaluation keys that are under way: bytes arrive in parts, and stay when an upload breaks off.

Everything runs on the gateway's loop, except file writes, which run on threads.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from blindtail.errors import BlindtailError, ContainerError, Overloaded, TailUnavailable
from cloud.config import KeyLimits
from cloud.keyfolder import KeyFolder, write_at

_log = logging.getLogger(__name__)
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass
class Partial:
    """The bytes of one key set that have arrived so far."""

    identity: str
    received: int
    moved_s: float
    writer: object = None  # the upload that may write; a later one takes over
    checking: bool = False
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)


class Partials:
    """Those of one cell, by the name of their keys. `clock` is monotonic seconds."""

    def __init__(self, folder: KeyFolder, limits: KeyLimits, clock: Callable[[], float]) -> None:
        self._folder, self._limits, self._clock = folder, limits, clock
        self._held: dict[str, Partial] = {}

    def take_over(self, found: Mapping[str, int]) -> None:
        """What an earlier run left: name -> bytes. Its owner is not in a name; who can name it goes on."""
        now = self._clock()
        self._held |= {name: Partial("", received, now) for name, received in found.items()}

    def get(self, name: str) -> Partial | None:
        return self._held.get(name)

    def open(self, name: str, identity: str) -> Partial:
        """The one under this name, or a new one; the oldest of an identity that has too many goes for it."""
        partial = self._held.get(name)
        if partial is None:
            own = [n for n, p in self._held.items() if p.identity == identity and not p.checking]
            if len(own) >= self._limits.partial_per_identity:
                self.drop(min(own, key=lambda n: self._held[n].moved_s))
            partial = self._held[name] = Partial(identity, 0, self._clock())
        partial.identity = identity  # unknown after a restart
        return partial

    async def append(
        self, name: str, partial: Partial, writer: object, piece: bytes, total_bytes: int
    ) -> None:
        """Raises `ContainerError`, `Overloaded`, `TailUnavailable`: see `KeyStore.receive`."""
        async with partial.writing:
            if partial.writer is not writer or self._held.get(name) is not partial:
                raise TailUnavailable("a later upload of the same keys took over")
            if partial.received + len(piece) > total_bytes:
                self.drop(name)
                raise ContainerError(f"more than the announced {total_bytes} bytes of keys were sent")
            if not piece:
                return
            try:
                await asyncio.to_thread(write_at, self._folder.partial(name), partial.received, piece)
            except OSError as error:
                self.drop(name)
                raise _no_room(error) from error
            partial.received += len(piece)
            partial.moved_s = self._clock()

    def drop(self, name: str) -> None:
        self._held.pop(name, None)
        self._folder.drop_partial(name)

    def drop_program(self, program_id: str) -> None:
        """Those for a program's keys; one that is being checked goes when the check is done."""
        for name in [
            n for n, p in self._held.items() if not p.checking and self._folder.is_of(n, program_id)
        ]:
            self.drop(name)

    def sweep(self) -> None:
        """Drops those that have not moved for long."""
        now = self._clock()
        for name, partial in list(self._held.items()):
            if not partial.checking and now - partial.moved_s > self._limits.partial_idle_s:
                self.drop(name)


def _no_room(error: OSError) -> BlindtailError:
    _log.error("the key store cannot write: %s", error.strerror)
    if error.errno in _FULL:
        return Overloaded("the cloud's key store has no room left on its disk: try again later", 30.0)
    return Overloaded("the cloud's key store cannot be written: its operator must look", 30.0)


__all__ = ["Partial", "Partials"]
