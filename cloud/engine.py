"""What an evaluator does, wherever it runs: programs, loaded keys, one evaluation at a time."""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

from blindtail.he.backends import Evaluator, Keys, open_evaluator
from blindtail.he.program import Program


def limit_threads(threads: int) -> None:
    """Native threads of libraries that are loaded after this call."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)


class Engine:
    """Evaluators by program, and the keys used last. Not thread-safe.

    `loaded_keys_bytes` bounds the memory of loaded keys; at least one set stays.
    """

    def __init__(self, programs: Mapping[str, Program], backend: str, loaded_keys_bytes: int) -> None:
        self._evaluators: dict[str, Evaluator] = {
            program_id: open_evaluator(backend, program) for program_id, program in programs.items()
        }
        self._budget_bytes = loaded_keys_bytes
        self._keys: OrderedDict[tuple[str, str], tuple[Keys, int]] = OrderedDict()

    def evaluate(self, program_id: str, keys_path: str, container: bytes) -> tuple[bytes, float]:
        """Container in, (container, seconds) out. Raises `ContainerError`, `KeysMissing`."""
        start_s = time.monotonic()
        keys = self._load(program_id, keys_path)
        reply = self._evaluators[program_id].evaluate(keys, container)
        return reply, time.monotonic() - start_s

    def _load(self, program_id: str, keys_path: str) -> Keys:
        name = (program_id, keys_path)
        evaluator = self._evaluators[program_id]
        try:
            inode = os.stat(keys_path).st_ino  # an evicted and uploaded again file is another one
        except OSError:
            self._keys.pop(name, None)
            return evaluator.load_keys(Path(keys_path))  # says that it is missing
        held = self._keys.get(name)
        if held is not None and held[1] == inode:
            self._keys.move_to_end(name)
            return held[0]
        keys = evaluator.load_keys(Path(keys_path))
        self._keys[name] = (keys, inode)
        self._keys.move_to_end(name)
        total = sum(k.memory_bytes for k, _ in self._keys.values())
        while total > self._budget_bytes and len(self._keys) > 1:
            _, (old, _) = self._keys.popitem(last=False)
            total -= old.memory_bytes
        return keys


__all__ = ["Engine", "limit_threads"]
