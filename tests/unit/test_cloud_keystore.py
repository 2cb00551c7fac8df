"""The key store: partial uploads, checks, the budget, restarts. The check itself is a fake here."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from blindtail.errors import (
    ConfigError,
    ContainerError,
    KeysMissing,
    Overloaded,
    ProgramMismatch,
    TailUnavailable,
)
from blindtail.wire import KeyState, KeyStatus
from cloud import partials
from cloud.config import KeyLimits
from tests.cloud_cases import sha
from tests.key_bench import BOTH, KEYS, PROGRAM, READY_BYTES, SIZE, Bench, files, other, pieces, run

pytestmark = pytest.mark.timeout(30)


def test_from_nothing_to_ready(tmp_path: Path) -> None:
    async def body(b: Bench) -> None:
        assert b.status() == KeyStatus(KeyState.MISSING, 0)
        with pytest.raises(KeysMissing):
            b.store.pin("a", PROGRAM, sha(KEYS))
        b.check.go.clear()
        assert (await b.send()).state is KeyState.CHECKING
        assert (await b.send()).state is KeyState.CHECKING  # sent twice: nothing happens
        assert files(tmp_path, "ready") == []
        b.check.go.set()
        await b.checked()
        assert b.status() == KeyStatus(KeyState.READY, SIZE)
        assert (await b.send()).state is KeyState.READY
        assert b.check.calls == 1
        path = b.store.pin("a", PROGRAM, sha(KEYS))
        assert path.stat().st_size == READY_BYTES
        b.store.unpin(path)
        assert files(tmp_path, "partial") == []
        assert (tmp_path / "clear" / "ready").stat().st_mode & 0o077 == 0

    run(tmp_path, body)


def test_an_upload_goes_on_where_it_broke_off(tmp_path: Path) -> None:
    async def body(b: Bench) -> None:
        status = await b.send(stop=200_000)
        assert status == KeyStatus(KeyState.MISSING, 200_000)
        for wrong in (0, 199_999, 200_001):
            with pytest.raises(ContainerError, match="200000 bytes are here"):
                await b.send(offset=wrong)
        await b.send(offset=200_000)
        await b.checked()
        assert b.status().state is KeyState.READY

    run(tmp_path, body)


def test_what_arrived_and_what_is_ready_survive_a_restart(tmp_path: Path) -> None:
    async def first(b: Bench) -> None:
        await b.ready(other(1))
        await b.send(stop=100_000)

    async def second(b: Bench) -> None:
        assert b.status(other(1)).state is KeyState.READY
        assert b.status() == KeyStatus(KeyState.MISSING, 100_000)
        await b.send(offset=100_000)
        await b.checked()
        assert b.status().state is KeyState.READY

    run(tmp_path, first)
    (tmp_path / "clear" / "ready" / ".partial-x").write_bytes(b"a check died here")
    run(tmp_path, second)
    assert all(len(name) == 64 for name in files(tmp_path, "ready"))


def test_an_upload_that_was_whole_when_the_cell_died_is_checked_on_asking(tmp_path: Path) -> None:
    async def first(b: Bench) -> None:
        await b.send(stop=100_000)

    async def second(b: Bench) -> None:
        assert b.status() == KeyStatus(KeyState.MISSING, SIZE)
        await b.send(offset=SIZE)
        await b.checked()
        assert b.status().state is KeyState.READY

    run(tmp_path, first)
    (partial,) = (tmp_path / "clear" / "partial").iterdir()
    partial.write_bytes(KEYS)
    run(tmp_path, second)


def test_refused_keys_are_gone_and_the_reason_is_told(tmp_path: Path) -> None:
    bad = b"bad" + KEYS[3:]

    async def body(b: Bench) -> None:
        await b.send(bad)
        await b.checked()
        assert b.status(bad) == KeyStatus(KeyState.REFUSED, 0, "residue above its prime")
        assert files(tmp_path, "ready") == files(tmp_path, "partial") == []
        assert (await b.send(bad, stop=50_000)).state is KeyState.MISSING  # may try again
        b.clock.now += 10_000
        b.store.sweep()

    run(tmp_path, body)


@pytest.mark.parametrize("total", [SIZE - 1, SIZE + 1, 0, 1 << 40])
def test_a_size_other_than_the_programs_is_refused_before_a_byte(tmp_path: Path, total: int) -> None:
    async def body(b: Bench) -> None:
        with pytest.raises(ContainerError, match=str(SIZE)):
            await b.send(total=total)
        assert files(tmp_path, "partial") == []

    run(tmp_path, body)


def test_more_bytes_than_announced_are_refused_and_dropped(tmp_path: Path) -> None:
    async def body(b: Bench) -> None:
        with pytest.raises(ContainerError, match="more than"):
            await b.send(KEYS + b"x", digest=sha(KEYS))
        assert files(tmp_path, "partial") == []
        assert b.check.calls == 0

    run(tmp_path, body)


def test_an_unknown_program_is_a_mismatch(tmp_path: Path) -> None:
    async def body(b: Bench) -> None:
        with pytest.raises(ProgramMismatch):
            await b.store.receive("a", "0" * 64, sha(KEYS), SIZE, 0, pieces(KEYS))

    run(tmp_path, body)


def test_keys_belong_to_the_identity_that_sent_them(tmp_path: Path) -> None:
    async def body(b: Bench) -> None:
        await b.ready()
        assert b.status(who="b").state is KeyState.MISSING
        with pytest.raises(KeysMissing):
            b.store.pin("b", PROGRAM, sha(KEYS))

    run(tmp_path, body)


def test_a_later_upload_takes_over(tmp_path: Path) -> None:
    async def body(b: Bench) -> None:
        gate = asyncio.Event()

        async def stuck() -> AsyncIterator[bytes]:
            yield KEYS[:50_000]
            await gate.wait()
            yield KEYS[50_000:100_000]

        old = asyncio.create_task(b.store.receive("a", PROGRAM, sha(KEYS), SIZE, 0, stuck()))
        while b.status().received_bytes < 50_000:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await b.send(offset=50_000, stop=50_000)
        gate.set()
        with pytest.raises(TailUnavailable, match="took over"):
            await old
        assert b.status().received_bytes == 100_000

    run(tmp_path, body)


def test_the_least_recently_used_goes_when_the_budget_is_full(tmp_path: Path) -> None:
    async def body(b: Bench) -> None:
        for i in range(3):
            await b.ready(other(i))
        b.store.unpin(b.store.pin("a", PROGRAM, sha(other(0))))
        await b.ready(other(3))
        states = [b.status(other(i)).state for i in range(4)]
        assert states == [KeyState.READY, KeyState.MISSING, KeyState.READY, KeyState.READY]
        assert b.store.stored_bytes == 3 * BOTH
        assert len(files(tmp_path, "ready")) == 3
        assert files(tmp_path, "raw") == files(tmp_path, "ready")

    run(tmp_path, body, KeyLimits(budget_bytes=3 * BOTH))


def test_keys_in_use_stay_and_go_when_let_go(tmp_path: Path) -> None:
    async def body(b: Bench) -> None:
        await b.ready(other(0))
        path = b.store.pin("a", PROGRAM, sha(other(0)))
        await b.ready(other(1))
        assert path.exists()
        b.store.evict_all()
        assert path.exists()
        b.store.unpin(path)
        assert b.store.stored_bytes == BOTH

    run(tmp_path, body, KeyLimits(budget_bytes=BOTH))


def test_keys_larger_than_the_whole_budget_are_refused(tmp_path: Path) -> None:
    async def body(b: Bench) -> None:
        await b.send()
        await b.checked()
        assert b.status().state is KeyState.REFUSED
        assert "budget" in b.status().problem

    run(tmp_path, body, KeyLimits(budget_bytes=BOTH - 1))


def test_files_removed_behind_its_back_are_missing_keys(tmp_path: Path) -> None:
    async def body(b: Bench) -> None:
        await b.ready()
        for path in (tmp_path / "clear" / "ready").iterdir():
            path.unlink()
        with pytest.raises(KeysMissing):
            b.store.pin("a", PROGRAM, sha(KEYS))
        assert b.status().state is KeyState.MISSING

    run(tmp_path, body)


def test_partial_uploads_are_bounded_by_count_and_time(tmp_path: Path) -> None:
    async def body(b: Bench) -> None:
        for i in range(4):
            await b.send(other(i), stop=50_000)
        assert b.status(other(0)).received_bytes == b.status(other(1)).received_bytes == 0
        assert len(files(tmp_path, "partial")) == 2
        b.clock.now += 4000
        b.store.sweep()
        assert files(tmp_path, "partial") == []

    run(tmp_path, body, KeyLimits(partial_per_identity=2))


@pytest.mark.parametrize(
    ("code", "text"), [(errno.ENOSPC, "no room"), (errno.EDQUOT, "no room"), (errno.EACCES, "operator")]
)
def test_a_disk_that_fails_is_told_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, text: str
) -> None:
    def fail(path: Path, offset: int, piece: bytes) -> None:
        if offset:
            raise OSError(code, "the disk")
        path.write_bytes(piece)

    async def body(b: Bench) -> None:
        monkeypatch.setattr(partials, "write_at", fail)
        with pytest.raises(Overloaded, match=text):
            await b.send()
        assert files(tmp_path, "partial") == []
        monkeypatch.undo()
        await b.ready()

    run(tmp_path, body)


def test_one_cell_per_state_directory(tmp_path: Path) -> None:
    async def body(b: Bench) -> None:
        with pytest.raises(ConfigError, match="another cell"):
            Bench(tmp_path)

    run(tmp_path, body)
    run(tmp_path, lambda b: asyncio.sleep(0))  # and it is let go


def test_a_state_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="state-dir"):
        Bench(tmp_path / "file" / "state")
