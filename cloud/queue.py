"""The queue of a cell: who is served next, and what is dropped.

Fairness: deficit round robin (Shreedhar and Varghese, SIGCOMM 1995) over
identities, in predicted evaluation seconds, so that a client of an expensive
tail does not starve one of a cheap tail. At most two evaluations are
outstanding per evaluator: one runs, one waits beside it. Work that expired is
dropped when its turn comes. A crash blames the evaluation that ran; it is tried
once more, on an idle evaluator; two crashes by one identity quarantine it. When
nothing waits, an idle evaluator can be taken aside for a short work of another kind.

Pure asyncio: knows neither Ray nor gRPC. Lives on one loop. Times are seconds.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from blindtail.errors import AccessDenied, DeadlineExceeded, EvaluationFailed, Overloaded, TailError
from blindtail.wire import EvaluateResult
from cloud.config import QueueLimits
from cloud.evaluators import EvaluatorCrashed, EvaluatorGone, Member, Pool, Work

_log = logging.getLogger(__name__)
#: Weight of the newest measurement in a program's predicted seconds.
_EWMA = 0.1
#: An evaluation that its evaluator lost through no fault of its own is sent this often at most.
_MAX_SENDS = 4


class Predictor:
    """Predicted evaluation seconds by program, corrected by what was measured."""

    def __init__(self, prior: Callable[[str], float]) -> None:
        self._prior = prior
        self._learned: dict[str, float] = {}

    def __call__(self, program_id: str) -> float:
        value = self._learned.get(program_id)
        if value is None:
            value = self._learned[program_id] = max(self._prior(program_id), 1e-4)
        return value

    def forget(self, program_id: str) -> None:
        """The program is served no more."""
        self._learned.pop(program_id, None)

    def learn(self, program_id: str, eval_s: float) -> None:
        old = self(program_id)
        # One outlier (a page fault, a stopped process) must not distort fairness.
        self._learned[program_id] = old + _EWMA * (min(eval_s, 4 * old) - old)


@dataclass(eq=False)
class Job:
    """One evaluation on its way. `deadline_s` is on the queue's clock."""

    identity: str
    work: Work
    cost_s: float
    enqueued_s: float
    deadline_s: float
    future: asyncio.Future[EvaluateResult]
    affinity: Hashable = None
    sent_s: float = 0.0
    sends: int = 0
    crashes: int = 0


@dataclass(eq=False)
class _Flow:
    jobs: deque[Job] = field(default_factory=deque)
    deficit_s: float = 0.0
    fresh_turn: bool = True


