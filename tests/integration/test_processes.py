"""Child processes: announced, logged, and gone with everything they started."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edge.processes import Child, ChildFailed

pytestmark = pytest.mark.timeout(60)

#: A module that starts a grandchild, announces itself, and does what it is told.
_SCRIPT = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
mode, folder = sys.argv[1], Path(sys.argv[2])
if mode == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("hello from", mode, flush=True)
if mode == "fail":
    sys.exit("no such thing")
grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"], start_new_session=True)
part = folder / "part"
part.write_text(json.dumps({"grandchild": grandchild.pid}))
part.rename(folder / "announce.json")
if mode == "leave":
    sys.exit(0)
if mode == "quick":
    grandchild.kill()
    grandchild.wait()
    sys.exit(0)
time.sleep(100)
"""


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _child(mode: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Child:
    (folder / "spawned_for_test.py").write_text(_SCRIPT)
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    return Child(mode, ["spawned_for_test", mode, str(folder)], folder / "logs" / "child.log")


@pytest.mark.parametrize("mode", ["calm", "deaf"])
def test_stop_ends_the_whole_family(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with _child(mode, tmp_path, monkeypatch) as child:
        grandchild = child.announcement(tmp_path / "announce.json", 30.0)["grandchild"]
        assert _alive(child.pid)
        assert _alive(grandchild)  # positive control of `_alive`
        child.stop(grace_s=0.5)
        assert not _alive(child.pid)
        assert not _alive(grandchild)


def test_what_outlives_its_parents_is_ended_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with _child("leave", tmp_path, monkeypatch) as child:
        grandchild = child.announcement(tmp_path / "announce.json", 30.0)["grandchild"]
        assert child.wait(30.0) == 0
        assert _alive(grandchild)  # nobody's child by now
    assert not _alive(grandchild)


def test_a_failing_child_says_where_to_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        _child("fail", tmp_path, monkeypatch) as child,
        pytest.raises(ChildFailed, match=r"status 1; see .*child.log: hello from fail \| no such thing"),
    ):
        child.announcement(tmp_path / "announce.json", 30.0)


def test_a_child_that_takes_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with _child("calm", tmp_path, monkeypatch) as child:
        with pytest.raises(ChildFailed, match="not ready after"):
            child.announcement(tmp_path / "never.json", 0.3)
        with pytest.raises(ChildFailed, match="not done after"):
            child.wait(0.2)


def test_an_orderly_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with _child("quick", tmp_path, monkeypatch) as child:
        assert child.wait(30.0) == 0
        child.check()
        with pytest.raises(ChildFailed, match="before it was ready"):
            child.announcement(tmp_path / "never.json", 1.0)
