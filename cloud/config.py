"""What an operator sets for one cell, checked once, at the door."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from blindtail.errors import ConfigError
from blindtail.rpc import ServerTls, is_loopback

Backend = Literal["seal", "clear"]


def default_state_dir() -> Path:
    """$XDG_STATE_HOME/blindtail/cloud, or ~/.local/state/blindtail/cloud."""
    root = os.environ.get("XDG_STATE_HOME")
    return (Path(root) if root else Path.home() / ".local" / "state") / "blindtail" / "cloud"


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files for mutual TLS: the cell's certificate and key, and the CA that signs its clients."""

    certificate: Path
    key: Path
    client_ca: Path

    def load(self) -> ServerTls:
        try:
            return ServerTls(
                self.certificate.read_bytes(), self.key.read_bytes(), self.client_ca.read_bytes()
            )
        except OSError as error:
            raise ConfigError(f"cannot read the TLS file {error.filename}: {error.strerror}") from error


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """Bounds on stored evaluation keys, per cell unless said otherwise."""

    budget_bytes: int = 4_000_000_000  # prepared keys; the least recently used go first
    partial_per_identity: int = 4  # uploads that are not complete
    partial_idle_s: float = 3600.0  # then their bytes are dropped
    check_timeout_s: float = 60.0  # for validating one key container
    check_memory_bytes: int = 4_000_000_000


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """Bounds on waiting work. A full queue answers `Overloaded`."""

    jobs: int = 256
    jobs_per_identity: int = 128
    outstanding_per_evaluator: int = 2
    max_wait_s: float = 60.0  # for requests without a deadline of their own
    quarantine_s: float = 60.0  # after two evaluator crashes by one identity
    crash_window_s: float = 120.0


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """Bounds on sessions. At the bound the longest unused session is forgotten."""

    idle_s: float = 900.0
    per_identity: int = 256
    total: int = 10_000


@dataclass(frozen=True, slots=True)
class CloudConfig:
    """One cell: which models, where it listens, how many evaluators.

    models                paths of `cloud.bt` files; several models and versions at once
    port                  0 picks a free one
    backend               "clear" computes on readable numbers: tests only
    metrics_port          Prometheus over HTTP on the same host; None or 0 = off
    advertise             host:port that edges are told to dial from now on; "" = as they dialled
    threads               native threads of one evaluator
    loaded_keys_bytes     memory for keys that one evaluator keeps loaded
    tls                   needed to listen on anything but loopback
    """

    models: tuple[Path, ...] = ()
    host: str = "127.0.0.1"
    port: int = 0
    evaluators: int = 2
    backend: Backend = "seal"
    state_dir: Path = field(default_factory=default_state_dir)
    metrics_port: int | None = None
    advertise: str = ""
    threads: int = 1
    loaded_keys_bytes: int = 1_000_000_000
    shutdown_grace_s: float = 2.0
    tls: TlsFiles | None = None
    keys: KeyLimits = KeyLimits()
    queue: QueueLimits = QueueLimits()
    sessions: SessionLimits = SessionLimits()

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ConfigError(f"port must be 0 (any free one) to 65535, not {self.port}")
        if self.metrics_port is not None and not 0 <= self.metrics_port < 65536:
            raise ConfigError(f"metrics_port must be 0 to 65535, not {self.metrics_port}")
        if not 1 <= self.evaluators <= 1024:
            raise ConfigError(f"evaluators must be 1 to 1024, not {self.evaluators}")
        if not 1 <= self.threads <= 256:
            raise ConfigError(f"threads must be 1 to 256, not {self.threads}")
        if self.backend not in ("seal", "clear"):
            raise ConfigError(f"backend must be seal (or clear, for tests), not {self.backend!r}")
        if self.tls is None and not is_loopback(self.host):
            raise ConfigError(
                f"without TLS a cell listens on loopback only, and {self.host} is not: set tls.certificate, "
                "tls.key and tls.client_ca, or host = 127.0.0.1"
            )
        positive = {
            "keys.budget_bytes": self.keys.budget_bytes,
            "keys.partial_per_identity": self.keys.partial_per_identity,
            "keys.partial_idle_s": self.keys.partial_idle_s,
            "keys.check_timeout_s": self.keys.check_timeout_s,
            "keys.check_memory_bytes": self.keys.check_memory_bytes,
            "queue.jobs": self.queue.jobs,
            "queue.jobs_per_identity": self.queue.jobs_per_identity,
            "queue.outstanding_per_evaluator": self.queue.outstanding_per_evaluator,
            "queue.max_wait_s": self.queue.max_wait_s,
            "sessions.idle_s": self.sessions.idle_s,
            "sessions.per_identity": self.sessions.per_identity,
            "sessions.total": self.sessions.total,
            "loaded_keys_bytes": self.loaded_keys_bytes,
        }
        for name, value in positive.items():
            if not value > 0:
                raise ConfigError(f"{name} must be above zero, not {value}")


__all__ = [
    "Backend",
    "CloudConfig",
    "KeyLimits",
    "QueueLimits",
    "SessionLimits",
    "TlsFiles",
    "default_state_dir",
]
