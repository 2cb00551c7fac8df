"""Whether requests are being answered: what can wait, waits for a quiet moment."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Activity:
    """Counts the requests that a runtime is answering. Thread-safe; times are on `clock`, seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._running, self._ended_s = 0, float("-inf")

    @contextmanager
    def request(self) -> Iterator[None]:
        """Around the answering of one request."""
        with self._lock:
            self._running += 1
        try:
            yield
        finally:
            with self._lock:
                self._running -= 1
                self._ended_s = self._clock()

    def quiet(self, for_s: float) -> bool:
        """True when no request is being answered, and none has been for `for_s`."""
        with self._lock:
            return not self._running and self._clock() - self._ended_s >= for_s


__all__ = ["Activity"]
