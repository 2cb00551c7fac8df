"""The session of one tail, kept alive in the background while `infer` goes on.

One thread per tail walks a loop: keys on disk (made by the key process), cipher
loaded, registered, keys in the cloud (uploaded by the key process), READY. What
an evaluation meets is handed to that thread: a lost session is registered anew
after a random wait, evicted keys are uploaded again, a cloud that is away is tried
every 0.2 to 1 s, a model of another version is asked for twice a minute.
Until READY again, `ready` is False and policies answer from exits.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from blindtail.errors import (
    AccessDenied,
    BlindtailError,
    ConfigError,
    ContainerError,
    DeadlineExceeded,
    EvaluationFailed,
    KeysMissing,
    Overloaded,
    ProgramMismatch,
    SessionLost,
    TailError,
    TailUnavailable,
)
from blindtail.he.spec import TailSpec
from blindtail.records import TailReply
from blindtail.wire import REQUEST_ID_BYTES, KeyState
from edge.cipher import open_cipher
from edge.keyfiles import KeyFiles, KeySet
from edge.keys import KeyWorker
from edge.tail import TAIL_TIMEOUT_S, Cipher, TailState, TailStatus
from edge.tail_client import CellClient

_log = logging.getLogger(__name__)

CALL_S = 5.0
BACK_OFF_S = (0.2, 1.0)
#: Random wait before a lost session is registered again: a restarted cell meets its edges one by one.
REJOIN_S = 0.5
#: How often a cloud that said no for good (other model, no access) is asked again.
HOPELESS_S = 30.0
#: First and longest wait after refused keys or a failed key process.
FAILED_S = (10.0, 300.0)
#: This many replies in a row that came too late, and the thread asks whether the cloud is there;
#: it waits this long for the reply, and asks no more often than that.
LATE_IN_A_ROW = 3
PING_S = 2.0
PROBE_S = 10.0
#: What an evaluation met -> the state until the thread has dealt with it.
_STATE_AFTER: Mapping[type[TailError], TailState] = {
    SessionLost: TailState.JOINING,
    KeysMissing: TailState.UPLOADING,
    ProgramMismatch: TailState.MISMATCH,
    AccessDenied: TailState.DENIED,
}
_HOPELESS = (TailState.MISMATCH, TailState.DENIED, TailState.CLOSED)


class RemoteTail:
    """A `Tail` in the cloud. `start` begins; `evaluate` is safe from any thread."""

    def __init__(
        self,
        spec: TailSpec,
        client: CellClient,
        files: KeyFiles,
        worker: KeyWorker,
        *,
        backend: str = "seal",
        clock: Callable[[], float] = time.monotonic,
        seed: int | None = None,
        load_cipher: Callable[[TailSpec, Path, str], Cipher] = open_cipher,
        on_probe: Callable[[float], None] | None = None,
    ) -> None:
        self._spec, self._client, self._files, self._worker = spec, client, files, worker
        self._backend, self._clock, self._load_cipher = backend, clock, load_cipher
        self._on_probe = on_probe
        self._random = random.Random(seed)
        self._changed = threading.Condition()
        self._status = TailStatus(TailState.STARTING, key_bytes=spec.key_bytes, since_s=clock())
        self._cipher: Cipher | None = None
        self._keys: KeySet | None = None
        self._session: bytes | None = None
        self._trouble: TailError | None = None
        self._held_until_s = 0.0  # after Overloaded
        self._late = 0
        self._typical_s = 0.0  # smoothed round trip
        self._next_ping_s = 0.0
        self._wake = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="tail-session", daemon=True)

    def start(self) -> None:
        self._thread.start()

    # -- what the runtime sees ---------------------------------------------------

    @property
    def spec(self) -> TailSpec:
        return self._spec

    @property
    def cipher(self) -> Cipher | None:
        return self._cipher

    @property
    def ready(self) -> bool:
        return self._status.state is TailState.READY and self._clock() >= self._held_until_s

    def status(self) -> TailStatus:
        return self._status

    def wait_ready(self, timeout_s: float) -> bool:
        with self._changed:
            self._changed.wait_for(
                lambda: self._status.state is TailState.READY or self._status.state in _HOPELESS, timeout_s
            )
            return self._status.state is TailState.READY

    def evaluate(self, container: bytes, remaining_s: float | None) -> TailReply:
        """One evaluation; the same bytes are sent once more after a broken connection or a failed
        evaluation, if the time left covers a typical round trip. Raises `TailError`."""
        end_s = self._clock() + (TAIL_TIMEOUT_S if remaining_s is None else remaining_s)
        session = self._session
        if session is None or self._status.state is not TailState.READY:
            raise TailUnavailable("the tail is not ready")
        return self._evaluate(session, container, end_s)

    def _evaluate(self, session: bytes, container: bytes, end_s: float) -> TailReply:
        request_id = os.urandom(REQUEST_ID_BYTES)
        for attempt in (0, 1):
            try:
                left_s = end_s - self._clock()
                reply = self._client.evaluate(session, request_id, attempt, container, left_s)
            except (TailUnavailable, EvaluationFailed) as error:
                if attempt or end_s - self._clock() <= self._typical_s:
                    self._note(session, error)
                    raise
            except TailError as error:
                self._note(session, error)
                raise
            else:
                self._late = 0
                self._typical_s += 0.2 * (reply.round_trip_s - self._typical_s)
                return reply
        raise AssertionError("unreachable")

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._status = TailStatus(TailState.CLOSED, since_s=self._clock())
            self._changed.notify_all()
        self._wake.set()
        self._worker.close()
        self._client.close()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout=5)

    # -- what an evaluation met --------------------------------------------------

    def _note(self, session: bytes, error: TailError) -> None:
        """Tells the thread what happened; stops offloads at once where they would fail again."""
        if isinstance(error, ContainerError | EvaluationFailed):
            return  # about this request, not about the session
        if isinstance(error, Overloaded):
            wait_s = min(error.retry_after_s, 30.0) * self._random.uniform(1.0, 1.5)
            self._held_until_s = self._clock() + wait_s
            return
        if isinstance(error, DeadlineExceeded):
            # Too little time, a slow cloud, or a silent link? The thread asks; offloads go on.
            self._late += 1
            if self._late >= LATE_IN_A_ROW:
                self._wake.set()
            return
        with self._changed:
            if self._closed or session != self._session or self._trouble is not None:
                return  # about a session that is gone already
            self._trouble = error
            self._set(_STATE_AFTER.get(type(error), TailState.AWAY), str(error))
        self._wake.set()

    # -- the thread ----------------------------------------------------------------

    def _run(self) -> None:
        back_off_s, failed_s = BACK_OFF_S[0], FAILED_S[0]
        while not self._closed:
            wait_s = 0.0
            try:
                self._connect()
                back_off_s, failed_s = BACK_OFF_S[0], FAILED_S[0]
                wait_s = self._watch()
            except Overloaded as error:
                self._set(TailState.AWAY, str(error))
                wait_s = min(error.retry_after_s, HOPELESS_S) * self._random.uniform(1.0, 1.5)
            except (ProgramMismatch, AccessDenied, ConfigError) as error:
                denied = isinstance(error, AccessDenied)
                self._set(TailState.DENIED if denied else TailState.MISMATCH, str(error))
                wait_s = HOPELESS_S * self._random.uniform(0.8, 1.2)
            except (TailUnavailable, DeadlineExceeded, SessionLost, KeysMissing) as error:
                self._set(TailState.AWAY, str(error))
                forget = getattr(self._client, "forget_cell", None)
                if forget is not None:
                    forget()
                wait_s = back_off_s * self._random.uniform(0.5, 1.0)
                back_off_s = min(2 * back_off_s, BACK_OFF_S[1])
            except BlindtailError as error:  # refused keys, a full disk, a key process that died
                self._set(TailState.FAILED, str(error))
                wait_s = failed_s * self._random.uniform(0.8, 1.2)
                failed_s = min(2 * failed_s, FAILED_S[1])
            except Exception as error:
                _log.exception("the session of a tail failed; it starts again")
                self._set(TailState.FAILED, f"unexpected {type(error).__name__}")
                wait_s = HOPELESS_S
            if wait_s > 0 and not self._closed:
                self._wake.wait(wait_s)
                self._wake.clear()

    def _connect(self) -> None:
        """From nothing, or from what is there, to READY."""
        keys = self._keys or self._local_keys()
        result = self._client.register(keys.sha256, CALL_S)
        fresh = False
        while result.keys is not KeyState.READY:
            if result.keys is KeyState.CHECKING:
                self._set(TailState.CHECKING)
                self._pause(0.1)
            else:
                self._set(TailState.UPLOADING)
                self._worker.run(self._client.address, self._progress)
                # The key process may have found damaged keys and made new ones.
                keys = self._local_keys()
            fresh = True
            result = self._client.register(keys.sha256, CALL_S)
        self._probe(result.session, fresh)
        with self._changed:
            self._session, self._trouble, self._late = result.session, None, 0
            self._set(TailState.READY, registrations=self._status.registrations + 1)

    def _local_keys(self) -> KeySet:
        """The key set on disk, made by the key process when it is missing or damaged; loads the cipher."""
        old, self._keys = self._keys, None
        self._files.prepare()
        try:
            keys = self._files.find()
            if keys is not None and (self._cipher is None or keys != old):
                self._cipher = self._load_cipher(self._spec, keys.secret, self._backend)
        except ContainerError:
            keys = None  # the key process moves damaged files aside and makes new ones
        if keys is None:
            self._cipher = None
            self._set(TailState.KEYS)
            self._worker.run(None, self._progress)
            keys = self._files.find()
            if keys is None:
                raise EvaluationFailed("no keys were made: see that the state directory can be written")
            self._cipher = self._load_cipher(self._spec, keys.secret, self._backend)
        self._keys = keys
        return keys

    def _probe(self, session: bytes, fresh: bool) -> None:
        """Evaluates an encryption of zeros: warms the path, and tells how long an offload takes.

        Nothing is learned from its content. The first one after an upload also
        loads the keys in the cloud, so only the second one's time counts.
        """
        cipher = self._cipher
        assert cipher is not None
        for measured in (False, True) if fresh or self._typical_s == 0.0 else (True,):
            start_s = self._clock()
            container = cipher.encrypt(np.zeros(self._spec.features))
            try:
                reply = self._evaluate(session, container, self._clock() + PROBE_S)
                cipher.decrypt(reply.container)
            except (EvaluationFailed, Overloaded, ContainerError):
                return  # requests will meet it, and answer from an exit
            if measured and self._on_probe is not None:
                self._on_probe(self._clock() - start_s)

    def _watch(self) -> float:
        """Sleeps until an evaluation meets trouble; how long to wait before connecting again."""
        while True:
            self._wake.wait()
            self._wake.clear()
            with self._changed:
                trouble = self._trouble
                quiet = trouble is None and not self._closed
                if not quiet:
                    self._session = None
            if quiet:
                self._ping()
                continue
            if self._closed or isinstance(trouble, KeysMissing):
                return 0.0
            if isinstance(trouble, SessionLost):
                return self._random.uniform(0.0, REJOIN_S)
            if trouble is not None:
                raise trouble
            return 0.0

    def _ping(self) -> None:
        """After replies that came too late: raises `TailUnavailable` when the cloud is not there."""
        if self._late < LATE_IN_A_ROW or self._clock() < self._next_ping_s:
            return
        self._next_ping_s = self._clock() + PING_S
        assert self._keys is not None
        try:
            self._client.key_status(self._keys.sha256, PING_S)
        except TailError as error:
            self._session = None
            raise TailUnavailable(f"the cloud has gone silent ({error})") from error
        self._late = 0

    def _progress(self, event: Mapping[str, Any]) -> None:
        kind = event.get("event")
        if kind == "making":
            self._set(TailState.KEYS)
        elif kind == "uploading":
            self._set(TailState.UPLOADING, sent_bytes=int(event.get("sent", 0)))
        elif kind == "checking":
            self._set(TailState.CHECKING, sent_bytes=self._spec.key_bytes)

    def _set(
        self, state: TailState, problem: str = "", *, sent_bytes: int = 0, registrations: int | None = None
    ) -> None:
        with self._changed:
            if self._closed:
                return
            old = self._status
            self._status = TailStatus(
                state=state,
                problem=problem,
                sent_bytes=self._spec.key_bytes if state is TailState.READY else sent_bytes,
                key_bytes=self._spec.key_bytes,
                registrations=old.registrations if registrations is None else registrations,
                since_s=old.since_s if old.state is state else self._clock(),
            )
            if old.state is not state:
                _log.info("tail %s: %s %s", self._spec.program_id[:8], state.value, problem)
            self._changed.notify_all()

    def _pause(self, seconds: float) -> None:
        self._wake.wait(seconds)
        if self._closed:
            raise TailUnavailable("this runtime is closed")
