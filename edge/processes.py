"""Child processes that never stay behind: start, wait for an announcement, stop.

Used by the demo and by benchmarks, which run a cloud and an edge site as
processes of their own. Each child gets a session (and so a process group) of its
own and a log file; stopping ends it and everything it has started.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from blindtail.errors import BlindtailError

_POLL_S = 0.1
_TAIL_LINES = 5
#: In the environment of a child and of everything it starts: marks, the outermost first.
_MARK = "BLINDTAIL_FAMILY"
#: A process that was killed ends when it gets its turn on a processor.
_END_S = 30.0


class ChildFailed(BlindtailError):
    """A child process ended or did not get ready; the message ends with its log's last lines."""


class Child:
    """One child process running `python -m ...`, with its log.

    name  for messages
    log   gets stdout and stderr
    """

    def __init__(
        self, name: str, arguments: Sequence[str], log: Path, *, env: Mapping[str, str] | None = None
    ) -> None:
        self.name, self.log = name, log
        log.parent.mkdir(parents=True, exist_ok=True)
        self._mark = secrets.token_hex(16)
        marks = f"{os.environ.get(_MARK, '')} {self._mark}".strip()
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {}), _MARK: marks},
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def code(self) -> int | None:
        """Exit status, or None while it runs."""
        return self._process.poll()

    def check(self) -> None:
        """Raises `ChildFailed` when it has ended with an error."""
        code = self.code
        if code not in (None, 0):
            raise ChildFailed(f"the {self.name} process ended with status {code}; {self.hint()}")

    def hint(self) -> str:
        """Where to look, and the log's last lines."""
        try:
            lines = self.log.read_text(errors="replace").strip().splitlines()[-_TAIL_LINES:]
        except OSError:
            lines = []
        return f"see {self.log}" + (": " + " | ".join(line.strip() for line in lines) if lines else "")

    def announcement(self, path: Path, timeout_s: float) -> dict[str, Any]:
        """Waits until the child has written its announcement, a JSON object."""
        end_s = time.monotonic() + timeout_s
        while not path.exists():
            self.check()
            if self.code is not None:
                raise ChildFailed(f"the {self.name} process ended before it was ready; {self.hint()}")
            if time.monotonic() > end_s:
                raise ChildFailed(
                    f"the {self.name} process was not ready after {timeout_s:.0f} s; {self.hint()}"
                )
            time.sleep(_POLL_S)
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def wait(self, timeout_s: float) -> int:
        """Its exit status. Raises `ChildFailed` when it takes longer."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise ChildFailed(
                f"the {self.name} process was not done after {timeout_s:.0f} s; {self.hint()}"
            ) from None

    def stop(self, grace_s: float = 15.0) -> None:
        """SIGTERM, a grace period, then SIGKILL to whatever is left of it and its descendants.

        They have all ended when it returns, also those whose parents ended before them.
        """
        family = self._family()
        if self.code is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(grace_s)
        family |= self._family()
        if self.code is None:
            self._process.kill()
            self._process.wait()
        self._end(family)

    def kill(self) -> None:
        """SIGKILL to it and all its descendants at once, as a machine that loses power."""
        family = self._family()
        self._process.kill()
        _kill(family)
        self._process.wait()
        self._end(family)

    def _family(self) -> set[tuple[int, str]]:
        """(pid, start time) of everything that it has started and that runs."""
        return _descendants(self.pid) | _marked(self._mark)

    def _end(self, family: set[tuple[int, str]]) -> None:
        """SIGKILL to all of them, and to what they start meanwhile, until none is left."""
        end_s = time.monotonic() + _END_S
        while left := {(pid, started) for pid, started in family if _start_time(pid) == started}:
            _kill(left)
            if time.monotonic() > end_s:
                raise ChildFailed(f"of the {self.name} process {len(left)} are left though they were killed")
            time.sleep(_POLL_S)
            family = left | self._family()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat after the name (state, parent, ...)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _start_time(pid: int) -> str | None:
    fields = _stat(pid)
    return fields[19] if fields and fields[0] != "Z" else None


def _kill(family: Iterable[tuple[int, str]]) -> None:
    """Children of a parent that is gone keep their pid and start time."""
    for pid, started in family:
        if _start_time(pid) == started:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)


def _marked(mark: str) -> set[tuple[int, str]]:
    """(pid, start time) of every process of this user whose environment holds `mark`."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if mark.encode() in (entry / "environ").read_bytes() and (fields := _stat(int(entry.name))):
                    found.add((int(entry.name), fields[19]))
    return found


def _descendants(root: int) -> set[tuple[int, str]]:
    """(pid, start time) of every process below `root`."""
    children: dict[int, list[tuple[int, str]]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            children.setdefault(int(fields[1]), []).append((int(entry.name), fields[19]))
    found: set[tuple[int, str]] = set()
    waiting = [root]
    while waiting:
        for pid, started in children.get(waiting.pop(), []):
            if (pid, started) not in found:
                found.add((pid, started))
                waiting.append(pid)
    return found


__all__ = ["Child", "ChildFailed"]
