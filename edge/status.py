"""What a runtime tells about itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from blindtail.records import LatencyEstimate
from edge.tail import TailState, TailStatus


@dataclass(frozen=True)
class RuntimeStatus:
    """What an operator wants to see. `latencies` are timings only.

    tails      cut (stage index) -> state of its encrypted tail
    latencies  step -> learned estimate ("offload1" is an offload at the cut after stage 1)
    """

    model: str
    version: str
    policy: str
    closed: bool
    answered: int
    fallbacks: Mapping[str, int]
    routes: Mapping[str, int]
    tails: Mapping[int, TailStatus]
    latencies: Mapping[str, LatencyEstimate]

    @property
    def ready(self) -> bool:
        return any(t.state is TailState.READY for t in self.tails.values())
