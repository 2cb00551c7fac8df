"""How commands are told to connect: one set of flags for everything an operator or a probe dials."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from blindtail.errors import ConfigError
from blindtail.rpc import INSECURE_LOOPBACK, Credentials
from blindtail.tls import ClientTlsFiles

Plaintext = Annotated[
    bool, typer.Option("--plaintext", help="No TLS. Accepted for a server on this very host only.")
]
Ca = Annotated[
    Path | None, typer.Option("--ca", help="PEM of the authority that signed the server's certificate.")
]
Certificate = Annotated[Path | None, typer.Option("--certificate", help="PEM of your certificate.")]
Key = Annotated[Path | None, typer.Option("--key", help="PEM of its private key.")]
ServerName = Annotated[
    str | None, typer.Option("--server-name", help="The name in the server's certificate, if it is not HOST.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def credentials_of(
    plaintext: bool, ca: Path | None, certificate: Path | None, key: Path | None, server_name: str | None
) -> Credentials:
    """What the flags say. Raises `ConfigError` for too few, too many, or files that cannot be used."""
    given = [path for path in (ca, certificate, key) if path is not None]
    if plaintext and (given or server_name):
        raise ConfigError("--plaintext and TLS files exclude each other: remove one")
    if plaintext:
        return INSECURE_LOOPBACK
    if not given:
        raise ConfigError("say how to connect: --ca, --certificate and --key, or --plaintext on loopback")
    if ca is None or certificate is None or key is None:
        raise ConfigError("mutual TLS needs all three of --ca, --certificate and --key")
    return ClientTlsFiles(ca, certificate, key, server_name).load()


__all__ = ["AsJson", "Ca", "Certificate", "Key", "Plaintext", "ServerName", "credentials_of"]
