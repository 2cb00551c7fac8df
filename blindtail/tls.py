"""PEM files of mutual TLS: read, checked, and watched for renewal. Standard library only.

A renewal replaces two files, and nobody can replace two files in one step: whoever
reads in between finds a certificate and a key that do not belong together. So every
pair is checked before it is used. A process that starts waits for the second file
for a moment; one that runs keeps what it has.

Who holds a connection for long and wants to follow a renewal keeps `stamp(files)`
from when it dialled and compares it later: another stamp means that the files have
changed, and that the next connection will use them.
"""

from __future__ import annotations

import os
import ssl
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from blindtail.errors import ConfigError

#: How long a process that starts waits for the second file of a pair, and how often it looks.
PAIR_WAIT_S, _PAIR_POLL_S = 1.0, 0.05
#: Larger files are not certificates.
_PEM_BYTES = 1_000_000

#: What changes with a file: its status' time (a chmod counts), size and inode; zeros when it is not there.
Stamp = tuple[tuple[int, int, int], ...]
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class ClientTls:
    """TLS of who dials, PEM bytes. `certificate` and `key` are what the server knows it by."""

    ca: bytes
    certificate: bytes
    key: bytes
    server_name: str | None = None  # expected name in the server's certificate, when it is not the host

    def __repr__(self) -> str:  # never the key
        return f"ClientTls(server_name={self.server_name!r})"


@dataclass(frozen=True, slots=True)
class ServerTls:
    """TLS of a server, PEM bytes. Clients must show a certificate that `client_ca` signed."""

    certificate: bytes
    key: bytes
    client_ca: bytes

    def __repr__(self) -> str:
        return "ServerTls()"


@dataclass(frozen=True, slots=True)
class ClientTlsFiles:
    """PEM files of who dials, read at every dial, so that a renewal needs no restart.

    server_name  expected name in the server's certificate, when it is not the host
    """

    ca: Path
    certificate: Path
    key: Path
    server_name: str | None = None

    def load(self, wait_s: float = PAIR_WAIT_S) -> ClientTls:
        """Raises `ConfigError` naming the file that is missing, wrong, or a key that others may read.

        wait_s  how long to wait for the second file of a renewal
        """

        def read() -> ClientTls:
            check_private(self.key)
            tls = ClientTls(_pem(self.ca), _pem(self.certificate), _pem(self.key), self.server_name)
            _check(self.certificate, tls.certificate, self.key, tls.key, self.ca, tls.ca)
            return tls

        return _patiently(read, wait_s)

    def stamp(self) -> Stamp:
        return _stamp(self.ca, self.certificate, self.key)


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files of a server: its certificate and key, and the CA that signs its clients."""

    certificate: Path
    key: Path
    client_ca: Path

    def load(self, wait_s: float = PAIR_WAIT_S) -> ServerTls:
        """Raises `ConfigError` naming the file that is missing, wrong, or a key that others may read."""

        def read() -> ServerTls:
            check_private(self.key)
            tls = ServerTls(_pem(self.certificate), _pem(self.key), _pem(self.client_ca))
            _check(self.certificate, tls.certificate, self.key, tls.key, self.client_ca, tls.client_ca)
            return tls

        return _patiently(read, wait_s)

    def stamp(self) -> Stamp:
        return _stamp(self.client_ca, self.certificate, self.key)

    def as_client(self, server_name: str | None = None) -> ClientTlsFiles:
        """The same files for dialling: a cell towards other cells and its orchestrator."""
        return ClientTlsFiles(self.client_ca, self.certificate, self.key, server_name)


class _NotAPair(ConfigError):
    """Certificate and key do not belong together: perhaps a renewal is half done."""


def check_private(path: Path) -> None:
    """Raises `ConfigError` for a private key that everybody on this machine may read."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise ConfigError(f"cannot read the TLS file {path}: {error.strerror}") from error
    if mode & (stat.S_IROTH | stat.S_IWOTH):
        raise ConfigError(f"the private key {path} is open to every user of this machine: chmod 600 {path}")


def _pem(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_PEM_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read the TLS file {path}: {error.strerror}") from error
    if len(data) > _PEM_BYTES:
        raise ConfigError(f"{path} is larger than {_PEM_BYTES:,} bytes: this is not a PEM file")
    return data


def _check(
    certificate_path: Path, certificate: bytes, key_path: Path, key: bytes, ca_path: Path, ca: bytes
) -> None:
    """Raises `ConfigError` for what no handshake could succeed with."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=ca.decode("ascii", "ignore"))
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(f"{ca_path} holds no certificate of an authority in PEM") from error
    # Only files can be given to OpenSSL: these two live in memory.
    with _memory_file(certificate) as certificate_file, _memory_file(key) as key_file:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(
                certificate_file, key_file, password=lambda: b""
            )
        except ssl.SSLError as error:
            if b"ENCRYPTED" in key:
                raise ConfigError(
                    f"the private key {key_path} has a password: a server cannot ask for it, store it without"
                ) from error
            raise _NotAPair(
                f"{certificate_path} and {key_path} are not a certificate and its private key in PEM "
                f"({error.reason or 'unreadable'})"
            ) from error


@contextmanager
def _memory_file(data: bytes) -> Iterator[str]:
    """The path of an unnamed file in memory."""
    with os.fdopen(os.memfd_create("pem"), "wb") as file:
        file.write(data)
        file.flush()
        yield f"/proc/self/fd/{file.fileno()}"


def _patiently(read: Callable[[], _T], wait_s: float) -> _T:
    end_s = time.monotonic() + wait_s
    while True:
        try:
            return read()
        except _NotAPair:
            if time.monotonic() >= end_s:
                raise
            time.sleep(_PAIR_POLL_S)


def _stamp(*paths: Path) -> Stamp:
    found = []
    for path in paths:
        try:
            status = os.stat(path)
        except OSError:
            found.append((0, 0, 0))
        else:
            found.append((status.st_ctime_ns, status.st_size, status.st_ino))
    return tuple(found)


__all__ = ["ClientTls", "ClientTlsFiles", "ServerTls", "Stamp", "TlsFiles", "check_private"]
