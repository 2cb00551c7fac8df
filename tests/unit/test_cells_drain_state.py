"""When a drained cell has been left, and which settings of cells are refused."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from blindtail.config import load_config
from blindtail.errors import ConfigError
from cloud.config import CloudConfig
from cloud.drain import QUIET_S, Drain

pytestmark = pytest.mark.timeout(30)


class Cell:
    def __init__(self, grace_s: float = 30.0) -> None:
        self.waiting, self.sessions = 0, 3
        self.drain = Drain(grace_s, time.monotonic, lambda: self.waiting, lambda since_s: self.sessions)


def test_a_cell_that_nobody_uses_is_left_at_once() -> None:
    cell = Cell()
    start_s = time.monotonic()
    status = asyncio.run(cell.drain.begin())
    assert time.monotonic() - start_s < QUIET_S / 2
    assert (status.draining, status.sessions, status.waiting) == (True, 3, 0)
    assert cell.drain.on
    assert not cell.drain.end().draining
    assert not cell.drain.on


def test_the_last_use_and_what_runs_are_waited_for() -> None:
    async def body() -> None:
        cell = Cell()
        cell.drain.used()
        cell.waiting = 1
        start_s = time.monotonic()
        begun = asyncio.create_task(cell.drain.begin())
        await asyncio.sleep(QUIET_S + 0.3)
        assert not begun.done()
        cell.waiting = 0
        await begun
        assert time.monotonic() - start_s < QUIET_S + 1.5

    asyncio.run(body())


@pytest.mark.parametrize("own", [True, False])
def test_the_grace_bounds_the_wait(own: bool) -> None:
    cell = Cell(0.2 if own else 30.0)
    cell.waiting = 1
    start_s = time.monotonic()
    status = asyncio.run(cell.drain.begin(None if own else 0.2))
    assert 0.15 < time.monotonic() - start_s < 2
    assert status.waiting == 1


def test_an_end_of_the_drain_ends_the_wait() -> None:
    async def body() -> None:
        cell = Cell()
        cell.waiting = 1
        begun = asyncio.create_task(cell.drain.begin())
        await asyncio.sleep(0.1)
        assert cell.drain.on
        cell.drain.end()
        assert not (await asyncio.wait_for(begun, 5)).draining

    asyncio.run(body())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('peers = ["b.example:50051"]', "loopback"),
        ('peers = ["b.example"]', "host:port"),
        ('others = ["nowhere"]', "host:port"),
        ('advertise = "nowhere"', "host:port"),
        ("others = [" + ", ".join(f'"c{i}:1"' for i in range(9)) + "]", "at most 8"),
        ("replicas = 9", "replicas"),
        ("drain_grace_s = -1", "drain_grace_s"),
    ],
)
def test_wrong_settings_of_cells_are_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "cell.toml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_config(CloudConfig, tmp_path / "cell.toml")


def test_right_settings_of_cells_are_taken(tmp_path: Path) -> None:
    text = 'peers = ["127.0.0.1:2"]\nothers = ["b.example:50051"]\nreplicas = 0\ndrain_grace_s = 0\n'
    (tmp_path / "cell.toml").write_text(text)
    config = load_config(CloudConfig, tmp_path / "cell.toml")
    assert (config.peers, config.others) == (("127.0.0.1:2",), ("b.example:50051",))
