"""Evaluators that hold every evaluation back until a test lets them go on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

from cloud.engine import Engine
from cloud.evaluators import Evaluated, LocalMember, LocalPool, Member, Work
from cloud.registry import Registry


class Gate:
    """`LocalCell(..., pool_of=gate.pool)`: one evaluator; `ran` evaluations have come to the gate."""

    def __init__(self) -> None:
        self.ran = 0
        self._opened = threading.Event()

    def open(self) -> None:
        self._opened.set()

    async def passed(self) -> None:
        self.ran += 1
        await asyncio.to_thread(self._opened.wait, 20)

    def pool(self, registry: Registry) -> LocalPool:
        return _GatedPool(registry, self)


class _GatedMember(LocalMember):
    def __init__(self, name: str, engine: Engine, gate: Gate) -> None:
        super().__init__(name, engine)
        self._gate = gate

    async def evaluate(self, work: Work) -> Evaluated:
        await self._gate.passed()
        return await super().evaluate(work)


class _GatedPool(LocalPool):
    def __init__(self, registry: Registry, gate: Gate) -> None:
        super().__init__(registry.programs, "clear", 1, 1 << 30)
        self._gate = gate
        self._gated: list[Member] = []

    async def start(self) -> None:
        await super().start()
        self._gated = [_GatedMember(m.name, m._engine, self._gate) for m in self._members]

    @property
    def members(self) -> Sequence[Member]:
        return self._gated
