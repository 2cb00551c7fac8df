"""Settings of an edge site: TOML and flags, checked once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blindtail.errors import ConfigError
from blindtail.rpc import INSECURE_LOOPBACK, ClientTlsFiles, Credentials, split_address
from edge.cells import split_addresses
from edge.cipher import check_backend
from edge.tickets import MOST_TICKETS
from orchestrator.policy import make_policy


@dataclass(frozen=True)
class EdgeConfig:
    """An edge site. Every field is a TOML setting of the same name.

    model              edge.bt
    cloud              host:port of the cloud, several with commas between them or as a list: the first is
                       preferred, the others are for when it is away; absent = the site works alone
    orchestrator       host:port of who hands down policies and objectives; absent = none
    plaintext          no TLS; accepted for a cloud and an orchestrator on this very host only
    tls                PEM files of mutual TLS (ca, certificate, key, server_name), read again when they
                       change; absent = TLS with the system's roots
    policy             deadline, threshold, edge-only or cloud-only
    policy_parameters  the policy's own settings
    deadline_s         deadline of every image, seconds; absent = none
    state_dir          where this site's keys live; default ~/.local/state/blindtail
    uplink_bps         the uplink, bits per second; keys are sent at less than half of it
    backend            seal, or clear (no encryption: for tests only)
    tickets            encryptions that each actor prepares in quiet moments and announces to the cloud,
                       which can then do most of an evaluation ahead; 0 = none, most 64
    threads            threads per stage of the head
    actors             runtimes that answer side by side
    in_flight          images that one actor works on at once
    images_per_s       how fast images come, all actors together; absent = as fast as they are answered
    gate               file that says how many of the images may come by now, for demonstrations; absent, or
                       once the file is gone = all
    ready_timeout_s    how long to wait for keys before the first image; 0 = not at all
    metrics_port       Prometheus over HTTP: the first actor's port, the next one's is one higher, and so
                       on; absent or 0 = off
    metrics_host       where those ports listen; what they show is in docs/metrics.md
    """

    model: Path
    cloud: str | tuple[str, ...] | None = None
    orchestrator: str | None = None
    plaintext: bool = False
    tls: ClientTlsFiles | None = None
    policy: str = "deadline"
    policy_parameters: dict[str, Any] = field(default_factory=dict)
    deadline_s: float | None = None
    state_dir: Path | None = None
    uplink_bps: float | None = None
    backend: str = "seal"
    tickets: int = 4
    threads: int = 1
    actors: int = 1
    in_flight: int = 2
    images_per_s: float | None = None
    gate: Path | None = None
    ready_timeout_s: float = 60.0
    metrics_port: int | None = None
    metrics_host: str = "127.0.0.1"

    def __post_init__(self) -> None:
        if self.cloud is not None:
            split_addresses(self.cloud)
        if self.orchestrator is not None:
            split_address(self.orchestrator)
        if self.plaintext and self.tls is not None:
            raise ConfigError("plaintext and tls exclude each other: remove one")
        check_backend(self.backend)
        bounds = (("threads", 1, 64), ("actors", 1, 64), ("in_flight", 1, 64), ("tickets", 0, MOST_TICKETS))
        for name, low, high in bounds:
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"{name} must be from {low} to {high}, not {getattr(self, name)}")
        for name in ("deadline_s", "uplink_bps", "images_per_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} must be above 0, not {value}")
        if self.ready_timeout_s < 0:
            raise ConfigError("ready_timeout_s must be 0 or more")
        if self.metrics_port and not 0 < self.metrics_port <= 65536 - self.actors:
            raise ConfigError(
                f"metrics_port and the ports of all {self.actors} actors from it on must be 1 to 65535, "
                f"not {self.metrics_port}"
            )
        try:
            # The model's own thresholds are not known yet; any will do for this check.
            given = self.policy_parameters.get("thresholds", 0.5)
            make_policy(self.policy, self.policy_parameters, thresholds=[0.5] * _count(given))
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def credentials(self) -> Credentials:
        """Raises `ConfigError` when a TLS file cannot be read, or a key is open to everybody."""
        if self.plaintext:
            return INSECURE_LOOPBACK
        if self.tls is not None:
            self.tls.load()
        return self.tls

    def metrics_port_of(self, actor: int) -> int:
        """The port of one actor's metrics; 0 = none."""
        return self.metrics_port + actor if self.metrics_port else 0

    def runtime_settings(self) -> Mapping[str, Any]:
        """Keyword arguments of `EdgeRuntime.open`, address and credentials included."""
        return {
            "address": self.cloud,
            "credentials": self.credentials(),
            "policy": self.policy,
            "policy_parameters": self.policy_parameters,
            "deadline_s": self.deadline_s,
            "state_dir": self.state_dir,
            "uplink_bps": self.uplink_bps,
            "backend": self.backend,
            "orchestrator": self.orchestrator,
            "threads": self.threads,
            "tickets": self.tickets,
        }


def _count(thresholds: object) -> int:
    return len(thresholds) if isinstance(thresholds, list | tuple) and thresholds else 1
