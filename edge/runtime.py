"""EdgeRuntime: an image in, an answer out, always, also when the cloud is gone."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from blindtail.bundle import EdgeBundle
from blindtail.errors import ConfigError, DeadlineExceeded, InputError, StateError, TailError
from blindtail.metrics import EdgeMetrics
from blindtail.records import Action, Answer, Decision, DecisionContext, LatencyEstimate
from blindtail.rpc import Credentials
from edge.executor import HeadExecutor, softmax
from edge.latency import LatencyBook
from edge.priors import priors_of
from edge.request import Clock, Request
from edge.status import RuntimeStatus
from edge.tail import Tail, fallback_reason
from orchestrator.policy import UNAVAILABLE, Policy, best_exit, make_policy

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
        deadline_s: float | None = None,
        metrics: EdgeMetrics | None = None,
    ) -> None:
        """Composition by hand; `open` is the usual door. `tails`: cut -> tail, owned from now on."""
        unknown = set(tails) - set(bundle.cuts)
        if unknown:
            raise ConfigError(f"model {bundle.model} has no cut after stage {min(unknown)}")
        self.bundle = bundle
        self.policy = policy
        self.deadline_s = deadline_s
        self._metrics = metrics
        self._tails = dict(tails)
        self._clock = clock
        self._head = head or HeadExecutor(bundle)
        self._latencies = latencies or LatencyBook(priors_of(bundle))
        self._exit_after = {e.after_stage: i for i, e in enumerate(bundle.exits)}
        self._counting = threading.Lock()
        self._routes: Counter[str] = Counter()
        self._fallbacks: Counter[str] = Counter()
        self._pool = ThreadPoolExecutor(ASYNC_THREADS, thread_name_prefix="infer")
        self._closed = False
        self._head.warm_up()

    @classmethod
    def open(
        cls,
        edge_bt: str | Path | EdgeBundle,
        address: str | None = None,
        *,
        credentials: Credentials = None,
        policy: Policy | str = "deadline",
        policy_parameters: Mapping[str, Any] | None = None,
        deadline_s: float | None = None,
        state_dir: str | Path | None = None,
        uplink_bps: float | None = None,
        backend: str = "seal",
        threads: int = 1,
        clock: Clock = time.monotonic,
        metrics: EdgeMetrics | None = None,
    ) -> Self:
        """Loads `edge.bt`, starts keys and session in the background, answers at once.

        address      "host:port" of the cloud; None = this device works alone
        credentials  `ClientTls`, or "insecure-loopback" for plaintext to this host
        policy       a name (`orchestrator.policy.POLICIES`) or a `Policy`
        deadline_s   default deadline of a request; None = none
        state_dir    where keys live (default: ~/.local/state/blindtail); share it
                     between runtimes of one device and they share one key set
        uplink_bps   the uplink's bits per second; keys are uploaded at less than
                     half of it. None = as fast as the link takes them
        metrics      counters for Prometheus, see `blindtail.metrics`
        backend      "seal", or "clear" (no encryption at all: for tests only)

        Raises `BundleError` for a damaged file, `ConfigError` for a wrong setting.
        """
        bundle = edge_bt if isinstance(edge_bt, EdgeBundle) else EdgeBundle.open(edge_bt)
        if isinstance(policy, str):
            try:
                policy = make_policy(
                    policy, policy_parameters, thresholds=[e.threshold for e in bundle.exits]
                )
            except ValueError as error:
                raise ConfigError(str(error)) from error
        tails: dict[int, Tail] = {}
        latencies = LatencyBook(priors_of(bundle, uplink_bps))
        if address is not None:
            from edge.tails import open_tails

            tails = open_tails(
                bundle,
                address,
                credentials=credentials,
                state_dir=state_dir,
                uplink_bps=uplink_bps,
                backend=backend,
                on_probe=lambda cut, s: latencies.observe(f"offload{cut}", s, clock()),
            )
        try:
            return cls(
                bundle,
                tails,
                policy,
                clock=clock,
                head=HeadExecutor(bundle, threads=threads),
                latencies=latencies,
                deadline_s=deadline_s,
                metrics=metrics,
            )
        except BaseException:
            for tail in tails.values():
                tail.close()
            raise

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
        x = self._head.prepare(image)
        for stage in range(len(self.bundle.stages)):
            x = self._run_stage(request, stage, x)
            self._run_exit(request, stage, x)
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
            return self._count(request.answer_exit(decision.exit_index, reason))
        return self._fall_back(request, stage, x, reason)

    def _offload(self, request: Request, cut: int, x: NDArray[np.float32]) -> Answer:
        """Encrypt, evaluate, decrypt; whatever goes wrong, the best exit answers."""
        # Bought beforehand: when the reply does not come, no time is left for it.
        self._ensure_exit(request, cut, x)
        began_s = self._clock()
        try:
            tail = self._tails.get(cut)
            if tail is None or tail.cipher is None:
                return self._fall_back(request, cut, x, UNAVAILABLE)
            decrypt_s = self._estimate("decrypt").p95_s
            encrypt_s = self._estimate("encrypt").p95_s

            self._require(request, encrypt_s + decrypt_s)
            with request.step("encrypt"):
                container = tail.cipher.encrypt(
                    x.reshape(-1).astype(np.float64), _less(request.left_s(), decrypt_s)
                )
            request.uplink_bytes = len(container)

            remaining_s = _less(request.left_s(), decrypt_s)
            self._require(request, decrypt_s)
            sent_s = self._clock()
            try:
                reply = tail.evaluate(container, remaining_s)
            except BaseException:
                request.add("network", self._clock() - sent_s)
                raise
            request.reply_bytes = len(reply.container)
            inside_s = reply.timings.queue_s + reply.timings.eval_s
            request.add("network", self._clock() - sent_s - inside_s)
            request.add("queue", reply.timings.queue_s)
            request.add("eval", reply.timings.eval_s)

            # Even a reply that came late has taught what an offload takes.
            self._require(request, decrypt_s)
            with request.step("decrypt"):
                logits = tail.cipher.decrypt(reply.container, request.left_s())
        except Exception as error:
            self._learn_failure(request, cut, error, self._clock() - began_s)
            return self._fall_back(request, cut, x, fallback_reason(error))
        now_s = self._clock()
        self._latencies.observe("encrypt", request.spent["encrypt"], now_s)
        self._latencies.observe("decrypt", request.spent["decrypt"], now_s)
        self._latencies.observe(f"offload{cut}", now_s - began_s, now_s)
        if request.late():
            return self._fall_back(request, cut, x, "deadline")
        if logits.shape != (len(self.bundle.class_names),) or not np.isfinite(logits).all():
            return self._fall_back(request, cut, x, "refused")
        return self._count(request.answer(softmax(logits), "tail", cut=cut))

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
        deadline_s = self.deadline_s if deadline_s is None else deadline_s
        if deadline_s is not None and not deadline_s > 0:
            raise InputError(f"a deadline is a number of seconds above 0, not {deadline_s!r}")
        return Request(self._clock, started_s, deadline_s, self.bundle.class_names)

    def _run_stage(self, request: Request, stage: int, x: NDArray[np.float32]) -> NDArray[np.float32]:
        start_s = self._clock()
        x = self._head.run_stage(stage, x)
        now_s = self._clock()
        request.add("head", now_s - start_s)
        self._latencies.observe(f"stage{stage}", now_s - start_s, now_s)
        return x

    def _run_exit(self, request: Request, stage: int, x: NDArray[np.float32]) -> None:
        """Evaluates the exit after `stage`, if there is one."""
        index = self._exit_after.get(stage)
        if index is None:
            return
        start_s = self._clock()
        logits = self._head.run_exit(index, x)
        request.see(index, softmax(logits, self.bundle.exits[index].temperature))
        now_s = self._clock()
        request.add("exits", now_s - start_s)
        self._latencies.observe(f"exit{index}", now_s - start_s, now_s)

    def _ensure_exit(self, request: Request, stage: int, x: NDArray[np.float32]) -> None:
        """When no exit has been seen yet, runs the head on to the next one."""
        while not request.exits and stage + 1 < len(self.bundle.stages):
            stage += 1
            x = self._run_stage(request, stage, x)
            self._run_exit(request, stage, x)

    def _decide(self, request: Request, stage: int) -> Decision:
        with request.step("decide"):
            return self.policy.decide(self._context(request, stage))

    def _context(self, request: Request, stage: int) -> DecisionContext:
        now_s = self._clock()
        tail = self._tails.get(stage)
        following = [s for s in self._exit_after if s > stage]
        next_exit = None
        if following:
            steps = [f"stage{s}" for s in range(stage + 1, min(following) + 1)]
            steps.append(f"exit{self._exit_after[min(following)]}")
            next_exit = self._latencies.sum(tuple(steps), now_s)
        ready = tail.ready if tail is not None else any(t.ready for t in self._tails.values())
        return DecisionContext(
            stage=stage,
            stages=len(self.bundle.stages),
            exits=tuple(request.exits),
            exit_here=self._exit_after.get(stage),
            cut_here=tail is not None,
            tail_ready=ready,
            elapsed_s=request.elapsed_s(),
            deadline_s=request.deadline_s,
            offload=self._latencies.estimate(f"offload{stage}", now_s)
            if tail is not None and ready
            else None,
            next_exit=next_exit,
            cut_ahead=any(cut > stage for cut in self._tails),
        )

    def _fall_back(self, request: Request, stage: int, x: NDArray[np.float32], reason: str | None) -> Answer:
        """The exit with the highest calibrated confidence answers (the later one on a tie)."""
        self._ensure_exit(request, stage, x)
        best = best_exit(request.exits)
        assert best is not None  # a bundle has an exit, and every stage has run by now
        return self._count(
            request.answer_exit(best.index, reason, cut=stage if request.uplink_bytes else None)
        )

    def _require(self, request: Request, needed_s: float) -> None:
        left_s = request.left_s()
        if left_s is not None and left_s <= needed_s:
            raise DeadlineExceeded("the time left does not suffice for the next step")

    def _estimate(self, step: str) -> LatencyEstimate:
        return self._latencies.estimate(step, self._clock())

    def _learn_failure(self, request: Request, cut: int, error: Exception, seconds: float) -> None:
        """A reply that did not come teaches that offloads are slow; other faults say nothing about time."""
        if isinstance(error, DeadlineExceeded) and "network" in request.spent:
            self._latencies.observe(f"offload{cut}", seconds, self._clock(), censored=True)
        elif not isinstance(error, TailError):
            # The type alone: a foreign exception's text may carry anything.
            _log.warning("unexpected %s on the way to the tail; an exit answered", type(error).__name__)

    def _count(self, answer: Answer) -> Answer:
        with self._counting:
            self._routes[answer.route] += 1
            if answer.fallback is not None:
                self._fallbacks[answer.fallback] += 1
        if self._metrics is not None:
            self._metrics.answered(
                answer.route,
                answer.timings.total_s,
                answer.fallback,
                answer.uplink_bytes,
                answer.reply_bytes,
            )
        return answer

    # -- state -----------------------------------------------------------------

    def wait_ready(self, timeout_s: float = 60.0) -> bool:
        """Waits until every tail can take offloads; False when one cannot in time.

        True at once for a runtime without a cloud. `infer` needs no waiting.
        """
        end_s = time.monotonic() + timeout_s
        return all(t.wait_ready(max(0.0, end_s - time.monotonic())) for t in self._tails.values())

    def status(self) -> RuntimeStatus:
        """A snapshot for people and dashboards."""
        with self._counting:
            routes, fallbacks = dict(self._routes), dict(self._fallbacks)
        return RuntimeStatus(
            model=self.bundle.model,
            version=self.bundle.version,
            policy=self.policy.name,
            closed=self._closed,
            answered=sum(routes.values()),
            fallbacks=fallbacks,
            routes=routes,
            tails={cut: tail.status() for cut, tail in self._tails.items()},
            latencies=self._latencies.snapshot(self._clock()),
        )

    def close(self) -> None:
        """Ends background work. May be called twice; a running `infer` still gets its answer."""
        if self._closed:
            return
        self._closed = True
        for tail in self._tails.values():
            tail.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _less(left_s: float | None, margin_s: float) -> float | None:
    return None if left_s is None else left_s - margin_s
