"""A session with several scripted cells."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from blindtail.errors import BlindtailError, SessionLost, TailUnavailable
from blindtail.records import TailReply, TailTimings
from blindtail.wire import KeyState, KeyStatus, RegisterResult
from edge import backoff
from edge import session as session_module
from edge.cells import Cells
from edge.keyfiles import KeyFiles
from edge.session import RemoteTail
from edge.tail import TailState
from tests.clock import until
from tests.edge_fakes import PlainCipher, reply, spec_of
from tests.session_cases import ACTIVATION, FakeWorker

A, B, C = "127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"


class World:
    """Cells by address, all with one set of keys unless told otherwise."""

    def __init__(self) -> None:
        self.down: set[str] = set()
        self.faults: dict[str, BlindtailError] = {}
        self.draining: set[str] = set()
        self.keys: dict[str, KeyState] = {}
        self.others: dict[str, tuple[str, ...]] = {}
        self.advertised: dict[str, str] = {}
        self.lost: set[str] = set()  # cells that forgot their sessions
        self.dialled: list[str] = []
        self.registered: list[str] = []
        self.evaluated: list[str] = []
        self.clients: list[FakeClient] = []
        self.hold: threading.Event | None = None  # evaluations wait for it
        self.holding = threading.Semaphore(0)
        self.refuse_evaluations = False

    def dial(self, address: str) -> FakeClient:
        self.dialled.append(address)
        self.clients.append(FakeClient(self, address))
        return self.clients[-1]

    def take_keys(self, address: str) -> None:
        self.keys[address] = KeyState.READY


class FakeClient:
    def __init__(self, world: World, address: str) -> None:
        self.world, self.given, self.address = world, address, address
        self.closed = False

    def _reach(self) -> None:
        if self.closed or self.address in self.world.down:
            raise TailUnavailable(f"nobody at {self.address}")
        if self.address in self.world.faults:
            raise self.world.faults[self.address]

    def register(self, key_sha256: bytes, timeout_s: float) -> RegisterResult:
        world = self.world
        self._reach()
        self.address = world.advertised.get(self.given, self.address)
        world.registered.append(self.address)
        world.lost.discard(self.address)
        return RegisterResult(
            len(world.registered).to_bytes(16, "big"),
            world.keys.get(self.address, KeyState.READY),
            "",
            600.0,
            self.address in world.draining,
            world.others.get(self.address, ()),
        )

    def key_status(self, key_sha256: bytes, timeout_s: float) -> KeyStatus:
        self._reach()
        return KeyStatus(self.world.keys.get(self.address, KeyState.READY), 0)

    def evaluate(
        self,
        session: bytes,
        request_id: bytes,
        attempt: int,
        container: bytes,
        remaining_s: float,
        program_id: str = "",
    ) -> TailReply:
        world = self.world
        hold = world.hold
        if hold is not None:
            world.holding.release()
            assert hold.wait(10)
        self._reach()
        if self.address in world.lost:
            raise SessionLost("forgotten")
        world.evaluated.append(self.address)
        honest = reply()
        timings = TailTimings(0.0, 0.001, "fake", self.address in world.draining, "1")
        return TailReply(honest.container, timings, 0.001)

    def close(self) -> None:
        self.closed = True


class Rig:
    def __init__(self, folder: Path) -> None:
        self.world, self.folder = World(), folder
        self.files = KeyFiles(folder, spec_of())
        self.worker = FakeWorker(self.files, self.world.take_keys)
        self.states: list[TailState] = []
        self.tail: RemoteTail | None = None

    def start(self, *addresses: str, wait: bool = True) -> RemoteTail:
        tail = self.tail = RemoteTail(
            spec_of(),
            Cells(addresses, self.world.dial),
            self.files,
            self.worker,
            seed=1,
            load_cipher=lambda *_: PlainCipher(),
        )
        tail.start()
        if wait:
            assert tail.wait_ready(10.0), tail.status()
        return tail

    def fails(self) -> None:
        """A request with no time for another cell meets the trouble."""
        assert self.tail is not None
        self.tail._attempts.typical_s = 5.0
        with pytest.raises(BlindtailError):
            self.tail.evaluate(ACTIVATION, 1.0)

    def at(self, address: str) -> None:
        """Waits until requests go there."""
        until(lambda: self.tail is not None and self.tail.ready and self.tail.status().cell == address)


@pytest.fixture(name="rig")
def rig_of_one_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    monkeypatch.setattr(session_module, "REJOIN_S", 0.02)
    monkeypatch.setattr(backoff, "BACK_OFF_S", (0.02, 0.05))
    monkeypatch.setattr(session_module, "MOVE_S", 0.05)
    monkeypatch.setattr(session_module, "_SETTLED_S", 0.0)
    made = Rig(tmp_path)
    yield made
    if made.tail is not None:
        made.tail.close()
        until(lambda: all(client.closed for client in made.world.clients))
