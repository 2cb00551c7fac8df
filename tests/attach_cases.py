"""A scripted host of an attachment: an edge as far as an orchestrator can tell."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from blindtail.attach import Attachment
from blindtail.rpc import INSECURE_LOOPBACK
from blindtail.wire.control import Hello, PeerKind, PolicyAck, PolicyUpdate, Report


class Host:
    """An edge's callbacks: counts answers, applies policies, or refuses them for the reason `refuse`."""

    def __init__(self, model: str = "toy", kind: PeerKind = PeerKind.EDGE) -> None:
        self.model, self.kind = model, kind
        self.instance = os.urandom(16)
        self.answers = self.asked = 0
        self.version = 0
        self.refuse = ""

    def hello(self) -> Hello:
        return Hello(self.kind, self.instance, "1", ((self.model, "1"),), self.version)

    def report(self, interval_s: float) -> Report | None:
        self.asked += 1
        taken, self.answers = self.answers, 0
        return Report(interval_s, {"tail": taken})

    def on_policy(self, update: PolicyUpdate) -> PolicyAck | None:
        if self.refuse:
            return PolicyAck(update.version, False, self.refuse)
        self.version = update.version
        return PolicyAck(update.version, True)

    @contextmanager
    def attached(
        self, address: str, credentials: Any = INSECURE_LOOPBACK, **more: Any
    ) -> Iterator[Attachment]:
        """An attachment for the time of the block; it must close within two seconds."""
        parts: dict[str, Any] = {"hello": self.hello, "report": self.report, "on_policy": self.on_policy}
        made = Attachment(address, credentials, **{**parts, **more}, seed=1)
        made.start()
        try:
            yield made
        finally:
            start_s = time.monotonic()
            made.close()
            assert time.monotonic() - start_s < 2
            assert not made.connected
