"""The state of one `infer` call: what it has seen, where its time went, its answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from blindtail.records import Answer, ExitSeen, Timings
from orchestrator.policy import Policy

FloatArray = NDArray[np.float64]
Clock = Callable[[], float]


@dataclass
class Request:
    """Mutable, owned by one call of `infer`. Times are on `clock`, in seconds.

    deadline_s      counted from `started_s`; None = no deadline
    policy          decides from the first stage to the last, whatever comes into force meanwhile
    policy_version  an orchestrator's number for it; 0 = the edge's own
    """

    clock: Clock
    started_s: float
    deadline_s: float | None
    class_names: tuple[str, ...]
    policy: Policy
    policy_version: int = 0
    exits: list[ExitSeen] = field(default_factory=list)
    spent: dict[str, float] = field(default_factory=dict)
    uplink_bytes: int = 0
    reply_bytes: int = 0
    sent_ticket: bool = False  # encrypted with one
    ticket: bool = False  # and the cloud had it ready
    notes: dict[str, float] = field(default_factory=dict)  # for this device alone, see `edge.ranges`
    awaiting: bool = False  # the cloud owes a reply: what goes wrong then is no secret
    round_trips: int = 0  # completed, of a tail that has several
    _probabilities: dict[int, FloatArray] = field(default_factory=dict)

    def elapsed_s(self) -> float:
        return self.clock() - self.started_s

    def left_s(self) -> float | None:
        """Time until the deadline (negative when late); None without one."""
        return None if self.deadline_s is None else self.deadline_s - self.elapsed_s()

    def late(self) -> bool:
        left_s = self.left_s()
        return left_s is not None and left_s <= 0

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Adds the time of the block to `name` (a field of `Timings` without `_s`)."""
        start_s = self.clock()
        try:
            yield
        finally:
            self.add(name, self.clock() - start_s)

    def add(self, name: str, seconds: float) -> None:
        self.spent[name] = self.spent.get(name, 0.0) + max(0.0, seconds)

    def see(self, index: int, probabilities: FloatArray) -> None:
        """Records an exit's calibrated probabilities (classes,)."""
        self.exits.append(seen(index, probabilities))
        self._probabilities[index] = probabilities

    def has_seen(self, index: int | None) -> bool:
        return index in self._probabilities

    def answer(
        self, probabilities: FloatArray, route: str, *, fallback: str | None = None, cut: int | None = None
    ) -> Answer:
        """Closes the books: label, probabilities and timings of the whole call."""
        label = int(np.argmax(probabilities))
        extra = {} if cut is None else {"cut": float(cut)}
        if self.policy_version:
            extra["policy_version"] = float(self.policy_version)
        if self.ticket and route == "tail":
            extra["ticket"] = 1.0
        if self.round_trips:
            extra["round_trips"] = float(self.round_trips)
        extra |= self.notes
        steps = {f"{name}_s": seconds for name, seconds in self.spent.items()}
        return Answer(
            label=label,
            class_name=self.class_names[label],
            probabilities=tuple(float(p) for p in probabilities),
            confidence=float(probabilities[label]),
            route=route,
            fallback=fallback,
            timings=Timings(total_s=self.elapsed_s(), **steps),
            uplink_bytes=self.uplink_bytes,
            reply_bytes=self.reply_bytes,
            exits=tuple(self.exits),
            extra=extra,
        )

    def answer_exit(self, index: int, fallback: str | None = None, cut: int | None = None) -> Answer:
        return self.answer(self._probabilities[index], f"exit{index + 1}", fallback=fallback, cut=cut)


def seen(index: int, probabilities: FloatArray) -> ExitSeen:
    """Confidence, margin and entropy (nats) of probabilities (classes,)."""
    second, first = np.partition(probabilities, -2)[-2:]
    positive = probabilities[probabilities > 0]
    entropy = float(-(positive * np.log(positive)).sum())
    return ExitSeen(index, float(first), float(first - second), max(0.0, entropy))
