"""A session with one scripted cell and a key worker that makes none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blindtail.errors import BlindtailError, ContainerError, DeadlineExceeded
from blindtail.records import TailReply
from blindtail.wire import KeyState, KeyStatus, RegisterResult, TicketsTaken
from edge import backoff
from edge import session as session_module
from edge.activity import Activity
from edge.cells import Cells
from edge.keyfiles import KeyFiles
from edge.keys import Report
from edge.session import RemoteTail
from tests.clock import until
from tests.edge_fakes import FEATURES, PlainCipher, reply, spec_of


class FakeCell:
    """A `CellClient`: sessions are numbered; `faults` are raised by the next evaluations, in order."""

    address = "127.0.0.1:1"

    def __init__(self) -> None:
        self.keys = KeyState.MISSING
        self.registered: list[bytes] = []
        self.evaluated: list[tuple[bytes, bytes, int]] = []
        self.faults: list[BlindtailError] = []
        self.refuse: BlindtailError | None = None
        self.closed = False
        self.pings = 0
        self.silent = False
        self.capacity = 16
        self.offers: list[tuple[bytes, tuple[bytes, ...]]] = []
        self.offer_fault: BlindtailError | None = None
        self.containers: list[bytes] = []

    def take_keys(self, address: str) -> None:
        self.keys = KeyState.READY

    def register(self, key_sha256: bytes, timeout_s: float) -> RegisterResult:
        self.registered.append(key_sha256)
        if self.silent:
            raise DeadlineExceeded("no reply")
        if self.refuse is not None:
            raise self.refuse
        return RegisterResult(len(self.registered).to_bytes(16, "big"), self.keys, "", 600.0)

    def key_status(self, key_sha256: bytes, timeout_s: float) -> KeyStatus:
        self.pings += 1
        if self.silent:
            raise DeadlineExceeded("no reply")
        return KeyStatus(self.keys, 0)

    def tickets(self, session: bytes, seeds: tuple[bytes, ...], timeout_s: float) -> TicketsTaken:
        self.offers.append((session, seeds))
        if self.offer_fault is not None:
            raise self.offer_fault
        return TicketsTaken(len(seeds) if self.capacity else 0, self.capacity)

    def evaluate(
        self,
        session: bytes,
        request_id: bytes,
        attempt: int,
        container: bytes,
        remaining_s: float,
        program_id: str = "",
    ) -> TailReply:
        self.evaluated.append((session, request_id, attempt))
        self.containers.append(container)
        if self.faults:
            raise self.faults.pop(0)
        return reply()

    def close(self) -> None:
        self.closed = True


class FakeWorker:
    """A `KeyWorker` that writes two small files; `uploaded` is told the address that it was sent to."""

    def __init__(self, files: KeyFiles, uploaded: Callable[[str], None]) -> None:
        self.files, self._uploaded = files, uploaded
        self.orders: list[str | None] = []
        self.fault: BlindtailError | None = None

    def run(self, address: str | None, report: Report) -> None:
        self.orders.append(address)
        if self.fault is not None:
            raise self.fault
        try:
            found = self.files.find()
        except ContainerError:
            self.files.set_aside()
            found = None
        if found is None:
            report({"event": "making"})
            self.files.secret.write_bytes(b"s" * 8 + bytes([len(self.orders)]))
            self.files.evaluation.write_bytes(b"e" * 8 + bytes([len(self.orders)]))
            self.files.complete()
        if address is not None:
            report({"event": "uploading", "sent": 3, "total": 9})
            self._uploaded(address)

    @property
    def uploads(self) -> list[str]:
        """Addresses, in order."""
        return [address for address in self.orders if address is not None]

    def close(self) -> None:
        pass


class Rig:
    def __init__(self, folder: Path) -> None:
        self.cell = FakeCell()
        self.files = KeyFiles(folder, spec_of())
        self.worker = FakeWorker(self.files, self.cell.take_keys)
        self.probes: list[float] = []
        self.loads = self.dialled = 0
        self.activity = Activity()
        self.tail = self.make()

    def make(self, tickets: int = 0) -> RemoteTail:
        def load(*_: Any) -> PlainCipher:
            self.loads += 1
            self.cipher = PlainCipher()
            return self.cipher

        def dial(address: str) -> FakeCell:
            assert address == self.cell.address
            self.dialled += 1
            return self.cell

        return RemoteTail(
            spec_of(),
            Cells([self.cell.address], dial),
            self.files,
            self.worker,
            seed=1,
            load_cipher=load,
            on_probe=lambda seconds, timings: self.probes.append(seconds),
            tickets=tickets,
            activity=self.activity,
        )

    def start(self) -> RemoteTail:
        self.tail.start()
        assert self.tail.wait_ready(10.0), self.tail.status()
        return self.tail

    def again(self, count: int) -> None:
        """Waits until the tail is READY for the `count`-th time."""
        until(lambda: self.tail.status().registrations >= count and self.tail.ready)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "REJOIN_S", 0.02)
    monkeypatch.setattr(backoff, "BACK_OFF_S", (0.02, 0.05))


@pytest.fixture(name="rig")
def rig_of_one_test(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    yield made
    made.tail.close()


ACTIVATION = PlainCipher().encrypt(np.zeros(FEATURES))
