"""The gRPC client of one cell: register, ask for keys, announce tickets, evaluate."""

from __future__ import annotations

import threading
import time
from typing import Protocol

from blindtail.errors import DeadlineExceeded
from blindtail.he.spec import TailSpec
from blindtail.line import Line
from blindtail.records import TailReply, TailTimings
from blindtail.rpc import Credentials, TailStub
from blindtail.wire import (
    EvaluateCall,
    KeyStatus,
    KeyStatusCall,
    RegisterCall,
    RegisterResult,
    TicketOffer,
    TicketsTaken,
)


class CellClient(Protocol):
    """What a session needs of a cell. Every method raises only `TailError`. Thread-safe."""

    @property
    def address(self) -> str:
        """Where the cell is dialled."""

    def register(self, key_sha256: bytes, timeout_s: float) -> RegisterResult: ...

    def key_status(self, key_sha256: bytes, timeout_s: float) -> KeyStatus: ...

    def tickets(self, session: bytes, seeds: tuple[bytes, ...], timeout_s: float) -> TicketsTaken:
        """Announces seeds; none, to ask how many it takes. A cell without tickets: capacity 0."""

    def evaluate(
        self,
        session: bytes,
        request_id: bytes,
        attempt: int,
        container: bytes,
        remaining_s: float,
        program_id: str = "",
    ) -> TailReply:
        """`program_id`: the segment that is meant; empty = the session's own program."""
        ...

    def close(self) -> None: ...


class GrpcTailClient:
    """A `CellClient` over gRPC. Follows the cell's own address once it has named one.

    A cell behind a balancer answers `Register` with its own address; from then on
    that one is dialled. When it is gone, this client is of no more use. Renewed
    certificate files are used without a restart, see `blindtail.line`.
    """

    def __init__(
        self,
        address: str,
        credentials: Credentials,
        *,
        model: str,
        version: str,
        spec: TailSpec,
        reply_bytes: int | None = None,
    ) -> None:
        """reply_bytes: largest reply accepted, the program's own when not given."""
        self._reply_bytes = reply_bytes or spec.reply_bytes
        self._credentials = credentials
        self._model, self._version, self._spec = model, version, spec
        self._lock = threading.Lock()
        self._line = Line(address, credentials, TailStub)

    @property
    def address(self) -> str:
        return self._line.address

    def register(self, key_sha256: bytes, timeout_s: float) -> RegisterResult:
        call = RegisterCall(self._model, self._version, self._spec.program_id, key_sha256)
        with self._line.use() as stub:
            result = stub.register(call, timeout_s)
        if result.address and result.address != self._line.address:
            self._dial(result.address)
        return result

    def key_status(self, key_sha256: bytes, timeout_s: float) -> KeyStatus:
        with self._line.use() as stub:
            return stub.key_status(KeyStatusCall(self._spec.program_id, key_sha256), timeout_s)

    def tickets(self, session: bytes, seeds: tuple[bytes, ...], timeout_s: float) -> TicketsTaken:
        with self._line.use() as stub:
            return stub.tickets(TicketOffer(session, seeds), timeout_s)

    def evaluate(
        self,
        session: bytes,
        request_id: bytes,
        attempt: int,
        container: bytes,
        remaining_s: float,
        program_id: str = "",
    ) -> TailReply:
        """Raises a `TailError` after `remaining_s` at the latest; `ContainerError` for an oversized reply."""
        if remaining_s <= 0:
            raise DeadlineExceeded("no time is left for the round trip")
        call = EvaluateCall(session, request_id, container, attempt, remaining_s, program_id)
        start_s = time.monotonic()
        with self._line.use() as stub:
            result = stub.evaluate(call, remaining_s, self._reply_bytes)
        timings = TailTimings(
            result.queue_s, result.eval_s, result.evaluator, result.draining, result.version, result.ticket
        )
        return TailReply(result.container, timings, time.monotonic() - start_s)

    def close(self) -> None:
        with self._lock:
            self._line.close()

    def _dial(self, address: str) -> None:
        line = Line(address, self._credentials, TailStub)
        with self._lock:
            old, self._line = self._line, line
        old.close()
