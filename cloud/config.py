"""What an operator sets for one cell, checked once, at the door."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from blindtail.errors import ConfigError
from blindtail.he.backends import settle
from blindtail.identity import check_roles
from blindtail.rpc import is_loopback, split_address
from blindtail.serving import TlsFiles
from blindtail.wire.tail import MOST_OTHERS

Backend = Literal["auto", "native", "seal", "clear"]


def default_state_dir() -> Path:
    """$XDG_STATE_HOME/blindtail/cloud, or ~/.local/state/blindtail/cloud."""
    root = os.environ.get("XDG_STATE_HOME")
    return (Path(root) if root else Path.home() / ".local" / "state") / "blindtail" / "cloud"


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """Bounds on stored evaluation keys, per cell unless said otherwise."""

    budget_bytes: int = 4_000_000_000  # keys on disk; the least recently used go first
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
class TicketLimits:
    """Bounds on what idle evaluators do ahead of requests, where the backend can (`native`)."""

    per_identity: int = (
        16  # seeds that one client may have announced for a program; 0 = nothing is done ahead
    )
    budget_bytes: int = 256_000_000  # memory of all evaluators' tickets; the least recently made go first
    stale_s: float = 60.0  # a client's seeds that waited this long make room for its newer ones
    announced: int = 4096  # seeds of all clients


@dataclass(frozen=True, slots=True)
class CloudConfig:
    """One cell: which models, where it listens, how many evaluators.

    models                paths of `cloud.bt` files; several models and versions at once
    port                  0 picks a free one
    backend               "native", where it was built; "seal"; "auto": native, else seal (settled at once);
                          "clear" computes on readable numbers: tests only
    metrics_port          Prometheus over HTTP on the same host; None or 0 = off
    advertise             host:port that edges are told to dial from now on; "" = as they dialled
    others                host:port of other cells, told to edges: they move there when this one goes
    peers                 host:port of other cells of this operator, for evaluation keys; this cell's own
                          address (as bound, or as advertised) among them does no harm
    replicas              copies of a client's keys that this cell gives to peers; 0 = none
    orchestrator          host:port where this cell reports its load; absent = nowhere
    drain_grace_s         how long a cell that ends goes on answering until its edges have moved
    threads               native threads of one evaluator
    loaded_keys_bytes     memory for keys that one evaluator keeps loaded
    calibrate_s           seconds for measuring, at the start, what evaluations will take (`native`); kept in
                          state_dir. 0 = go by a reference processor until evaluations were measured
    tls                   needed to listen on anything but loopback; files are read again when they change
    roles                 identity -> role, for certificates of another authority: {"cn:alice" = "operator"}
    """

    models: tuple[Path, ...] = ()
    host: str = "127.0.0.1"
    port: int = 0
    evaluators: int = 2
    backend: Backend = "auto"
    state_dir: Path = field(default_factory=default_state_dir)
    metrics_port: int | None = None
    advertise: str = ""
    threads: int = 1
    loaded_keys_bytes: int = 1_000_000_000
    calibrate_s: float = 1.0
    others: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    replicas: int = 1
    orchestrator: str | None = None
    drain_grace_s: float = 10.0
    shutdown_grace_s: float = 2.0
    tls: TlsFiles | None = None
    roles: dict[str, str] = field(default_factory=dict)
    keys: KeyLimits = KeyLimits()
    queue: QueueLimits = QueueLimits()
    sessions: SessionLimits = SessionLimits()
    tickets: TicketLimits = TicketLimits()

    def __post_init__(self) -> None:
        check_roles(self.roles)
        if not 0 <= self.port < 65536:
            raise ConfigError(f"port must be 0 (any free one) to 65535, not {self.port}")
        if self.metrics_port is not None and not 0 <= self.metrics_port < 65536:
            raise ConfigError(f"metrics_port must be 0 to 65535, not {self.metrics_port}")
        if not 1 <= self.evaluators <= 1024:
            raise ConfigError(f"evaluators must be 1 to 1024, not {self.evaluators}")
        if not 1 <= self.threads <= 256:
            raise ConfigError(f"threads must be 1 to 256, not {self.threads}")
        object.__setattr__(self, "backend", settle(self.backend))
        if self.tls is None and not is_loopback(self.host):
            raise ConfigError(
                f"without TLS a cell listens on loopback only, and {self.host} is not: set tls.certificate, "
                "tls.key and tls.client_ca, or host = 127.0.0.1"
            )
        self._check_cells()
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
            "tickets.budget_bytes": self.tickets.budget_bytes,
            "tickets.stale_s": self.tickets.stale_s,
            "tickets.announced": self.tickets.announced,
            "loaded_keys_bytes": self.loaded_keys_bytes,
        }
        for name, value in positive.items():
            if not value > 0:
                raise ConfigError(f"{name} must be above zero, not {value}")
        if not 0 <= self.calibrate_s <= 60:
            raise ConfigError(f"calibrate_s must be 0 (off) to 60, not {self.calibrate_s}")
        if not 0 <= self.tickets.per_identity <= 1024:
            raise ConfigError(
                f"tickets.per_identity must be 0 (off) to 1024, not {self.tickets.per_identity}"
            )

    def _check_cells(self) -> None:
        """Raises `ConfigError` for what concerns other cells."""
        for address in (*self.others, *self.peers, *filter(None, (self.advertise,))):
            host, _ = split_address(address)
            if address in self.peers and self.tls is None and not is_loopback(host):
                raise ConfigError(f"without TLS peers are on loopback only, and {address} is not: set tls")
        if self.orchestrator is not None:
            host, _ = split_address(self.orchestrator)
            if self.tls is None and not is_loopback(host):
                raise ConfigError(
                    f"without TLS the orchestrator is on loopback, and {self.orchestrator} is not: set tls"
                )
        if len(self.others) > MOST_OTHERS:
            raise ConfigError(f"others may name at most {MOST_OTHERS} cells, not {len(self.others)}")
        if not 0 <= self.replicas <= 8:
            raise ConfigError(f"replicas must be 0 to 8, not {self.replicas}")
        if not 0 <= self.drain_grace_s <= 3600:
            raise ConfigError(f"drain_grace_s must be 0 to 3600, not {self.drain_grace_s}")


__all__ = [
    "Backend",
    "CloudConfig",
    "KeyLimits",
    "QueueLimits",
    "SessionLimits",
    "TicketLimits",
    "TlsFiles",
    "default_state_dir",
]
