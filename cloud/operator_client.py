"""What an operator asks of one cell's models, over gRPC."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import grpc

from blindtail.errors import BundleError, TailUnavailable
from blindtail.rpc import Credentials, named_error, read_pieces, secure_channel
from blindtail.wire.cell import (
    LIST_BYTES,
    MODELS,
    CanaryCall,
    DropCall,
    ModelChunk,
    ModelEntry,
    ModelHeader,
    decode_models,
    encode_model_query,
    encode_rollback,
)

#: Most bytes per second of the slowest link that a push is expected to survive.
_SLOW_LINK = 50_000
CALL_S, PUSH_S, DROP_S = 60.0, 300.0, 300.0


class OperatorClient:
    """Every call returns the models concerned, as they are now. Raises `BlindtailError`. Thread-safe."""

    def __init__(self, address: str, credentials: Credentials) -> None:
        self.address = address
        self._channel = secure_channel(address, credentials, max_reply_bytes=LIST_BYTES)

    def push(
        self,
        path: Path,
        allow: Sequence[str] = (),
        on_progress: Callable[[int, int], None] = lambda sent, total: None,
    ) -> list[ModelEntry]:
        """Sends a cloud.bt. `on_progress(sent_bytes, total_bytes)` after every piece."""
        try:
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").digest()
                total = file.tell()
                file.seek(0)
                header = ModelHeader(sha256, total, tuple(allow))

                def messages() -> Iterator[bytes]:
                    first: ModelHeader | None = header
                    sent = 0
                    for piece in read_pieces(file.read):
                        yield ModelChunk(piece, first).encode()
                        first = None
                        sent += len(piece)
                        on_progress(sent, total)

                method = self._channel.stream_unary(f"/{MODELS}/Push", None, None)
                return _called(lambda: method(messages(), timeout=PUSH_S + total / _SLOW_LINK))
        except OSError as error:
            raise BundleError(f"cannot read {path}: {error.strerror}") from error

    def models(self, model: str = "") -> list[ModelEntry]:
        """ "" = all."""
        return self._unary("List", encode_model_query(model), CALL_S)

    def canary(self, model: str, version: str, share: float) -> list[ModelEntry]:
        return self._unary("Canary", CanaryCall(model, version, share).encode(), CALL_S)

    def rollback(self, model: str) -> list[ModelEntry]:
        return self._unary("Rollback", encode_rollback(model), CALL_S)

    def drop(self, model: str, version: str) -> list[ModelEntry]:
        """Returns when the last request on it is done."""
        return self._unary("Drop", DropCall(model, version).encode(), DROP_S)

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _unary(self, name: str, data: bytes, timeout_s: float) -> list[ModelEntry]:
        method = self._channel.unary_unary(f"/{MODELS}/{name}", None, None)
        return _called(lambda: method(data, timeout=timeout_s))


def _called(call: Callable[[], Any]) -> list[ModelEntry]:
    try:
        return decode_models(call())
    except grpc.RpcError as error:
        raise named_error(error) from error
    except ValueError as error:
        raise TailUnavailable("the connection to the cell is closed") from error


__all__ = ["OperatorClient"]
