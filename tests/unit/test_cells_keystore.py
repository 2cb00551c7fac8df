"""What the key store does for other cells and for models that come and go. The check itself is a fake."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from blindtail.errors import KeysMissing
from blindtail.wire import KeyState
from cloud.keyfolder import KeyFolder, encoded_folder
from cloud.registry import Registry
from tests.cloud_cases import bundle, program, sha
from tests.key_bench import KEYS, PROGRAM, SIZE, Bench, files, other, pieces, run

pytestmark = pytest.mark.timeout(30)


def container(b: Bench, data: bytes = KEYS, who: str = "a") -> bytes:
    return b.store.container(who, PROGRAM, sha(data)).read_bytes()


def test_the_container_stays_beside_the_keys_and_goes_with_them(tmp_path: Path) -> None:
    async def body(b: Bench) -> None:
        with pytest.raises(KeysMissing):
            container(b)
        await b.ready()
        assert container(b) == KEYS
        with pytest.raises(KeysMissing):
            container(b, who="b")
        b.store.evict_all()
        assert files(tmp_path, "raw") == files(tmp_path, "ready") == []

    run(tmp_path, body)


def test_the_container_survives_a_restart_and_a_death_before_it_was_put_aside(tmp_path: Path) -> None:
    async def first(b: Bench) -> None:
        await b.ready()
        await b.ready(other(1))

    async def second(b: Bench) -> None:
        assert container(b) == KEYS
        assert container(b, other(1)) == other(1)
        assert b.store.stored_bytes == 2 * (SIZE + 100)

    run(tmp_path, first)
    # The cell died between the check of one and its last rename; another container lost its keys.
    name = KeyFolder.name("a", PROGRAM, sha(other(1)))
    (tmp_path / "clear" / "raw" / name).rename(tmp_path / "clear" / "partial" / name)
    (tmp_path / "clear" / "raw" / ("0" * 64)).write_bytes(b"nobody's")
    run(tmp_path, second)
    assert len(files(tmp_path, "raw")) == 2


def test_only_an_edges_own_upload_is_announced(tmp_path: Path) -> None:
    async def body(b: Bench) -> None:
        heard: list[tuple[str, str, bytes]] = []
        b.store.on_ready = lambda *key: heard.append(key)
        status = await b.store.receive("a", PROGRAM, sha(other(1)), SIZE, 0, pieces(other(1)), from_cell=True)
        assert status.state is KeyState.CHECKING
        await b.checked()
        assert b.status(other(1)).state is KeyState.READY
        assert heard == []
        await b.ready()
        assert heard == [("a", PROGRAM, sha(KEYS))]

    run(tmp_path, body)


def test_refused_keys_of_another_cell_are_not_held_against_the_edge(tmp_path: Path) -> None:
    async def body(b: Bench) -> None:
        bad = b"bad" + KEYS[3:]
        await b.store.receive("a", PROGRAM, sha(bad), SIZE, 0, pieces(bad), from_cell=True)
        await b.checked()
        assert b.status(bad).state is KeyState.MISSING
        await b.send(bad)  # positive control: the edge's own are
        await b.checked()
        assert b.status(bad).state is KeyState.REFUSED

    run(tmp_path, body)


def test_while_another_cell_is_asked_the_edge_waits_and_sends_nothing(tmp_path: Path) -> None:
    async def body(b: Bench) -> None:
        with b.store.awaiting("a", PROGRAM, sha(KEYS)):
            assert b.status().state is KeyState.CHECKING
            assert b.status(who="b").state is KeyState.MISSING
            assert (await b.send()).state is KeyState.CHECKING
            assert files(tmp_path, "partial") == []
            short = await b.store.receive(
                "a", PROGRAM, sha(KEYS), SIZE, 0, pieces(KEYS, stop=50_000), from_cell=True
            )
            assert (short.state, short.received_bytes) == (KeyState.MISSING, 50_000)
            assert b.status().state is KeyState.CHECKING
        assert b.status().state is KeyState.MISSING
        await b.send(offset=50_000)
        await b.checked()
        assert b.status().state is KeyState.READY

    run(tmp_path, body)


def test_a_program_that_comes_and_goes_brings_and_takes_its_keys(tmp_path: Path) -> None:
    (entry,) = Registry([bundle(1, model="late")], "clear").entries

    async def body(b: Bench) -> None:
        b.store.know(entry)
        assert (tmp_path / "programs" / f"{entry.program_id}.bt").is_file()
        await b.ready()
        path = b.store.pin("a", PROGRAM, sha(KEYS))
        await b.ready(other(1))
        await b.send(other(2), stop=50_000)
        b.store.forget_program(PROGRAM)
        assert not (tmp_path / "programs" / f"{PROGRAM}.bt").exists()
        # What is in use stays until it is let go, but is nobody's any more.
        assert b.status().state is KeyState.MISSING
        assert path.exists()
        assert files(tmp_path, "ready") == files(tmp_path, "raw") == [path.name]
        assert files(tmp_path, "partial") == []
        b.store.unpin(path)
        assert files(tmp_path, "ready") == files(tmp_path, "raw") == []
        assert (tmp_path / "programs" / f"{entry.program_id}.bt").is_file()

    assert entry.program_id != program().spec.program_id
    run(tmp_path, body)


def test_keys_whose_program_went_while_they_were_checked_are_dropped(tmp_path: Path) -> None:
    async def body(b: Bench) -> None:
        b.check.go.clear()
        await b.send()
        b.store.forget_program(PROGRAM)
        # The child that checks had read the program before it went.
        b.check.needs_bundle = False
        b.check.go.set()
        await b.checked()
        assert files(tmp_path, "ready") == files(tmp_path, "raw") == files(tmp_path, "partial") == []
        assert b.status().state is KeyState.REFUSED

    run(tmp_path, body)


def test_a_name_tells_the_program_and_hides_the_rest() -> None:
    names = {
        KeyFolder.name(*key)
        for key in [("a", PROGRAM, sha(KEYS)), ("b", PROGRAM, sha(KEYS)), ("a", PROGRAM, sha(other(1)))]
    }
    assert len(names) == 3
    assert all(len(name) == 64 and KeyFolder.is_of(name, PROGRAM) for name in names)
    assert not KeyFolder.is_of(names.pop(), "0" * 64)


def test_uploads_and_gifts_of_one_key_set_meet(tmp_path: Path) -> None:
    """The later writer takes over, and the keys arrive once."""

    async def body(b: Bench) -> None:
        gate = asyncio.Event()

        async def slow() -> AsyncIterator[bytes]:
            yield KEYS[:50_000]
            await gate.wait()
            yield KEYS[50_000:]

        gift = asyncio.create_task(b.store.receive("a", PROGRAM, sha(KEYS), SIZE, 0, slow(), from_cell=True))
        while b.status().received_bytes < 50_000:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await b.send(offset=50_000)
        gate.set()
        await asyncio.gather(gift, return_exceptions=True)
        await b.checked()
        assert b.status().state is KeyState.READY
        assert container(b) == KEYS
        assert b.check.calls == 1

    run(tmp_path, body)


# --- encoded weights, whatever is in the files ------------------------------------------------


def put(root: Path, *names: str) -> None:
    for name in names:
        (encoded_folder(root, "clear") / name).write_bytes(b"x")


def test_a_program_that_goes_takes_its_encoded_weights(tmp_path: Path) -> None:
    (entry,) = Registry([bundle(1, model="late")], "clear").entries
    late = entry.program_id

    async def body(b: Bench) -> None:
        b.store.know(entry)
        put(tmp_path, f"{PROGRAM}.32.1", f"{PROGRAM}.64.1", f"{late}.32.1")
        # Of the time when this cell ran another backend.
        other = encoded_folder(tmp_path, "native")
        other.mkdir(parents=True)
        (other / f"{PROGRAM}.32.1").write_bytes(b"x")
        b.store.forget_program(PROGRAM)
        assert files(tmp_path, "encoded") == [f"{late}.32.1"]
        assert list(other.iterdir()) == []

    run(tmp_path, body)


def test_what_no_evaluator_reads_is_cleared_away(tmp_path: Path) -> None:
    late = program(1).spec.program_id
    kept, writing = f"{PROGRAM}.32.1", ".partial-abc"
    stale = (f"{PROGRAM}.32.0", f"{late}.32.1", PROGRAM, "junk")

    async def body(b: Bench) -> None:
        put(tmp_path, kept, writing, *stale)
        b.store.sweep()  # while evaluators run: one of them may be writing
        assert files(tmp_path, "encoded") == sorted([kept, writing])
        abandoned = encoded_folder(tmp_path, "clear") / ".partial-old"
        abandoned.write_bytes(b"x")
        os.utime(abandoned, (0, 0))  # by an evaluator that was killed
        b.store.sweep()
        assert files(tmp_path, "encoded") == sorted([kept, writing])
        put(tmp_path, *stale)
        b.store.tidy()  # before any does
        assert files(tmp_path, "encoded") == [kept]

    run(tmp_path, body)
    assert (tmp_path / "clear" / "encoded").stat().st_mode & 0o777 == 0o700
