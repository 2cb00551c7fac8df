"""EdgeRuntime: an image in, an answer out, always, also when the cloud is gone."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from blindtail.bundle import EdgeBundle
from blindtail.errors import ConfigError, DeadlineExceeded, InputError, StateError, TailError
from blindtail.metrics import EdgeMetrics
from blindtail.records import Action, Answer, Decision
from blindtail.rpc import Credentials
from blindtail.wire.control import Report
from edge.accounting import Accounting, report_of
from edge.activity import Activity
from edge.control import PolicyControl, Rules
from edge.executor import HeadExecutor, softmax
from edge.interludes import Interludes
from edge.keyfiles import default_state_dir
from edge.latency import LatencyBook
from edge.offloads import Offloads
from edge.priors import priors_of
from edge.ranges import LOGITS, Ranges
from edge.request import Clock, Request
from edge.round_trips import RoundTrips
from edge.stages import Stages
from edge.status import RuntimeStatus
from edge.tail import Tail, fallback_reason, in_all
from edge.trial import policy_for
from edge.view import View
from orchestrator.policy import UNAVAILABLE, Policy, best_exit

_log = logging.getLogger(__name__)

#: Answers of `infer_async` that are worked on at once; more wait for their turn.
ASYNC_THREADS = 8


class EdgeRuntime:
    """Classifies images on the edge, through early exits or the encrypted tail.

        with EdgeRuntime.open("edge.bt", "cloud.example:50051", credentials=tls) as edge:
            answer = edge.infer(image, deadline_s=0.5)

    Thread-safe. `infer` raises only `InputError` (a bad image) and `StateError`
    (closed); whatever happens to the cloud, an exit answers in time. No image,
    activation, logit or key is ever logged, and nothing that was decrypted leaves
    this object except in the `Answer`.
    """

    def __init__(
        self,
        bundle: EdgeBundle,
        tails: Mapping[int, Tail],
        policy: Policy,
        *,
        clock: Clock = time.monotonic,
        head: HeadExecutor | None = None,
        latencies: LatencyBook | None = None,
        offloads: Offloads | None = None,
        activity: Activity | None = None,
        deadline_s: float | None = None,
        metrics: EdgeMetrics | None = None,
    ) -> None:
        """Composition by hand; `open` is the usual door. `tails`: cut -> tail, owned from now on.
        `activity`: told of every request, for those tails."""
        unknown = set(tails) - set(bundle.cuts)
        if unknown:
            raise ConfigError(f"model {bundle.model} has no cut after stage {min(unknown)}")
        self.bundle = bundle
        self._rules = Rules(policy, deadline_s)
        self._control: PolicyControl | None = None
        self._metrics = metrics
        self._accounting = Accounting(metrics)
        self._tails = dict(tails)
        self._clock = clock
        self._head = head or HeadExecutor(bundle)
        self._latencies = latencies or LatencyBook(priors_of(bundle))
        self._offloads = offloads or Offloads.of(bundle, self._latencies)
        self._activity = activity or Activity(clock)
        self._ranges = Ranges({cut: bundle.segments(cut) for cut in bundle.cuts})
        self._interludes = Interludes(bundle)
        self._stages = Stages(bundle, self._head, self._latencies, clock)
        self._view = View(bundle, self._tails, self._latencies, self._offloads, clock)
        self._pool = ThreadPoolExecutor(ASYNC_THREADS, thread_name_prefix="infer")
        self._closed = False
        self._head.warm_up()
        if metrics is not None:
            metrics.watch(lambda: {cut: t.status().state.name.lower() for cut, t in self._tails.items()})

    @classmethod
    def open(
        cls,
        edge_bt: str | Path | EdgeBundle,
        address: str | Sequence[str] | None = None,
        *,
        credentials: Credentials = None,
        policy: Policy | str = "deadline",
        policy_parameters: Mapping[str, Any] | None = None,
        deadline_s: float | None = None,
        state_dir: str | Path | None = None,
        uplink_bps: float | None = None,
        backend: str = "seal",
        threads: int = 1,
        tickets: int = 4,
        orchestrator: str | None = None,
        clock: Clock = time.monotonic,
        metrics: EdgeMetrics | None = None,
    ) -> Self:
        """Loads `edge.bt`, starts keys and session in the background, answers at once.

        address      "host:port" of the cloud, or several ("a:1,b:2"): the first is preferred;
                     None = this device works alone
        credentials  `ClientTlsFiles` (read again when they change), `ClientTls`, or
                     "insecure-loopback" for plaintext to this host
        policy       a name (`orchestrator.policy.POLICIES`) or a `Policy`
        deadline_s   default deadline of a request; None = none
        state_dir    where keys live (default: ~/.local/state/blindtail); share it
                     between runtimes of one device and they share one key set
        uplink_bps   the uplink's bits per second; keys are uploaded at less than
                     half of it. None = as fast as the link takes them
        tickets      encryptions prepared in quiet moments for each cut, so that the cloud can do most
                     of an evaluation ahead; (levels + 1) * N * 8 bytes each; 0 = none
        orchestrator "host:port" of who hands down policies and objectives, with the
                     same credentials; see `attach`
        metrics      counters for Prometheus, see `blindtail.metrics`
        backend      "seal", or "clear" (no encryption at all: for tests only)

        Raises `BundleError` for a damaged file, `ConfigError` for a wrong setting.
        """
        bundle = edge_bt if isinstance(edge_bt, EdgeBundle) else EdgeBundle.open(edge_bt)
        if isinstance(policy, str):
            policy = policy_for(bundle, policy, policy_parameters)
        tails: dict[int, Tail] = {}
        latencies, activity = LatencyBook(priors_of(bundle, uplink_bps)), Activity(clock)
        offloads = Offloads.of(bundle, latencies)
        if address is not None:
            from edge.tails import open_tails

            tails = open_tails(
                bundle,
                address,
                credentials=credentials,
                state_dir=state_dir,
                uplink_bps=uplink_bps,
                backend=backend,
                on_probe=lambda cut, s, timings: offloads.observe(cut, s, timings, clock()),
                on_upload=None if metrics is None else metrics.keys_uploaded,
                tickets=tickets,
                activity=activity,
            )
        try:
            runtime = cls(
                bundle,
                tails,
                policy,
                clock=clock,
                head=HeadExecutor(bundle, threads=threads),
                latencies=latencies,
                offloads=offloads,
                activity=activity,
                deadline_s=deadline_s,
                metrics=metrics,
            )
            if orchestrator is not None:
                runtime.attach(orchestrator, credentials, state_dir)
        except BaseException:
            for tail in tails.values():
                tail.close()
            raise
        return runtime

    # -- the one path ----------------------------------------------------------

    def infer(self, image: NDArray[Any], deadline_s: float | None = None) -> Answer:
        """Answers one image of shape (C, H, W), or (H, W) for one channel.

        deadline_s  seconds from this call; None = the runtime's default

        Stages run one by one. After each, the policy says EXIT, CONTINUE or
        OFFLOAD. An offload that fails or would be late is answered by the exit
        with the highest calibrated confidence, with `Answer.fallback` saying why.
        Raises `InputError` and `StateError`, never an error of the cloud's.
        """
        return self._infer(image, deadline_s, self._clock())

    def _infer(self, image: NDArray[Any], deadline_s: float | None, started_s: float) -> Answer:
        request = self._request(deadline_s, started_s)
        with self._activity.request():
            return self._answer(request, image)

    def _answer(self, request: Request, image: NDArray[Any]) -> Answer:
        x = self._head.prepare(image)
        for stage in range(len(self.bundle.stages)):
            x = self._stages.run(request, stage, x)
            decision = self._decide(request, stage)
            if decision.action is Action.EXIT:
                return self._exit(request, stage, x, decision)
            if request.exits and request.late():
                return self._fall_back(request, stage, x, "deadline")
            if decision.action is Action.OFFLOAD:
                return self._offload(request, stage, x)
        return self._fall_back(request, len(self.bundle.stages) - 1, x, None)

    def _exit(self, request: Request, stage: int, x: NDArray[np.float32], decision: Decision) -> Answer:
        """The exit that the policy names; marked when only a missing tail made it answer."""
        reason = UNAVAILABLE if decision.reason == UNAVAILABLE else None
        if decision.exit_index is not None and request.has_seen(decision.exit_index):
            return self._accounting.count(request.answer_exit(decision.exit_index, reason))
        return self._fall_back(request, stage, x, reason)

    def _offload(self, request: Request, cut: int, x: NDArray[np.float32]) -> Answer:
        """Encrypt, evaluate, decrypt, once a segment; whatever goes wrong, the best exit answers."""
        # Bought beforehand: when the reply does not come, no time is left for it.
        self._stages.ensure_exit(request, cut, x)
        began_s = self._clock()
        try:
            tail = self._tails.get(cut)
            cipher = None if tail is None else tail.cipher
            if tail is None or cipher is None:
                return self._fall_back(request, cut, x, UNAVAILABLE)
            values, told = self._interludes.begin(cut, x), []
            trips = len(self.bundle.segments(cut))
            made = RoundTrips(request, cut, tail, cipher, values, self._latencies, self._ranges, self._clock)
            for segment in range(trips):
                told.append(made.make(segment))
                request.round_trips += trips > 1
            logits, timings = values.logits, in_all(told)
        except Exception as error:
            self._learn_failure(request, cut, error, self._clock() - began_s)
            return self._fall_back(request, cut, x, fallback_reason(error))
        now_s = self._clock()
        self._latencies.observe("encrypt", request.spent["encrypt"] / trips, now_s)
        self._latencies.observe("decrypt", request.spent["decrypt"] / trips, now_s)
        self._offloads.observe(cut, now_s - began_s, timings, now_s, sent=request.sent_ticket)
        if request.late():
            return self._fall_back(request, cut, x, "deadline")
        classes = len(self.bundle.class_names)
        if values.strange or logits.shape != (classes,) or not np.isfinite(logits).all():
            return self._fall_back(request, cut, x, "refused")
        if cut not in self.bundle.refreshed or not self.bundle.refreshed[cut].ends_in_interlude:
            request.notes |= self._ranges.note(LOGITS, cut, logits, trips - 1)
        return self._accounting.count(request.answer(softmax(logits), "tail", cut=cut))

    async def infer_async(self, image: NDArray[Any], deadline_s: float | None = None) -> Answer:
        """As `infer`, without blocking the event loop; the deadline counts from this call."""
        if self._closed:
            raise StateError("this runtime is closed: open a new one")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, self._infer, image, deadline_s, self._clock())

    # -- steps -----------------------------------------------------------------

    def _request(self, deadline_s: float | None, started_s: float) -> Request:
        if self._closed:
            raise StateError("this runtime is closed: open a new one")
        rules = self._rules  # one look: they may be replaced at any moment
        deadline_s = rules.deadline_s if deadline_s is None else deadline_s
        if deadline_s is not None and not deadline_s > 0:
            raise InputError(f"a deadline is a number of seconds above 0, not {deadline_s!r}")
        names = self.bundle.class_names
        return Request(self._clock, started_s, deadline_s, names, rules.policy, rules.version)

    def _decide(self, request: Request, stage: int) -> Decision:
        with request.step("decide"):
            try:
                return request.policy.decide(self._view.context(request, stage))
            except Exception as error:
                _log.warning("policy %s failed: %s; the head goes on", request.policy.name, error)
                return Decision(Action.CONTINUE, reason="policy failed")

    def _fall_back(self, request: Request, stage: int, x: NDArray[np.float32], reason: str | None) -> Answer:
        """The exit with the highest calibrated confidence answers (the later one on a tie)."""
        self._stages.ensure_exit(request, stage, x)
        best = best_exit(request.exits)
        assert best is not None  # a bundle has an exit, and every stage has run by now
        answer = request.answer_exit(best.index, reason, cut=stage if request.uplink_bytes else None)
        return self._accounting.count(answer, awaiting=request.awaiting)

    def _learn_failure(self, request: Request, cut: int, error: Exception, seconds: float) -> None:
        """A reply that did not come teaches that offloads are slow; other faults say nothing about time."""
        if isinstance(error, DeadlineExceeded) and "network" in request.spent:
            self._offloads.gave_up(cut, seconds, self._clock())
        elif not isinstance(error, TailError):
            # The type alone: a foreign exception's text may carry anything.
            _log.warning("unexpected %s on the way to the tail; an exit answered", type(error).__name__)

    # -- state -----------------------------------------------------------------

    @property
    def policy(self) -> Policy:
        """In force for requests that begin now."""
        return self._rules.policy

    @property
    def deadline_s(self) -> float | None:
        """Of requests that bring none of their own, from now on."""
        return self._rules.deadline_s

    def attach(
        self, orchestrator: str, credentials: Credentials, state_dir: str | Path | None = None
    ) -> None:
        """Follows the policies of the orchestrator at "host:port" from now on; returns at once.

        Until the first one comes, and while it is away, the last one it sent is in
        force, else the runtime's own. Raises `ConfigError`, and `StateError` when
        attached already.
        """
        if self._control is not None or self._closed:
            raise StateError("a runtime is attached once, before it is closed")
        root = Path(state_dir) if state_dir is not None else default_state_dir()
        heard = None if self._metrics is None else self._metrics.policy_update
        control = PolicyControl(self.bundle, self._rules, self._use, self._report, root, heard)
        control.start(orchestrator, credentials)
        if self._metrics is not None:
            self._metrics.watch_control(
                policy_version=lambda: control.version, attached=lambda: control.state == "attached"
            )
        self._control = control

    def wait_attached(self, timeout_s: float = 10.0) -> bool:
        """Waits until the orchestrator is there and its policy in force; False when it is not in time."""
        return self._control is not None and self._control.wait_attached(timeout_s)

    def _use(self, rules: Rules) -> None:
        self._rules = rules  # one assignment: a request sees the old pair or the new one

    def _report(self, interval_s: float) -> Report:
        learned = self._latencies.snapshot(self._clock())
        states = [tail.status().state for tail in self._tails.values()]
        return report_of(self._accounting.take(), interval_s, learned, states)

    def wait_ready(self, timeout_s: float = 60.0) -> bool:
        """Waits until every tail can take offloads; False when one cannot in time.

        True at once for a runtime without a cloud. `infer` needs no waiting.
        """
        end_s = time.monotonic() + timeout_s
        return all(t.wait_ready(max(0.0, end_s - time.monotonic())) for t in self._tails.values())

    def status(self) -> RuntimeStatus:
        """A snapshot for people and dashboards."""
        routes, fallbacks = self._accounting.totals()
        rules, control = self._rules, self._control
        return RuntimeStatus(
            model=self.bundle.model,
            version=self.bundle.version,
            policy=rules.policy.name,
            closed=self._closed,
            answered=sum(routes.values()),
            fallbacks=fallbacks,
            routes=routes,
            tails={cut: tail.status() for cut, tail in self._tails.items()},
            latencies=self._latencies.snapshot(self._clock()),
            policy_version=rules.version,
            deadline_s=rules.deadline_s,
            orchestrator="" if control is None else control.state,
            by_ticket=self._accounting.by_ticket,
            out_of_range=self._accounting.out_of_range,
        )

    def close(self) -> None:
        """Ends background work. May be called twice; a running `infer` still gets its answer."""
        if self._closed:
            return
        self._closed = True
        if self._control is not None:
            self._control.close()
        for tail in self._tails.values():
            tail.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
