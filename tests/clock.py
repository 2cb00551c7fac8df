"""Time in tests: a clock that is moved by hand, and waiting for what must happen."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


class FakeClock:
    """A clock that moves when told to."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def until(
    condition: Callable[[], Any],
    text: str = "it never happened",
    limit_s: float = 25.0,
    *,
    every_s: float = 0.005,
) -> Any:
    """What `condition` gives once that is true; fails with `text` when it is not in time."""
    end_s = time.monotonic() + limit_s
    while not (found := condition()):
        assert time.monotonic() < end_s, text
        time.sleep(every_s)
    return found


__all__ = ["FakeClock", "until"]
