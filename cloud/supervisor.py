"""`serve`: a cell that comes back by itself, whatever of it is killed.

The process of the command (this one, whose pid a service manager knows) holds no
Ray. It starts `python -m cloud.app` as its child, which starts a Ray cluster of its
own with the gateway and the evaluators. When that is lost (the raylet, Ray's
control store or the child itself was killed), everything that is left of it is
ended, and a fresh child begins: Ray keeps too much per process to start twice in
one. Port, state directory and announce file stay the same.

The child hears lines on its standard input: an order (JSON), then "drain", then
"end"; an input that ends means that this process is gone. It tells events as JSON
lines on its standard output.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from blindtail import errors
from blindtail.errors import BlindtailError, TailUnavailable
from blindtail.metrics import check_metrics_port
from blindtail.serving import probe_port
from cloud.config import CloudConfig
from cloud.models import ModelStore
from cloud.registry import open_bundles

#: More losses of the cluster than this within the window are beyond repair.
RESTARTS, WINDOW_S = 5, 300.0
#: Wait before a restart, by how many there were within the window: the first one is at once.
BACK_OFF_S = (0.0, 1.0, 2.0, 4.0, 8.0)
_POLL_S = 0.1
#: For the child to end once it was told to, beyond the graces that it was given.
_END_S = 30.0
#: Short: Ray puts sockets below it, and their paths may have 107 characters.
_FOLDER = "bt-cell-"
_PR_SET_CHILD_SUBREAPER = 36


def serve(
    config: CloudConfig,
    *,
    announce: Path | None = None,
    on_ready: Callable[[Mapping[str, Any]], None] = lambda announced: None,
    on_progress: Callable[[str], None] = lambda text: None,
    on_loss: Callable[[str], None] = lambda text: None,
    ray_address: str | None = None,
    node_ip: str | None = None,
    peer_address: str | None = None,
) -> int:
    """Runs a cell until SIGTERM or SIGINT. Call it on the main thread. Returns the exit code.

    `ray_address` and `node_ip`: join that Ray cluster, on this node, instead of
    starting one; `peer_address` (host:port): how its other cells dial this one; see
    `cloud.fleet`.

    The first signal drains the cell for at most `drain_grace_s`, the second one ends it
    at once. `announce` is written atomically once evaluations can start, kept up to
    date, absent while the cluster is started again, and removed at the end; `on_ready`
    gets the same content, once. `on_loss` hears why the cluster is started again. Raises
    `ConfigError` or `BundleError` before Ray is started where that can be told.
    """
    on_progress("reading models")
    ModelStore(config.state_dir, config.backend).load(open_bundles(config.models))
    if config.tls is not None:
        config.tls.load()
    if config.metrics_port and not ray_address:
        check_metrics_port(config.host, config.metrics_port)
    config = replace(
        config,
        # 0 becomes a free one now, so that a restarted cell keeps it; and before Ray's seconds are spent.
        # On a cluster that was there before, an earlier gateway may still hold it: see `fleet.clear`.
        port=config.port if ray_address and config.port else probe_port(config.host, config.port),
        models=tuple(p.resolve() for p in config.models),
        state_dir=config.state_dir.resolve(),
    )
    settings = json.loads(json.dumps(asdict(config), default=str))
    grace_s = config.drain_grace_s + config.shutdown_grace_s

    def order(folder: Path, restarts: int) -> Mapping[str, Any]:
        return {
            "config": settings,
            "announce": None if announce is None else str(announce.absolute()),
            "folder": str(folder),
            "pid": os.getpid(),
            "restarts": restarts,
            "ray_address": ray_address,
            "node_ip": node_ip,
            "peer_address": peer_address,
        }

    supervisor = Supervisor(
        [sys.executable, "-m", "cloud.app"],
        order,
        announce=announce,
        stop_s=grace_s + _END_S,
        on_ready=on_ready,
        on_progress=on_progress,
        on_loss=on_loss,
    )
    return supervisor.run()


class Supervisor:
    """Keeps one child alive. `order(folder, restarts)` is what each child is told first."""

    def __init__(
        self,
        command: Sequence[str],
        order: Callable[[Path, int], Mapping[str, Any]],
        *,
        announce: Path | None = None,
        stop_s: float = _END_S,
        on_ready: Callable[[Mapping[str, Any]], None] = lambda announced: None,
        on_progress: Callable[[str], None] = lambda text: None,
        on_loss: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._command, self._order, self._announce = list(command), order, announce
        self._stop_s = stop_s
        self._on_ready, self._on_progress, self._on_loss = on_ready, on_progress, on_loss
        # A SimpleQueue may be put into from a signal handler.
        self._events: queue.SimpleQueue[Mapping[str, Any]] = queue.SimpleQueue()
        self._stops = 0  # signals so far
        self._was_ready = False

    def run(self) -> int:
        """Exit code: 0 when it was asked to end, 1 when the cell is beyond repair.

        Raises the `BlindtailError` that kept the first child from getting ready.
        """
        _remove_stale_folders()
        self._unpublish()
        losses: list[float] = []
        with _subreaper(), self._signals():
            while True:
                problem = self._life(len(losses))
                if self._stops:
                    return 0
                if not self._was_ready:
                    raise problem
                now = time.monotonic()
                losses = [*(t for t in losses if now - t < WINDOW_S), now]
                if len(losses) > RESTARTS:
                    return 1
                self._on_loss(f"{problem}; starting again ({len(losses)} of {RESTARTS})")
                if self._pause(BACK_OFF_S[min(len(losses), len(BACK_OFF_S)) - 1]):
                    return 0

    # -- one child ------------------------------------------------------------------

    def _life(self, restarts: int) -> BlindtailError:
        """From the start of a child to the end of the last process that it left. Why it ended."""
        folder = Path(tempfile.mkdtemp(prefix=_FOLDER))
        held = _lock(folder / "lock", os.O_CREAT)
        before = _children()
        code_path = str(Path(__file__).resolve().parents[1])
        paths = [code_path, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        try:
            child = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                # Ctrl-C in a terminal, and a signal to the group, reach this process alone.
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            )
            reader = threading.Thread(target=self._read, args=(child,), daemon=True)
            reader.start()
            try:
                _tell(child, json.dumps(self._order(folder, restarts)))
                problem = self._follow(child, before | {child.pid})
            finally:
                child.kill()
                child.wait()
                _end_all(before)
                reader.join(timeout=5)
                for pipe in (child.stdin, child.stdout):
                    with contextlib.suppress(OSError):
                        pipe.close()  # type: ignore[union-attr]
            return self._last_word() or problem
        finally:
            self._unpublish()
            shutil.rmtree(folder, ignore_errors=True)
            os.close(held)

    def _follow(self, child: subprocess.Popen[str], known: set[int]) -> BlindtailError:
        """Until the child has ended, or has not although it was told to. `known`: children of our own."""
        told, end_s = 0, float("inf")
        problem: BlindtailError | None = None
        while child.poll() is None and time.monotonic() < end_s:
            if self._stops > told:
                _tell(child, "drain" if told == 0 else "end")
                end_s = time.monotonic() + (self._stop_s if told == 0 else _END_S)
                told += 1
            with contextlib.suppress(queue.Empty):
                problem = self._hear(self._events.get(timeout=_POLL_S)) or problem
            _reap(known)
        return problem or TailUnavailable("the cell's Ray cluster was lost")

    def _hear(self, event: Mapping[str, Any]) -> BlindtailError | None:
        kind = event.get("event")
        if kind == "progress" and not self._was_ready:
            self._on_progress(str(event.get("text")))
        elif kind == "ready" and not self._was_ready:
            self._was_ready = True
            self._on_ready(event["announced"])
        elif kind == "failed":
            name = str(event.get("kind"))
            known = getattr(errors, name, None) if name in errors.__all__ else None
            return (known or TailUnavailable)(str(event.get("message")))
        return None

    def _last_word(self) -> BlindtailError | None:
        """What the child said before it ended and nobody has heard yet."""
        problem: BlindtailError | None = None
        with contextlib.suppress(queue.Empty):
            while True:
                problem = self._hear(self._events.get_nowait()) or problem
        return problem

    def _read(self, child: subprocess.Popen[str]) -> None:
        assert child.stdout is not None
        with contextlib.suppress(ValueError, OSError):  # closed
            for line in child.stdout:
                with contextlib.suppress(ValueError):
                    event = json.loads(line)
                    if isinstance(event, dict):
                        self._events.put(event)

    def _pause(self, seconds: float) -> bool:
        """Waits; True at once when a signal asks for the end."""
        end_s = time.monotonic() + seconds
        while not self._stops and time.monotonic() < end_s:
            time.sleep(min(_POLL_S, seconds))
        return bool(self._stops)

    def _unpublish(self) -> None:
        if self._announce is not None:
            self._announce.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def stop(*_: object) -> None:
            self._stops += 1
            self._events.put({})  # wakes the loop

        old = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


def _tell(child: subprocess.Popen[str], line: str) -> None:
    assert child.stdin is not None
    with contextlib.suppress(OSError):  # it has ended: its exit is noticed elsewhere
        child.stdin.write(line + "\n")
        child.stdin.flush()


# -- what a lost cluster leaves ---------------------------------------------------------


@contextlib.contextmanager
def _subreaper() -> Iterator[None]:
    """Orphans below this process become its children, so that none can be lost. Linux; elsewhere nothing."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is None:
        yield
        return
    prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def _parents() -> dict[int, int]:
    """pid -> parent's pid, of all processes that can be seen."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                stat = (entry / "stat").read_bytes()
                found[int(entry.name)] = int(stat.rsplit(b")", 1)[1].split()[1])
    return found


def _children() -> set[int]:
    return {pid for pid, parent in _parents().items() if parent == os.getpid()}


def _reap(known: set[int]) -> None:
    """Lets go of adopted orphans that have ended; `known` children are somebody else's to wait for."""
    with contextlib.suppress(ChildProcessError):
        while True:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None or ended.si_pid in known:
                return
            os.waitpid(ended.si_pid, os.WNOHANG)


def _end_all(before: set[int], limit_s: float = 10.0) -> None:
    """Ends and reaps every process below this one but those that were its children `before`.

    Ray's agents take up to a minute to notice by themselves that their cluster is gone.
    """
    end_s = time.monotonic() + limit_s
    while time.monotonic() < end_s:
        parents = _parents()
        own = {pid for pid, parent in parents.items() if parent == os.getpid()} - before
        below, front = set(own), set(own)
        while front:
            front = {pid for pid, parent in parents.items() if parent in front} - below
            below |= front
        if not below:
            return
        for pid in below:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        for pid in own:
            with contextlib.suppress(OSError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.02)


def _lock(path: Path, flags: int = 0) -> int:
    """A descriptor that holds the file's lock. Raises `OSError` when another process does."""
    handle = os.open(path, os.O_RDWR | flags, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle


def _remove_stale_folders() -> None:
    """Ray's folders of cells that were killed: ours, and locked by nobody any more."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_FOLDER}*"):
        try:
            if folder.stat().st_uid != os.getuid():
                continue
            handle = _lock(folder / "lock")
        except OSError:
            continue
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


__all__ = ["RESTARTS", "Supervisor", "serve"]
