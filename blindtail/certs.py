"""A development authority: certificates for edges, cells, orchestrators and operators.

Meant for one team and its machines: the authority's key is a file of whoever made
it, and nothing is revoked. A company's own authority serves as well, see
`blindtail.identity` for what its certificates mean here.

Keys are ECDSA on P-256. A leaf says who it is in a SPIFFE id (a URI among its
alternative names), is allowed to sign nothing, and is for one side of a handshake
where its role is on one side only. Files get their modes whatever the umask.

Needs the extra `certs` (the package cryptography).
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from blindtail.errors import AccessDenied, ConfigError
from blindtail.identity import Role, check_name, from_certificate, spiffe_id
from blindtail.tls import check_private

CA_CERTIFICATE, CA_KEY = "ca.pem", "ca.key"
#: Roles that are dialled; their certificates name hosts. They dial too: other cells, an orchestrator.
SERVER_ROLES = (Role.CELL, Role.ORCHESTRATOR)
DEFAULT_HOSTS = ("localhost", "127.0.0.1")
#: Clocks of devices may be behind by as much.
_CLOCK_SKEW = datetime.timedelta(hours=1)
_MOST_DAYS = 36_500
_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")


@dataclass(frozen=True)
class Issued:
    """The files that a device needs, all in one folder."""

    certificate: Path
    key: Path
    ca: Path


@dataclass(frozen=True)
class Shown:
    """What a certificate says. `identity` and `role` are None for an authority or a stranger's."""

    subject: str
    issuer: str
    identity: str | None
    role: str | None
    authority: bool
    hosts: tuple[str, ...]
    serial: str
    valid_from: datetime.datetime
    valid_until: datetime.datetime


