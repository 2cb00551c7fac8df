"""Policies: pure functions from what an edge knows to what it does next.

A policy sees one frozen `DecisionContext` after each stage of the head and says
EXIT, CONTINUE or OFFLOAD. It holds no state and reads no clock: time and learned
latencies are part of the context. This module imports the standard library and
`blindtail.records` only, so that edge, orchestrator and simulator share it.

All policies agree on two things. An exit is *sure* when its calibrated confidence
reaches its threshold. When an unsure input cannot be offloaded, the exit with the
highest calibrated confidence answers; the decision's reason is then
"unavailable" when only the missing tail stood in the way.
"""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from blindtail.records import Action, Decision, DecisionContext, ExitSeen

#: `Decision.reason` of an exit that answers only because no tail was there.
UNAVAILABLE = "unavailable"


class PolicyError(ValueError):
    """A policy's name or parameters are wrong; the message says which and what is allowed."""


def best_exit(exits: Sequence[ExitSeen]) -> ExitSeen | None:
    """The exit with the highest calibrated confidence (the later one on a tie), or None."""
    return max(exits, key=lambda e: (e.confidence, e.index), default=None)


class Policy(ABC):
    """`decide` must be pure: the same context always gives the same decision."""

    name: ClassVar[str]

    @abstractmethod
    def decide(self, context: DecisionContext) -> Decision:
        """Called once after every stage of the head."""


@dataclass(frozen=True)
class ExitThreshold(Policy):
    """Answer from the first sure exit; offload at the model's last cut what stays unsure.

    thresholds  confidence at which each exit is sure, one per exit

    Deadlines are ignored here: a late reply falls back to the best exit.
    """

    name: ClassVar[str] = "threshold"
    thresholds: tuple[float, ...]

    def __post_init__(self) -> None:
        _check_thresholds(self.name, self.thresholds)

    def decide(self, context: DecisionContext) -> Decision:
        if sure := _sure(context, self.thresholds):
            return Decision(Action.EXIT, sure.index, "sure")
        if context.can_offload and not context.cut_ahead:
            return Decision(Action.OFFLOAD, reason="unsure")
        if not context.last_stage:
            return Decision(Action.CONTINUE, reason="unsure")
        return _give_up(context)


@dataclass(frozen=True)
class EdgeOnly(Policy):
    """Never offload: the first sure exit answers, or the most confident one at the end.

    thresholds  confidence at which each exit is sure; above 1 an exit never answers early
    """

    name: ClassVar[str] = "edge-only"
    thresholds: tuple[float, ...]

    def __post_init__(self) -> None:
        _check_thresholds(self.name, self.thresholds)

    def decide(self, context: DecisionContext) -> Decision:
        if sure := _sure(context, self.thresholds):
            return Decision(Action.EXIT, sure.index, "sure")
        if not context.last_stage:
            return Decision(Action.CONTINUE, reason="unsure")
        return _give_up(context, offers_tail=False)


@dataclass(frozen=True)
class CloudOnly(Policy):
    """Offload everything, at `cut` (index of a stage) or, without one, at the model's last cut."""

    name: ClassVar[str] = "cloud-only"
    cut: int | None = None

    def __post_init__(self) -> None:
        if self.cut is not None and (not isinstance(self.cut, int) or self.cut < 0):
            raise PolicyError(
                f"policy {self.name}: cut is the index of a stage, 0 or more, not {self.cut!r:.60}"
            )

    def decide(self, context: DecisionContext) -> Decision:
        wanted = not context.cut_ahead if self.cut is None else context.stage == self.cut
        if wanted and context.can_offload:
            return Decision(Action.OFFLOAD, reason="always")
        if not context.last_stage:
            return Decision(Action.CONTINUE, reason="always")
        return _give_up(context)


