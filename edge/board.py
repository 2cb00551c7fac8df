"""The state of one tail, for those who ask for it and those who wait for it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from blindtail.he.spec import TailSpec
from edge.tail import HOPELESS, TailState, TailStatus

_log = logging.getLogger(__name__)


class Board:
    """Thread-safe. `changed` is notified with every `set`; `status` is replaced whole."""

    def __init__(self, spec: TailSpec, clock: Callable[[], float]) -> None:
        self._spec, self._clock = spec, clock
        self.changed = threading.Condition()
        self.status = TailStatus(TailState.STARTING, key_bytes=spec.key_bytes, since_s=clock())

    @property
    def is_ready(self) -> bool:
        return self.status.state is TailState.READY

    def set(
        self,
        state: TailState,
        problem: str = "",
        *,
        sent_bytes: int = 0,
        registrations: int | None = None,
        cell: str = "",
    ) -> None:
        """Does nothing once it is closed."""
        with self.changed:
            old = self.status
            if old.state is TailState.CLOSED:
                return
            self.status = TailStatus(
                state=state,
                problem=problem,
                sent_bytes=self._spec.key_bytes if state is TailState.READY else sent_bytes,
                key_bytes=self._spec.key_bytes,
                registrations=old.registrations if registrations is None else registrations,
                since_s=old.since_s if old.state is state else self._clock(),
                cell=cell,
            )
            if old.state is not state:
                _log.info("tail %s: %s %s", self._spec.program_id[:8], state.value, problem)
            self.changed.notify_all()

    def close(self) -> None:
        with self.changed:
            self.status = TailStatus(TailState.CLOSED, since_s=self._clock())
            self.changed.notify_all()

    def wait_ready(self, timeout_s: float) -> bool:
        """False after `timeout_s`, or when it is hopeless."""
        with self.changed:
            self.changed.wait_for(lambda: self.is_ready or self.status.state in HOPELESS, timeout_s)
            return self.is_ready


__all__ = ["Board"]
