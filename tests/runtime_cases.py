"""A runtime with one tail at most, and images that its exits are sure or unsure of."""

from __future__ import annotations

from typing import Any

from edge.runtime import EdgeRuntime
from orchestrator.policy import ExitThreshold, Policy
from tests.edge_fakes import FakeTail, bundle_of

UNSURE, SURE = 60, 250
THRESHOLDS = (0.9, 0.9)


def runtime(tail: FakeTail | None = None, policy: Policy | None = None, **settings: Any) -> EdgeRuntime:
    tails = {} if tail is None else {2: tail}
    bundle = settings.pop("bundle", None) or bundle_of()
    return EdgeRuntime(bundle, tails, policy or ExitThreshold(THRESHOLDS), **settings)
