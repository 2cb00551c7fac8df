"""What the orchestrator remembers over restarts, in one SQLite file.

    policies  every version that was ever in force, who set it, and what became of it
    votes     which edges applied or refused a version
    sums      what edges reported, per minute: counts by model, kind and name

Every change is one transaction, written through to the disk before it is answered:
a process that is killed, or a machine that loses power, finds either the old
state or the new one. One process uses a file at a time. All methods block: they
belong on a thread of their own. SQLite's errors come out as a `ConfigError`
where the file is opened and as a `StateError` later.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from blindtail.errors import BlindtailError, ConfigError, StateError
from blindtail.wire.policies import PolicyState

#: Raised with every change of the tables below.
SCHEMA = 1
_BUSY_S = 2.0
_MOST = 2**62  # SQLite's integers have 63 bits
_TABLES = """
CREATE TABLE policies (
    version        INTEGER PRIMARY KEY AUTOINCREMENT,  -- never given twice
    model          TEXT NOT NULL,
    document       BLOB NOT NULL,
    state          TEXT NOT NULL,
    author         TEXT NOT NULL,
    note           TEXT NOT NULL,
    created_unix_s REAL NOT NULL,
    undoes         INTEGER                             -- the version that this one rolled back
);
CREATE INDEX policies_by_model ON policies (model, version);
CREATE TABLE votes (
    version INTEGER NOT NULL,
    voter   TEXT NOT NULL,
    applied INTEGER NOT NULL,
    reason  TEXT NOT NULL,
    unix_s  REAL NOT NULL,
    PRIMARY KEY (version, voter)
) WITHOUT ROWID;
CREATE TABLE sums (
    minute INTEGER NOT NULL,                           -- since 1970
    model  TEXT NOT NULL,
    kind   TEXT NOT NULL,
    name   TEXT NOT NULL,
    total  INTEGER NOT NULL,
    PRIMARY KEY (minute, model, kind, name)
) WITHOUT ROWID;
"""

#: (minute since 1970, model, kind, name) -> count. Kinds: "route", "fallback", "bytes".
SumKey = tuple[int, str, str, str]
#: (version, voter).
VoteKey = tuple[int, str]
#: Rows of sums that are kept at most: about 100 bytes each.
MOST_SUMS = 1_000_000


@dataclass(frozen=True, slots=True)
class Stored:
    """One version of a policy as it stands in the file. `undoes`: the version that it rolled back."""

    version: int
    model: str
    document: bytes
    state: PolicyState
    author: str
    note: str
    created_unix_s: float
    undoes: int | None = None


@dataclass(frozen=True, slots=True)
class Vote:
    """An edge's last word on a version."""

    applied: bool
    reason: str = ""


_COLUMNS = "version, model, document, state, author, note, created_unix_s, undoes"