class Queue:
    """`submit` work, await its future. `on_wait(queue_s)` observes each dispatch."""

    def __init__(
        self,
        pool: Pool,
        limits: QueueLimits,
        predict: Predictor,
        clock: Callable[[], float],
        *,
        on_wait: Callable[[float], None] = lambda queue_s: None,
    ) -> None:
        self._pool, self._limits, self._predict, self._clock = pool, limits, predict, clock
        self._on_wait = on_wait
        self._flows: dict[str, _Flow] = {}
        self._turns: deque[str] = deque()
        self._retries: deque[Job] = deque()
        self._sent: dict[str, list[Job]] = {}  # by evaluator, oldest first
        # By evaluator, until its last job is handled; None = what it was taken aside for.
        self._ran_at_crash: dict[str, Job | None] = {}
        self._last_keys: dict[str, Hashable] = {}  # by evaluator
        self._aside: dict[str, str] = {}  # by evaluator: identity that it does something ahead for
        self._queued: dict[asyncio.Future[EvaluateResult], Job] = {}
        self._crashes: dict[str, list[float]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        #: Called when nothing waits: evaluators may be `idle`.
        self.on_idle: Callable[[], None] = lambda: None
        pool.on_change = self.dispatch

    def __len__(self) -> int:
        """Jobs that wait (those with an evaluator not counted)."""
        return len(self._queued)

    def submit(self, identity: str, work: Work, remaining_s: float) -> asyncio.Future[EvaluateResult]:
        """Raises `Overloaded`, `AccessDenied` (in quarantine) or `DeadlineExceeded` at once."""
        now = self._clock()
        if self._closed:
            raise Overloaded("the cell is shutting down: try again soon", 1.0)
        self.refuse_quarantined(identity)
        if remaining_s <= 0:
            raise DeadlineExceeded("no time was left when the request arrived")
        own = self._flows.get(identity)
        if len(self._queued) >= self._limits.jobs or (
            own is not None and len(own.jobs) >= self._limits.jobs_per_identity
        ):
            retry_s = self.backlog_s() / max(1, len(self._pool.members))
            raise Overloaded(
                f"the cell's queue is full: try again in {retry_s:.1f} s", min(max(retry_s, 0.1), 30.0)
            )
        job = Job(
            identity,
            work,
            self._predict(work.program_id),
            now,
            now + min(remaining_s, self._limits.max_wait_s),
            asyncio.get_running_loop().create_future(),
            affinity=work.keys,  # loaded once for all versions that answer for one
        )
        if own is None:  # a flow exists exactly while it has jobs
            own = self._flows[identity] = _Flow()
            self._turns.append(identity)
        own.jobs.append(job)
        self._queued[job.future] = job
        self.dispatch()
        return job.future

    def abandon(self, future: asyncio.Future[EvaluateResult]) -> None:
        """Nobody waits: withdraws a job that still queues; one that runs is finished."""
        job = self._queued.pop(future, None)
        if job is None:
            return
        if job in self._retries:
            self._retries.remove(job)
        else:
            self._remove(job)
        future.cancel()

    def backlog_s(self) -> float:
        """Predicted evaluation seconds of all that waits or runs."""
        running = sum(job.cost_s for jobs in self._sent.values() for job in jobs)
        return sum(job.cost_s for job in self._queued.values()) + running

    def dispatch(self) -> None:
        """Gives work to evaluators until they are full or no work is left."""
        while self._retries:
            member = self._pick(idle_only=True)
            if member is None:
                return  # fresh work waits, or a retry would never meet an idle evaluator
            self._send(self._retries.popleft(), member)
        while self._turns:
            member = self._pick()
            if member is None:
                return
            job = self._next()
            if job is None:
                return
            self._send(job, self._holder(job) or self._pick(affinity=job.affinity) or member)
        if not self._closed:
            self.on_idle()

    # -- what is done while nothing waits --------------------------------------

    def idle(self) -> list[Member]:
        """Evaluators with nothing to do; none while a request waits."""
        if self._queued or self._closed:
            return []
        return [m for m in self._pool.members if m.name not in self._sent and m.name not in self._aside]

    def take_aside(self, member: Member, identity: str) -> None:
        """The evaluator does something ahead for this identity, until `bring_back`. Requests may be
        sent to it, and wait."""
        self._aside[member.name] = identity

    def bring_back(self, member: Member, *, crashed: bool = False) -> None:
        """`crashed`: of what it was taken aside for, unless that was after it was done."""
        identity = self._aside.pop(member.name, "")
        if crashed:
            # Requests that it was sent meanwhile had not begun.
            if member.name in self._sent:
                self._ran_at_crash.setdefault(member.name, None)
            self._blame(identity)
        self.dispatch()

    async def close(self) -> None:
        """Refuses what waits; gives up what runs."""
        self._closed = True
        for job in list(self._queued.values()):
            if not job.future.done():
                job.future.set_exception(Overloaded("the cell is shutting down: try again soon", 1.0))
        self._queued.clear()
        self._flows.clear()
        self._turns.clear()
        self._retries.clear()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- whose turn ------------------------------------------------------------

    def _next(self) -> Job | None:
        """The next live job by deficit round robin; expired ones are dropped on the way."""
        while self._turns:
            identity = self._turns[0]
            flow = self._flows[identity]
            if flow.fresh_turn:
                # The quantum is the largest cost that waits: every turn serves at least one job.
                flow.deficit_s += max(f.jobs[0].cost_s for f in self._flows.values())
                flow.fresh_turn = False
            job = flow.jobs[0]
            if job.deadline_s <= self._clock():
                self._remove(job)
                self._drop(job)
                continue
            if job.cost_s > flow.deficit_s + 1e-12:
                flow.fresh_turn = True
                self._turns.rotate(-1)
                continue
            flow.deficit_s -= job.cost_s
            self._remove(job)
            return job
        return None

    def _pick(self, *, idle_only: bool = False, affinity: Hashable = None) -> Member | None:
        """The evaluator with the fewest outstanding; among equals, the one with the keys loaded."""
        best: Member | None = None
        best_rank: tuple[int, bool] = (0, False)
        for member in self._pool.members:
            outstanding = self._outstanding(member)
            limit = 1 if idle_only else self._limits.outstanding_per_evaluator
            if outstanding >= limit:
                continue
            rank = (outstanding, affinity is None or self._last_keys.get(member.name) != affinity)
            if best is None or rank < best_rank:
                best, best_rank = member, rank
        return best

    def _holder(self, job: Job) -> Member | None:
        """The evaluator that has done a part of this job ahead, if it is not full."""
        if job.work.holder:
            for member in self._pool.members:
                if member.name == job.work.holder:
                    free = self._outstanding(member) < self._limits.outstanding_per_evaluator
                    return member if free else None
        return None

    def _outstanding(self, member: Member) -> int:
        return len(self._sent.get(member.name, ())) + (member.name in self._aside)

    def _remove(self, job: Job) -> None:
        flow = self._flows[job.identity]
        flow.jobs.remove(job)
        if not flow.jobs:
            del self._flows[job.identity]
            self._turns.remove(job.identity)

    def _drop(self, job: Job) -> None:
        self._queued.pop(job.future, None)
        if not job.future.done():
            job.future.set_exception(DeadlineExceeded("the deadline passed while the request was queued"))

    # -- in flight -------------------------------------------------------------

    def _send(self, job: Job, member: Member) -> None:
        if job.deadline_s <= self._clock():
            self._drop(job)
            return
        self._queued.pop(job.future, None)
        self._sent.setdefault(member.name, []).append(job)
        self._last_keys[member.name] = job.affinity
        job.sends += 1
        job.sent_s = self._clock()
        task = asyncio.create_task(self._run(job, member))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, job: Job, member: Member) -> None:
        outcome: EvaluateResult | TailError | None = None
        try:
            reply, eval_s, ticket = await member.evaluate(job.work)
            if not ticket:
                self._predict.learn(job.work.program_id, eval_s)
            # Waiting beside a running evaluation is queueing as well.
            queue_s = max(0.0, self._clock() - job.enqueued_s - eval_s)
            self._on_wait(queue_s)
            outcome = EvaluateResult(
                reply, queue_s, eval_s, member.name, version=job.work.version, ticket=ticket
            )
        except TailError as error:
            outcome = error
        except EvaluatorGone as error:
            outcome = self._lost(job, member, isinstance(error, EvaluatorCrashed))
        except Exception as error:
            _log.error("evaluation failed on %s: %s", member.name, type(error).__name__)
            outcome = EvaluationFailed("the evaluator failed on this request; the cloud's log says why")
        finally:
            sent = self._sent.get(member.name, [])
            if job in sent:
                sent.remove(job)
            if not sent:
                self._sent.pop(member.name, None)
                self._ran_at_crash.pop(member.name, None)
            self._finish(job, outcome)
            if not self._closed:
                self.dispatch()

    def _finish(self, job: Job, outcome: EvaluateResult | TailError | None) -> None:
        if job.future.done() or job.future in self._queued:
            return
        if outcome is None:
            job.future.cancel()
        elif isinstance(outcome, EvaluateResult):
            job.future.set_result(outcome)
        else:
            job.future.set_exception(outcome)

    def _lost(self, job: Job, member: Member, arrived: bool) -> TailError | None:
        """Puts the job back, or says why not. The oldest job that had arrived is the one that ran,
        unless the evaluator was aside."""
        first = None if member.name in self._aside else self._sent[member.name][0]
        if arrived and self._ran_at_crash.setdefault(member.name, first) is job:
            job.crashes += 1
            self._blame(job.identity)
        now = self._clock()
        if job.crashes >= 2 or job.sends >= _MAX_SENDS:
            return EvaluationFailed("the evaluator crashed twice on this request: it is not tried again")
        if self._closed or job.deadline_s <= now:
            return DeadlineExceeded("the evaluator crashed, and no time was left to try again")
        self._queued[job.future] = job
        self._retries.append(job)
        return None

    def _blame(self, identity: str) -> None:
        now = self._clock()
        recent = [t for t in self._crashes.get(identity, []) if now - t <= self._limits.crash_window_s]
        self._crashes[identity] = [*recent, now][-2:]

    def refuse_quarantined(self, identity: str) -> None:
        """Raises `AccessDenied` for an identity whose requests crashed two evaluators of late."""
        now = self._clock()
        crashes = self._crashes.get(identity, [])
        if len(crashes) < 2 or crashes[1] - crashes[0] > self._limits.crash_window_s:
            return
        left_s = crashes[1] + self._limits.quarantine_s - now
        if left_s <= 0:
            del self._crashes[identity]
            return
        raise AccessDenied(
            f"two evaluators crashed on requests of this client: it is refused for another {left_s:.0f} s"
        )


__all__ = ["Job", "Predictor", "Queue"]
