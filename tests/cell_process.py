"""`blindtail cloud` as a process, for tests: launched, followed, and seen to its end with all below it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blindtail.bundle import CloudBundle
from blindtail.rpc import INSECURE_LOOPBACK, TailStub, secure_channel
from tests.clock import until
from tests.cloud_cases import Client, bundle

ROOT = Path(__file__).resolve().parents[1]
COMMAND = """
import sys, typer
from blindtail.config import load_config
from cloud.cli import register
app = typer.Typer(pretty_exceptions_enable=False)
app.callback()(lambda: None)
register(app)
app(sys.argv[1:])
"""


@dataclass
class Running:
    """One `blindtail cloud` and what it announced."""

    process: subprocess.Popen[bytes]
    announce: Path
    folder: Path
    metrics_port: int = 0

    def read(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.announce.read_text())
        return content

    def client(self) -> Client:
        return Client(TailStub(secure_channel(self.read()["address"], INSECURE_LOOPBACK)))

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(40)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)

    def ended(self) -> tuple[int, str, str]:
        """Exit code, standard output and standard error, once it has ended."""
        code = self.process.wait(60)
        return code, (self.folder / "out").read_text(), (self.folder / "err").read_text()


def launch(folder: Path, *flags: str, model: CloudBundle | None = None, empty: bool = False) -> Running:
    """A cell on the clear backend, in a process group of its own; `empty` = without any model."""
    folder.mkdir(parents=True, exist_ok=True)
    (model or bundle()).save(folder / "cloud.bt")
    announce = folder / "announce.json"
    announce.unlink(missing_ok=True)  # of a cell that was killed here
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # Files, not pipes: nobody reads while it runs.
    with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
        process = subprocess.Popen(
            [
                *(sys.executable, "-c", COMMAND, "cloud", *([] if empty else [str(folder / "cloud.bt")])),
                *("--backend", "clear", "--state-dir", str(folder / "state")),
                *("--announce", str(announce), "--json", *flags),
            ],
            stdout=out,
            stderr=err,
            env=environment,
            cwd=folder,
            start_new_session=True,
        )
    return Running(process, announce, folder)


def wait_for(condition: Callable[[], Any], text: str, limit_s: float = 60) -> Any:
    """`until`, for what other processes do."""
    return until(condition, text, limit_s, every_s=0.05)


def until_ready(running: Running) -> dict[str, Any]:
    def ready() -> bool:
        if running.process.poll() is not None:
            raise AssertionError(running.ended())
        return running.announce.exists()

    wait_for(ready, "the cell did not get ready", 90)
    return running.read()


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def descendants(pid: int) -> dict[int, str]:
    """pid -> command of every process below `pid`."""
    parents: dict[int, tuple[int, str]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            parents[int(entry.name)] = (int(fields[1]), command)
    found: dict[int, str] = {}
    front = {pid}
    while front:
        front = {p for p, (parent, _) in parents.items() if parent in front and p not in found}
        found.update({p: parents[p][1] for p in front})
    return found


def all_gone(pids: dict[int, str], limit_s: float = 20) -> None:
    assert len(pids) >= 5
    try:
        wait_for(lambda: not any(alive(p) for p in pids), "processes stayed", limit_s)
    finally:
        for pid in pids:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