class Store:
    """Opens, or makes, `folder`/orchestrator.sqlite. Raises `ConfigError` that says what to do."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "orchestrator.sqlite"
        self._lock = _lock(folder)
        try:
            self._db = self._open()
        except BaseException:
            os.close(self._lock)
            raise

    def close(self) -> None:
        """Any number of times."""
        if self._lock >= 0:
            self._db.close()
            os.close(self._lock)
            self._lock = -1

    # -- policies ----------------------------------------------------------------

    def add(
        self,
        model: str,
        document: bytes,
        *,
        author: str,
        note: str,
        unix_s: float,
        undoes: int | None = None,
    ) -> Stored:
        """Puts a new version in force for `model` and sends the one before it into history:
        as rolled back when it is the version that this one `undoes`, as replaced otherwise."""
        active, replaced = PolicyState.ACTIVE.value, PolicyState.REPLACED.value
        with self._changing() as db:
            db.execute(
                "UPDATE policies SET state = ? WHERE version = ?", (PolicyState.ROLLED_BACK.value, undoes)
            )
            db.execute(
                "UPDATE policies SET state = ? WHERE model = ? AND state = ?", (replaced, model, active)
            )
            done = db.execute(
                "INSERT INTO policies (model, document, state, author, note, created_unix_s, undoes) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                (model, document, active, author, note, unix_s, undoes),
            )
            row = db.execute(f"{_SELECT} WHERE version = ?", (done.lastrowid,)).fetchone()
        return _stored(row)

    def active(self) -> list[Stored]:
        """What is in force, one version a model."""
        with self._reading() as db:
            rows = db.execute(f"{_SELECT} WHERE state = ? ORDER BY model", (PolicyState.ACTIVE.value,))
            return [_stored(row) for row in rows]

    def history(self, model: str, limit: int) -> list[Stored]:
        """Newest first; `model` "" = all."""
        with self._reading() as db:
            rows = db.execute(
                f"{_SELECT} WHERE ? IN ('', model) ORDER BY version DESC LIMIT ?", (model, limit)
            )
            return [_stored(row) for row in rows]

    def predecessor(self, model: str, version: int) -> Stored | None:
        """The newest version of `model` before `version` that was never rolled back."""
        with self._reading() as db:
            row = db.execute(
                f"{_SELECT} WHERE model = ? AND version < ? AND state != ? ORDER BY version DESC LIMIT 1",
                (model, version, PolicyState.ROLLED_BACK.value),
            ).fetchone()
            return None if row is None else _stored(row)

    # -- votes -------------------------------------------------------------------

    def add_votes(self, votes: Mapping[VoteKey, Vote], unix_s: float) -> None:
        """An edge's last word on a version counts."""
        with self._changing() as db:
            db.executemany(
                "INSERT INTO votes (version, voter, applied, reason, unix_s) VALUES (?, ?, ?, ?, ?) "
                "ON CONFLICT (version, voter) DO UPDATE SET "
                "applied = excluded.applied, reason = excluded.reason, unix_s = excluded.unix_s",
                [(*key, vote.applied, vote.reason, unix_s) for key, vote in votes.items()],
            )

    def votes(self, version: int) -> dict[str, Vote]:
        with self._reading() as db:
            rows = db.execute("SELECT voter, applied, reason FROM votes WHERE version = ?", (version,))
            return {voter: Vote(bool(applied), reason) for voter, applied, reason in rows}

    def refusals(self, versions: Iterable[int]) -> dict[int, int]:
        """How many edges refused each of these versions."""
        with self._reading() as db:
            query = "SELECT count(*) FROM votes WHERE version = ? AND NOT applied"
            return {v: int(db.execute(query, (v,)).fetchone()[0]) for v in versions}

    # -- sums of reports ---------------------------------------------------------

    def add_sums(self, counts: Mapping[SumKey, int]) -> None:
        with self._changing() as db:
            db.executemany(
                "INSERT INTO sums (minute, model, kind, name, total) VALUES (?, ?, ?, ?, ?) "
                "ON CONFLICT DO UPDATE SET total = min(total + excluded.total, ?)",
                [(*key, min(count, _MOST), _MOST) for key, count in counts.items()],
            )

    def sums(self, since_minute: int = 0) -> dict[SumKey, int]:
        with self._reading() as db:
            rows = db.execute(
                "SELECT minute, model, kind, name, total FROM sums WHERE minute >= ?", (since_minute,)
            )
            return {(minute, model, kind, name): total for minute, model, kind, name, total in rows}

    def usage(self, model: str, since_minute: int) -> list[tuple[str, str, str, int]]:
        """(model, kind, name, total) since a minute, sorted; `model` "" = all."""
        with self._reading() as db:
            # total() and not sum(): what peers claim may add up to more than an integer holds.
            rows = db.execute(
                "SELECT model, kind, name, total(total) FROM sums "
                "WHERE minute >= ? AND ? IN ('', model) GROUP BY model, kind, name ORDER BY 1, 2, 3",
                (since_minute, model),
            )
            return [(str(m), str(kind), str(name), min(int(total), _MOST)) for m, kind, name, total in rows]

    def forget(self, before_unix_s: float, most_sums: int = MOST_SUMS) -> None:
        """Drops sums, and votes on versions no longer in force, that are older; of the sums also the
        oldest minutes beyond `most_sums` rows, whatever their age. Policies stay."""
        with self._changing() as db:
            db.execute("DELETE FROM sums WHERE minute < ?", (int(before_unix_s // 60),))
            beyond = db.execute(
                "SELECT minute FROM sums ORDER BY minute DESC LIMIT 1 OFFSET ?", (most_sums,)
            ).fetchone()
            if beyond is not None:
                db.execute("DELETE FROM sums WHERE minute <= ?", beyond)
            db.execute(
                "DELETE FROM votes WHERE unix_s < ? AND version NOT IN "
                "(SELECT version FROM policies WHERE state = ?)",
                (before_unix_s, PolicyState.ACTIVE.value),
            )

    # -- SQLite ------------------------------------------------------------------

    def _open(self) -> sqlite3.Connection:
        try:
            # SQLite gives its side files the mode of this one.
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        except OSError as error:
            raise ConfigError(f"cannot write {self._path}: {error.strerror}") from error
        db = sqlite3.connect(self._path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            with self._translated(db, lambda why: ConfigError(f"cannot use {self._path}: {why}")):
                db.execute("PRAGMA journal_mode = WAL")
                db.execute("PRAGMA synchronous = FULL")
                self._prepare(db)
        except BaseException:
            db.close()
            raise
        return db

    def _prepare(self, db: sqlite3.Connection) -> None:
        found = db.execute("PRAGMA user_version").fetchone()[0]
        if found > SCHEMA:
            raise ConfigError(
                f"{self._path} was written by a newer release (schema {found}, this one knows {SCHEMA}): "
                "use that release, or another state_dir"
            )
        if found == 0:
            if db.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
                raise ConfigError(f"{self._path} is a database of something else: choose another state_dir")
            db.executescript(f"BEGIN IMMEDIATE; {_TABLES} PRAGMA user_version = {SCHEMA}; COMMIT;")
        problem = db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if problem != "ok":
            raise ConfigError(f"cannot use {self._path}: {_DAMAGED}")

    @contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it, or nothing."""
        with self._reading() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):  # SQLite has ended it by itself
                    db.execute("ROLLBACK")
                raise

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        if self._lock < 0:
            raise StateError("the orchestrator is closing")
        with self._translated(self._db, lambda why: StateError(f"the orchestrator's state: {why}")):
            yield self._db

    @contextmanager
    def _translated(
        self, db: sqlite3.Connection, made: Callable[[str], BlindtailError]
    ) -> Iterator[sqlite3.Connection]:
        try:
            yield db
        except sqlite3.Error as error:
            name = getattr(error, "sqlite_errorname", "") or ""
            why = next((text for start, text in _REASONS.items() if name.startswith(start)), None)
            raise made(why or f"{name or type(error).__name__} ({error})") from error


_DAMAGED = (
    "the database is damaged. Policies in force at the edges stay in force; move the file away and set "
    "them again, or restore a copy"
)
#: Beginning of SQLite's name of an error -> what to do. Nothing was changed in any case.
_REASONS = {
    "SQLITE_BUSY": "another program has locked the database: end it and try again",
    "SQLITE_LOCKED": "another program has locked the database: end it and try again",
    "SQLITE_FULL": "its disk is full: make room and try again",
    "SQLITE_IOERR": "its disk cannot be read or written: look at the system's log, and at the room left",
    "SQLITE_READONLY": "the database may not be written: look at the owner and mode of its folder",
    "SQLITE_CANTOPEN": "the database cannot be opened: look at the owner and mode of its folder",
    "SQLITE_CORRUPT": _DAMAGED,
    "SQLITE_NOTADB": _DAMAGED,
}
_SELECT = f"SELECT {_COLUMNS} FROM policies"


def _stored(row: tuple[int, str, bytes, str, str, str, float, int | None]) -> Stored:
    version, model, document, state, author, note, created_unix_s, undoes = row
    return Stored(version, model, document, PolicyState(state), author, note, created_unix_s, undoes)


def _lock(folder: Path) -> int:
    """Makes the folder and holds its lock. Raises `ConfigError` when another process does."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"cannot use the state directory {folder}: {error.strerror}") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise ConfigError(
            f"another orchestrator uses the state directory {folder}: end it, or choose another --state-dir"
        ) from error
    return handle


__all__ = ["SCHEMA", "Store", "Stored", "SumKey", "Vote", "VoteKey"]
