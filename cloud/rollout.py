"""Changing what a cell serves while it serves: push, canary, rollback, drop.

Every change takes the same steps, one change at a time: evaluators get the
programs that it needs, the disk gets the new catalogue, then requests are routed
by it, then whoever asked is told. A step that fails undoes those before it. What
nobody needs any more is unloaded when the last request on it is done. All of it
lives on the gateway's loop; reading, checking and encoding models does not.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterable
from pathlib import Path
from typing import Any

from blindtail.he.program import Program
from blindtail.wire.cell import CanaryCall, DropCall, ModelEntry, ModelHeader
from cloud.catalogue import Catalogue, Name
from cloud.evaluators import Pool
from cloud.keystore import KeyStore
from cloud.models import ModelStore
from cloud.registry import Registry

_log = logging.getLogger(__name__)
#: Longest wait for requests on a program that is to be unloaded; evaluators that hang are ended before.
_DRAIN_S = 150.0
_CLOSE_S = 10.0


class InFlight:
    """Requests that wait or run, by the name of the program that answers them."""

    def __init__(self) -> None:
        self._count: Counter[str] = Counter()
        self._waiting: list[tuple[frozenset[str], asyncio.Future[None]]] = []

    def begin(self, name: str) -> None:
        self._count[name] += 1

    def end(self, name: str) -> None:
        self._count[name] -= 1
        if self._count[name] > 0:
            return
        del self._count[name]
        for names, waiter in self._waiting:
            if not waiter.done() and names.isdisjoint(self._count):
                waiter.set_result(None)

    async def drained(self, names: Collection[str], timeout_s: float) -> bool:
        """Waits until nothing is in flight on any of these; False after `timeout_s`."""
        if frozenset(names).isdisjoint(self._count):
            return True
        waiter = (frozenset(names), asyncio.get_running_loop().create_future())
        self._waiting.append(waiter)
        try:
            await asyncio.wait_for(waiter[1], timeout_s)
            return True
        except TimeoutError:
            return False
        finally:
            self._waiting.remove(waiter)


class Rollout:
    """One cell's operations on models. `answered` counts evaluations by (model, version).

    sessions_of  (model, version) -> sessions that are open
    forget       called with the name of a program that is served no more
    measure      called on a thread with programs that will be served, see `cloud.costs`
    """

    def __init__(
        self,
        registry: Registry,
        store: ModelStore,
        keys: KeyStore,
        pool: Pool,
        *,
        sessions_of: Callable[[str, str], int],
        forget: Callable[[str], None],
        measure: Callable[[Iterable[Program]], None],
    ) -> None:
        self._registry, self._store, self._keys, self._pool = registry, store, keys, pool
        self._sessions_of, self._forget, self._measure = sessions_of, forget, measure
        self.in_flight = InFlight()
        self.answered: Counter[Name] = Counter()
        self._loaded = set(registry.programs)
        self._receiving, self._changing = asyncio.Lock(), asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()

    def listed(self, model: str = "") -> list[ModelEntry]:
        """What is here, and what was withdrawn (no programs); "" = of every model."""
        catalogue = self._registry.catalogue
        found = []
        for version in catalogue.versions.values():
            if model not in ("", version.model):
                continue
            shares = {rule.version: rule.share for rule in catalogue.rules(version.model)}
            found.append(
                ModelEntry(
                    model=version.model,
                    version=version.version,
                    programs=version.programs,
                    allow=version.allow,
                    share=shares.get(version.version, 0.0),
                    requests=self.answered[version.name],
                    sessions=self._sessions_of(version.model, version.version),
                    pushed=version.pushed,
                    compatible_with=", ".join(catalogue.compatible_with(version)),
                )
            )
        withdrawn = [ModelEntry(m, v, ()) for m, v in catalogue.withdrawn if model in ("", m)]
        return [*found, *withdrawn]

    async def push(self, header: ModelHeader, pieces: AsyncIterator[bytes]) -> list[ModelEntry]:
        """Serves the file from now on. Raises `BundleError` (nothing has changed then), `ConfigError`."""
        async with self._receiving:
            path = await self._store.receive(header, pieces)
        return await self._whole(self._install(path, header))

    async def canary(self, call: CanaryCall) -> list[ModelEntry]:
        """Raises `ConfigError`."""
        what = f"{call.model} {call.version}: share {call.share:g}"
        return await self._whole(
            self._change(call.model, what, lambda c: c.with_share(call.model, call.version, call.share))
        )

    async def rollback(self, model: str) -> list[ModelEntry]:
        """Raises `ConfigError`."""
        return await self._whole(
            self._change(model, f"{model}: shares rolled back", lambda c: c.rolled_back(model))
        )

    async def drop(self, call: DropCall) -> list[ModelEntry]:
        """Returns when the last request on it is done and its keys are gone. Raises `ConfigError`."""
        what = f"{call.model} {call.version}: withdrawn"
        entries = await self._whole(
            self._change(call.model, what, lambda c: c.without(call.model, call.version), wait=True)
        )
        del self.answered[call.model, call.version]
        return entries

    def forget_withdrawn(self) -> None:
        """At the start: keys of withdrawn programs, should the cell have died while it dropped them."""
        catalogue = self._registry.catalogue
        for programs in catalogue.withdrawn.values():
            for program_id in set(programs) - catalogue.program_ids:
                self._keys.forget_program(program_id)

    async def close(self) -> None:
        """Lets changes that are under way end; those that hang are given up."""
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=_CLOSE_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    # -- steps ----------------------------------------------------------------------

    async def _whole(self, change: Coroutine[Any, Any, list[ModelEntry]]) -> list[ModelEntry]:
        """A change ends as it should, also when the operator who asked for it hangs up."""
        return await asyncio.shield(self._start(change))

    def _start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _install(self, path: Path, header: ModelHeader) -> list[ModelEntry]:
        sha256 = header.sha256.hex()
        try:
            version = await asyncio.to_thread(self._store.open, path, sha256, header.allow)
            async with self._changing:
                try:
                    new = self._registry.catalogue.with_version(version)
                    await asyncio.to_thread(self._store.keep, path, sha256)
                    await self._commit(new, f"{version.model} {version.version}: pushed")
                finally:
                    await asyncio.to_thread(self._store.clean, self._registry.catalogue)
        finally:
            await asyncio.to_thread(self._store.discard, path)
        return self.listed(version.model)

    async def _change(
        self, model: str, what: str, change: Callable[[Catalogue], Catalogue], *, wait: bool = False
    ) -> list[ModelEntry]:
        async with self._changing:
            await self._commit(change(self._registry.catalogue), what)
        retired = self._start(self._retire())
        if wait:
            await retired
        return self.listed(model)

    async def _retire(self) -> None:
        """Never raises: the change itself is done."""
        try:
            await self._clear()
        except Exception:
            _log.exception("what is no longer served could not be cleared away")

    async def _commit(self, new: Catalogue, what: str) -> None:
        old = self._registry.catalogue
        if new is old:
            return
        planned = Registry()
        planned.adopt(new)
        fresh = {n: program for n, program in planned.programs.items() if n not in self._loaded}
        added = [entry for entry in planned.entries if entry.program_id not in old.program_ids]
        try:
            for entry in added:
                await asyncio.to_thread(self._keys.know, entry)
            await asyncio.to_thread(self._measure, [entry.program for entry in added])
            await self._pool.load(fresh)
            await asyncio.to_thread(self._store.save, new)
        except BaseException:
            await self._pool.unload(fresh)
            for entry in added:
                self._keys.forget_program(entry.program_id)
            raise
        self._loaded.update(fresh)
        self._registry.adopt(new)
        _log.info("%s", what)

    async def _clear(self) -> None:
        """Unloads what is no longer needed, once nothing runs on it; keys of dropped programs go too."""
        unwanted = self._loaded - set(self._registry.programs)
        if not await self.in_flight.drained(unwanted, _DRAIN_S):
            _log.error("a withdrawn program is unloaded while requests on it are still in flight")
        async with self._changing:
            unwanted -= set(self._registry.programs)  # wanted again meanwhile
            self._loaded -= unwanted
            await self._pool.unload(unwanted)
            for name in unwanted:
                self._forget(name)
                if ":" not in name:
                    await self._keys.withdraw_program(name)
            await asyncio.to_thread(self._store.clean, self._registry.catalogue)


__all__ = ["InFlight", "Rollout"]
