"""What runs in an evaluator's process, and how its outcomes cross to the gateway's: as plain tuples."""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blindtail import errors
from blindtail.bundle import open_program
from blindtail.errors import BlindtailError, EvaluationFailed
from blindtail.he.program import Program
from cloud.engine import Engine, limit_threads
from cloud.keyfolder import encoded_folder, program_path

#: ("ok", payload...) or ("error", class name, public message).
Outcome = tuple[Any, ...]
#: Ray puts arguments of 100 KiB and more into its object store.
_PIECE_BYTES = 96_000


def end_without_raylet() -> None:
    """Ends this process when the raylet that started it is gone: it could reach nobody any more."""
    raylet = os.getppid()

    def watch() -> None:
        while os.getppid() == raylet:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, name="raylet-watchdog", daemon=True).start()


def error_outcome(error: BaseException) -> Outcome:
    name = type(error).__name__ if isinstance(error, BlindtailError) else ""
    return ("error", name, str(error) if name else type(error).__name__)


def raise_outcome(outcome: Outcome) -> None:
    """Raises what an ("error", ...) stands for."""
    if outcome[0] == "ok":
        return
    kind = getattr(errors, outcome[1], None) if outcome[1] in errors.__all__ else None
    if kind is None:
        raise EvaluationFailed(f"a process of the cell failed ({outcome[2]}); its log says why")
    raise kind(outcome[2])


def in_pieces(container: bytes) -> list[bytes]:
    """As arguments that Ray sends along with the call. A larger one goes through its object store, which
    takes 1.5 ms more for 123 KB."""
    return [container[at : at + _PIECE_BYTES] for at in range(0, len(container), _PIECE_BYTES)]


class EvaluatorActor:
    """Evaluates, one request at a time. Has no way to hold a secret key.

    `root` is the cell's state directory, where the programs are and their encoded weights;
    `names` those to hold from the start (see `cloud.engine`).
    """

    def __init__(
        self, root: Path, names: Sequence[str], backend: str, loaded_keys_bytes: int, threads: int
    ) -> None:
        end_without_raylet()
        # A core dump would hold clients' keys.
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        limit_threads(threads)
        self._root = root
        self._opened: dict[str, Program] = {}  # by own id: a stand-in shares its weights
        self._engine = Engine({}, backend, loaded_keys_bytes, threads, encoded_folder(root, backend))
        for name in names:
            self._load(name)

    def pid(self) -> int:
        return os.getpid()

    def load(self, names: Sequence[str]) -> Outcome:
        """All or none."""
        try:
            for name in names:
                self._load(name)
            return ("ok",)
        except Exception as error:
            self.unload(names)
            return error_outcome(error)

    def unload(self, names: Sequence[str]) -> None:
        for name in names:
            self._engine.unload(name)
        used = {name.rpartition(":")[2] for name in self._engine.names}
        self._opened = {own: program for own, program in self._opened.items() if own in used}

    def _load(self, name: str) -> None:
        own = name.rpartition(":")[2]
        if own not in self._opened:
            self._opened[own] = open_program(program_path(self._root, own))
        self._engine.load(name, self._opened[own])

    def evaluate(self, program_id: str, keys_path: str, ticket: bytes, *pieces: bytes) -> Outcome:
        """("ok", what `Engine.evaluate` gave, counters, lost tickets). pieces: the container, `in_pieces`."""
        try:
            if program_id not in self._engine.names:
                self._load(program_id)
            done = self._engine.evaluate(program_id, keys_path, b"".join(pieces), ticket)
            return ("ok", tuple(done), tuple(self._engine.counters), self._engine.take_lost())
        except Exception as error:
            return error_outcome(error)

    def make_ticket(self, ticket: bytes, program_id: str, keys_path: str, seed: bytes) -> Outcome:
        """("ok", bytes in memory, counters, lost tickets)."""
        try:
            size = self._engine.make_ticket(ticket, program_id, keys_path, seed)
            return ("ok", size, tuple(self._engine.counters), self._engine.take_lost())
        except Exception as error:
            return error_outcome(error)

    def drop_tickets(self, names: Sequence[bytes]) -> None:
        self._engine.drop_tickets(names)


__all__ = [
    "EvaluatorActor",
    "Outcome",
    "end_without_raylet",
    "error_outcome",
    "in_pieces",
    "raise_outcome",
]
