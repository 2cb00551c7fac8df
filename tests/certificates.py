"""Short-lived certificates for tests of mutual TLS."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


def certificates(folder: Path, *names: str) -> dict[str, Path]:
    """A test authority and one certificate per name, valid on this host for a day.

    Writes ca.pem and, for each name, NAME.pem and NAME.key; returns them by file name.
    """
    folder.mkdir()
    authority_key = ec.generate_private_key(ec.SECP256R1())
    authority = _builder("test authority", "test authority", authority_key).add_extension(
        x509.BasicConstraints(ca=True, path_length=0), critical=True
    )
    (folder / "ca.pem").write_bytes(_pem(authority.sign(authority_key, hashes.SHA256())))
    hosts = [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost")]
    for name in names:
        key = ec.generate_private_key(ec.SECP256R1())
        made = _builder(name, "test authority", key).add_extension(
            x509.SubjectAlternativeName(hosts), critical=False
        )
        (folder / f"{name}.pem").write_bytes(_pem(made.sign(authority_key, hashes.SHA256())))
        (folder / f"{name}.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        (folder / f"{name}.key").chmod(0o600)
    return {path.name: path for path in folder.iterdir()}


def _builder(subject: str, issuer: str, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
