"""An authority in a folder, a server that says who calls, and what clients and OpenSSL make of it."""

from __future__ import annotations

import asyncio
import datetime
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from blindtail.certs import create_authority, issue
from blindtail.errors import BlindtailError, TailUnavailable
from blindtail.identity import Role
from blindtail.rpc import Credentials, from_rpc_error, secure_channel, server_options
from blindtail.serving import GrpcServer, answer, identity_of
from blindtail.tls import ClientTlsFiles, TlsFiles

Call = Callable[[bytes], bytes]


class Echo:
    """A `GrpcServer` on a thread: `Who` says who calls, `Only` is for operators, `Slow` takes its time."""

    def __init__(
        self, tls: TlsFiles | None, roles: dict[str, str] | None = None, connection_age_s: float = 3600.0
    ) -> None:
        self.roles = roles or {}
        methods = {
            name: grpc.unary_unary_rpc_method_handler(method)
            for name, method in (("Who", self._who), ("Only", self._only), ("Slow", self._slow))
        }
        self._server = GrpcServer(
            "127.0.0.1",
            0,
            tls,
            {"test.Echo": methods},
            options=server_options(1 << 16, connection_age_s, 5.0),
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self.port = 0

    async def _who(self, data: bytes, context: Any) -> bytes:
        async def call() -> bytes:
            return str(identity_of(context, self.roles)).encode()

        return await answer(context, call)

    async def _only(self, data: bytes, context: Any) -> bytes:
        async def call() -> bytes:
            identity_of(context, self.roles).require(Role.OPERATOR)
            return b"done"

        return await answer(context, call)

    async def _slow(self, data: bytes, context: Any) -> bytes:
        await asyncio.sleep(float(data))
        return b"late"

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def __enter__(self) -> Echo:
        self._thread.start()
        self.port = asyncio.run_coroutine_threadsafe(self._server.start(), self._loop).result(10)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._server.stop(0.1), self._loop).result(10)
        asyncio.run_coroutine_threadsafe(self._drain(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _drain(self) -> None:
        tasks = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass
class Authority:
    folder: Path

    def server(self, name: str = "cell-1", **more: Any) -> TlsFiles:
        made = issue(self.folder, name, Role.CELL, **more)
        return TlsFiles(made.certificate, made.key, made.ca)

    def client(self, name: str = "camera-7", role: Role = Role.EDGE, **more: Any) -> ClientTlsFiles:
        made = issue(self.folder, name, role, **more)
        return ClientTlsFiles(made.ca, made.certificate, made.key)


YESTERDAY = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)


@pytest.fixture(name="authority")
def authority_of_one_test(tmp_path: Path) -> Authority:
    create_authority(tmp_path / "ca", now=YESTERDAY)
    return Authority(tmp_path / "ca")


def methods(channel: grpc.Channel) -> dict[str, Call]:
    """Method -> call; every error is a blindtail one."""

    def made(name: str) -> Call:
        raw = channel.unary_unary(f"/test.Echo/{name}", None, None)

        def call(data: bytes) -> bytes:
            try:
                return bytes(raw(data, timeout=5))
            except grpc.RpcError as error:
                raise from_rpc_error(error) from error
            except ValueError as error:
                raise TailUnavailable("closed") from error

        return call

    return {name: made(name) for name in ("Who", "Only", "Slow")}


@contextmanager
def dialled(address: str, credentials: Credentials) -> Iterator[dict[str, Call]]:
    with secure_channel(address, credentials) as channel:
        yield methods(channel)


def who(address: str, credentials: Credentials) -> str:
    with dialled(address, credentials) as call:
        return call["Who"](b"").decode()


def refused(address: str, credentials: Credentials) -> bool:
    with pytest.raises(BlindtailError) as error:
        who(address, credentials)
    return isinstance(error.value, TailUnavailable)


def handshake(
    port: int, files: ClientTlsFiles | None, ca: Path, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3
) -> tuple[str, str]:
    """(TLS version, serial of the server's certificate) as OpenSSL sees them. Raises `OSError`."""
    context = ssl.create_default_context(cafile=str(ca))
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["h2"])
    if files is not None:
        context.load_cert_chain(files.certificate, files.key)
    with (
        socket.create_connection(("127.0.0.1", port), timeout=5) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as connection,
    ):
        shown = connection.getpeercert()
        assert shown is not None
        connection.settimeout(2)
        # Under TLS 1.3 the server's verdict on our certificate comes after the handshake.
        if connection.recv(1) == b"":
            raise ConnectionResetError("closed by the server")
        return str(connection.version()), str(shown["serialNumber"]).lower().lstrip("0")
