"""Our half: start a rival's interpreter, ask it for runs, read its lines, end it."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers.protocol import Floats, Task

ROOT = Path(__file__).resolve().parents[2]
#: Rivals that `--peer NAME=PYTHON` knows, and their programs.
PEERS = {"pyhelayers": "bench.peers.pyhelayers", "orion-v2": "bench.peers.orion_v2"}
PREPARE_S, RUN_S = 600.0, 120.0


class PeerFailed(Exception):
    """A rival cannot go on; the text is one line."""


@dataclass(frozen=True)
class Description:
    """What a child says of itself when it is prepared; the fields are those of `protocol.Rival`."""

    system: str
    note: str
    uplink_bytes: int
    key_bytes: int
    reply_bytes: int
    encrypt_s: list[float]
    decrypt_s: list[float]


class Peer:
    """A rival in a process of its own, prepared for one net. Raises `PeerFailed` from every method."""

    def __init__(self, name: str, python: str, task: Task, program: str = "", prepare_s: float = PREPARE_S):
        self.name = name
        self._folder = tempfile.TemporaryDirectory(prefix="btpeer-")
        folder = Path(self._folder.name)
        task.write(folder)
        threads = str(task.threads)
        environment = {
            **os.environ,
            **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), threads),
            "GOMAXPROCS": threads,
        }
        self._said = folder / "stderr"
        with self._said.open("wb") as said:
            try:
                self._process = subprocess.Popen(
                    [python, "-m", program or PEERS[name], str(folder)],
                    cwd=ROOT,
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=said,
                    bufsize=0,
                )
            except OSError as error:
                self._folder.cleanup()
                raise PeerFailed(f"{python} cannot be run: {error.strerror}") from error
        self._unread = b""
        try:
            self.description = Description(**self._line(prepare_s))
        except BaseException:
            self.close()
            raise

    def ask(self, index: int, times: int = 1) -> None:
        """Start `times` evaluations of input `index`, one after the other."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"input": index, "times": times}).encode() + b"\n")
        except OSError:
            raise PeerFailed(self._why("it has ended")) from None

    def answer(self) -> tuple[list[float], Floats]:
        """(seconds of each, logits) of what was asked for."""
        told = self._line(RUN_S)
        return [float(s) for s in told["seconds"]], np.asarray(told["logits"], np.float64)

    def run(self, index: int, times: int = 1) -> tuple[list[float], Floats]:
        self.ask(index, times)
        return self.answer()

    def close(self) -> None:
        """Ends the child. Safe to call twice."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()

    def _line(self, timeout_s: float) -> dict[str, Any]:
        stdout = self._process.stdout
        assert stdout is not None
        end_s = time.monotonic() + timeout_s
        while b"\n" not in self._unread:
            ready, _, _ = select.select([stdout], [], [], max(0.0, end_s - time.monotonic()))
            if not ready:
                self._process.kill()
                raise PeerFailed(self._why(f"no answer within {timeout_s:g} s"))
            got = os.read(stdout.fileno(), 1 << 16)
            if not got:
                raise PeerFailed(self._why("it has ended"))
            self._unread += got
        line, _, self._unread = self._unread.partition(b"\n")
        try:
            told: dict[str, Any] = json.loads(line)
        except ValueError as error:
            raise PeerFailed(f"its answer is not JSON: {line[:80]!r}") from error
        if "error" in told:
            raise PeerFailed(str(told["error"]))
        return told

    def _why(self, what: str) -> str:
        """What happened and the last line that the child wrote, as one line."""
        lines = self._said.read_text(errors="replace").splitlines() if self._said.exists() else []
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"{what}: {last[:200]}" if last else what


def own(task: Task) -> Peer:
    """Our own tail in a process of its own, by this interpreter."""
    return Peer("blindtail", sys.executable, task, "bench.peers.blindtail_tail")
