"""What a policy gets to see of a running request."""

from __future__ import annotations

from collections.abc import Mapping

from blindtail.bundle import EdgeBundle
from blindtail.records import DecisionContext
from edge.latency import LatencyBook
from edge.offloads import Offloads
from edge.request import Clock, Request
from edge.tail import Tail


class View:
    """Makes the frozen context of one decision from the request, the tails and what was learned."""

    def __init__(
        self,
        bundle: EdgeBundle,
        tails: Mapping[int, Tail],
        latencies: LatencyBook,
        offloads: Offloads,
        clock: Clock,
    ) -> None:
        self._stages, self._tails = len(bundle.stages), tails
        self._latencies, self._offloads, self._clock = latencies, offloads, clock
        self._exit_after = {e.after_stage: i for i, e in enumerate(bundle.exits)}

    def context(self, request: Request, stage: int) -> DecisionContext:
        """As of now, after `stage` has run."""
        now_s = self._clock()
        tail = self._tails.get(stage)
        following = [s for s in self._exit_after if s > stage]
        next_exit = None
        if following:
            steps = [f"stage{s}" for s in range(stage + 1, min(following) + 1)]
            steps.append(f"exit{self._exit_after[min(following)]}")
            next_exit = self._latencies.sum(tuple(steps), now_s)
        ready = tail.ready if tail is not None else any(t.ready for t in self._tails.values())
        ticket = tail is not None and ready and tail.tickets > 0
        return DecisionContext(
            stage=stage,
            stages=self._stages,
            exits=tuple(request.exits),
            exit_here=self._exit_after.get(stage),
            cut_here=tail is not None,
            tail_ready=ready,
            elapsed_s=request.elapsed_s(),
            deadline_s=request.deadline_s,
            offload=self._offloads.estimate(stage, ticket, now_s) if tail is not None and ready else None,
            next_exit=next_exit,
            cut_ahead=any(cut > stage for cut in self._tails),
            ticket=ticket,
            eval_online_s=None if tail is None else self._offloads.eval_online_s(stage),
            eval_total_s=None if tail is None else self._offloads.eval_total_s(stage),
        )
