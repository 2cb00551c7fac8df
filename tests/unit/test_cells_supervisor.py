"""The process that keeps a cell: restarts, patience, and nothing left behind. Its child is a script."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from blindtail.errors import ConfigError, TailUnavailable
from cloud import supervisor
from cloud.supervisor import RESTARTS, Supervisor
from tests.cell_process import alive

pytestmark = pytest.mark.timeout(30)

#: What every script can use: `order`, `tell(event, **fields)`, `asked()` = the next line.
CHILD = """
import json, os, pathlib, subprocess, sys, time
def tell(event, **fields): print(json.dumps({"event": event, **fields}), flush=True)
def asked(): return sys.stdin.readline().strip()
order = json.loads(asked())
folder = pathlib.Path(order["folder"])
record = open(order["record"], "a", buffering=1)
"""
READY = 'tell("ready", announced={"restarts": order["restarts"]})\n'


class Rig:
    def __init__(self, folder: Path, script: str, stop_s: float = 10.0) -> None:
        self.record, self.announce = folder / "record", folder / "announce.json"
        self.ready: list[Mapping[str, Any]] = []
        self.losses: list[str] = []
        self.folders: list[Path] = []
        self.when_ready: Callable[[], None] = lambda: None
        self.supervisor = Supervisor(
            [sys.executable, "-c", CHILD + script],
            self._order,
            announce=self.announce,
            stop_s=stop_s,
            on_ready=self._ready,
            on_loss=self.losses.append,
        )

    def _order(self, folder: Path, restarts: int) -> Mapping[str, Any]:
        self.folders.append(folder)
        return {"folder": str(folder), "record": str(self.record), "restarts": restarts}

    def _ready(self, announced: Mapping[str, Any]) -> None:
        self.ready.append(announced)
        self.announce.write_text("{}")
        self.when_ready()

    def run(self) -> int:
        try:
            return self.supervisor.run()
        finally:
            assert not self.announce.exists()
            assert not any(folder.exists() for folder in self.folders)

    def lines(self) -> list[str]:
        return self.record.read_text().splitlines()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "BACK_OFF_S", (0.0,))


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_the_first_signal_drains(tmp_path: Path) -> None:
    script = READY + 'record.write(asked() + "\\n")\nprint("noise of a library")\n'
    rig = Rig(tmp_path, script)
    rig.when_ready = stop
    before = signal.getsignal(signal.SIGTERM)
    assert rig.run() == 0
    assert rig.lines() == ["drain"]
    assert rig.losses == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_second_signal_ends_at_once(tmp_path: Path) -> None:
    script = """
tell("ready", announced={})
while True:
    line = asked()
    record.write(line + "\\n")
    tell("progress", text=line)
    if line == "end": break
"""
    rig = Rig(tmp_path, script, stop_s=60.0)

    def twice() -> None:
        stop()
        stop()

    rig.when_ready = twice
    start_s = time.monotonic()
    assert rig.run() == 0
    assert rig.lines() == ["drain", "end"]
    assert time.monotonic() - start_s < 10


def test_a_child_that_does_not_end_is_killed(tmp_path: Path) -> None:
    rig = Rig(tmp_path, READY + "time.sleep(60)\n", stop_s=0.3)
    rig.when_ready = stop
    start_s = time.monotonic()
    assert rig.run() == 0
    assert time.monotonic() - start_s < 10


def test_a_lost_cluster_is_started_again_and_announced_once(tmp_path: Path) -> None:
    script = (
        READY
        + """
