"""What an evaluator does, wherever it runs: programs, loaded keys, tickets, one evaluation at a time."""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from blindtail.errors import EvaluationFailed
from blindtail.he.backends import Evaluator, Keys, Ticket, open_evaluator
from blindtail.he.program import Program
from blindtail.metrics import EvaluatorCounters


def limit_threads(threads: int) -> None:
    """Native threads of libraries that are loaded after this call."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)


def makes_tickets(backend: str) -> bool:
    """Whether evaluators on this (settled) backend can do a part of a request ahead."""
    return backend == "native"


class Evaluated(NamedTuple):
    """A reply container, the seconds it took, and whether a ticket was used."""

    container: bytes
    eval_s: float
    ticket: bool = False


class Engine:
    """Evaluators by program, and the keys used last. Not thread-safe.

    A program is known by its id, or by "EDGE'S-ID:OWN-ID" when it stands in for
    another version's: it then reads and writes containers under the edge's id, with
    the keys that are loaded for that one already. `loaded_keys_bytes` bounds the
    memory of loaded keys; at least one set stays. `threads`: of one evaluation, where the
    backend has a choice. Tickets are held until they are used or dropped, or until their
    keys or their program go: how many there are is whose business it is who orders them.
    `weights`: folder for encoded weights that all engines of a node share; None = memory of its own.
    """

    def __init__(
        self,
        programs: Mapping[str, Program],
        backend: str,
        loaded_keys_bytes: int,
        threads: int = 1,
        weights: Path | None = None,
    ) -> None:
        self._backend, self._threads, self._weights = backend, threads, weights
        self._evaluators: dict[str, Evaluator] = {}
        for name, program in programs.items():
            self.load(name, program)
        self._budget_bytes = loaded_keys_bytes
        self._keys: OrderedDict[tuple[str, str], tuple[Keys, int]] = OrderedDict()
        self._evaluations = self._key_loads = 0
        self._tickets: dict[bytes, tuple[str, Keys, Ticket]] = {}  # name -> program, keys, ticket
        self._lost: list[bytes] = []
        self._held_bytes, self._next_look_s = (0, 0), 0.0

    @property
    def counters(self) -> EvaluatorCounters:
        """What this engine has done, and what it and its process hold (looked up once a second, and
        after a load)."""
        now_s = time.monotonic()
        if now_s >= self._next_look_s:
            keys_bytes = sum(keys.memory_bytes for keys, _ in list(self._keys.values()))
            self._held_bytes, self._next_look_s = (keys_bytes, _resident_bytes()), now_s + 1.0
        return EvaluatorCounters(self._evaluations, self._key_loads, *self._held_bytes)

    @property
    def names(self) -> Collection[str]:
        """Of the programs it holds."""
        return self._evaluators.keys()

    def load(self, name: str, program: Program) -> None:
        """Encodes a program's weights, which takes as long as some evaluations, or maps them."""
        if name not in self._evaluators:
            edges = replace(program.spec, program_id=_edges_id(name))
            stand_in = Program(edges, program.ops)
            self._evaluators[name] = open_evaluator(self._backend, stand_in, self._threads, self._weights)

    def unload(self, name: str) -> None:
        """Forgets a program, and keys that no other program here is for."""
        gone = self._evaluators.pop(name, None)
        if gone is not None and all(o.spec.keys_id != gone.spec.keys_id for o in self._evaluators.values()):
            for held in [held for held in self._keys if held[0] == gone.spec.keys_id]:
                self._void(self._keys.pop(held)[0])
        self._forget([ticket for ticket, (of, _, _) in self._tickets.items() if of == name])

    def evaluate(self, name: str, keys_path: str, container: bytes, ticket: bytes = b"") -> Evaluated:
        """Container in, container out. Raises `ContainerError`, `KeysMissing`.

        ticket  name of one that was made here for this container's seed: it is used, once, if it is
                here and fits. The reply's bytes do not depend on it.
        """
        start_s = time.monotonic()
        keys = self._load(name, keys_path)
        evaluator = self._evaluators[name]
        of, made_for, made = self._tickets.pop(ticket, (name, None, None))
        reply: bytes | None = None
        if made is not None and of == name and made_for is keys:
            try:
                reply = evaluator.evaluate(keys, container, made)
            except EvaluationFailed:
                made = None  # its seed is another one
        else:
            made = None
        if reply is None:
            reply = evaluator.evaluate(keys, container)
        self._evaluations += 1
        return Evaluated(reply, time.monotonic() - start_s, made is not None)

    # -- tickets ----------------------------------------------------------------------

    def make_ticket(self, ticket: bytes, name: str, keys_path: str, seed: bytes) -> int:
        """Does ahead what depends on a request's 64-byte seed, keeps it under the name `ticket` and
        returns its bytes in memory. Raises `KeysMissing`, `EvaluationFailed`."""
        keys = self._load(name, keys_path)
        made = self._evaluators[name].make_ticket(keys, seed)
        # Holding on to the keys: a ticket is never compared with others that took their place in memory.
        self._tickets[ticket] = (name, keys, made)
        return made.memory_bytes

    def drop_tickets(self, names: Iterable[bytes]) -> None:
        """Those that are not here are no fault."""
        for ticket in names:
            self._tickets.pop(ticket, None)

    def take_lost(self) -> list[bytes]:
        """Tickets that had to go with their keys or their program; each is named once."""
        lost, self._lost = self._lost, []
        return lost

    def _void(self, keys: Keys) -> None:
        self._forget([ticket for ticket, (_, of, _) in self._tickets.items() if of is keys])

    def _forget(self, names: list[bytes]) -> None:
        self.drop_tickets(names)
        self._lost += names

    # -- keys -------------------------------------------------------------------------

    def _load(self, program: str, keys_path: str) -> Keys:
        evaluator = self._evaluators[program]
        name = (evaluator.spec.keys_id, keys_path)  # all segments of a tail share what is loaded
        try:
            inode = os.stat(keys_path).st_ino  # an evicted and uploaded again file is another one
        except OSError:
            if name in self._keys:
                self._void(self._keys.pop(name)[0])
            return evaluator.load_keys(Path(keys_path))  # says that it is missing
        held = self._keys.get(name)
        if held is not None and held[1] == inode:
            self._keys.move_to_end(name)
            return held[0]
        keys = evaluator.load_keys(Path(keys_path))
        if held is not None:
            self._void(held[0])
        self._key_loads += 1
        self._next_look_s = 0.0
        self._keys[name] = (keys, inode)
        self._keys.move_to_end(name)
        total = sum(k.memory_bytes for k, _ in self._keys.values())
        while total > self._budget_bytes and len(self._keys) > 1:
            _, (old, _) = self._keys.popitem(last=False)
            total -= old.memory_bytes
            self._void(old)
        return keys


def _edges_id(name: str) -> str:
    """The program id that edges encrypt for."""
    return name.partition(":")[0]


def _resident_bytes() -> int:
    """Of this process; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


__all__ = ["Engine", "Evaluated", "limit_threads", "makes_tickets"]
