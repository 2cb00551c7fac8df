"""Sessions: which program and which keys a client's requests are for.

A session is forgotten after a time without use, at a restart, and when its
identity opens more than it may: the edge then registers again by itself. A
session belongs to the identity that opened it; to everybody else it does not exist.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from blindtail.errors import SessionLost
from blindtail.wire import SESSION_BYTES
from cloud.config import SessionLimits
from cloud.registry import Entry
from cloud.requests import Requests


@dataclass
class Session:
    """One client's registration. `last_used_s` is on the gateway's monotonic clock.

    Names what it is for, and holds none of it: versions come and go.
    """

    id: bytes
    identity: str
    model: str
    version: str
    program_id: str
    key_sha256: bytes
    last_used_s: float
    requests: Requests = field(repr=False)


class Sessions:
    """Bounded by count and by time without use. Not thread-safe: lives on the gateway's loop."""

    def __init__(
        self,
        limits: SessionLimits,
        clock: Callable[[], float],
        random_bytes: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._limits, self._clock, self._random_bytes = limits, clock, random_bytes
        # Least recently used first, over all and by identity.
        self._all: OrderedDict[bytes, Session] = OrderedDict()
        self._by_identity: dict[str, OrderedDict[bytes, Session]] = {}
        #: Told of every session that is forgotten.
        self.on_forgotten: Callable[[bytes], None] = lambda session_id: None

    def __len__(self) -> int:
        return len(self._all)

    def open(self, identity: str, entry: Entry, key_sha256: bytes) -> Session:
        self.sweep()
        own = self._by_identity.get(identity, OrderedDict())
        if len(own) >= self._limits.per_identity:
            self._forget(next(iter(own.values())))
        elif len(self._all) >= self._limits.total:
            self._forget(next(iter(self._all.values())))
        now = self._clock()
        session = Session(
            self._random_bytes(SESSION_BYTES),
            identity,
            entry.model,
            entry.version,
            entry.program_id,
            key_sha256,
            now,
            Requests(self._clock),
        )
        self._all[session.id] = session
        self._by_identity.setdefault(identity, OrderedDict())[session.id] = session
        return session

    def use(self, session_id: bytes, identity: str) -> Session:
        """The session, its idle time started anew. Raises `SessionLost`."""
        self.sweep()
        session = self._all.get(session_id)
        if session is None or session.identity != identity:
            raise SessionLost(
                "the cloud does not know this session (it restarted, or the session idled): register again"
            )
        session.last_used_s = self._clock()
        self._all.move_to_end(session_id)
        self._by_identity[identity].move_to_end(session_id)
        return session

    def used_since(self, since_s: float) -> int:
        """How many were opened or used since then, a time on the clock."""
        count = 0
        for session in reversed(self._all.values()):
            if session.last_used_s < since_s:
                break
            count += 1
        return count

    def count(self, model: str, version: str) -> int:
        """Open sessions of one version's edges."""
        return sum((s.model, s.version) == (model, version) for s in self._all.values())

    def sweep(self) -> None:
        """Forgets what has not been used for `idle_s`; cheap when there is nothing to forget."""
        horizon = self._clock() - self._limits.idle_s
        while self._all:
            oldest = next(iter(self._all.values()))
            if oldest.last_used_s >= horizon:
                return
            self._forget(oldest)

    def clear(self) -> None:
        """Forgets all of them, as a restart does."""
        for session in list(self._all.values()):
            self._forget(session)

    def _forget(self, session: Session) -> None:
        del self._all[session.id]
        own = self._by_identity[session.identity]
        del own[session.id]
        if not own:
            del self._by_identity[session.identity]
        self.on_forgotten(session.id)


__all__ = ["Session", "Sessions"]
