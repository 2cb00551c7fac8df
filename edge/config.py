"""Settings of an edge site: TOML and flags, checked once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blindtail.errors import ConfigError
from blindtail.rpc import INSECURE_LOOPBACK, ClientTls, Credentials, split_address
from edge.cipher import check_backend
from orchestrator.policy import make_policy


@dataclass(frozen=True)
class TlsFiles:
    """PEM files of mutual TLS. `server_name`: the name in the cloud's certificate, if it is not the host."""

    ca: Path
    certificate: Path
    key: Path
    server_name: str | None = None

    def read(self) -> ClientTls:
        """Raises `ConfigError` naming the file that cannot be read."""
        ca, certificate, key = (_pem(path) for path in (self.ca, self.certificate, self.key))
        return ClientTls(ca, certificate, key, self.server_name)


@dataclass(frozen=True)
class EdgeConfig:
    """An edge site. Every field is a TOML setting of the same name.

    model              edge.bt
    cloud              host:port of the cloud; absent = the site works alone
    plaintext          no TLS; accepted for a cloud on this very host only
    tls                PEM files of mutual TLS; absent = TLS with the system's roots
    policy             deadline, threshold, edge-only or cloud-only
    policy_parameters  the policy's own settings
    deadline_s         deadline of every image, seconds; absent = none
    state_dir          where this site's keys live; default ~/.local/state/blindtail
    uplink_bps         the uplink, bits per second; keys are sent at less than half of it
    backend            seal, or clear (no encryption: for tests only)
    threads            threads per stage of the head
    actors             runtimes that answer side by side
    in_flight          images that one actor works on at once
    ready_timeout_s    how long to wait for keys before the first image; 0 = not at all
    """

    model: Path
    cloud: str | None = None
    plaintext: bool = False
    tls: TlsFiles | None = None
    policy: str = "deadline"
    policy_parameters: dict[str, Any] = field(default_factory=dict)
    deadline_s: float | None = None
    state_dir: Path | None = None
    uplink_bps: float | None = None
    backend: str = "seal"
    threads: int = 1
    actors: int = 1
    in_flight: int = 2
    ready_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        if self.cloud is not None:
            split_address(self.cloud)
        if self.plaintext and self.tls is not None:
            raise ConfigError("plaintext and tls exclude each other: remove one")
        check_backend(self.backend)
        for name, low, high in (("threads", 1, 64), ("actors", 1, 64), ("in_flight", 1, 64)):
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"{name} must be from {low} to {high}, not {getattr(self, name)}")
        for name in ("deadline_s", "uplink_bps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} must be above 0, not {value}")
        if self.ready_timeout_s < 0:
            raise ConfigError("ready_timeout_s must be 0 or more")
        try:
            # The model's own thresholds are not known yet; any will do for this check.
            given = self.policy_parameters.get("thresholds", 0.5)
            make_policy(self.policy, self.policy_parameters, thresholds=[0.5] * _count(given))
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def credentials(self) -> Credentials:
        """Raises `ConfigError` when a TLS file cannot be read."""
        if self.plaintext:
            return INSECURE_LOOPBACK
        return None if self.tls is None else self.tls.read()

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
            "threads": self.threads,
        }


def _pem(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the TLS file {path}: {error.strerror}") from error


def _count(thresholds: object) -> int:
    return len(thresholds) if isinstance(thresholds, list | tuple) and thresholds else 1