@dataclass(frozen=True)
class DeadlineAware(Policy):
    """The cheapest action that can still give a sure answer by the deadline.

    Cost order, cheapest first; the first admissible action is taken:

    1. EXIT from a sure exit: costs nothing more.
    2. CONTINUE to the next exit or cut, some milliseconds of the edge's own time.
       Admissible when the next exit's predicted p95 meets the deadline *and* no
       offload that is possible here is given away: then a later cut must exist
       and the time left must cover the next exit and an offload after it.
    3. OFFLOAD at this cut: uplink bytes and the cloud's seconds. Admissible when
       the tail is ready and the predicted p95, times `safety`, plus `reserve_s`,
       meets the deadline. That is shorter while a ticket is at hand.
    4. EXIT from the most confident exit, unsure as it is (or CONTINUE while no
       exit has been seen).

    thresholds  confidence at which each exit is sure, one per exit
    safety      factor on the predicted p95 of an offload (1 = take it as it is)
    reserve_s   seconds of the deadline that an offload must leave unused
    """

    name: ClassVar[str] = "deadline"
    thresholds: tuple[float, ...]
    safety: float = 1.0
    reserve_s: float = 0.0

    def __post_init__(self) -> None:
        _check_thresholds(self.name, self.thresholds)
        if not (_is_number(self.safety) and self.safety > 0):
            raise PolicyError(f"policy {self.name}: safety must be above 0, not {self.safety!r:.60}")
        if not (_is_number(self.reserve_s) and self.reserve_s >= 0):
            raise PolicyError(f"policy {self.name}: reserve_s must be 0 or more, not {self.reserve_s!r:.60}")

    def decide(self, context: DecisionContext) -> Decision:
        if sure := _sure(context, self.thresholds):
            return Decision(Action.EXIT, sure.index, "sure")
        left_s = math.inf if context.deadline_s is None else context.deadline_s - context.elapsed_s
        next_s = context.next_exit.p95_s if context.next_exit else 0.0
        offload_s = math.inf
        if context.can_offload and context.offload is not None:
            offload_s = context.offload.p95_s * self.safety + self.reserve_s
        if offload_s < math.inf and offload_s <= left_s:
            if context.cut_ahead and not context.last_stage and next_s + offload_s <= left_s:
                return Decision(Action.CONTINUE, reason="unsure")
            return Decision(Action.OFFLOAD, reason="unsure")
        leads_on = context.next_exit is not None or (context.cut_ahead and context.tail_ready)
        if not context.last_stage and (not context.exits or (leads_on and next_s <= left_s)):
            return Decision(Action.CONTINUE, reason="unsure")
        best = best_exit(context.exits)
        if best is not None and context.can_offload:
            return Decision(Action.EXIT, best.index, "no time")
        return _give_up(context)


POLICIES: Mapping[str, type[Policy]] = {
    p.name: p for p in (DeadlineAware, ExitThreshold, EdgeOnly, CloudOnly)
}


def make_policy(
    name: str, parameters: Mapping[str, Any] | None = None, *, thresholds: Sequence[float] = ()
) -> Policy:
    """Builds the policy `name` (a key of `POLICIES`) from checked parameters.

    thresholds  the model's own, one per exit: used when `parameters` gives none

    A single number given as `thresholds` parameter applies to every exit. Raises
    `PolicyError` (a `ValueError`) that names what is unknown and what is allowed.
    """
    if name not in POLICIES:
        raise PolicyError(f"unknown policy {name!r}{_closest(name, POLICIES)}; known: {', '.join(POLICIES)}")
    known = [f.name for f in fields(POLICIES[name])]  # type: ignore[arg-type]
    values = dict(parameters or {})
    for key in values:
        if key not in known:
            allowed = ", ".join(known) or "none"
            raise PolicyError(
                f"policy {name} has no parameter {key!r}{_closest(key, known)}; it has: {allowed}"
            )
    if "thresholds" in known:
        given = values.get("thresholds", tuple(thresholds))
        if _is_number(given):
            given = (given,) * max(1, len(thresholds))
        if not isinstance(given, Sequence) or isinstance(given, str):
            raise PolicyError(
                f"policy {name}: thresholds is a number or a list of numbers, not {given!r:.60}"
            )
        if thresholds and len(given) != len(thresholds):
            raise PolicyError(
                f"policy {name}: {len(given)} thresholds given, but the model has {len(thresholds)} exits"
            )
        values["thresholds"] = tuple(given)
    return POLICIES[name](**values)


def _sure(context: DecisionContext, thresholds: tuple[float, ...]) -> ExitSeen | None:
    """The exit evaluated right here, if it is sure."""
    if context.exit_here is None or not context.exits:
        return None
    seen = context.exits[-1]
    return seen if seen.confidence >= thresholds[min(seen.index, len(thresholds) - 1)] else None


def _give_up(context: DecisionContext, *, offers_tail: bool = True) -> Decision:
    """The most confident exit answers (or the head goes on while none has been seen)."""
    best = best_exit(context.exits)
    reason = UNAVAILABLE if offers_tail and context.cut_here and not context.tail_ready else "unsure"
    if best is None and not context.last_stage:
        return Decision(Action.CONTINUE, reason=reason)
    return Decision(Action.EXIT, best.index if best else None, reason)


def _check_thresholds(name: str, thresholds: tuple[float, ...]) -> None:
    if not thresholds:
        raise PolicyError(f"policy {name} needs thresholds: one confidence per exit")
    for value in thresholds:
        if not (_is_number(value) and value >= 0):
            raise PolicyError(f"policy {name}: a threshold is a confidence of 0 or more, not {value!r:.60}")


def _is_number(value: object) -> bool:
    """A finite number that a float can hold."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _closest(word: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
