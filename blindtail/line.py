"""A channel that follows its certificate files: renewed ones are used without a restart.

A gRPC client's certificate is fixed when its channel is made. `Line` keeps one
channel and makes another when the files have changed, so that who calls notices
nothing. A stream that lives for hours has no next call: its owner keeps
`rpc.stamp(credentials)` from when it dialled, compares it now and then, and dials
again when it differs.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import grpc

from blindtail import wire
from blindtail.errors import ConfigError
from blindtail.rpc import ClientTlsFiles, Credentials, secure_channel, stamp
from blindtail.tls import PAIR_WAIT_S

_log = logging.getLogger(__name__)
_S = TypeVar("_S")
#: How often the files are looked at, seconds.
_LOOK_S = 1.0


@dataclass
class _Held(Generic[_S]):
    """One channel, what was made of it, and how many calls use it now."""

    channel: grpc.Channel
    made: _S
    users: int = 0


class Line(Generic[_S]):
    """A channel to one server, dialled anew when its certificate files have changed.

        line = Line(address, credentials, TailStub)
        with line.use() as stub:
            stub.key_status(call, 5.0)

    Calls begun on the old channel end there; it is closed after the last of them.
    New files that cannot be used (a renewal half done) leave the line as it is.
    Thread-safe.

    make  what is made of a channel once, for example a stub
    """

    def __init__(
        self,
        address: str,
        credentials: Credentials,
        make: Callable[[grpc.Channel], _S],
        *,
        max_reply_bytes: int = wire.REPLY_BYTES,
    ) -> None:
        """Raises `ConfigError`, as `secure_channel`."""
        self.address = address
        self._credentials, self._make, self._max_reply_bytes = credentials, make, max_reply_bytes
        self._lock = threading.Lock()
        self._closed = False
        self._next_look_s = time.monotonic() + _LOOK_S
        self._stamp = stamp(credentials)
        self._current = self._dial(PAIR_WAIT_S)

    @contextmanager
    def use(self) -> Iterator[_S]:
        """What was made of the channel, which stays open at least until the block ends."""
        self._look()
        with self._lock:
            held = self._current
            held.users += 1
        try:
            yield held.made
        finally:
            with self._lock:
                held.users -= 1
                done = held.users == 0 and held is not self._current
            if done:
                held.channel.close()

    def close(self) -> None:
        """Closes the channel at once; calls in flight fail with `TailUnavailable`."""
        with self._lock:
            self._closed = True
        self._current.channel.close()

    def _look(self) -> None:
        with self._lock:
            now_s = time.monotonic()
            if now_s < self._next_look_s or self._closed:
                return
            self._next_look_s = now_s + _LOOK_S
            if (found := stamp(self._credentials)) == self._stamp:
                return
            self._stamp = found
        try:
            fresh = self._dial(0.0)
        except ConfigError as error:
            _log.warning("the new TLS files are not used: %s", error)
            return
        self._replace(fresh)

    def _replace(self, fresh: _Held[_S]) -> None:
        with self._lock:
            old = self._current
            if self._closed:
                unused: _Held[_S] | None = fresh
            else:
                self._current = fresh
                unused = None if old.users else old
        if unused is not None:
            unused.channel.close()

    def _dial(self, wait_s: float) -> _Held[_S]:
        credentials = self._credentials
        if isinstance(credentials, ClientTlsFiles):
            credentials = credentials.load(wait_s)
        channel = secure_channel(self.address, credentials, max_reply_bytes=self._max_reply_bytes)
        return _Held(channel, self._make(channel))


__all__ = ["Line"]
