"""A cell on loopback gRPC that serves one clear tail and breaks on cue. Tests only.

Unlike the real cell it can be told to answer late, wrongly, or not at all, and to
die at a chosen moment; like it, it keeps partial uploads and checks key hashes.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

from blindtail import wire
from blindtail.errors import (
    BlindtailError,
    ContainerError,
    KeysMissing,
    ProgramMismatch,
    SessionLost,
    TailUnavailable,
)
from blindtail.he.backends import open_evaluator
from blindtail.he.program import Program
from blindtail.ports import free_port
from blindtail.rpc import server_options, to_status
from blindtail.wire import KeyState

#: Called with (how many evaluations came before, the call, the honest reply's bytes).
Behaviour = Callable[[int, wire.EvaluateCall, bytes], bytes]


class ScriptedCell:
    """`with ScriptedCell(program, folder) as cell:` serves at `cell.address`."""

    def __init__(self, program: Program, folder: Path, version: str = "1", port: int = 0) -> None:
        self.program, self.folder, self.version = program, folder, version
        self.behaviour: Behaviour | None = None
        self.sessions: dict[bytes, bytes] = {}
        self.uploads: dict[bytes, bytearray] = {}
        self.ready: set[bytes] = set()
        self.registered = 0
        self.evaluated = 0
        self.received = 0  # bytes of keys, repeats counted
        self.break_upload_after: int | None = None
        self.stall_upload_after: int | None = None
        self.attempts: list[tuple[bytes, int]] = []
        self._evaluator = open_evaluator("clear", program)
        self._lock = threading.Lock()
        self.port = port or free_port()  # the same after `stop` and `start`
        self._server: grpc.Server | None = None

    def start(self) -> None:
        self._server = grpc.server(
            ThreadPoolExecutor(16), options=server_options(max(1 << 20, self.program.spec.uplink_bytes))
        )
        handlers = {
            "Register": grpc.unary_unary_rpc_method_handler(self._guard(self._register)),
            "KeyStatus": grpc.unary_unary_rpc_method_handler(self._guard(self._key_status)),
            "UploadKeys": grpc.stream_unary_rpc_method_handler(self._guard(self._upload)),
            "Evaluate": grpc.unary_unary_rpc_method_handler(self._guard(self._evaluate)),
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(wire.SERVICE, handlers),))
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        self._server.start()

    def stop(self) -> None:
        """At once: calls in flight are broken off, connections closed."""
        if self._server is not None:
            self._server.stop(0).wait(10)
            self._server = None

    def forget(self, *, keys: bool = False, sessions: bool = True) -> None:
        """What a restart, or an eviction, loses."""
        with self._lock:
            if sessions:
                self.sessions.clear()
            if keys:
                self.ready.clear()
                self.uploads.clear()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def __enter__(self) -> ScriptedCell:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # -- the service -----------------------------------------------------------

    def _guard(self, method: Callable[[Any], bytes]) -> Callable[[Any, grpc.ServicerContext], bytes]:
        def handle(request: Any, context: grpc.ServicerContext) -> bytes:
            try:
                return method(request)
            except BlindtailError as error:
                code, message, metadata = to_status(error)
                context.set_trailing_metadata(metadata)
                context.abort(code, message)
                raise AssertionError("unreachable") from error

        return handle

    def _register(self, data: bytes) -> bytes:
        call = wire.RegisterCall.decode(data)
        if call.version != self.version or call.program_id != self.program.spec.program_id:
            raise ProgramMismatch(f"the cloud serves version {self.version}, the edge has {call.version}")
        session = os.urandom(16)
        with self._lock:
            self.registered += 1
            self.sessions[session] = call.key_sha256
            state = KeyState.READY if call.key_sha256 in self.ready else KeyState.MISSING
        return wire.RegisterResult(session, state, "", 600.0).encode()

    def _key_status(self, data: bytes) -> bytes:
        return self._status(wire.KeyStatusCall.decode(data).key_sha256)

    def _status(self, sha: bytes) -> bytes:
        state = KeyState.READY if sha in self.ready else KeyState.MISSING
        return wire.KeyStatus(state, len(self.uploads.get(sha, b""))).encode()

    def _upload(self, chunks: Iterator[bytes]) -> bytes:
        header: wire.KeyHeader | None = None
        held = bytearray()
        for data in chunks:
            chunk = wire.KeyChunk.decode(data)
            if header is None:
                header = chunk.header
                assert header is not None
                held = self.uploads.setdefault(header.key_sha256, bytearray())
                if header.offset != len(held):
                    raise ContainerError("the upload goes on at the wrong place")
            held += chunk.data
            self.received += len(chunk.data)
            if self.break_upload_after is not None and len(held) >= self.break_upload_after:
                self.break_upload_after = None
                raise TailUnavailable("the connection broke")
            if self.stall_upload_after is not None and len(held) >= self.stall_upload_after:
                self.stall_upload_after = None
                time.sleep(30)
        assert header is not None
        if len(held) == header.total_bytes:
            if hashlib.sha256(held).digest() != header.key_sha256:
                raise ContainerError("the keys do not have the hash announced")
            source = self.folder / "uploaded"
            source.write_bytes(held)
            self._evaluator.prepare_keys(source, self.folder / "prepared")
            self.ready.add(header.key_sha256)
        return self._status(header.key_sha256)

    def _evaluate(self, data: bytes) -> bytes:
        call = wire.EvaluateCall.decode(data, 1 << 20)
        with self._lock:
            count, self.evaluated = self.evaluated, self.evaluated + 1
            self.attempts.append((call.request_id, call.attempt))
            if call.session not in self.sessions:
                raise SessionLost("unknown session: register again")
            if self.sessions[call.session] not in self.ready:
                raise KeysMissing("the keys were evicted: upload them again")
            start_s = time.monotonic()
            keys = self._evaluator.load_keys(self.folder / "prepared")
            reply = self._evaluator.evaluate(keys, call.container)
            took_s = time.monotonic() - start_s
        if self.behaviour is not None:
            reply = self.behaviour(count, call, reply)
        return wire.EvaluateResult(reply, 0.0, took_s, "scripted").encode()
