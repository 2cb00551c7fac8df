"""How long the session of a tail waits after what it met on its way to a cell."""

from __future__ import annotations

import random

from blindtail.errors import (
    AccessDenied,
    BlindtailError,
    DeadlineExceeded,
    KeysMissing,
    Overloaded,
    SessionLost,
    TailUnavailable,
)
from edge.joining import FINAL
from edge.tail import TailState

#: First and longest wait before a cloud that is away is tried again.
BACK_OFF_S = (0.2, 1.0)
#: How often a cloud that said no for good (other model, no access) is asked again.
HOPELESS_S = 30.0
#: First and longest wait after refused keys or a failed key process.
FAILED_S = (10.0, 300.0)


class BackOff:
    """Waits that double while a trouble lasts, drawn at random: edges of one cell do not come all at once."""

    def __init__(self, draw: random.Random) -> None:
        self._random = draw
        self.reset()

    def reset(self) -> None:
        """All went well: waits begin with the first ones again."""
        self._away_s, self._failed_s = BACK_OFF_S[0], FAILED_S[0]

    def first_s(self) -> float:
        """A first wait, whatever came before."""
        return BACK_OFF_S[0] * self._random.uniform(0.5, 1.0)

    def after(self, error: Exception) -> tuple[TailState, str, float]:
        """What the tail's state is from now on, what to say of it, and the wait in seconds."""
        if isinstance(error, Overloaded):
            wait_s = min(error.retry_after_s, HOPELESS_S) * self._random.uniform(1.0, 1.5)
            return TailState.AWAY, str(error), wait_s
        if isinstance(error, FINAL):
            state = TailState.DENIED if isinstance(error, AccessDenied) else TailState.MISMATCH
            return state, str(error), HOPELESS_S * self._random.uniform(0.8, 1.2)
        if isinstance(error, TailUnavailable | DeadlineExceeded | SessionLost | KeysMissing):
            wait_s = self._away_s * self._random.uniform(0.5, 1.0)
            self._away_s = min(2 * self._away_s, BACK_OFF_S[1])
            return TailState.AWAY, str(error), wait_s
        if isinstance(error, BlindtailError):  # refused keys, a full disk, a key process that died
            wait_s = self._failed_s * self._random.uniform(0.8, 1.2)
            self._failed_s = min(2 * self._failed_s, FAILED_S[1])
            return TailState.FAILED, str(error), wait_s
        return TailState.FAILED, f"unexpected {type(error).__name__}", HOPELESS_S


__all__ = ["BackOff"]
