"""The parent's side of the key process: starts it, follows it, ends it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from blindtail import errors
from blindtail.errors import BlindtailError, EvaluationFailed, TailUnavailable
from edge.keys_child import Order

Report = Callable[[Mapping[str, Any]], None]


class KeyWorker(Protocol):
    """Makes, and when given an address uploads, keys without stalling this process."""

    def run(self, address: str | None, report: Report) -> None:
        """Blocks until done; `report` gets every event. Raises `BlindtailError`."""

    def close(self) -> None:
        """Ends work in progress; `run` then raises."""


class KeyProcess:
    """A `KeyWorker` that runs `python -m edge.keys_child`, one process per order."""

    def __init__(self, order: Callable[[str | None], Order]) -> None:
        self._order = order
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._closed = False

    def run(self, address: str | None, report: Report) -> None:
        last: Mapping[str, Any] = {}
        with self._lock:
            if self._closed:
                raise TailUnavailable("this runtime is closed")
            # `-P` would be safer, but the edge package must be found from a checkout too.
            process = self._process = subprocess.Popen(
                [sys.executable, "-m", "edge.keys_child"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                bufsize=1,
                env=_environment(),
                close_fds=True,
            )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(self._order(address).encode() + "\n")
            process.stdin.flush()
            for line in process.stdout:
                last = _event(line)
                report(last)
        except (BrokenPipeError, ValueError) as error:
            raise TailUnavailable("the key process ended before its order arrived") from error
        finally:
            process.kill()  # does nothing when it has ended by itself
            process.wait()
            process.stdout.close()
            with contextlib.suppress(OSError):
                process.stdin.close()
        if self._closed:  # also when the last event came in before the end did
            raise TailUnavailable("this runtime is closed")
        if last.get("event") == "failed":
            raise _raised(last)
        if last.get("event") != "done":
            raise EvaluationFailed("the key process ended before its time; it is started again")

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._process is not None:
                self._process.kill()


def _event(line: str) -> Mapping[str, Any]:
    try:
        event = json.loads(line)
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}


def _raised(event: Mapping[str, Any]) -> BlindtailError:
    kind = getattr(errors, str(event.get("kind")), EvaluationFailed)
    if not (isinstance(kind, type) and issubclass(kind, BlindtailError)):
        kind = EvaluationFailed
    return kind(str(event.get("message", "")))


def _environment() -> dict[str, str]:
    """This process's environment, one thread, and the folders that our packages come from."""
    root = str(Path(__file__).resolve().parent.parent)
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {**os.environ, **single, "PYTHONPATH": os.pathsep.join(paths)}
