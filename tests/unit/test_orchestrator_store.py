"""What the orchestrator remembers: versions, votes, sums; and files that cannot be used."""

from __future__ import annotations

import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from blindtail.errors import ConfigError, StateError
from blindtail.wire.policies import PolicyState
from orchestrator.store import SCHEMA, Store, Stored, Vote

ACTIVE, REPLACED, ROLLED_BACK = PolicyState.ACTIVE, PolicyState.REPLACED, PolicyState.ROLLED_BACK


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path / "state")
    yield made
    made.close()


def put(store: Store, model: str, document: bytes = b"{}", undoes: int | None = None) -> Stored:
    return store.add(model, document, author="operator:ada", note="why", unix_s=1e9, undoes=undoes)


def states(store: Store) -> dict[int, PolicyState]:
    return {s.version: s.state for s in store.history("", 100)}


def test_versions_rise_over_all_models(store: Store) -> None:
    made = [put(store, model).version for model in ("a", "b", "", "a")]
    assert made == [1, 2, 3, 4]
    assert states(store) == {1: REPLACED, 2: ACTIVE, 3: ACTIVE, 4: ACTIVE}
    assert [s.version for s in store.active()] == [3, 4, 2]  # by model
    assert [s.version for s in store.history("a", 100)] == [4, 1]
    assert [s.version for s in store.history("", 2)] == [4, 3]


def test_a_rollback_is_a_new_version(store: Store) -> None:
    good, bad = put(store, "a", b"good"), put(store, "a", b"bad")
    put(store, "b")
    again = put(store, "a", good.document, undoes=bad.version)
    assert states(store) == {1: REPLACED, 2: ROLLED_BACK, 3: ACTIVE, 4: ACTIVE}
    assert again.undoes == bad.version
    # A version that was rolled back is nobody's predecessor.
    before = store.predecessor("a", again.version)
    assert before is not None
    assert before.document == b"good"
    assert store.predecessor("a", good.version) is None
    assert store.predecessor("b", 3) is None


def test_everything_is_there_after_a_restart(tmp_path: Path) -> None:
    first = Store(tmp_path)
    stored = put(first, "a", b"\x00document")
    first.add_votes({(1, "edge:x"): Vote(False, "too few exits"), (1, "edge:y"): Vote(True)}, 5.0)
    first.add_votes({(1, "edge:y"): Vote(False, "changed its mind")}, 6.0)
    first.add_sums({(10, "a", "route", "tail"): 3})
    first.add_sums({(10, "a", "route", "tail"): 4, (11, "a", "route", "exit1"): 2**63})
    first.close()
    first.close()
    with pytest.raises(StateError, match="closing"):
        first.active()
    second = Store(tmp_path)
    assert second.active() == [stored]
    assert second.votes(1) == {
        "edge:x": Vote(False, "too few exits"),
        "edge:y": Vote(False, "changed its mind"),
    }
    assert second.refusals([1, 2]) == {1: 2, 2: 0}
    assert second.sums() == {(10, "a", "route", "tail"): 7, (11, "a", "route", "exit1"): 2**62}
    second.close()


def test_usage_is_added_up_by_model_and_name(store: Store) -> None:
    store.add_sums(
        {
            (10, "a", "route", "tail"): 3,
            (11, "a", "route", "tail"): 4,
            (11, "a", "fallback", "deadline"): 1,
            (11, "b", "route", "exit1"): 2**63,
            (12, "b", "route", "exit1"): 2**63,  # together more than an integer holds
        }
    )
    assert store.usage("", 0) == [
        ("a", "fallback", "deadline", 1),
        ("a", "route", "tail", 7),
        ("b", "route", "exit1", 2**62),
    ]
    assert store.usage("a", 11) == [("a", "fallback", "deadline", 1), ("a", "route", "tail", 4)]
    assert store.usage("a", 12) == []


def test_what_is_old_goes(store: Store) -> None:
    put(store, "a")
    put(store, "a")
    store.add_votes({(1, "edge:x"): Vote(True), (2, "edge:x"): Vote(True)}, 100.0)
    store.add_sums({(minute, "a", "route", "tail"): 1 for minute in range(10)})
    store.forget(before_unix_s=5 * 60.0)
    assert {key[0] for key in store.sums()} == {5, 6, 7, 8, 9}
    assert not store.votes(1)  # of a version that was replaced
    assert store.votes(2)  # of the one in force
    store.forget(0.0, most_sums=2)
    assert {key[0] for key in store.sums()} == {8, 9}
    assert len(store.history("", 100)) == 2