def create_authority(folder: Path, *, days: float = 3650, now: datetime.datetime | None = None) -> Path:
    """Makes ca.pem and ca.key in a new folder (0700). Returns the path of ca.pem.

    Raises `ConfigError` when the folder holds anything already, or cannot be written.
    """
    now = _now(now)
    _make_folder(folder)
    try:
        if any(folder.iterdir()):
            raise ConfigError(
                f"{folder} is not empty: an authority gets a folder of its own, choose a new one"
            )
        folder.chmod(0o700)
    except OSError as error:
        raise ConfigError(f"cannot use the folder {folder}: {error.strerror}") from error
    key = ec.generate_private_key(ec.SECP256R1())
    name = _subject(f"blindtail authority {secrets.token_hex(4)}")
    public = key.public_key()
    certificate = (
        _builder(name, name, public, now, _until(now, days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write(folder / CA_KEY, _key_pem(key), 0o600)
    _write(folder / CA_CERTIFICATE, _pem(certificate), 0o644)
    return folder / CA_CERTIFICATE


def issue(
    authority: Path,
    name: str,
    role: Role,
    *,
    hosts: Sequence[str] = (),
    days: float = 30,
    out: Path | None = None,
    renew: bool = False,
    now: datetime.datetime | None = None,
) -> Issued:
    """A new key and certificate: NAME.key, NAME.pem and a copy of ca.pem in one folder.

    authority  folder of `create_authority`
    hosts      names and addresses that a server is dialled by; by default those of
               the certificate that is renewed, else localhost and 127.0.0.1
    out        folder for the three files; default: NAME in the authority's folder
    renew      replace the files that are there, for the same name and role

    Key and certificate are replaced by renaming, the key first: a running server
    takes the new pair at its next handshake. Raises `ConfigError`.
    """
    check_name(name)
    if name in ("ca", CA_CERTIFICATE, CA_KEY):
        raise ConfigError(f"the name {name} is the authority's: choose another")
    now = _now(now)
    ca, ca_key = _open_authority(authority, now)
    folder = authority / name if out is None else out
    files = Issued(folder / f"{name}.pem", folder / f"{name}.key", folder / CA_CERTIFICATE)
    old = _existing(files, name, role, renew)
    hosts = _hosts(role, hosts, old)
    until = _until(now, days)
    if until > ca.not_valid_after_utc:
        left = (ca.not_valid_after_utc - now).days
        raise ConfigError(f"the authority itself is valid for {left} more days: give at most --days {left}")
    key = ec.generate_private_key(ec.SECP256R1())
    public = key.public_key()
    alternative: list[x509.GeneralName] = [x509.UniformResourceIdentifier(spiffe_id(role, name))]
    alternative += [_general_name(host) for host in hosts]
    purposes = [ExtendedKeyUsageOID.CLIENT_AUTH]
    if role in SERVER_ROLES:
        purposes.append(ExtendedKeyUsageOID.SERVER_AUTH)
    certificate = (
        _builder(_subject(name), ca.subject, public, max(now, ca.not_valid_before_utc + _CLOCK_SKEW), until)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        .add_extension(x509.SubjectAlternativeName(alternative), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(_authority_identifier(ca), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    _make_folder(folder)
    if folder.resolve() != authority.resolve():
        _write(files.ca, _pem(ca), 0o644)
    _write(files.key, _key_pem(key), 0o600)
    _write(files.certificate, _pem(certificate), 0o644)
    return files


def show(path: Path) -> Shown:
    """What the first certificate of a PEM file says. Raises `ConfigError`."""
    certificate = _read_certificate(path)
    uris, hosts = _alternative_names(certificate)
    common = [str(a.value) for a in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    authority = _is_authority(certificate)
    identity = role = None
    if not authority:
        try:
            found = from_certificate(uris, common, {})
        except AccessDenied:
            pass  # a certificate that names nobody: no server here would accept it
        else:
            identity, role = found.name, found.role.value if found.role else None
    return Shown(
        subject=certificate.subject.rfc4514_string(),
        issuer=certificate.issuer.rfc4514_string(),
        identity=identity,
        role=role,
        authority=authority,
        hosts=hosts,
        serial=f"{certificate.serial_number:x}",
        valid_from=certificate.not_valid_before_utc,
        valid_until=certificate.not_valid_after_utc,
    )


# -- what is there ----------------------------------------------------------------


def _open_authority(
    folder: Path, now: datetime.datetime
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    path = folder / CA_KEY
    if not path.exists() or not (folder / CA_CERTIFICATE).exists():
        raise ConfigError(f"there is no authority in {folder}: make one with `blindtail certs init {folder}`")
    certificate = _read_certificate(folder / CA_CERTIFICATE)
    check_private(path)
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is no private key in PEM") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise ConfigError(f"{path} is not the key of {folder / CA_CERTIFICATE}: the authority is damaged")
    if not _is_authority(certificate):
        raise ConfigError(f"{folder / CA_CERTIFICATE} is not the certificate of an authority")
    if certificate.not_valid_after_utc <= now:
        raise ConfigError(
            f"the authority in {folder} expired on {certificate.not_valid_after_utc:%Y-%m-%d}: make another "
            "with `blindtail certs init` in a new folder, and issue every certificate again"
        )
    return certificate, key


def _existing(files: Issued, name: str, role: Role, renew: bool) -> Shown | None:
    """The certificate to renew, or None when nothing is there."""
    there = [path for path in (files.certificate, files.key) if path.exists()]
    if not there:
        return None
    if not renew:
        raise ConfigError(f"{there[0]} is there already: give --force to renew it")
    if not files.certificate.exists():
        return None
    old = show(files.certificate)
    if old.identity != f"{role.value}:{name}":
        raise ConfigError(
            f"{files.certificate} is for {old.identity or old.subject}, not for {role.value}:{name}: "
            "choose another --out"
        )
    return old


def _read_certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} holds no certificate in PEM") from error


def _alternative_names(certificate: x509.Certificate) -> tuple[list[str], tuple[str, ...]]:
    """URIs and hosts."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return [], ()
    hosts = [
        *found.get_values_for_type(x509.DNSName),
        *(str(address) for address in found.get_values_for_type(x509.IPAddress)),
    ]
    return list(found.get_values_for_type(x509.UniformResourceIdentifier)), tuple(hosts)


def _is_authority(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, ValueError):
        return False


# -- what is made -----------------------------------------------------------------


def _hosts(role: Role, given: Sequence[str], old: Shown | None) -> tuple[str, ...]:
    if role not in SERVER_ROLES:
        if given:
            raise ConfigError(f"the role {role.value} is never dialled: leave out --host")
        return ()
    return tuple(dict.fromkeys(given)) or (old.hosts if old is not None else ()) or DEFAULT_HOSTS


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    labels = host.removeprefix("*.").split(".")
    number = labels[-1].isdecimal()  # a mistyped address, no name
    if len(host) > 253 or number or not all(_LABEL.fullmatch(label) for label in labels):
        raise ConfigError(
            f"{host!r} is not a host: give a name (cell.example) or an address, without a port"
        ) from None
    return x509.DNSName(host)


def _now(now: datetime.datetime | None) -> datetime.datetime:
    return (now or datetime.datetime.now(datetime.UTC)).replace(microsecond=0)


def _until(now: datetime.datetime, days: float) -> datetime.datetime:
    if not 0 < days <= _MOST_DAYS:
        raise ConfigError(f"days must be above 0 and at most {_MOST_DAYS}, not {days:g}")
    return now + datetime.timedelta(days=days)


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    begin: datetime.datetime,
    end: datetime.datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin - _CLOCK_SKEW)
        .not_valid_after(end)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _authority_identifier(ca: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    identifier = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: Any) -> bytes:
    return bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )


def _make_folder(path: Path) -> None:
    """A new one is for its owner only; one that is there stays as it is. Raises `ConfigError`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_dir():
            path.mkdir()
            path.chmod(0o700)
    except OSError as error:
        raise ConfigError(f"cannot make the folder {path}: {error.strerror}") from error


def _write(path: Path, data: bytes, mode: int) -> None:
    """Whole or not at all, never readable by more than `mode` says. Raises `ConfigError`."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


__all__ = ["DEFAULT_HOSTS", "SERVER_ROLES", "Issued", "Shown", "create_authority", "issue", "show"]
