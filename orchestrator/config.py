"""What an operator sets for the orchestrator, checked once, at the door."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from blindtail.errors import ConfigError
from blindtail.identity import check_roles
from blindtail.rpc import is_loopback
from blindtail.serving import TlsFiles


def default_state_dir() -> Path:
    """$XDG_STATE_HOME/blindtail/orchestrator, or ~/.local/state/blindtail/orchestrator."""
    root = os.environ.get("XDG_STATE_HOME")
    return (Path(root) if root else Path.home() / ".local" / "state") / "blindtail" / "orchestrator"


@dataclass(frozen=True, slots=True)
class AttachLimits:
    """Bounds on streams. Beyond them a peer is answered `Overloaded` and dials again later."""

    total: int = 2_000
    per_identity: int = 64  # one certificate; on loopback without TLS everybody together
    messages_per_s: float = 50.0  # of one stream; twice as many may come at once


@dataclass(frozen=True, slots=True)
class OrchestratorConfig:
    """One orchestrator: where it listens, what it remembers, when it takes a policy back.

    port               0 picks a free one
    roles              identity -> role, for certificates of another authority ("cn:alice" -> "operator")
    report_interval_s  how often edges and cells are asked to report
    rollback_share     a policy that at least this share of the edges that answered refuse is rolled back
    settle_s           how long edges may take to answer before a share of few answers counts
    retention_s        how long sums of reports are kept
    metrics_port       Prometheus over HTTP on the same host; None or 0 = off
    tls                needed to listen on anything but loopback
    """

    host: str = "127.0.0.1"
    port: int = 0
    state_dir: Path = field(default_factory=default_state_dir)
    tls: TlsFiles | None = None
    roles: dict[str, str] = field(default_factory=dict)
    report_interval_s: float = 2.0
    rollback_share: float = 0.2
    settle_s: float = 3.0
    retention_s: float = 7 * 86_400.0
    metrics_port: int | None = None
    shutdown_grace_s: float = 1.0
    attach: AttachLimits = AttachLimits()

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ConfigError(f"port must be 0 (any free one) to 65535, not {self.port}")
        if self.metrics_port is not None and not 0 <= self.metrics_port < 65536:
            raise ConfigError(f"metrics_port must be 0 to 65535, not {self.metrics_port}")
        if self.tls is None and not is_loopback(self.host):
            raise ConfigError(
                f"without TLS the orchestrator listens on loopback only, and {self.host} is not: set "
                "tls.certificate, tls.key and tls.client_ca, or host = 127.0.0.1"
            )
        if not 0 < self.rollback_share <= 1:
            raise ConfigError(f"rollback_share must be above 0 and at most 1, not {self.rollback_share}")
        if not 0.1 <= self.report_interval_s <= 3600:
            raise ConfigError(f"report_interval_s must be 0.1 to 3600, not {self.report_interval_s}")
        if not 0 <= self.shutdown_grace_s <= 60:
            raise ConfigError(f"shutdown_grace_s must be 0 to 60, not {self.shutdown_grace_s}")
        check_roles(self.roles)
        positive = {
            "settle_s": self.settle_s,
            "retention_s": self.retention_s,
            "attach.total": self.attach.total,
            "attach.per_identity": self.attach.per_identity,
            "attach.messages_per_s": self.attach.messages_per_s,
        }
        for name, value in positive.items():
            if not value > 0:
                raise ConfigError(f"{name} must be above zero, not {value}")


__all__ = ["AttachLimits", "OrchestratorConfig", "default_state_dir"]