record.write(f"life {order['restarts']}\\n")
if order["restarts"] < 2: os._exit(3)
record.write(asked() + "\\n")
"""
    )
    rig = Rig(tmp_path, script)
    original = rig._order

    def order(folder: Path, restarts: int) -> Mapping[str, Any]:
        if restarts == 2:
            stop()
        return original(folder, restarts)

    rig.supervisor._order = order
    assert rig.run() == 0
    assert rig.lines() == ["life 0", "life 1", "life 2", "drain"]
    assert rig.ready == [{"restarts": 0}]
    assert len(rig.losses) == 2
    assert f"1 of {RESTARTS}" in rig.losses[0]
    assert len(set(rig.folders)) == 3


@pytest.mark.parametrize("way", ["os._exit(3)", "os.kill(os.getpid(), 9)", "sys.exit(0)"])
def test_after_too_many_losses_it_gives_up(tmp_path: Path, way: str) -> None:
    rig = Rig(tmp_path, READY + 'record.write("life\\n")\n' + way + "\n")
    assert rig.run() == 1
    assert len(rig.lines()) == RESTARTS + 1


def test_losses_long_ago_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "WINDOW_S", 0.0)
    rig = Rig(tmp_path, READY + 'record.write("life\\n")\nos._exit(3)\n')

    def loss(text: str) -> None:
        rig.losses.append(text)
        if len(rig.losses) > 2 * RESTARTS:
            stop()

    rig.supervisor._on_loss = loss
    assert rig.run() == 0
    assert len(rig.lines()) > RESTARTS + 1


def test_a_child_that_never_got_ready_is_not_tried_again(tmp_path: Path) -> None:
    script = 'record.write("life\\n")\ntell("failed", kind="ConfigError", message="the port is taken")\n'
    rig = Rig(tmp_path, script)
    with pytest.raises(ConfigError, match="the port is taken"):
        rig.run()
    assert rig.lines() == ["life"]
    silent = Rig(tmp_path, "sys.exit(1)\n")
    with pytest.raises(TailUnavailable):
        silent.run()


def test_a_signal_during_the_wait_for_a_restart_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "BACK_OFF_S", (60.0,))
    rig = Rig(tmp_path, READY + "os._exit(3)\n")
    rig.supervisor._on_loss = lambda text: stop()
    start_s = time.monotonic()
    assert rig.run() == 0
    assert time.monotonic() - start_s < 10


def test_nothing_of_a_lost_cluster_is_left(tmp_path: Path) -> None:
    """Also what has a session of its own, and what lost its parent long ago."""
    script = (
        READY
        + """
sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
nested = (
    f"import subprocess; null = subprocess.DEVNULL; "
    f"print(subprocess.Popen({sleep!r}, stdout=null, start_new_session=True).pid, flush=True)"
)
pids = [subprocess.Popen(sleep).pid, subprocess.Popen(sleep, start_new_session=True).pid]
pids.append(int(subprocess.run([sys.executable, "-c", nested], stdout=subprocess.PIPE, check=True).stdout))
for pid in pids:
    os.kill(pid, 0)
    record.write(f"{pid}\\n")
os._exit(3)
"""
    )
    rig = Rig(tmp_path, script)
    seen: list[bool] = []

    def loss(text: str) -> None:
        seen.extend(alive(int(line)) for line in rig.lines())
        stop()

    rig.supervisor._on_loss = loss
    assert rig.run() == 0
    assert seen == [False, False, False]


def test_orphans_that_end_are_let_go_while_the_child_lives(tmp_path: Path) -> None:
    script = """
nested = (
    "import subprocess; null = subprocess.DEVNULL; "
    "print(subprocess.Popen(['sleep', '0.3'], stdout=null).pid, flush=True)"
)
orphan = subprocess.run([sys.executable, "-c", nested], stdout=subprocess.PIPE, check=True).stdout
record.write(f"{int(orphan)}\\n")
end_s = time.monotonic() + 5
while os.path.exists(f"/proc/{int(orphan)}") and time.monotonic() < end_s: time.sleep(0.02)
record.write(f"{os.path.exists(f'/proc/{int(orphan)}')}\\n")
tell("ready", announced={})
asked()
"""
    rig = Rig(tmp_path, script)
    rig.when_ready = stop
    assert rig.run() == 0
    assert rig.lines()[1] == "False"
