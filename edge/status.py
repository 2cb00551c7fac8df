"""What a runtime tells about itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from blindtail.records import LatencyEstimate
from edge.tail import TailState, TailStatus


@dataclass(frozen=True)
class RuntimeStatus:
    """What an operator wants to see. `latencies` are timings only.

    tails           cut (stage index) -> state of its encrypted tail
    latencies       step -> learned estimate ("offload1" is an offload at the cut after stage 1)
    policy_version  the orchestrator's number of the policy in force; 0 = the runtime's own
    deadline_s      of requests that bring none of their own; None = none
    orchestrator    "attached", "away", or "" for a runtime without one
    by_ticket       answers of the tail that a ticket made shorter
    out_of_range    note of `edge.ranges` -> answers that carry it. For this device's people alone:
                    it derives from decryptions
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
    policy_version: int = 0
    deadline_s: float | None = None
    orchestrator: str = ""
    by_ticket: int = 0
    out_of_range: Mapping[str, int] = field(default_factory=dict)

    @property
    def ready(self) -> bool:
        return any(t.state is TailState.READY for t in self.tails.values())
