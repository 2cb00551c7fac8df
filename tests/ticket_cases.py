"""A client with real keys for tests of tickets, and what a cell counted of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

from blindtail.he.container import HEADER_BYTES
from blindtail.he.native_backend import available
from blindtail.he.program import Program
from blindtail.he.secret import Encryptor, SecretKey
from blindtail.rpc import INSECURE_LOOPBACK, TailStub, secure_channel
from blindtail.wire import SEED_BYTES, KeyState, TicketOffer, TicketsTaken
from cloud.config import Backend, CloudConfig, TicketLimits
from cloud.engine import Engine
from cloud.evaluators import Pool
from cloud.local import LocalCell
from cloud.registry import Registry
from tests.cloud_cases import Client, activation, bundle, program

_T = TypeVar("_T")
NATIVE_ALONE = [
    pytest.mark.timeout(60),
    pytest.mark.skipif(not available(), reason="tickets are the native backend's, and it was not built"),
]
EVENTS = ("announced", "made", "used", "missed", "dropped")


@dataclass
class Device:
    """Keys of one device, and activations that it has encrypted."""

    keys: bytes
    encryptor: Encryptor

    @classmethod
    def of(cls, program: Program, folder: Path) -> Device:
        secret = SecretKey.generate(program.spec, folder / "keys")
        return cls((folder / "keys").read_bytes(), Encryptor(program.spec, secret))

    def containers(self, count: int) -> list[bytes]:
        return [self.encryptor.encrypt(activation(i)) for i in range(count)]

    def client(self, address: str) -> Client:
        return Client(TailStub(secure_channel(address, INSECURE_LOOPBACK)), keys=self.keys)


def seed_of(container: bytes) -> bytes:
    return container[HEADER_BYTES : HEADER_BYTES + SEED_BYTES]


def offer(client: Client, session: bytes, containers: list[bytes]) -> TicketsTaken:
    return client.stub.tickets(TicketOffer(session, tuple(map(seed_of, containers))), 10)


def counted(cell: LocalCell) -> dict[str, int]:
    """Events of the model "toy" that have happened."""
    read = cell.metrics.registry.get_sample_value
    values = {e: read("blindtail_cloud_tickets_total", {"model": "toy", "event": e}) for e in EVENTS}
    return {event: int(value) for event, value in values.items() if value}


def held_bytes(cell: LocalCell) -> float:
    """As the gauge has it."""
    return cell.metrics.registry.get_sample_value("blindtail_cloud_ticket_bytes", {"model": "toy"}) or 0.0


class Cells:
    """Cells in this process with the model "toy", each in a folder of its own; `close` ends them."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._opened = folder, list[LocalCell]()

    def __call__(
        self,
        backend: Backend = "native",
        evaluators: int = 1,
        pool_of: Callable[[Registry], Pool] | None = None,
        **limits: Any,
    ) -> LocalCell:
        """`limits`: of tickets."""
        cell = LocalCell(
            [bundle()],
            backend=backend,
            evaluators=evaluators,
            state_dir=self._folder / f"state-{len(self._opened)}",
            config=CloudConfig(backend=backend, tickets=TicketLimits(**limits), calibrate_s=0.0),
            pool_of=pool_of,
        )
        self._opened.append(cell.start())
        return cell

    def close(self) -> None:
        for cell in self._opened:
            cell.stop()


# Fixtures under another name than they are asked for by, so that a test file can import them.
@pytest.fixture(scope="module", name="device")
def device_with_keys(tmp_path_factory: pytest.TempPathFactory) -> Device:
    return Device.of(program(), tmp_path_factory.mktemp("device"))


@pytest.fixture(name="open_cell")
def cells_of_one_test(tmp_path: Path) -> Iterator[Cells]:
    with closing(Cells(tmp_path)) as cells:
        yield cells


def attached(cell: LocalCell, device: Device) -> tuple[Client, bytes]:
    """A client whose keys are there, and its session."""
    client = device.client(cell.address)
    assert client.upload_and_wait() is KeyState.READY
    return client, client.register().session


def on_loop(cell: LocalCell, function: Callable[[], _T]) -> _T:
    async def call() -> _T:
        return function()

    return cell.call(call)


def engines(cell: LocalCell) -> list[Engine]:
    assert cell.gateway is not None
    return [member._engine for member in cell.gateway.pool._members]  # type: ignore[attr-defined]


def tickets_in(cell: LocalCell) -> int:
    """In the evaluators' own memory."""
    return sum(len(engine._tickets) for engine in engines(cell))
