"""`blindtail cell`: the operator's commands for a cell itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated

import grpc
import typer

from blindtail.connection_options import (
    AsJson,
    Ca,
    Certificate,
    Key,
    Plaintext,
    ServerName,
    credentials_of,
)
from blindtail.errors import ConfigError, TailUnavailable
from blindtail.rpc import Credentials, named_error, secure_channel
from blindtail.wire.cell import CELL, DrainStatus, encode_drain

CALL_S = 10.0
#: A drain is waited for as long as its grace, or as long as a cell's own may be.
_LONGEST_S = 3600.0

Address = Annotated[str, typer.Argument(metavar="HOST:PORT", help="The cell.")]

cells = typer.Typer(
    help="A running cell: send its edges away, welcome them again, see what is there. For operators.",
    no_args_is_help=True,
)


class CellClient:
    """What an operator asks of one cell. Raises `BlindtailError`. Close it."""

    def __init__(self, address: str, credentials: Credentials) -> None:
        self._channel = secure_channel(address, credentials)

    def drain(self, grace_s: float = 0.0) -> DrainStatus:
        """Returns when the edges have gone, or after the grace; 0 = the cell's own."""
        return self._call("Drain", encode_drain(grace_s), (grace_s or _LONGEST_S) + CALL_S)

    def resume(self) -> DrainStatus:
        return self._call("Resume", b"", CALL_S)

    def status(self) -> DrainStatus:
        return self._call("Status", b"", CALL_S)

    def close(self) -> None:
        self._channel.close()

    def _call(self, name: str, data: bytes, timeout_s: float) -> DrainStatus:
        method = self._channel.unary_unary(f"/{CELL}/{name}", None, None)
        try:
            return DrainStatus.decode(method(data, timeout=timeout_s))
        except grpc.RpcError as error:
            raise named_error(error) from error
        except ValueError as error:
            raise TailUnavailable("the connection to the cell is closed") from error


@cells.command("drain", no_args_is_help=True)
def drain(
    address: Address,
    grace: Annotated[
        float | None, typer.Option(help="Seconds to wait for edges to go; default: the cell's own.")
    ] = None,
    plaintext: Plaintext = False,
    ca: Ca = None,
    certificate: Certificate = None,
    key: Key = None,
    server_name: ServerName = None,
    as_json: AsJson = False,
) -> None:
    """Send a cell's edges to other cells; returns when they have gone.

    The cell goes on answering those that have nowhere else to go, and stays
    drained until `blindtail cell resume`, or until it is started again.

    \b
      blindtail cell drain 127.0.0.1:50051 --plaintext
    """
    if grace is not None and not 0 < grace <= _LONGEST_S:
        raise ConfigError(f"--grace is above 0 and at most {_LONGEST_S:.0f} s, not {grace}")
    credentials = credentials_of(plaintext, ca, certificate, key, server_name)
    _ask(address, credentials, lambda cell: cell.drain(grace or 0.0), as_json)


@cells.command("resume", no_args_is_help=True)
def resume(
    address: Address,
    plaintext: Plaintext = False,
    ca: Ca = None,
    certificate: Certificate = None,
    key: Key = None,
    server_name: ServerName = None,
    as_json: AsJson = False,
) -> None:
    """Let edges come to a drained cell again."""
    _ask(address, credentials_of(plaintext, ca, certificate, key, server_name), CellClient.resume, as_json)


@cells.command("status", no_args_is_help=True)
def status(
    address: Address,
    plaintext: Plaintext = False,
    ca: Ca = None,
    certificate: Certificate = None,
    key: Key = None,
    server_name: ServerName = None,
    as_json: AsJson = False,
) -> None:
    """Whether a cell drains, how many sessions were used in the last second, what waits or runs."""
    _ask(address, credentials_of(plaintext, ca, certificate, key, server_name), CellClient.status, as_json)


def _ask(
    address: str, credentials: Credentials, call: Callable[[CellClient], DrainStatus], as_json: bool
) -> None:
    cell = CellClient(address, credentials)
    try:
        found = call(cell)
    finally:
        cell.close()
    if as_json:
        fields = {"draining": found.draining, "sessions": found.sessions, "waiting": found.waiting}
        print(json.dumps({"cell": address, **fields}))
        return
    state = "drains" if found.draining else "serves"
    print(f"{address} {state}: {found.sessions} sessions in use, {found.waiting} requests wait or run")


def register(app: typer.Typer) -> None:
    """Adds the group `cell`."""
    app.add_typer(cells, name="cell")


__all__ = ["CellClient", "register"]
