"""From nothing to a session at one cell: keys on disk, registered, keys in the cloud, warmed up."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from blindtail.errors import (
    AccessDenied,
    BlindtailError,
    ConfigError,
    ContainerError,
    EvaluationFailed,
    Overloaded,
    ProgramMismatch,
    TailUnavailable,
)
from blindtail.he.spec import TailSpec
from blindtail.records import TailReply, TailTimings
from blindtail.wire import KeyState, RegisterResult
from edge.cells import Place
from edge.keyfiles import KeyFiles, KeySet
from edge.keys import KeyWorker
from edge.tail import Cipher, TailState, in_all

CALL_S = 5.0
PROBE_S = 10.0
_POLL_S = 0.1

#: (state, sent_bytes=...): how far it has come.
Tell = Callable[..., None]


#: What a cell says for good: it has another model, or the edge no access.
FINAL = (ProgramMismatch, AccessDenied, ConfigError)


def finality(error: BlindtailError) -> int:
    """What is over soonest first: a cell that is away, then broken keys, then what is `FINAL`."""
    if isinstance(error, FINAL):
        return 2
    return 1 if isinstance(error, ContainerError | EvaluationFailed) else 0


class Draining(Exception):
    """The cell is about to end and another one is preferred. Never leaves the edge's session."""


class Joiner:
    """One tail's way into a cell. For one thread, except `close`.

    evaluate   (place, container, seconds, segment) -> reply
    on_probe   hears the seconds of an encrypted round trip, or of all of a refreshed tail's, and what the
               cloud says about it
    on_upload  hears the seconds from the start of an upload until its keys were usable
    on_others  hears of the other cells that a cell names
    following  later segments of a refreshed tail
    """

    def __init__(
        self,
        spec: TailSpec,
        files: KeyFiles,
        worker: KeyWorker,
        *,
        backend: str,
        clock: Callable[[], float],
        load_cipher: Callable[[TailSpec, Path, str], Cipher],
        evaluate: Callable[[Place, bytes, float, int], TailReply],
        on_probe: Callable[[float, TailTimings], None] | None,
        on_upload: Callable[[float], None] | None,
        on_others: Callable[[tuple[str, ...]], None],
        following: Sequence[TailSpec] = (),
    ) -> None:
        self._features = [spec.features, *(later.features for later in following)]
        self._spec, self._files, self._worker = spec, files, worker
        self._backend, self._clock, self._load_cipher = backend, clock, load_cipher
        self._evaluate = evaluate
        self._on_probe, self._on_upload, self._on_others = on_probe, on_upload, on_others
        self._keys: KeySet | None = None
        self._place: Place | None = None  # being joined
        self._ended = threading.Event()
        self.cipher: Cipher | None = None

    def close(self) -> None:
        """From any thread: what goes on ends with an error."""
        self._ended.set()
        self._worker.close()
        place = self._place
        if place is not None:
            place.client.close()

    def keys(self, tell: Tell) -> KeySet:
        """The key set, and the cipher beside it."""
        return self._keys or self._local_keys(tell)

    def join(self, place: Place, tell: Tell, *, prefer_another: bool) -> None:
        """Registers at the place and sees that the keys are there: it has a session afterwards.

        Raises `BlindtailError`; `Draining` for such a cell when another one is preferred.
        """
        new = place.session is None
        self._place = place
        try:
            result, fresh = self._register(place, tell, prefer_another)
            place.session, place.draining = result.session, result.draining
            self._probe(place, warm_first=fresh or new)
        finally:
            self._place = None

    def _register(self, place: Place, tell: Tell, prefer_another: bool) -> tuple[RegisterResult, bool]:
        client, keys = place.client, self.keys(tell)
        fresh, upload_from_s = False, None
        while True:
            if self._ended.is_set():
                raise TailUnavailable("this runtime is closed")
            result = client.register(keys.sha256, CALL_S)
            self._on_others(result.others)
            if result.draining and prefer_another:
                raise Draining
            if result.keys is KeyState.READY:
                if upload_from_s is not None and self._on_upload is not None:
                    self._on_upload(self._clock() - upload_from_s)
                return result, fresh
            fresh = True
            if result.keys is KeyState.CHECKING:  # or another cell is asked for them
                tell(TailState.CHECKING)
                while client.key_status(keys.sha256, CALL_S).state is KeyState.CHECKING:
                    self._ended.wait(_POLL_S)
                    if self._ended.is_set():
                        raise TailUnavailable("this runtime is closed")
            else:
                tell(TailState.UPLOADING)
                upload_from_s = upload_from_s or self._clock()
                self._worker.run(client.address, partial(self._progress, tell))
                # The key process may have found damaged keys and made new ones.
                keys = self._local_keys(tell)

    def _local_keys(self, tell: Tell) -> KeySet:
        """The key set on disk, made by the key process when it is missing or damaged; loads the cipher."""
        old, self._keys = self._keys, None
        self._files.prepare()
        try:
            keys = self._files.find()
            if keys is not None and (self.cipher is None or keys != old):
                self.cipher = self._load_cipher(self._spec, keys.secret, self._backend)
        except ContainerError:
            keys = None  # the key process moves damaged files aside and makes new ones
        if keys is None:
            self.cipher = None
            tell(TailState.KEYS)
            self._worker.run(None, partial(self._progress, tell))
            keys = self._files.find()
            if keys is None:
                raise EvaluationFailed("no keys were made: see that the state directory can be written")
            self.cipher = self._load_cipher(self._spec, keys.secret, self._backend)
        self._keys = keys
        return keys

    def _probe(self, place: Place, *, warm_first: bool) -> None:
        """Evaluates encryptions of zeros: warms the path, and tells how long an offload takes.

        Nothing is learned from its content. The first one in a cell also loads the
        keys there, so only the second one's time counts.
        """
        cipher = self.cipher
        assert cipher is not None
        for measured in (False, True) if warm_first else (True,):
            start_s = self._clock()
            told: list[TailTimings] = []
            try:
                for segment, features in enumerate(self._features):
                    container = cipher.encrypt(np.zeros(features), segment=segment)
                    reply = self._evaluate(place, container, PROBE_S, segment)
                    cipher.decrypt(reply.container, segment=segment)
                    told.append(reply.timings)
            except (EvaluationFailed, Overloaded, ContainerError):
                return  # requests will meet it, and answer from an exit
            if measured and self._on_probe is not None:
                self._on_probe(self._clock() - start_s, in_all(told))

    def _progress(self, tell: Tell, event: Mapping[str, Any]) -> None:
        kind = event.get("event")
        if kind == "making":
            tell(TailState.KEYS)
        elif kind == "uploading":
            tell(TailState.UPLOADING, sent_bytes=int(event.get("sent", 0)))
        elif kind == "checking":
            tell(TailState.CHECKING, sent_bytes=self._spec.key_bytes)


__all__ = ["CALL_S", "FINAL", "PROBE_S", "Draining", "Joiner", "Tell", "finality"]
