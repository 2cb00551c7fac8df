"""`blindtail health`: is a cell or an orchestrator serving? For probes, scripts and operators.

The standard gRPC health service answers, over the same TLS as every other call,
so that an image needs no second tool for its probe.
"""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

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
from blindtail.errors import ConfigError, TailError


def check(address: str, credentials: Any, *, service: str = "", timeout_s: float = 3.0) -> dict[str, Any]:
    """What the server at `address` ("host:port") says of `service` ("" is the server as a whole).

    {"address", "service", "status", "serving", "seconds", "error"}: status is
    SERVING or NOT_SERVING as the server says, UNKNOWN when it does not know the
    service, and UNREACHABLE when nobody answers; `error` then says why. Raises
    `ConfigError` for a wrong address or plaintext to another host.
    """
    import grpc
    from grpc_health.v1 import health_pb2

    from blindtail.rpc import from_rpc_error, secure_channel

    states = health_pb2.HealthCheckResponse
    error: TailError | None = None
    start_s = time.monotonic()
    with secure_channel(address, credentials) as channel:
        call = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            health_pb2.HealthCheckRequest.SerializeToString,
            states.FromString,
        )
        try:
            status = states.ServingStatus.Name(
                call(health_pb2.HealthCheckRequest(service=service), timeout=timeout_s).status
            )
        except grpc.RpcError as raised:
            error = from_rpc_error(raised)
            unknown = raised.code() is grpc.StatusCode.NOT_FOUND
            status = "UNKNOWN" if unknown else "UNREACHABLE"
    return {
        "address": address,
        "service": service,
        "status": status,
        "serving": status == "SERVING",
        "seconds": round(time.monotonic() - start_s, 4),
        "error": None if error is None else str(error),
    }


def health(
    address: Annotated[str, typer.Argument(metavar="HOST:PORT", help="A cell or an orchestrator.")],
    plaintext: Plaintext = False,
    ca: Ca = None,
    certificate: Certificate = None,
    key: Key = None,
    server_name: ServerName = None,
    service: Annotated[
        str, typer.Option(help="Full gRPC name of one service; default: the server as a whole.")
    ] = "",
    timeout_s: Annotated[float, typer.Option("--timeout", help="Seconds to wait for the answer.")] = 3.0,
    as_json: AsJson = False,
) -> None:
    """Ask a cell or an orchestrator whether it is serving. Exit code 0: yes; 1: no.

    \b
    Try it:  blindtail health 127.0.0.1:50051 --plaintext
             blindtail health cell-a:50051 --ca ca.pem --certificate cell-a.pem --key cell-a.key
    """
    if not 0 < timeout_s <= 600:
        raise ConfigError(f"--timeout must be above 0 and at most 600 seconds, not {timeout_s}")
    found = check(
        address,
        credentials_of(plaintext, ca, certificate, key, server_name),
        service=service,
        timeout_s=timeout_s,
    )
    if as_json:
        print(json.dumps(found))
    elif found["serving"]:
        print(f"{address} is serving ({found['seconds'] * 1000:.0f} ms)")
    else:
        print(f"{address}: {found['status']}" + (f" ({found['error']})" if found["error"] else ""))
    raise typer.Exit(0 if found["serving"] else 1)


def register(app: typer.Typer) -> None:
    """Adds the command `health`."""
    app.command("health", no_args_is_help=True)(health)


__all__ = ["check", "register"]
