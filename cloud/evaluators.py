"""Evaluators as the queue sees them, and the in-process kind.

A `Pool` holds evaluators that come and go; the queue asks it for those that are
up. Each does one evaluation at a time, in the order of arrival. Ray actors are
the production kind (`cloud.actor`); `LocalPool` needs no Ray and no process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from blindtail.he.program import Program
from blindtail.metrics import EvaluatorCounters
from cloud.engine import Engine, Evaluated, makes_tickets

_T = TypeVar("_T")


class EvaluatorGone(Exception):
    """The evaluator was gone before this work reached it. Never leaves the cloud."""


class EvaluatorCrashed(EvaluatorGone):
    """The evaluator's process ended before it answered. Never leaves the cloud."""


@dataclass(frozen=True, slots=True)
class Work:
    """One evaluation: program (name of a serving), prepared keys on this node, container.

    `version` of the model whose program it is. `ticket`: name of what the evaluator `holder` has
    done ahead for it; elsewhere the work takes longer and gives the same.
    """

    program_id: str
    keys: Path
    container: bytes
    version: str = ""
    ticket: bytes = b""
    holder: str = ""


@dataclass(frozen=True, slots=True)
class TicketWork:
    """One ticket to be made: its name, a program, prepared keys on this node, a request's seed."""

    name: bytes
    program_id: str
    keys: Path
    seed: bytes


class Member(Protocol):
    """One evaluator that is up."""

    @property
    def name(self) -> str: ...

    @property
    def pid(self) -> int: ...

    async def evaluate(self, work: Work) -> Evaluated:
        """Raises a `TailError`, `EvaluatorGone` or `EvaluatorCrashed`."""
        ...


class Pool(ABC):
    """The evaluators of a cell.

    Called on the loop: `on_change` when one comes or goes, `on_tickets_lost` with names of tickets
    that an evaluator had to give up.
    """

    #: Whether `make_ticket` can be called.
    makes_tickets = False

    def __init__(self) -> None:
        self.on_change: Callable[[], None] = lambda: None
        self.on_tickets_lost: Callable[[Sequence[bytes]], None] = lambda names: None
        self.restarts = 0

    @property
    @abstractmethod
    def members(self) -> Sequence[Member]:
        """Those that are up, in a stable order."""

    def counters(self) -> Mapping[int, EvaluatorCounters]:
        """Place -> what the evaluator there said of itself with its last reply."""
        return {}

    @abstractmethod
    async def start(self) -> None:
        """Returns when all are up. Raises `TailUnavailable` when none comes up."""

    async def load(self, programs: Mapping[str, Program]) -> None:
        """Returns when every evaluator that is up holds these programs too (name -> program, see
        `cloud.engine`); those that come up later hold them from the start. All or none."""
        raise NotImplementedError

    async def unload(self, names: Iterable[str]) -> None:
        """Forgets programs that nothing is sent for any more."""
        raise NotImplementedError

    async def make_ticket(self, member: str, work: TicketWork) -> int:
        """The evaluator of this name makes and keeps a ticket; its bytes in memory. What it is sent
        meanwhile waits. Raises as `Member.evaluate` does."""
        raise NotImplementedError

    def drop_tickets(self, member: str, names: Sequence[bytes]) -> None:
        """Does not wait; what is gone already is no fault."""
        raise NotImplementedError

    @abstractmethod
    async def close(self) -> None: ...


class LocalMember:
    """An evaluator on one worker thread of this process."""

    def __init__(
        self, name: str, engine: Engine, on_lost: Callable[[Sequence[bytes]], None] = lambda names: None
    ) -> None:
        self._name, self._engine, self._on_lost = name, engine, on_lost
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)

    @property
    def name(self) -> str:
        return self._name

    @property
    def pid(self) -> int:
        return os.getpid()

    async def evaluate(self, work: Work) -> Evaluated:
        return await self._run(
            lambda: self._engine.evaluate(work.program_id, str(work.keys), work.container, work.ticket)
        )

    async def make_ticket(self, work: TicketWork) -> int:
        return await self._run(
            lambda: self._engine.make_ticket(work.name, work.program_id, str(work.keys), work.seed)
        )

    def drop_tickets(self, names: Sequence[bytes]) -> None:
        with contextlib.suppress(RuntimeError):  # it has been closed
            self._thread.submit(self._engine.drop_tickets, names)

    async def _run(self, call: Callable[[], _T]) -> _T:
        def run() -> tuple[_T, list[bytes]]:
            result = call()
            return result, self._engine.take_lost()

        result, lost = await asyncio.get_running_loop().run_in_executor(self._thread, run)
        if lost:
            self._on_lost(lost)
        return result

    async def load(self, programs: Mapping[str, Program]) -> None:
        def load() -> None:
            for name, program in programs.items():
                self._engine.load(name, program)

        await self._run(load)

    async def unload(self, names: Iterable[str]) -> None:
        def unload() -> None:
            for name in names:
                self._engine.unload(name)

        await self._run(unload)

    @property
    def counters(self) -> EvaluatorCounters:
        return self._engine.counters

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)


class LocalPool(Pool):
    """`count` evaluators in this process, one thread each. For tests and single-process use.

    `weights`: see `cloud.engine`.
    """

    def __init__(
        self,
        programs: Mapping[str, Program],
        backend: str,
        count: int,
        loaded_keys_bytes: int,
        threads: int = 1,
        weights: Path | None = None,
    ) -> None:
        super().__init__()
        self._weights = weights
        self._programs, self._backend = dict(programs), backend
        self.makes_tickets = makes_tickets(backend)
        self._count, self._loaded_keys_bytes, self._threads = count, loaded_keys_bytes, threads
        self._members: list[LocalMember] = []

    @property
    def members(self) -> Sequence[Member]:
        return self._members

    def counters(self) -> Mapping[int, EvaluatorCounters]:
        return {place: member.counters for place, member in enumerate(self._members)}

    async def start(self) -> None:
        def engine() -> Engine:
            return Engine(
                self._programs, self._backend, self._loaded_keys_bytes, self._threads, self._weights
            )

        for index in range(self._count):
            name = f"evaluator-{index}"
            member = LocalMember(
                name, await asyncio.to_thread(engine), lambda names: self.on_tickets_lost(names)
            )
            self._members.append(member)
        self.on_change()

    async def load(self, programs: Mapping[str, Program]) -> None:
        fresh = {name: program for name, program in programs.items() if name not in self._programs}
        self._programs.update(fresh)
        try:
            for member in self._members:
                await member.load(fresh)
        except BaseException:
            await self.unload(fresh)
            raise

    async def unload(self, names: Iterable[str]) -> None:
        gone = tuple(names)
        for name in gone:
            self._programs.pop(name, None)
        for member in self._members:
            await member.unload(gone)

    async def make_ticket(self, member: str, work: TicketWork) -> int:
        for own in self._members:
            if own.name == member:
                return await own.make_ticket(work)
        raise EvaluatorGone

    def drop_tickets(self, member: str, names: Sequence[bytes]) -> None:
        for own in self._members:
            if own.name == member:
                own.drop_tickets(names)

    async def close(self) -> None:
        members, self._members = self._members, []
        for member in members:
            await asyncio.to_thread(member.close)


__all__ = [
    "Evaluated",
    "EvaluatorCrashed",
    "EvaluatorGone",
    "LocalMember",
    "LocalPool",
    "Member",
    "Pool",
    "TicketWork",
    "Work",
]
