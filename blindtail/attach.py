"""One stream to the orchestrator, kept alive in the background: of edges and of cells.

    attachment = Attachment("control.example:50061", credentials, hello, report, on_policy)
    attachment.start()

The stream is a service to its host, never a burden: the three callbacks run on
threads of the attachment, nothing here raises into the host or makes it wait,
and without an orchestrator the host goes on as it is. Nothing but the records of
`blindtail.wire.control` crosses: timings, counts and load up, policies down.
"""

from __future__ import annotations

import logging
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import grpc

from blindtail.errors import (
    AccessDenied,
    BlindtailError,
    ConfigError,
    ContainerError,
    Overloaded,
    ProgramMismatch,
    TailUnavailable,
)
from blindtail.rpc import (
    ClientTlsFiles,
    Credentials,
    Stamp,
    from_rpc_error,
    secure_channel,
    split_address,
    stamp,
)
from blindtail.wire.checks import TEXT_CHARS
from blindtail.wire.control import (
    CONTROL,
    DOWN_BYTES,
    MOST_ITEMS,
    UP_BYTES,
    Hello,
    PolicyAck,
    PolicyUpdate,
    Report,
    Welcome,
    decode_down,
    encode_up,
)

_log = logging.getLogger(__name__)

#: Waits between two dials: random in this range, the longer ones after failures in a row.
BACK_OFF_S = (0.2, 1.0)
#: After a refusal that the next dial will meet again (no access, another protocol).
REFUSED_S = 30.0
#: A stream that was not welcomed after this long is dialled again.
WELCOME_S = 10.0
#: A stream that lasted this long was a good one: the waits start again from the shortest.
_STABLE_S = 5.0
#: Bounds on what the orchestrator may ask for.
_REPORT_S = (0.05, 3600.0)
_MOST_ACKS = 64
_CLOSE_S = 1.5
_REFUSED = (AccessDenied, ConfigError, ContainerError, ProgramMismatch)

#: Put into a stream's outbox: its welcome has come.
_WELCOMED: Final = b""


@dataclass(eq=False)
class _Stream:
    """One call. `outbox` carries encoded messages, `_WELCOMED`, or None: the stream is over."""

    outbox: queue.SimpleQueue[bytes | None] = field(default_factory=queue.SimpleQueue)
    call: Any = None
    welcomed_s: float | None = None
    report_interval_s: float = 0.0
    files: Stamp = ()  # of the certificate when it was dialled
    renewing: bool = False


