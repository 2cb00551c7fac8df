"""A controller without a network, for its tests: a clock of its own, and edges that say what a test wants."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from prometheus_client import CollectorRegistry

from blindtail.identity import LOOPBACK, Identity, Role
from blindtail.metrics import OrchestratorMetrics
from blindtail.policy_document import Objectives, PolicyDocument
from blindtail.wire.control import Hello, PeerKind, PolicyAck
from blindtail.wire.policies import PolicyChange, PolicyEntry
from orchestrator.config import OrchestratorConfig
from orchestrator.controller import Controller
from orchestrator.peers import Peer
from orchestrator.store import Store

OPERATOR = Identity(Role.OPERATOR, "operator:ada")
GOOD = PolicyDocument("deadline", {"safety": 1.5}, Objectives(0.5)).encode()
BETTER = PolicyDocument("deadline", {"safety": 2.0}).encode()
BAD = PolicyDocument("threshold", {"thresholds": [0.5] * 9}).encode()


class Bench:
    """A controller with a clock of its own, and edges that say what a test wants."""

    def __init__(self, folder: Path, **settings: object) -> None:
        self.now_s = 1000.0
        self.config = OrchestratorConfig(state_dir=folder, **settings)  # type: ignore[arg-type]
        self.registry = CollectorRegistry()
        self.store = Store(folder)
        self.controller = Controller(
            self.config,
            self.store,
            OrchestratorMetrics(self.registry),
            clock=lambda: self.now_s,
            wall=lambda: 6000.0,
        )

    def edge(
        self,
        name: str,
        model: str = "toy",
        version: int = 0,
        instance: int = 0,
        role: Role | None = Role.EDGE,
    ) -> Peer:
        identity = LOOPBACK if role is None else Identity(role, name)
        hello = Hello(PeerKind.EDGE, instance.to_bytes(16, "big"), "1", ((model, "1"),), version)
        return self.controller.attach(identity, hello)

    def edges(self, number: int) -> list[Peer]:
        return [self.edge(f"edge:{i}") for i in range(number)]

    async def put(self, document: bytes, model: str = "", note: str = "") -> PolicyEntry:
        return await self.controller.set(OPERATOR, PolicyChange(model, document, note))

    def answer(self, peer: Peer, version: int, applied: bool = True, reason: str = "") -> None:
        self.controller.receive(peer, PolicyAck(version, applied, reason))

    async def in_force(self, model: str) -> tuple[int, bytes]:
        found = await self.controller.get(model)
        (entry,) = found if model else [e for e in found if not e.update.model]
        return entry.update.version, entry.update.document

    async def settle(self) -> None:
        self.now_s += self.config.settle_s + 1
        await self.controller.judge()


def run(tmp_path: Path, work: Callable[[Bench], Awaitable[None]], **settings: object) -> None:
    async def whole() -> None:
        bench = Bench(tmp_path, **settings)
        try:
            await bench.controller.load()
            bench.now_s += bench.config.settle_s + 1  # as if started long ago
            await work(bench)
        finally:
            await bench.controller.close()

    asyncio.run(whole())


async def sent(peer: Peer) -> tuple[int, bytes] | None:
    """What would go down the stream now."""
    try:
        update = await asyncio.wait_for(peer.next_update(), 0.01)
    except TimeoutError:
        return None
    return update.version, update.document
