"""What happens to the demo while it answers: processes are killed, an objective changes.

Each event is due when a share of the images has been answered. What it takes to
recover is watched on a thread of its own, so that answers are followed meanwhile.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blindtail.errors import BlindtailError
from edge.processes import ChildFailed

_POLL_S = 0.05
_RECOVERY_S = 120.0
#: Most of a command's time is Python's start.
_COMMAND_S = 60.0


@dataclass
class Recovery:
    """One casualty, and how long the system took. Times are this host's monotonic clock.

    `recovered_s` from the kill until `what` held again; None while it does not.
    `encrypted_s` from the kill until an image that came after it was answered by the tail.
    """

    victim: str
    pid: int
    at_image: int
    killed_at_s: float
    what: str
    recovered_s: float | None = None
    encrypted_s: float | None = None
    fallbacks: int = 0

    def to_json(self) -> dict[str, Any]:
        return {
            "victim": self.victim,
            "pid": self.pid,
            "at_image": self.at_image,
            "recovered_when": self.what,
            "recovered_s": self.recovered_s,
            "first_encrypted_answer_s": self.encrypted_s,
            "fallbacks_meanwhile": self.fallbacks,
        }


@dataclass
class Event:
    """`act(answered)` is called once, on a thread, when `share` of the images is answered."""

    share: float
    name: str
    act: Callable[[int], None]


@dataclass
class Events:
    """Runs each event at its time; with `one_by_one` not before the one before it is over.

    `pause_s` is then left between them. Raises, from `check`, what an event raised.
    """

    events: Sequence[Event]
    images: int
    one_by_one: bool = False
    pause_s: float = 0.0
    _threads: list[threading.Thread] = field(default_factory=list)
    _failed: list[BaseException] = field(default_factory=list)
    _over_s: float = -float("inf")

    def due(self, answered: int) -> str | None:
        """Starts the next event if it is time; its name then."""
        self.check()
        number = len(self._threads)
        if number >= len(self.events) or answered < self.events[number].share * self.images:
            return None
        if self.one_by_one and (self.happening or time.monotonic() < self._over_s + self.pause_s):
            return None
        thread = threading.Thread(target=self._run, args=(self.events[number], answered), daemon=True)
        self._threads.append(thread)
        thread.start()
        return self.events[number].name

    def finish(self, timeout_s: float) -> None:
        """Waits for events that run. Raises `ChildFailed` when one does not end, or what one raised."""
        end_s = time.monotonic() + timeout_s
        for event, thread in zip(self.events, self._threads, strict=False):
            thread.join(max(0.0, end_s - time.monotonic()))
            if thread.is_alive():
                raise ChildFailed(f"{event.name}: no end of it in time")
        self.check()

    @property
    def all_done(self) -> bool:
        return len(self._threads) == len(self.events) and not self.happening

    @property
    def happening(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def check(self) -> None:
        if self._failed:
            raise self._failed[0]

    def _run(self, event: Event, answered: int) -> None:
        try:
            event.act(answered)
        except BaseException as error:
            self._failed.append(error)
        finally:
            self._over_s = time.monotonic()


def kill(recoveries: list[Recovery], victim: str, pid: int, at_image: int, what: str) -> Recovery:
    """SIGKILL, as the kernel does when memory runs out."""
    recovery = Recovery(victim, pid, at_image, time.monotonic(), what)
    recoveries.append(recovery)
    os.kill(pid, signal.SIGKILL)
    return recovery


def until(holds: Callable[[], bool], recovery: Recovery) -> None:
    """Notes when `holds` does. Raises `ChildFailed` when it never does."""
    end_s = time.monotonic() + _RECOVERY_S
    while time.monotonic() < end_s:
        if holds():
            recovery.recovered_s = time.monotonic() - recovery.killed_at_s
            return
        time.sleep(_POLL_S)
    raise ChildFailed(
        f"after the {recovery.victim} was killed: not {recovery.what} within {_RECOVERY_S:.0f} s"
    )


def announced(path: Path) -> dict[str, Any]:
    """An announce file's content; empty while there is none."""
    with suppress(OSError, ValueError):
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    return {}


def alive(pid: int) -> bool:
    """True unless the process has ended (or waits for its parent to notice)."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def raylet_of(pid: int) -> int:
    """The raylet among the descendants of a `blindtail cloud` process. Raises `ChildFailed`."""
    for child in _below(pid):
        with suppress(OSError):
            if Path(f"/proc/{child}/comm").read_text().strip() == "raylet":
                return child
    raise ChildFailed("the cloud has no raylet: its Ray cluster is not up")


def _below(root: int) -> Iterator[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    waiting = [root]
    while waiting:
        for child in children.get(waiting.pop(), []):
            yield child
            waiting.append(child)


class Operator:
    """The operator's hands: `blindtail policy` as a command, as an operator would type it."""

    def __init__(self, orchestrator: str) -> None:
        self._orchestrator = orchestrator

    def set_deadline(self, policy: str, deadline_s: float, note: str, wait_s: float) -> dict[str, Any]:
        """A new policy version for all models; what the command says about it."""
        found: dict[str, Any] = self._policy(
            *("set", "--policy", policy, "--deadline", str(deadline_s), "--note", note),
            *("--wait", str(wait_s)),
            timeout_s=_COMMAND_S + wait_s,
        )
        return found

    def fleet(self) -> list[dict[str, Any]]:
        """Who is attached; empty while the orchestrator is away."""
        try:
            found = self._policy("fleet")
        except BlindtailError:
            return []
        peers: list[dict[str, Any]] = found["peers"] if isinstance(found, dict) else found
        return peers

    def _policy(self, verb: str, *arguments: str, timeout_s: float = _COMMAND_S) -> Any:
        command = [sys.executable, "-m", "blindtail", "policy", verb, *arguments]
        command += ["--orchestrator", self._orchestrator, "--plaintext", "--json"]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL
            )
        except subprocess.TimeoutExpired:
            raise BlindtailError(f"'blindtail policy {verb}' took longer than {timeout_s:.0f} s") from None
        if done.returncode:
            raise BlindtailError(f"'blindtail policy {verb}' failed: {done.stderr.strip()[-500:]}")
        return json.loads(done.stdout)


__all__ = [
    "Event",
    "Events",
    "Operator",
    "Recovery",
    "alive",
    "announced",
    "kill",
    "raylet_of",
    "until",
]
