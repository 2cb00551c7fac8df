"""Plain frozen records that roles exchange. Standard library only.

Times are seconds on the local monotonic clock (`_s`), sizes are bytes
(`_bytes`), confidences are calibrated probabilities in [0, 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


class Action(Enum):
    """What a policy can ask for after a stage of the head has run."""

    EXIT = "exit"  # answer now from `Decision.exit_index`
    CONTINUE = "continue"  # run the next stage of the head
    OFFLOAD = "offload"  # encrypt the activation at this cut and ask the cloud


@dataclass(frozen=True, slots=True)
class Decision:
    """A policy's verdict. `exit_index` is the exit to answer from (EXIT only)."""

    action: Action
    exit_index: int | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class ExitSeen:
    """One early exit's calibrated view of this input."""

    index: int  # index into the model's exits
    confidence: float  # max probability after temperature scaling
    margin: float  # top probability minus the second
    entropy: float  # nats


@dataclass(frozen=True, slots=True)
class LatencyEstimate:
    """Quantiles of a latency as learned so far, seconds. `samples` = 0 means a prior."""

    p50_s: float
    p95_s: float
    samples: int = 0


@dataclass(frozen=True, slots=True)
class DecisionContext:
    """All a policy may look at; time is part of it, so that `decide` is pure.

    stage            index of the stage that has just run
    stages           number of stages of the head
    exits            exits evaluated so far, in order (may be empty)
    exit_here        index of the exit evaluated right after this stage, or None
    cut_here         True when the model allows a cut after this stage
    tail_ready       True when keys are uploaded and the session is registered
    elapsed_s        time since `infer` was called
    deadline_s       the request's deadline, counted from the call; None = none
    offload          predicted time from this decision to the tail's answer, with a ticket
                     when one is at hand; None when this stage is no cut or the tail is not ready
    next_exit        predicted time from this decision to the next exit's answer,
                     or None when no exit follows
    cut_ahead        True when the model allows a cut after a later stage
    ticket           True when a ticket for the tail here is at hand: the cloud has been told its
                     seed, and has then most of the evaluation behind it
    eval_online_s    predicted evaluation in the cloud with a ticket; None when this is no cut
    eval_total_s     the same without one
    """

    stage: int
    stages: int
    exits: tuple[ExitSeen, ...]
    exit_here: int | None
    cut_here: bool
    tail_ready: bool
    elapsed_s: float
    deadline_s: float | None
    offload: LatencyEstimate | None
    next_exit: LatencyEstimate | None
    cut_ahead: bool = False
    ticket: bool = False
    eval_online_s: float | None = None
    eval_total_s: float | None = None

    @property
    def eval_s(self) -> float | None:
        """The evaluation that `offload` counts with."""
        return self.eval_online_s if self.ticket else self.eval_total_s

    @property
    def last_stage(self) -> bool:
        return self.stage == self.stages - 1

    @property
    def can_offload(self) -> bool:
        return self.cut_here and self.tail_ready


@dataclass(frozen=True, slots=True)
class Timings:
    """Where one answer's time went, seconds; a step that did not run is 0.

    The steps do not overlap and add up to `total_s` less what is named nowhere.
    `queue_s` and `eval_s` are reported by the cloud on its own clock; `network_s`
    is the round trip less those two. Of a refreshed tail each is the sum over all
    round trips, and `interlude_s` what the edge did between them.
    """

    total_s: float = 0.0
    head_s: float = 0.0
    exits_s: float = 0.0
    decide_s: float = 0.0
    encrypt_s: float = 0.0
    network_s: float = 0.0
    queue_s: float = 0.0
    eval_s: float = 0.0
    decrypt_s: float = 0.0
    interlude_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What `EdgeRuntime.infer` returns.

    route     "exit1", "exit2", ... (1-based), or "tail"
    fallback  None, or why the best exit answered instead of the tail
              ("deadline", "unavailable", "overloaded", "session", "keys", "evaluation", "refused")
    extra     "cut" of an offload, "policy_version" of an orchestrator's policy, "ticket" = 1 when
              the cloud had done most of the evaluation ahead; "round_trips" completed, where the
              tail is a refreshed one; "activation_range", "logit_range": multiple of the
              calibrated range where values lie outside it (`edge.ranges`)
    """

    label: int
    class_name: str
    probabilities: tuple[float, ...]
    confidence: float
    route: str
    fallback: str | None
    timings: Timings
    uplink_bytes: int = 0
    reply_bytes: int = 0
    exits: tuple[ExitSeen, ...] = ()
    extra: Mapping[str, float] = field(default_factory=dict)

    @property
    def offloaded(self) -> bool:
        return self.route == "tail"


@dataclass(frozen=True, slots=True)
class TailTimings:
    """What the cloud says about one evaluation, on its own clock.

    `version` of the model that answered; a cell that is `draining` wants its
    sessions to move to another. With a `ticket`, `eval_s` is what was left to do.
    """

    queue_s: float
    eval_s: float
    evaluator: str = ""
    draining: bool = False
    version: str = ""
    ticket: bool = False


@dataclass(frozen=True, slots=True)
class TailReply:
    """One evaluated container and its timings."""

    container: bytes
    timings: TailTimings
    round_trip_s: float