def test_only_the_owner_reads_it(tmp_path: Path) -> None:
    store = Store(tmp_path / "state")
    put(store, "a")
    modes = {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "state").iterdir()}
    assert modes == {0o600}
    assert (tmp_path / "state" / "orchestrator.sqlite-wal").exists()
    store.close()


def test_texts_are_never_sql(store: Store) -> None:
    nasty = "'); DROP TABLE policies; --"
    put(store, nasty, nasty.encode())
    assert store.history(nasty, 10)[0].model == nasty
    assert len(store.active()) == 1


# --- files that cannot be used --------------------------------------------------


def test_one_process_at_a_time(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="another orchestrator uses"):
        Store(tmp_path / "state")


def test_a_newer_release_wrote_it(tmp_path: Path) -> None:
    Store(tmp_path).close()
    with sqlite3.connect(tmp_path / "orchestrator.sqlite") as db:
        db.execute(f"PRAGMA user_version = {SCHEMA + 1}")
    db.close()
    for _ in range(2):  # the lock is let go
        with pytest.raises(ConfigError, match="newer release"):
            Store(tmp_path)


def test_a_database_of_something_else(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "orchestrator.sqlite") as db:
        db.execute("CREATE TABLE songs (title TEXT)")
    db.close()
    with pytest.raises(ConfigError, match="something else"):
        Store(tmp_path)


@pytest.mark.parametrize("damage", ["overwritten", "no database", "a hole"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    store = Store(tmp_path)
    for i in range(200):
        put(store, f"model-{i}", bytes(500))
    store.close()
    file = tmp_path / "orchestrator.sqlite"
    data = bytearray(file.read_bytes())
    if damage == "overwritten":
        data[200:] = b"\xa5" * (len(data) - 200)
    elif damage == "no database":
        data = bytearray(b"not a database, " * 1000)
    else:
        data[8192:12288] = bytes(4096)
    file.write_bytes(data)
    with pytest.raises(ConfigError, match="damaged") as raised:
        Store(tmp_path)
    assert str(file) in str(raised.value)


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="state directory"):
        Store(tmp_path / "file" / "state")
    (tmp_path / "state" / "orchestrator.sqlite").mkdir(parents=True)
    with pytest.raises(ConfigError, match="cannot write"):
        Store(tmp_path / "state")


def test_another_program_holds_it(store: Store, tmp_path: Path) -> None:
    put(store, "a")
    store._db.execute("PRAGMA busy_timeout = 100")  # it waits for seconds otherwise
    other = sqlite3.connect(tmp_path / "state" / "orchestrator.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        with pytest.raises(StateError, match="locked"):
            put(store, "b")
        assert len(store.active()) == 1  # it can be read meanwhile
    finally:
        other.execute("ROLLBACK")
        other.close()
    assert put(store, "b").version == 2


def test_a_full_disk_changes_nothing(store: Store) -> None:
    put(store, "a", b"good")
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StateError, match="disk is full"):
        put(store, "a", bytes(100_000))
    assert [(s.document, s.state) for s in store.history("", 10)] == [(b"good", ACTIVE)]
    store._db.execute(f"PRAGMA max_page_count = {pages + 1000}")
    assert put(store, "a").state is ACTIVE


WRITER = """
import sys
from pathlib import Path
from orchestrator.store import Store
store = Store(Path(sys.argv[1]))
good = store.add("a", b"0", author="", note="", unix_s=0.0).version
while True:
    bad = store.add("a", b"%d" % good, author="", note="", unix_s=0.0).version
    good = store.add("a", b"good", author="", note="", unix_s=0.0, undoes=bad).version
    print(good, flush=True)
"""


@pytest.mark.timeout(60)
def test_killed_at_any_moment_it_is_whole(tmp_path: Path) -> None:
    told = 0
    for _ in range(3):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).resolve().parents[2],
        )
        assert writer.stdout is not None
        for _ in range(5):
            told = int(writer.stdout.readline())
        writer.kill()
        told = max([told, *map(int, writer.stdout.read().split())])
        writer.wait()
        writer.stdout.close()
        store = Store(tmp_path)
        found = store.history("a", 10_000)
        store.close()
        # What was told is there, versions have no hole, and one of them is in force.
        assert [s.version for s in found] == list(range(found[0].version, 0, -1))
        assert found[0].version >= told
        assert [s.version for s in found if s.state is ACTIVE] == [found[0].version]
    assert told > 10


def test_threads_take_turns(store: Store) -> None:
    """The store is used from one thread at a time; which one does not matter."""
    made: list[int] = []
    thread = threading.Thread(target=lambda: made.append(put(store, "a").version))
    thread.start()
    thread.join()
    assert made == [1]
    assert store.active()[0].version == 1