class Attachment:
    """Dials for ever until closed; start it once.

    address      host:port of the orchestrator
    credentials  as for a cell, or a function that gives them, asked at every dial. A renewed
                 certificate file is noticed at the next report, and the stream dialled again
    hello        who speaks; asked at every dial, so `policy_version` is the one in force by then
    report       `report(interval_s) -> Report | None`: the sums since the host was last asked
                 (`interval_s` ago) and *takes* them: the host starts from zero again. It is
                 asked only while a stream is up, so a host keeps counters, which stay small
                 however long the orchestrator is away, and never a list of events. A report
                 that could not be sent is kept here and added to the next one. None: nothing
                 to say now, `interval_s` goes on growing.
    on_policy    a policy has come: apply or refuse it and say so; None: no answer
    on_change    told True when the orchestrator has welcomed us, False when that stream is over
    seed         of the random waits (tests)

    The constructor raises `ConfigError` for a wrong address, or plaintext to another host.
    """

    def __init__(
        self,
        address: str,
        credentials: Credentials | Callable[[], Credentials],
        hello: Callable[[], Hello],
        report: Callable[[float], Report | None],
        on_policy: Callable[[PolicyUpdate], PolicyAck | None],
        *,
        clock: Callable[[], float] = time.monotonic,
        seed: int | None = None,
        on_change: Callable[[bool], None] = lambda connected: None,
    ) -> None:
        split_address(address)
        if not callable(credentials):
            secure_channel(address, credentials).close()
        self._address, self._credentials = address, credentials
        self._hello, self._report, self._on_policy, self._on_change = hello, report, on_policy, on_change
        self._clock = clock
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._stream: _Stream | None = None
        self._closed = threading.Event()
        self._connected = threading.Event()
        self._said = ""  # last trouble that was logged
        # Held by whichever stream asks for a report: one at a time.
        self._reporting = threading.Lock()
        self._unsent: Report | None = None
        self._asked_s = clock()
        self._thread = threading.Thread(target=self._run, name="attachment", daemon=True)

    def start(self) -> None:
        """Begins to dial; returns at once."""
        self._thread.start()

    @property
    def address(self) -> str:
        return self._address

    @property
    def connected(self) -> bool:
        """True from the orchestrator's welcome until that stream is over."""
        return self._connected.is_set() and not self._closed.is_set()

    def wait_connected(self, timeout_s: float) -> bool:
        """Waits for a stream to be up; False when none is after `timeout_s`."""
        return self._connected.wait(timeout_s)

    def close(self) -> None:
        """Ends the stream within two seconds, whatever the other side does. Any number of times.

        A callback that hangs is left behind on its thread; nothing waits for it.
        """
        self._closed.set()
        with self._lock:
            if self._stream is not None:
                _end(self._stream)
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(_CLOSE_S)

    # -- the dialling thread -----------------------------------------------------

    def _run(self) -> None:
        ceiling_s = 2 * BACK_OFF_S[0]
        while not self._closed.is_set():
            wait_s = self._random.uniform(BACK_OFF_S[0], ceiling_s)
            ceiling_s = min(2 * ceiling_s, BACK_OFF_S[1])
            stream = _Stream()
            try:
                self._hold(stream)
                trouble = "the orchestrator ended the stream"
            except Exception as error:
                trouble, least_s = self._understand(error)
                wait_s = max(wait_s, least_s)
            if stream.welcomed_s is not None and self._clock() - stream.welcomed_s >= _STABLE_S:
                ceiling_s = 2 * BACK_OFF_S[0]
            if stream.renewing:
                _log.info("the certificate was renewed: dialling the orchestrator again")
            elif not self._closed.is_set():
                self._say(trouble)
            self._closed.wait(wait_s)

    def _hold(self, stream: _Stream) -> None:
        """One stream from dial to end; raises what ended it."""
        credentials = self._current_credentials()
        stream.files = stamp(credentials)
        first = encode_up(self._hello())
        with secure_channel(self._address, credentials, max_reply_bytes=DOWN_BYTES) as channel:
            attach = channel.stream_stream(f"/{CONTROL}/Attach", None, None)
            with self._lock:
                if self._closed.is_set():
                    return
                stream.call = attach(self._outgoing(stream, first))
                self._stream = stream
            try:
                for data in stream.call:
                    self._received(stream, data)
            finally:
                with self._lock:
                    self._stream = None
                _end(stream)
                if stream.welcomed_s is not None:
                    self._connected.clear()
                    self._tell(False)

    def _received(self, stream: _Stream, data: bytes) -> None:
        message = decode_down(data)
        if isinstance(message, Welcome) and stream.welcomed_s is None:
            stream.report_interval_s = min(max(message.report_interval_s, _REPORT_S[0]), _REPORT_S[1])
            stream.welcomed_s = self._clock()
            stream.outbox.put(_WELCOMED)
            self._said = ""
            _log.info("attached to the orchestrator at %s", self._address)
            self._connected.set()
            self._tell(True)
        elif isinstance(message, PolicyUpdate):
            ack = self._apply(message)
            if ack is not None:
                if stream.outbox.qsize() > _MOST_ACKS:
                    raise ContainerError("the orchestrator sends policies faster than it takes answers")
                stream.outbox.put(encode_up(ack))

    def _apply(self, update: PolicyUpdate) -> PolicyAck | None:
        try:
            return self._on_policy(update)
        except Exception as error:
            _log.exception("policy version %d could not be looked at", update.version)
            return PolicyAck(update.version, False, f"failed: {type(error).__name__}: {error}"[:TEXT_CHARS])

    def _tell(self, connected: bool) -> None:
        try:
            self._on_change(connected)
        except Exception:
            _log.exception("the host failed on a change of its attachment")

    # -- gRPC's sending thread ---------------------------------------------------

    def _outgoing(self, stream: _Stream, first: bytes) -> Iterator[bytes]:
        """What goes up, in order. gRPC asks for the next message once the last one is on its way."""
        yield first
        next_s = self._clock() + WELCOME_S
        while True:
            wait_s = next_s - self._clock()
            if wait_s > 0:
                try:
                    message = stream.outbox.get(timeout=wait_s)
                except queue.Empty:
                    continue
                if message is None:
                    return
                if message == _WELCOMED:
                    next_s = self._clock()
                else:
                    yield message
            elif stream.welcomed_s is None:
                stream.call.cancel()  # a process that hangs, or something else listens there
                return
            elif self._renewed(stream):
                stream.renewing = True
                stream.call.cancel()
                return
            else:
                next_s = self._clock() + stream.report_interval_s
                message = self._next_report(stream)
                if message is not None:
                    yield message
                    self._sent(stream)

    def _next_report(self, stream: _Stream) -> bytes | None:
        """The host's sums, together with what an earlier stream could not send. Never raises."""
        with self._reporting:
            if self._stream is not stream:
                return None  # over: the next stream asks
            now_s = self._clock()
            try:
                report = self._report(now_s - self._asked_s)
                if report is not None:
                    self._asked_s = now_s
                    self._unsent = report if self._unsent is None else merged(self._unsent, report)
                if self._unsent is None:
                    return None
                data = encode_up(self._unsent)
            except Exception:
                _log.exception("a report could not be made")
                self._unsent = None
                return None
            if len(data) > UP_BYTES:
                self._unsent = None
                self._say(f"a report of {len(data)} bytes is left out: at most {UP_BYTES} are accepted")
                return None
            return data

    def _sent(self, stream: _Stream) -> None:
        with self._reporting:
            if self._stream is stream:
                self._unsent = None

    def _current_credentials(self) -> Credentials:
        return self._credentials() if callable(self._credentials) else self._credentials

    def _renewed(self, stream: _Stream) -> bool:
        """True when other certificate files are there and can be used."""
        try:
            credentials = self._current_credentials()
            if not isinstance(credentials, ClientTlsFiles) or stamp(credentials) == stream.files:
                return False
            credentials.load(0.0)
        except Exception:
            return False  # half done: what stands goes on
        return True

    # -- troubles ----------------------------------------------------------------

    def _understand(self, error: Exception) -> tuple[str, float]:
        """(what to log, seconds to wait at least) for what ended a stream."""
        if isinstance(error, grpc.RpcError):
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                return "what listens there is no orchestrator: check the address", REFUSED_S
            known: BlindtailError = from_rpc_error(error)
        elif isinstance(error, BlindtailError):
            known = error
        else:
            return f"{type(error).__name__}: {error}", 0.0
        if isinstance(known, Overloaded):
            return str(known), min(known.retry_after_s, REFUSED_S)
        if isinstance(known, _REFUSED):
            return str(known), REFUSED_S
        if isinstance(known, TailUnavailable):
            return "it does not answer, or the connection broke", 0.0
        return str(known), 0.0

    def _say(self, trouble: str) -> None:
        """One line for each new trouble, not for each dial."""
        if trouble != self._said:
            self._said = trouble
            _log.warning("not attached to the orchestrator at %s: %s", self._address, trouble)


def _end(stream: _Stream) -> None:
    """Lets both threads of the stream go."""
    stream.outbox.put(None)
    if stream.call is not None:
        stream.call.cancel()


def merged(older: Report, newer: Report) -> Report:
    """Both reports as one: sums are added, the newer one tells states."""
    return Report(
        older.interval_s + newer.interval_s,
        _added(older.routes, newer.routes),
        _added(older.fallbacks, newer.fallbacks),
        newer.steps or older.steps,
        older.uplink_bytes + newer.uplink_bytes,
        older.reply_bytes + newer.reply_bytes,
        newer.tail,
        newer.load,
        newer.models,
    )


def _added(older: Mapping[str, int], newer: Mapping[str, int]) -> dict[str, int]:
    """Sums by name; beyond the most that a report may carry they go under "other"."""
    total = dict(newer)
    for name, count in older.items():
        if name not in total and len(total) >= MOST_ITEMS - 1:
            name = "other"
        total[name] = total.get(name, 0) + count
    return total


__all__ = ["BACK_OFF_S", "REFUSED_S", "WELCOME_S", "Attachment", "merged"]
