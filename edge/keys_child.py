"""The key process: makes keys and uploads them, away from the process that answers.

`python -m edge.keys_child` reads one JSON line on standard input (`Order`), tells
its progress in JSON lines on standard output (`{"event": ...}`), and ends. It
runs niced and single-threaded, since key generation holds the interpreter and a
core for about a second; it ends at once when its standard input closes, that is
when its parent is gone. Over the network it sends the evaluation keys and nothing
else, on a connection of its own: in small pieces, below half of the uplink,
resumed from what the cloud already holds.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from blindtail.errors import BlindtailError, ContainerError, DeadlineExceeded, TailError, TailUnavailable
from blindtail.he.spec import TailSpec
from blindtail.rpc import INSECURE_LOOPBACK, ClientTls, ClientTlsFiles, Credentials, TailStub, secure_channel
from blindtail.wire import CHUNK_BYTES, KeyHeader, KeyState, KeyStatusCall
from edge.cipher import make_keys, open_cipher
from edge.keyfiles import KeyFiles, KeySet

#: Share of the uplink that an upload may take.
UPLINK_SHARE = 0.45
#: A piece keeps a paced link busy for about this long at most.
_PIECE_S = 0.05
_PIECE_MIN = 16 * 1024
_CALL_S = 5.0
_POLL_S = 0.1
_BACK_OFF_S = (0.2, 1.0)
_TRIES = 5


@dataclass(frozen=True)
class Order:
    """What the parent asks for. `address` None: make keys only, upload nothing.

    progress_timeout_s  an upload that moves no byte for this long is broken off
    give_up_s           after this long, and some tries, without a byte more in the cloud, it fails
    """

    spec: dict[str, Any]
    state_dir: str
    backend: str = "seal"
    address: str | None = None
    credentials: dict[str, str | None] | str | None = None
    uplink_bps: float | None = None
    progress_timeout_s: float = 15.0
    give_up_s: float = 60.0

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, line: str) -> Order:
        return cls(**json.loads(line))


def credentials_to_json(credentials: Credentials) -> dict[str, str | None] | str | None:
    """Files go as their paths; what is read from them then never leaves this process."""
    if isinstance(credentials, ClientTlsFiles):
        paths = {name: str(getattr(credentials, name).absolute()) for name in ("ca", "certificate", "key")}
        return {"files": "yes", **paths, "server_name": credentials.server_name}
    if not isinstance(credentials, ClientTls):
        return credentials
    return {
        "ca": credentials.ca.decode("latin-1"),
        "certificate": credentials.certificate.decode("latin-1"),
        "key": credentials.key.decode("latin-1"),
        "server_name": credentials.server_name,
    }


def credentials_from_json(data: dict[str, str | None] | str | None) -> Credentials:
    if isinstance(data, dict) and data.get("files"):
        paths = [Path(data[name] or "") for name in ("ca", "certificate", "key")]
        return ClientTlsFiles(paths[0], paths[1], paths[2], data["server_name"])
    if isinstance(data, dict):
        ca, certificate, key = ((data[n] or "").encode("latin-1") for n in ("ca", "certificate", "key"))
        return ClientTls(ca, certificate, key, data["server_name"])
    return INSECURE_LOOPBACK if data == INSECURE_LOOPBACK else None


Tell = Callable[..., None]


def ensure_keys(spec: TailSpec, files: KeyFiles, backend: str, tell: Tell) -> KeySet:
    """The directory's key set, made first when there is none or when it is damaged.

    Call it under the directory's lock.
    """
    try:
        keys = files.find()
        if keys is not None:
            open_cipher(spec, keys.secret, backend)
            return keys
    except ContainerError as error:
        tell("damaged", message=str(error))
        files.set_aside()
    files.discard_partial()
    tell("making")
    make_keys(
        spec,
        files.secret,
        files.evaluation,
        backend,
        lambda done, total: tell("made", done=done, total=total),
    )
    return files.complete()


class Uploader:
    """Uploads one key set, resumable, over a channel of its own. Raises a `TailError` when it gives up."""

    def __init__(self, order: Order, program_id: str, keys: KeySet, tell: Tell) -> None:
        assert order.address is not None
        self._order, self._keys, self._tell = order, keys, tell
        self._program_id = program_id
        self._credentials = credentials_from_json(order.credentials)
        self._call = KeyStatusCall(program_id, keys.sha256)
        self._moved_s = time.monotonic()  # when a byte left, for the watchdog
        self._far = -1  # bytes that the cloud was ever known to hold
        self._progress_s, self._fruitless = time.monotonic(), 0
        self._jitter = random.Random()

    def run(self) -> None:
        back_off_s = _BACK_OFF_S[0]
        while True:
            try:
                if self._once():
                    return
                back_off_s = _BACK_OFF_S[0]
            except (TailUnavailable, DeadlineExceeded):
                self._fruitless += 1
                waited_s = time.monotonic() - self._progress_s
                if self._fruitless >= _TRIES and waited_s > self._order.give_up_s:
                    raise
                time.sleep(back_off_s * self._jitter.uniform(0.5, 1.0))
                back_off_s = min(back_off_s * 2, _BACK_OFF_S[1])

    def _once(self) -> bool:
        """One connection: asks, sends what is missing, waits for the verdict. True when READY."""
        channel = secure_channel(self._order.address or "", self._credentials)
        try:
            stub = TailStub(channel)
            status = stub.key_status(self._call, _CALL_S)
            self._reached(status.received_bytes)
            if status.state is KeyState.MISSING:
                self._tell("uploading", sent=status.received_bytes, total=self._keys.bytes)
                header = KeyHeader(
                    self._program_id, self._keys.sha256, self._keys.bytes, status.received_bytes
                )
                try:
                    with _Watchdog(self, channel.close):
                        status = stub.upload_keys(header, self._pieces(status.received_bytes))
                except ContainerError as error:
                    # Bytes of a broken connection may have arrived since we asked: ask again.
                    raise TailUnavailable(f"the upload was not taken ({error})") from error
                self._reached(status.received_bytes)
            while status.state is KeyState.CHECKING:
                self._tell("checking")
                time.sleep(_POLL_S)
                status = stub.key_status(self._call, _CALL_S)
            if status.state is KeyState.REFUSED:
                raise ContainerError(f"the cloud refused the evaluation keys: {status.problem}")
            return status.state is KeyState.READY
        finally:
            channel.close()

    def _pieces(self, offset: int) -> Iterator[bytes]:
        size, rate = CHUNK_BYTES, None
        if self._order.uplink_bps is not None:
            rate = self._order.uplink_bps * UPLINK_SHARE / 8  # bytes per second
            size = int(min(max(rate * _PIECE_S, _PIECE_MIN), CHUNK_BYTES))
        start_s, start = time.monotonic(), offset
        with self._keys.evaluation.open("rb") as file:
            file.seek(offset)
            while piece := file.read(size):
                yield piece
                offset += len(piece)
                self._moved_s = time.monotonic()
                self._tell("uploading", sent=offset, total=self._keys.bytes)
                if rate is not None:
                    time.sleep(max(0.0, start_s + (offset - start) / rate - time.monotonic()))
                else:
                    time.sleep(0)

    def _reached(self, received: int) -> None:
        if received > self._far:
            self._far, self._progress_s, self._fruitless = received, time.monotonic(), 0

    @property
    def stuck(self) -> bool:
        return time.monotonic() - self._moved_s > self._order.progress_timeout_s


class _Watchdog:
    """Ends a connection whose upload moves no byte for the order's progress timeout."""

    def __init__(self, uploader: Uploader, end: Callable[[], None]) -> None:
        self._uploader, self._end = uploader, end
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._done.wait(0.2):
            if self._uploader.stuck:
                self._end()
                return

    def __enter__(self) -> None:
        self._uploader._moved_s = time.monotonic()
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()


