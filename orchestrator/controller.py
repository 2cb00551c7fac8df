"""The orchestrator without its transport: who is attached, what is in force, what edges say about it.

Lives on one asyncio loop; the store works on a thread of its own. The decision
about a request is never made here: an edge makes it, with the policy that it
holds, whether this process runs or not.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Protocol, TypeVar

from blindtail.errors import BlindtailError, ConfigError, ContainerError, TailUnavailable
from blindtail.identity import Identity
from blindtail.policy_document import PolicyDocument
from blindtail.wire.control import Hello, PolicyAck, PolicyUpdate, Report
from blindtail.wire.policies import FleetPeer, PolicyChange, PolicyEntry, UsageCount
from orchestrator.config import OrchestratorConfig
from orchestrator.peers import Peer, Peers, passing
from orchestrator.rollout import OWN_DEFAULT, Rollout, checked, shown
from orchestrator.store import Store, Stored, Vote, VoteKey
from orchestrator.sums import Sums

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_TICK_S = 0.25
_WRITE_S = 2.0
_FORGET_S = 600.0
#: Entries of a history when the query gives no limit, and at most.
HISTORY, MOST_HISTORY = 20, 500
#: Votes on one version that are kept.
_MOST_VOTES = 20_000
_NOBODY = "no attached edge serves it now"


class Observer(Protocol):
    """What is counted; `blindtail.metrics.OrchestratorMetrics` is one."""

    def watch(
        self,
        *,
        peers: Callable[[], Mapping[tuple[str, str], int]],
        policy_versions: Callable[[], Mapping[str, int]],
    ) -> None: ...

    def policy_set(self, accepted: bool) -> None: ...

    def acked(self, model: str, applied: bool) -> None: ...

    def rolled_back(self, model: str) -> None: ...

    def reported(
        self,
        kind: str,
        model: str = "",
        routes: Mapping[str, int] | None = None,
        fallbacks: Mapping[str, int] | None = None,
    ) -> None: ...

    def stream_error(self, error: str) -> None: ...


class Controller:
    """`start`, calls, `close`, all on one loop. Owns the store.

    clock  seconds that only grow;  wall  seconds since 1970, for what is stored
    """

    def __init__(
        self,
        config: OrchestratorConfig,
        store: Store,
        observer: Observer,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.config, self.observer = config, observer
        self._store, self._clock, self._wall = store, clock, wall
        self._peers = Peers(config.attach)
        self._force: dict[str, Rollout] = {}
        self._sums = Sums()
        self._unwritten: dict[VoteKey, Vote] = {}
        self._changing = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, "store")
        self._closing = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._running: set[asyncio.Task[Any]] = set()
        self._started_s = 0.0
        self._trouble = ""

    async def start(self) -> None:
        """Reads what is in force and begins to look after it. Raises `StateError`."""
        await self.load()
        self.observer.watch(peers=self._attached_by_model, policy_versions=self._versions)
        self._keeper = asyncio.create_task(self._keep())

    async def load(self) -> None:
        """Reads what is in force. Raises `StateError`."""
        self._started_s = self._clock()
        for stored in await self._stored(self._store.active):
            votes = await self._stored(self._store.votes, stored.version)
            lasting = {voter: vote for voter, vote in votes.items() if not passing(voter)}
            self._force[stored.model] = Rollout(stored, self._started_s, lasting)

    async def close(self) -> None:
        """Writes what is not written yet, as far as the store allows."""
        self._closing.set()
        if self._keeper is not None:
            await self._keeper
        if self._running:
            await asyncio.wait(self._running)
        with suppress(BlindtailError):
            await self._write()
        self._thread.shutdown(wait=True)
        self._store.close()

    # -- streams -----------------------------------------------------------------

    def attach(self, identity: Identity, hello: Hello) -> Peer:
        """Raises `AccessDenied`, `ContainerError`, `Overloaded`."""
        peer = self._peers.add(identity, hello, self._clock())
        if peer.is_edge:
            rollout = self._rollout_for(peer)
            if rollout is not None and rollout.stored.version == peer.version:
                self._count(rollout, peer.voter, Vote(True))
            elif rollout is not None:
                peer.send(_update(rollout.stored))
        return peer

    def end_streams(self) -> None:
        """Tells all peers to dial again: this process is stopping."""
        for peer in self._peers:
            peer.end(TailUnavailable("the orchestrator is stopping"))

    def detach(self, peer: Peer) -> None:
        if self._peers.remove(peer) and passing(peer.voter):
            for rollout in self._force.values():
                rollout.votes.pop(peer.voter, None)

    def receive(self, peer: Peer, message: object) -> None:
        """A report or an answer to a policy. Raises `ContainerError`, `Overloaded`: the stream is over."""
        peer.take_allowance(self._clock(), self.config.attach.messages_per_s)
        if isinstance(message, Report):
            peer.report, peer.reported_s = message, self._clock()
            counted = (peer.model, message.routes, message.fallbacks) if peer.is_edge else ()
            self.observer.reported(peer.hello.kind.value, *counted)
            if peer.is_edge:
                self._sums.add(self._wall(), peer.model, message)
        elif isinstance(message, PolicyAck) and peer.is_edge:
            self._acknowledged(peer, message)
        else:
            raise ContainerError(
                "after its Hello an edge sends reports and answers to policies, a cell reports"
            )

    def _acknowledged(self, peer: Peer, ack: PolicyAck) -> None:
        if ack.version > peer.newest_sent or ack.version < 1:
            raise ContainerError(f"version {ack.version} of a policy was never sent on this stream")
        if ack.applied:
            peer.version = ack.version
        self.observer.acked(peer.model, ack.applied)
        rollout = self._rollout_for(peer)
        if rollout is not None and rollout.stored.version == ack.version:
            if not ack.applied:
                _log.warning("an edge refuses version %d: %s", ack.version, shown(ack.reason))
            self._count(rollout, peer.voter, Vote(ack.applied, "" if ack.applied else shown(ack.reason)))

    def _count(self, rollout: Rollout, voter: str, vote: Vote) -> None:
        known = rollout.votes.get(voter)
        if known != vote and (known is not None or len(rollout.votes) < _MOST_VOTES):
            rollout.votes[voter] = vote
            self._unwritten[(rollout.stored.version, voter)] = vote

    # -- operators ---------------------------------------------------------------

    async def set(self, author: Identity, change: PolicyChange) -> PolicyEntry:
        """Puts a new version in force and sends it to the edges that follow it.

        Raises `ConfigError` for a document that no edge could use, with nothing changed, and
        `StateError` when it cannot be stored.
        """
        try:
            if not change.model.isprintable():
                raise ConfigError("the name of a model has printable characters only")
            document = checked(change.document)
        except ConfigError:
            self.observer.policy_set(False)
            raise
        put = self._put_in_turn(change.model, document, author.name, shown(change.note))
        stored = await self._whole(put)
        self.observer.policy_set(True)
        entry = self._entry(stored, 0)
        if not self._following(stored.model):
            note = f"{entry.note} ({_NOBODY})" if entry.note else _NOBODY
            return PolicyEntry(entry.update, entry.state, entry.created_unix_s, entry.author, note)
        return entry

    async def get(self, model: str) -> list[PolicyEntry]:
        """What is in force: for `model` (its own policy, else the default one), or "" for all."""
        if not model:
            chosen = [self._force[name].stored for name in sorted(self._force)]
        else:
            rollout = self._force.get(model) or self._force.get("")
            chosen = [rollout.stored] if rollout is not None else []
        return await self._entries(chosen)

    async def history(self, model: str, limit: int) -> list[PolicyEntry]:
        """Newest first. Raises `StateError`."""
        most = min(limit or HISTORY, MOST_HISTORY)
        return await self._entries(await self._stored(self._store.history, model, most))

    def fleet(self, with_reports: bool = True) -> list[FleetPeer]:
        """Who is attached, the longest attached first."""
        now_s = self._clock()
        return [peer.shown(now_s, with_reports) for peer in self._peers]

    async def usage(self, model: str, last_s: float) -> list[UsageCount]:
        """What edges reported in the last `last_s` seconds, whole minutes. Raises `StateError`."""
        await self._whole(self._write())
        since = max(0, int((self._wall() - min(last_s, self.config.retention_s)) // 60))
        return [UsageCount(*row) for row in await self._stored(self._store.usage, model, since)]

    async def _entries(self, chosen: list[Stored]) -> list[PolicyEntry]:
        await self._whole(self._write())
        refusals = await self._stored(self._store.refusals, [s.version for s in chosen])
        return [self._entry(stored, refusals[stored.version]) for stored in chosen]

    def _entry(self, stored: Stored, refused: int) -> PolicyEntry:
        applied = sum(p.is_edge and p.version == stored.version for p in self._peers)
        return PolicyEntry(
            _update(stored),
            stored.state,
            stored.created_unix_s,
            stored.author,
            stored.note,
            applied,
            refused,
        )

    # -- policies in force -------------------------------------------------------

    def _rollout_for(self, peer: Peer) -> Rollout | None:
        return self._force.get(peer.model) or self._force.get("")

    def _following(self, model: str) -> list[Peer]:
        """Attached edges that use the policy of `model` ("" = those whose model has none of its own)."""
        return [
            peer
            for peer in self._peers
            if peer.is_edge and (peer.model == model or (not model and peer.model not in self._force))
        ]

    async def _put_in_turn(self, model: str, document: PolicyDocument, author: str, note: str) -> Stored:
        async with self._changing:
            return await self._put(model, document, author, note, None)

    async def _put(
        self, model: str, document: PolicyDocument, author: str, note: str, undoes: int | None
    ) -> Stored:
        def add() -> Stored:
            return self._store.add(
                model, document.encode(), author=author, note=note, unix_s=self._wall(), undoes=undoes
            )

        stored = await self._stored(add)
        self._force[model] = Rollout(stored, self._clock())
        for peer in self._following(model):
            peer.send(_update(stored))
        _log.info("version %d is in force for %s", stored.version, model or "all other models")
        return stored

    async def judge(self) -> None:
        """Takes back what too many edges refuse."""
        now_s = self._clock()
        if now_s - self._started_s < self.config.settle_s:
            return  # edges are still coming back: the first of them do not decide for all
        for model, rollout in [(m, r) for m, r in self._force.items() if r.doubtful]:
            attached = {peer.voter for peer in self._following(model)}
            settled = now_s - rollout.since_s >= self.config.settle_s
            why = rollout.refused_by(attached, self.config.rollback_share, settled)
            if why is not None:
                await self._roll_back(model, rollout.stored, why)

    async def _roll_back(self, model: str, bad: Stored, why: str) -> None:
        async with self._changing:
            if self._force[model].stored.version != bad.version:
                return  # an operator was faster
            before = await self._stored(self._store.predecessor, model, bad.version)
            if before is None and model and "" in self._force:
                before = self._force[""].stored
            document, source = OWN_DEFAULT, "the edges' own default"
            if before is not None:
                document, source = PolicyDocument.decode(before.document), f"as in version {before.version}"
            note = f"rolled back from {bad.version}: {why}; {source}"
            await self._put(model, document, "orchestrator", note, bad.version)
        self.observer.rolled_back(model)
        _log.warning("version %d is rolled back: %s", bad.version, why)

    # -- housekeeping ------------------------------------------------------------

    async def _keep(self) -> None:
        written_s = forgotten_s = self._clock()
        while not self._closing.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), _TICK_S)
            try:
                await self.judge()
                if self._clock() - written_s >= _WRITE_S:
                    written_s = self._clock()
                    await self._write()
                if self._clock() - forgotten_s >= _FORGET_S:
                    forgotten_s = self._clock()
                    self._sums.forget_names()
                    await self._stored(self._store.forget, self._wall() - self.config.retention_s)
                self._trouble = ""
            except Exception as error:
                if str(error) != self._trouble:  # one line, not one each time
                    self._trouble = str(error)
                    _log.error("%s: %s", type(error).__name__, error)

    async def _write(self) -> None:
        """Votes and sums so far. What cannot be written is kept, within bounds, for the next time."""
        votes, self._unwritten = self._unwritten, {}
        sums = self._sums.take()
        try:
            if votes:
                await self._stored(self._store.add_votes, votes, self._wall())
                votes = {}
            if sums:
                await self._stored(self._store.add_sums, sums)
                sums = {}
        finally:
            self._sums.put_back(sums)
            self._unwritten = {**votes, **self._unwritten} if len(votes) < _MOST_VOTES else self._unwritten

    async def _whole(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Does all of `work` even when the call that asked for it is broken off: file and memory agree."""
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return await asyncio.shield(task)

    async def _stored(self, function: Callable[..., _T], *arguments: object) -> _T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, lambda: function(*arguments))

    # -- for metrics, asked from another thread ------------------------------------

    def _attached_by_model(self) -> Mapping[tuple[str, str], int]:
        return Counter((peer.hello.kind.value, peer.model) for peer in list(self._peers))

    def _versions(self) -> Mapping[str, int]:
        return {model: rollout.stored.version for model, rollout in list(self._force.items())}


def _update(stored: Stored) -> PolicyUpdate:
    return PolicyUpdate(stored.version, stored.model, stored.document)


__all__ = ["HISTORY", "MOST_HISTORY", "Controller", "Observer"]
