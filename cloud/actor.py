"""A cell's Ray actors: the gateway, and one evaluator per process.

Both are detached and named, so that neither dies with a driver by accident. The
gateway keeps the evaluators: it watches each one's pidfd (Ray takes more than a
second to tell of a death), starts another in its place, and drops what an
earlier gateway left. Containers cross as bytes, errors as plain tuples: nothing
from a peer is unpickled.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import logging.handlers
import os
import resource
import select
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import prometheus_client
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from blindtail.errors import EvaluationFailed, TailUnavailable
from blindtail.he.program import Program
from blindtail.metrics import CloudMetrics, EvaluatorCounters, expiry, serve_metrics
from cloud.config import CloudConfig
from cloud.control import CellControl
from cloud.engine import Evaluated, makes_tickets
from cloud.evaluator import (
    EvaluatorActor,
    Outcome,
    end_without_raylet,
    error_outcome,
    in_pieces,
    raise_outcome,
)
from cloud.evaluators import EvaluatorCrashed, EvaluatorGone, Member, Pool, TicketWork, Work
from cloud.fleet import tag
from cloud.gateway import Gateway
from cloud.registry import Registry, open_bundles
from cloud.servicer import TailServer

NAMESPACE = "blindtail-cell"
GATEWAY = "gateway"
_log = logging.getLogger(__name__)

_START_S = 60.0
#: An evaluation that takes longer is taken for hung, and its process for crashed.
_HUNG_S = 60.0
_STABLE_S = 10.0
_BACK_OFF_S = (0.2, 10.0)


class RayMember:
    """One evaluator actor, seen from the gateway."""

    def __init__(
        self,
        name: str,
        handle: Any,
        pid: int,
        on_lost: Callable[[Sequence[bytes]], None] = lambda names: None,
    ) -> None:
        self.name, self.pid, self._handle, self._on_lost = name, pid, handle, on_lost
        self.counters = EvaluatorCounters()
        loop = asyncio.get_running_loop()
        self.dead: asyncio.Future[None] = loop.create_future()
        self._pidfd = os.pidfd_open(pid)
        loop.add_reader(self._pidfd, self._died)

    def _died(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        if not self.dead.done():
            self.dead.set_result(None)

    async def evaluate(self, work: Work) -> Evaluated:
        pieces = in_pieces(work.container)
        outcome = await self._call("evaluate", work.program_id, str(work.keys), work.ticket, *pieces)
        self._heard(outcome)
        return Evaluated(*outcome[1])

    async def make_ticket(self, work: TicketWork) -> int:
        outcome = await self._call("make_ticket", work.name, work.program_id, str(work.keys), work.seed)
        self._heard(outcome)
        return int(outcome[1])

    def drop_tickets(self, names: Sequence[bytes]) -> None:
        """Does not wait."""
        with contextlib.suppress(Exception):
            self._handle.drop_tickets.remote(list(names))

    def _heard(self, outcome: Outcome) -> None:
        """What an evaluator says of itself with a reply."""
        self.counters = EvaluatorCounters(*outcome[2])
        if outcome[3]:
            self._on_lost(outcome[3])

    async def load(self, names: Sequence[str]) -> None:
        """Raises `EvaluatorGone`, or why the programs cannot be loaded."""
        await self._call("load", list(names))

    def unload(self, names: Sequence[str]) -> None:
        """Does not wait."""
        with contextlib.suppress(Exception):
            self._handle.unload.remote(list(names))

    async def _call(self, method: str, *values: Any) -> Outcome:
        """An ("ok", ...). Raises `EvaluatorGone`, or what an ("error", ...) stands for."""
        # The process may be gone without the loop having heard of it yet.
        if self.dead.done() or select.select([self._pidfd], [], [], 0)[0]:
            await asyncio.wait([self.dead])
            raise EvaluatorGone
        reference = getattr(self._handle, method).remote(*values)
        reply = asyncio.ensure_future(_get(reference))
        try:
            await asyncio.wait((reply, self.dead), timeout=_HUNG_S, return_when=asyncio.FIRST_COMPLETED)
            if not reply.done():
                if not self.dead.done():
                    _log.error("%s hangs: ending it", self.name)
                    self.kill()
                    await asyncio.wait([self.dead], timeout=5.0)
                raise EvaluatorCrashed
            try:
                outcome = reply.result()
            except ray.exceptions.RayError as error:
                # Ray may know before the pidfd does; the pool must have dropped the member first.
                self.kill()
                await asyncio.wait([self.dead], timeout=5.0)
                raise EvaluatorCrashed from error
        finally:
            reply.cancel()
        raise_outcome(outcome)
        return outcome

    def kill(self) -> None:
        with contextlib.suppress(Exception):
            ray.kill(self._handle)


async def _get(reference: Any) -> Outcome:
    outcome: Outcome = await reference
    return outcome


class RayPool(Pool):
    """Keeps `config.evaluators` evaluator actors alive on this node."""

    def __init__(self, config: CloudConfig, programs: Mapping[str, Program]) -> None:
        super().__init__()
        self._config = config
        self.makes_tickets = makes_tickets(config.backend)
        self._names = dict.fromkeys(programs)  # in order; evaluators read the programs from disk
        self._members: dict[int, RayMember] = {}
        self._keepers: list[asyncio.Task[None]] = []
        self._all_up = asyncio.Event()
        self._generation = 0

    @property
    def members(self) -> Sequence[Member]:
        return [self._members[index] for index in sorted(self._members)]

    def counters(self) -> Mapping[int, EvaluatorCounters]:
        return {index: member.counters for index, member in self._members.items()}

    async def start(self) -> None:
        # On a cluster of several nodes, those of other nodes are other cells'.
        mine = f"evaluator-{tag(ray.get_runtime_context().get_node_id())}-"
        for entry in ray.util.list_named_actors(all_namespaces=True):
            if entry["namespace"] == NAMESPACE and entry["name"].startswith(mine):
                with contextlib.suppress(ValueError):  # it died meanwhile
                    ray.kill(ray.get_actor(entry["name"], namespace=NAMESPACE))
        self._keepers = [asyncio.create_task(self._keep(index)) for index in range(self._config.evaluators)]
        try:
            await asyncio.wait_for(self._all_up.wait(), 2 * _START_S)
        except TimeoutError as error:
            if not self._members:
                raise TailUnavailable(
                    "no evaluator came up: see the cell's log, and whether memory or cores are short"
                ) from error

    async def load(self, programs: Mapping[str, Program]) -> None:
        fresh = [name for name in programs if name not in self._names]
        self._names.update(dict.fromkeys(fresh))
        try:
            # One after another: while one loads, the others go on answering.
            for member in list(self._members.values()):
                with contextlib.suppress(EvaluatorGone):
                    await member.load(fresh)
        except BaseException:
            await self.unload(fresh)
            raise

    async def unload(self, names: Iterable[str]) -> None:
        gone = list(names)
        for name in gone:
            self._names.pop(name, None)
        for member in list(self._members.values()):
            member.unload(gone)

    async def make_ticket(self, member: str, work: TicketWork) -> int:
        for own in self._members.values():
            if own.name == member:
                return await own.make_ticket(work)
        raise EvaluatorGone

    def drop_tickets(self, member: str, names: Sequence[bytes]) -> None:
        for own in self._members.values():
            if own.name == member:
                own.drop_tickets(names)

    async def close(self) -> None:
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        members, self._members = list(self._members.values()), {}
        for member in members:
            member.kill()
        if members:
            await asyncio.wait([m.dead for m in members], timeout=5.0)

    async def _keep(self, index: int) -> None:
        """One place in the pool, for ever: start, watch, start again."""
        back_off_s = _BACK_OFF_S[0]
        while True:
            started_s = time.monotonic()
            member: RayMember | None = None
            try:
                member = await self._spawn(index)
                self._members[index] = member
                if len(self._members) == self._config.evaluators:
                    self._all_up.set()
                self.on_change()
                await asyncio.shield(member.dead)
                _log.error("%s (pid %d) died", member.name, member.pid)
            except asyncio.CancelledError:
                raise
            except Exception as error:
                _log.error("an evaluator did not start: %s: %s", type(error).__name__, error)
            self._members.pop(index, None)
            if member is not None:
                member.kill()
                self.on_change()
            self.restarts += 1
            if time.monotonic() - started_s > _STABLE_S:
                back_off_s = _BACK_OFF_S[0]
            else:
                await asyncio.sleep(back_off_s)
                back_off_s = min(2 * back_off_s, _BACK_OFF_S[1])

    async def _spawn(self, index: int) -> RayMember:
        self._generation += 1
        c = self._config
        here = ray.get_runtime_context().get_node_id()
        name = f"evaluator-{tag(here)}-{index}-{self._generation}"
        actor = ray.remote(EvaluatorActor).options(
            name=name,
            namespace=NAMESPACE,
            lifetime="detached",
            num_cpus=1,
            max_restarts=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),
        )
        names = list(self._names)
        handle = actor.remote(c.state_dir, names, c.backend, c.loaded_keys_bytes, c.threads)
        try:
            pid = await asyncio.wait_for(_pid(handle), _START_S)
        except BaseException:
            with contextlib.suppress(Exception):
                ray.kill(handle)
            raise
        member = RayMember(name, handle, pid, lambda names: self.on_tickets_lost(names))
        while late := [n for n in self._names if n not in names]:  # loaded into the others meanwhile
            names += late
            await member.load(late)
        return member


async def _pid(handle: Any) -> int:
    return int(await handle.pid.remote())


class GatewayActor:
    """Hosts the gateway and its gRPC server on this actor's event loop."""

    def __init__(self, config: CloudConfig) -> None:
        end_without_raylet()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        self._config = config
        self._gateway: Gateway | None = None
        self._control: CellControl | None = None
        self._server: TailServer | None = None
        self._port = 0
        self._stop_metrics: Callable[[], None] | None = None

    async def start(self) -> Outcome:
        """("ok", description) once evaluators are up and the port is served."""
        try:
            await self._start()
        except BaseException as error:
            await self._close(0.0)
            return error_outcome(error)
        return ("ok", await self.describe())

    async def _start(self) -> None:
        config = self._config
        registry = prometheus_client.CollectorRegistry()

        def pool_of(models: Registry) -> Pool:
            return RayPool(config, models.programs)

        metrics = CloudMetrics(registry)
        if config.tls is not None:
            metrics.watch_certificate(expiry(config.tls.certificate))
        self._gateway = Gateway(config, open_bundles(config.models), pool_of, metrics)
        _log_to(config.state_dir / "cell.log")
        self._server = TailServer(self._gateway)
        await self._gateway.start()
        self._port = await self._server.start()
        self._control = CellControl.of(self._gateway, self._port)
        if self._control is not None:
            self._control.start()
        if config.metrics_port:
            self._stop_metrics = serve_metrics(config.host, config.metrics_port, registry)

    async def describe(self) -> dict[str, Any]:
        """Address, processes and models; see `cloud.app` for the announce file made of it."""
        if self._gateway is None:
            raise EvaluationFailed("the gateway has not been started")
        host = self._config.host
        address = f"[{host}]:{self._port}" if ":" in host else f"{host}:{self._port}"
        return {
            "address": address,
            "port": self._port,
            "gateway_pid": os.getpid(),
            "serving": self._gateway.serving,
            **self._gateway.describe(),
        }

    async def meet(self, addresses: Sequence[str]) -> None:
        """Other cells of this Ray cluster, for keys."""
        if self._gateway is not None:
            self._gateway.meet(addresses)

    async def drain(self, grace_s: float | None = None) -> bool:
        """Sends edges away; returns when they have gone, or after the grace (None = the settings')."""
        if self._gateway is not None:
            await self._gateway.drain.begin(grace_s)
        return True

    async def stop(self, grace_s: float) -> bool:
        await self._close(grace_s)
        return True

    async def _close(self, grace_s: float) -> None:
        if self._control is not None:
            await asyncio.to_thread(self._control.close)
            self._control = None
        if self._stop_metrics is not None:
            await asyncio.to_thread(self._stop_metrics)
        if self._server is not None:
            await self._server.stop(grace_s)
        if self._gateway is not None:
            await self._gateway.close()
        self._server = self._gateway = self._stop_metrics = None


def _log_to(path: Path) -> None:
    """The cell's log: events and faults, never payloads, keys or identities."""
    handler = logging.handlers.RotatingFileHandler(path, maxBytes=2_000_000, backupCount=2)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in ("cloud", "blindtail"):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)


__all__ = [
    "GATEWAY",
    "NAMESPACE",
    "EvaluatorActor",
    "GatewayActor",
    "RayMember",
    "RayPool",
    "raise_outcome",
]
