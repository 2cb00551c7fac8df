"""The child's half: read the net, prepare, answer lines. Imports nothing of blindtail's."""

from __future__ import annotations

import json
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Part:
    """A dense layer, or a convolution (stride > 0) of a square image; a square follows."""

    weight: Floats
    bias: Floats
    stride: int = 0
    side: int = 0
    padding: int = 0


@dataclass(frozen=True)
class Task:
    """A net, inputs (n, features) and how many threads to use on which cores."""

    name: str
    parts: tuple[Part, ...]
    inputs: Floats
    threads: int
    cores: tuple[int, ...]

    def write(self, folder: Path) -> None:
        arrays = {"inputs": self.inputs}
        for i, part in enumerate(self.parts):
            arrays |= {f"w{i}": part.weight, f"b{i}": part.bias}
        np.savez(folder / "net.npz", **arrays)  # type: ignore[arg-type]
        described = {
            "name": self.name,
            "parts": [[part.stride, part.side, part.padding] for part in self.parts],
            "threads": self.threads,
            "cores": self.cores,
        }
        (folder / "net.json").write_text(json.dumps(described))

    @classmethod
    def read(cls, folder: Path) -> Task:
        told = json.loads((folder / "net.json").read_text())
        with np.load(folder / "net.npz") as arrays:
            parts = tuple(Part(arrays[f"w{i}"], arrays[f"b{i}"], *how) for i, how in enumerate(told["parts"]))
            inputs = arrays["inputs"]
        return cls(told["name"], parts, inputs, told["threads"], tuple(told["cores"]))


class Rival(ABC):
    """One system, prepared for one net. Sizes in bytes; `note` says how it was set up."""

    system: str
    note: str
    uplink_bytes: int
    key_bytes: int
    reply_bytes: int

    @abstractmethod
    def encrypt(self, x: Floats) -> Any:
        """What goes up, for one input (features,)."""

    @abstractmethod
    def evaluate(self, encrypted: Any) -> Any:
        """What comes down. Only this is timed as the server's."""

    @abstractmethod
    def decrypt(self, reply: Any) -> Floats:
        """Logits."""


def serve(make: Callable[[Task], Rival]) -> int:
    """A child's whole life. Ends when its standard input does."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print goes elsewhere

    def say(told: dict[str, Any]) -> None:
        answers.write(json.dumps(told) + "\n")

    try:
        task = Task.read(Path(sys.argv[1]))
        os.sched_setaffinity(0, task.cores)
        rival = make(task)
        encrypted = [rival.encrypt(x) for x in task.inputs]
        reply = rival.evaluate(encrypted[0])
        say(
            {
                "system": rival.system,
                "note": rival.note,
                "uplink_bytes": rival.uplink_bytes,
                "key_bytes": rival.key_bytes,
                "reply_bytes": rival.reply_bytes,
                "encrypt_s": clock(lambda: rival.encrypt(task.inputs[0]), 5),
                "decrypt_s": clock(lambda: rival.decrypt(reply), 5),
            }
        )
        for line in sys.stdin:
            asked = json.loads(line)
            given = encrypted[asked["input"] % len(encrypted)]
            seconds = []
            for _ in range(asked["times"]):
                start = time.perf_counter()
                reply = rival.evaluate(given)
                seconds.append(time.perf_counter() - start)
            say({"seconds": seconds, "logits": rival.decrypt(reply).tolist()})
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        say({"error": text[:300]})
        return 1
    return 0


def clock(call: Callable[[], Any], times: int) -> list[float]:
    """Seconds of each."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return found
