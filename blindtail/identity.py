"""Who a peer is, and what it may do: read from its certificate, never from its words.

A certificate of `blindtail certs` names role and name in a SPIFFE id
(github.com/spiffe/spiffe, SPIFFE-ID.md): `spiffe://blindtail/edge/camera-7` is the
identity "edge:camera-7". A certificate of another authority has no such id; its
common name then makes the identity "cn:NAME" with the role of an edge, unless
the settings of the server give it another. Without TLS, which is accepted on
loopback alone, everybody is "loopback" and may do everything.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase

from blindtail.errors import AccessDenied, ConfigError

TRUST_DOMAIN = "blindtail"
#: X.509's own bound (RFC 5280, appendix A.1).
_COMMON_NAME_CHARS = 64
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")


class Role(Enum):
    """What a certificate is for."""

    EDGE = "edge"  # uploads keys, asks for evaluations, attaches to an orchestrator
    CELL = "cell"  # serves tails, fetches keys from other cells, attaches to an orchestrator
    ORCHESTRATOR = "orchestrator"
    OPERATOR = "operator"  # a person: policies, models, drain


@dataclass(frozen=True, slots=True)
class Identity:
    """`str(identity)` is what limits, keys and sessions are scoped to."""

    role: Role | None  # None = on loopback without TLS: every role
    name: str

    def __str__(self) -> str:
        return self.name

    def may(self, *roles: Role) -> bool:
        return self.role is None or self.role in roles

    def require(self, *roles: Role) -> None:
        """Raises `AccessDenied` unless the identity has one of these roles."""
        if not self.may(*roles):
            wanted = " or ".join(role.value for role in roles)
            raise AccessDenied(
                f"this call is for the role {wanted}; the certificate shown is {self.name}: "
                "use one that was issued for it"
            )


LOOPBACK = Identity(None, "loopback")


def check_name(name: str) -> str:
    """A name fit for a certificate. Raises `ConfigError`."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} cannot be a name: use 1 to 64 letters, digits, '.', '_' and '-', starting and ending "
            "with a letter or digit"
        )
    return name


def spiffe_id(role: Role, name: str) -> str:
    return f"spiffe://{TRUST_DOMAIN}/{role.value}/{check_name(name)}"


def from_certificate(uris: Iterable[str], common_names: Iterable[str], roles: Mapping[str, str]) -> Identity:
    """The identity that a verified certificate stands for.

    roles  identity -> role, for certificates of another authority ("cn:alice" -> "operator")

    Raises `AccessDenied` when the certificate names nobody, or several.
    """
    ours = [uri for uri in uris if uri.startswith(f"spiffe://{TRUST_DOMAIN}/")]
    if len(ours) > 1:
        raise AccessDenied("the certificate has several SPIFFE ids: issue one with a single id")
    if ours:
        parts = ours[0].removeprefix(f"spiffe://{TRUST_DOMAIN}/").split("/")
        if len(parts) != 2 or parts[0] not in {r.value for r in Role} or not _NAME.fullmatch(parts[1]):
            raise AccessDenied("the certificate's SPIFFE id is not ROLE/NAME with a known role")
        return Identity(Role(parts[0]), f"{parts[0]}:{parts[1]}")
    names = [name for name in common_names if name]
    if len(names) != 1:
        raise AccessDenied("the client's certificate must have a SPIFFE id or exactly one common name")
    if not names[0].isprintable() or len(names[0]) > _COMMON_NAME_CHARS:
        raise AccessDenied("the common name of the client's certificate is not a short printable text")
    name = f"cn:{names[0]}"
    return Identity(Role(roles.get(name, Role.EDGE.value)), name)


def check_roles(roles: Mapping[str, str]) -> None:
    """Raises `ConfigError` for a setting that names an unknown role."""
    known = ", ".join(role.value for role in Role)
    for name, role in roles.items():
        if role not in {r.value for r in Role}:
            raise ConfigError(f"roles: {name!r} is given the role {role!r}; known roles: {known}")


def allowed(identity: Identity, patterns: Iterable[str]) -> bool:
    """True when a shell pattern matches, for example "edge:clinic-*"; no pattern at all allows everybody."""
    patterns = tuple(patterns)
    return not patterns or any(fnmatchcase(identity.name, pattern) for pattern in patterns)


__all__ = [
    "LOOPBACK",
    "TRUST_DOMAIN",
    "Identity",
    "Role",
    "allowed",
    "check_name",
    "check_roles",
    "from_certificate",
    "spiffe_id",
]
