"""Is a policy fit for use? Its document, checked before anybody gets it; then what edges say about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Set
from dataclasses import dataclass, field

from blindtail.errors import ConfigError
from blindtail.policy_document import PolicyDocument
from orchestrator.policy import make_policy
from orchestrator.store import Stored, Vote

#: In force for edges that refuse a policy and have had none before: as without an orchestrator.
OWN_DEFAULT = PolicyDocument("deadline")
#: A reason of an edge is shown to operators up to this length.
_REASON_CHARS = 200


def checked(document: bytes) -> PolicyDocument:
    """The policy as every release with its name and parameters would take it.

    How many exits a model has is not known here: an edge that finds the wrong number
    of thresholds refuses. Raises `ConfigError` with what is allowed, and the closest name.
    """
    found = PolicyDocument.decode(document)
    # One threshold stands for the model's own.
    own = () if "thresholds" in found.parameters else (0.5,)
    try:
        make_policy(found.policy, found.parameters, thresholds=own)
    except (ValueError, TypeError, OverflowError) as error:
        raise ConfigError(str(error)) from error
    return found


@dataclass
class Rollout:
    """A version in force, since when (seconds of our clock), and each edge's last word on it."""

    stored: Stored
    since_s: float
    votes: dict[str, Vote] = field(default_factory=dict)

    @property
    def doubtful(self) -> bool:
        """True when it may have to be taken back. What undoes another version stays: it was good
        before, and edges that refuse everything must not start a chain."""
        return self.stored.undoes is None and any(not vote.applied for vote in self.votes.values())

    def refused_by(self, attached: Set[str], share: float, settled: bool) -> str | None:
        """Why this version must be taken back, or None.

        It must when at least `share` of all edges refuse it: those attached, and those that have
        answered before. Edges that have said nothing may still apply it, so a share of the few
        first answers counts only once all had time to answer (`settled`).
        """
        refusals = [vote.reason for vote in self.votes.values() if not vote.applied]
        if not refusals:
            return None
        of = len(self.votes) if settled else len(attached | self.votes.keys())
        if len(refusals) < share * of:
            return None
        (reason, _), *_ = Counter(refusals).most_common(1)
        return f"refused by {len(refusals)} of {of} edges: {reason or 'no reason given'}"


def shown(reason: str) -> str:
    """A peer's text, fit for an operator's terminal and the log."""
    return "".join(c if c.isprintable() else " " for c in reason)[:_REASON_CHARS].strip()


__all__ = ["OWN_DEFAULT", "Rollout", "checked", "shown"]
