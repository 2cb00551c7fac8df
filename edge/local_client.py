"""A tail in this very process: for tests, for `verify`, and to try a model without a cloud.

The same containers cross as over the network; nothing is skipped but gRPC. An
evaluation runs in a worker thread, so that a deadline holds here too.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from blindtail.errors import DeadlineExceeded, TailUnavailable
from blindtail.he.spec import TailSpec
from blindtail.records import TailReply, TailTimings
from edge.cipher import make_keys, open_cipher
from edge.tail import TAIL_TIMEOUT_S, Cipher, TailState, TailStatus, Ticket

if TYPE_CHECKING:
    from blindtail.he.program import Program


class InProcessTailClient:
    """A `TailClient` around one evaluator. `container` in, `container` out, one at a time."""

    def __init__(self, evaluator: Any, keys: Any, *following: Any) -> None:
        """following: evaluators of a refreshed tail's later segments, for the same keys."""
        self._evaluators, self._keys = (evaluator, *following), keys
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="local-tail")

    def evaluate(self, container: bytes, remaining_s: float | None, segment: int = 0) -> TailReply:
        asked_s = time.monotonic()
        future: Future[TailReply] = self._pool.submit(self._run, container, asked_s, segment)
        try:
            return future.result(TAIL_TIMEOUT_S if remaining_s is None else max(0.0, remaining_s))
        except FutureTimeout as error:
            future.cancel()
            raise DeadlineExceeded("the local evaluation was not done in time") from error

    def _run(self, container: bytes, asked_s: float, segment: int) -> TailReply:
        start_s = time.monotonic()
        reply = self._evaluators[segment].evaluate(self._keys, container)
        done_s = time.monotonic()
        timings = TailTimings(start_s - asked_s, done_s - start_s, "local")
        return TailReply(reply, timings, done_s - asked_s)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


class LocalTail:
    """A `Tail` that is ready from the start: makes keys and opens `program` on `backend` here.

    following  a refreshed tail's later segments
    """

    def __init__(self, program: Program, backend: str = "clear", following: Sequence[Program] = ()) -> None:
        from blindtail.he.backends import open_evaluator

        self._spec = program.spec
        with TemporaryDirectory(prefix="blindtail-") as name:
            folder = Path(name)
            secret, keys, prepared = (folder / n for n in ("secret.key", "evaluation.keys", "prepared"))
            make_keys(program.spec, secret, keys, backend)
            self._cipher = open_cipher(program.spec, secret, backend, [p.spec for p in following])
            kind = "clear" if backend == "clear" else "auto"
            evaluator = open_evaluator(kind, program)
            evaluator.prepare_keys(keys, prepared)
            later = [open_evaluator(kind, p) for p in following]
            self._client = InProcessTailClient(evaluator, evaluator.load_keys(prepared), *later)
        self._closed = threading.Event()

    @property
    def spec(self) -> TailSpec:
        return self._spec

    @property
    def cipher(self) -> Cipher | None:
        return self._cipher

    @property
    def ready(self) -> bool:
        return not self._closed.is_set()

    def evaluate(self, container: bytes, remaining_s: float | None, segment: int = 0) -> TailReply:
        if self._closed.is_set():
            raise TailUnavailable("this tail is closed")
        return self._client.evaluate(container, remaining_s, segment)

    @property
    def tickets(self) -> int:
        return 0

    def take_ticket(self, cipher: Cipher) -> Ticket | None:
        return None

    def status(self) -> TailStatus:
        state = TailState.READY if self.ready else TailState.CLOSED
        return TailStatus(state, key_bytes=self._spec.key_bytes)

    def wait_ready(self, timeout_s: float) -> bool:
        return self.ready

    def close(self) -> None:
        self._closed.set()
        self._client.close()
