"""Policies as an orchestrator sends them, and some that no release has."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest

from blindtail.policy_document import Objectives, PolicyDocument
from blindtail.records import Decision, DecisionContext
from blindtail.wire.control import PolicyUpdate
from orchestrator import policy as policies
from orchestrator.policy import POLICIES, Policy


def update(
    version: int = 1,
    policy: str = "deadline",
    parameters: Mapping[str, Any] | None = None,
    deadline_s: float | None = None,
    model: str = "",
) -> PolicyUpdate:
    document = PolicyDocument(policy, parameters or {}, Objectives(deadline_s))
    return PolicyUpdate(version, model, document.encode())


class Strange(Policy):
    """A policy of another release, or one with a fault."""

    name: ClassVar[str] = "strange"

    def __init__(self, decision: Any) -> None:
        self.decision = decision

    def decide(self, context: DecisionContext) -> Decision:
        found: Decision = self.decision(context)
        return found


def introduce(monkeypatch: pytest.MonkeyPatch, decide: Any) -> None:
    """Makes a policy called "strange" known."""

    @dataclasses.dataclass(frozen=True)
    class Made(Policy):
        name: ClassVar[str] = "strange"

        def decide(self, context: DecisionContext) -> Decision:
            found: Decision = decide(context)
            return found

    monkeypatch.setattr(policies, "POLICIES", {**POLICIES, "strange": Made})