def carry_out(order: Order, tell: Tell) -> None:
    """Makes and, when asked, uploads keys. Raises `BlindtailError`."""
    spec = TailSpec.from_json(order.spec)
    files = KeyFiles(Path(order.state_dir), spec, order.backend)
    files.prepare()
    tell("waiting")
    with files.lock():
        keys = ensure_keys(spec, files, order.backend, tell)
        tell("keys", sha256=keys.sha256.hex(), bytes=keys.bytes)
        if order.address is not None:
            Uploader(order, spec.program_id, keys, tell).run()
            tell("uploaded", sent=keys.bytes, total=keys.bytes)


def main(given: TextIO = sys.stdin, out: TextIO = sys.stdout) -> int:
    """0 done, 1 failed; the last line then is {"event": "failed", "kind": ..., "message": ...}."""
    os.nice(10)
    os.environ["OMP_NUM_THREADS"] = "1"
    order = Order.decode(given.readline())
    threading.Thread(target=_end_with, args=(given,), daemon=True).start()
    writing = threading.Lock()

    def tell(event: str, **fields: Any) -> None:
        with writing:
            print(json.dumps({"event": event, **fields}), file=out, flush=True)

    try:
        carry_out(order, tell)
    except BlindtailError as error:
        tell("failed", kind=type(error).__name__, message=str(error), temporary=_is_temporary(error))
        return 1
    except Exception as error:  # the parent must learn of it; the text could hold anything
        tell("failed", kind="EvaluationFailed", message=f"unexpected {type(error).__name__}", temporary=True)
        return 1
    tell("done")
    return 0


def _is_temporary(error: BlindtailError) -> bool:
    return isinstance(error, TailError)


def _end_with(given: TextIO) -> None:
    """Blocks until the parent closes our standard input or dies, then ends this process."""
    descriptor = given.fileno()
    # Not through `given`: a thread inside its buffer would break the interpreter's end.
    while os.read(descriptor, 4096):
        pass
    os._exit(2)


if __name__ == "__main__":
    sys.exit(main())
