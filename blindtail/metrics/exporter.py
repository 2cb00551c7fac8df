"""Prometheus over HTTP, for every role."""

from __future__ import annotations

import socket
from collections.abc import Callable

import prometheus_client
from prometheus_client import CollectorRegistry

from blindtail.errors import ConfigError

_JOIN_S = 5.0


def serve_metrics(host: str, port: int, registry: CollectorRegistry) -> Callable[[], None]:
    """Serves `registry` at http://HOST:PORT/metrics on a thread; returns what ends it.

    Whoever reaches the port sees counts by model, version, route and outcome, and
    no identity, device, address, session or key. Raises `ConfigError` when the port
    cannot be had.
    """
    try:
        server, thread = prometheus_client.start_http_server(port, host, registry)
    except OSError as error:
        raise _taken(host, port, error) from error

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join(timeout=_JOIN_S)

    return stop


def check_metrics_port(host: str, port: int) -> None:
    """Raises `ConfigError` when the port cannot be had; before seconds are spent on anything else."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise _taken(host, port, error) from error


def _taken(host: str, port: int, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot serve metrics on {host}:{port} ({error.strerror or error}): choose another metrics_port"
    )


__all__ = ["check_metrics_port", "serve_metrics"]
