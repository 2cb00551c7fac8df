"""`blindtail certs`: a development authority and its certificates."""

from __future__ import annotations

import datetime
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blindtail.errors import ConfigError
from blindtail.identity import Role

if TYPE_CHECKING:
    from blindtail.certs import Shown

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
_ROLES = ", ".join(role.value for role in Role)

_HELP = """Make certificates for mutual TLS between hosts.

One authority signs the certificate of every device, cell, orchestrator and
operator; a certificate says who it is and which role it has, and that is what
the others go by. For development and small teams: keep the authority's folder
on one machine, and use your own authority where you have one.

\b
  blindtail certs init ca
  blindtail certs issue ca cell-1 --role cell --host cell.example
  blindtail certs issue ca camera-7 --role edge
  blindtail certs show ca/camera-7/camera-7.pem
"""


def register(app: typer.Typer) -> None:
    """Add the command group `certs`."""
    group = typer.Typer(help=_HELP, no_args_is_help=True, rich_markup_mode=None)
    group.command("init", no_args_is_help=True)(init_command)
    group.command("issue", no_args_is_help=True)(issue_command)
    group.command("show", no_args_is_help=True)(show_command)
    app.add_typer(group, name="certs")


def init_command(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A new folder for the authority; only you can read it.")
    ],
    days: Annotated[float, typer.Option("--days", help="How long the authority is valid.")] = 3650,
    as_json: AsJson = False,
) -> None:
    """Make an authority: ca.pem, which everybody may have, and ca.key, which nobody else may.

    The key signs certificates, so whoever has it can be anybody: keep DIR on one
    machine. Nothing that is there is ever overwritten.

    \b
      blindtail certs init ca
    """
    certs = _certs()
    shown = certs.show(certs.create_authority(folder, days=days))
    if as_json:
        print(json.dumps({"ca": str(folder / "ca.pem"), "key": str(folder / "ca.key"), **_fields(shown)}))
        return
    print(f"an authority in {folder}, valid until {shown.valid_until:%Y-%m-%d}")
    print(f"next: blindtail certs issue {folder} NAME --role {_ROLES.replace(', ', '|')}")


def issue_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The authority's folder.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the device, server or person.")],
    role: Annotated[str, typer.Option("--role", help=f"What the certificate is for: {_ROLES}.")],
    hosts: Annotated[
        list[str] | None,
        typer.Option(
            "--host",
            metavar="NAME-OR-IP",
            help="How a cell or orchestrator is dialled; repeatable. Default: localhost and 127.0.0.1, "
            "or those of the certificate that is renewed.",
        ),
    ] = None,
    days: Annotated[float, typer.Option("--days", help="How long the certificate is valid.")] = 30,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FOLDER", help="Folder for the files; default DIR/NAME.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Renew: replace the files of the same name and role.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Issue a certificate: NAME.pem, NAME.key and ca.pem in one folder, all that a device needs.

    Running servers and devices take a renewed certificate (--force) by
    themselves: at the next handshake, without a restart.

    \b
      blindtail certs issue ca camera-7 --role edge --out camera-7
      blindtail certs issue ca cell-1 --role cell --host cell.example --host 10.0.0.7
      blindtail certs issue ca alice --role operator --days 7
      blindtail certs issue ca cell-1 --role cell --force
    """
    certs = _certs()
    try:
        what = Role(role)
    except ValueError:
        raise ConfigError(f"there is no role {role!r}; roles: {_ROLES}") from None
    files = certs.issue(folder, name, what, hosts=tuple(hosts or ()), days=days, out=out, renew=force)
    shown = certs.show(files.certificate)
    if as_json:
        print(json.dumps({**{k: str(v) for k, v in asdict(files).items()}, **_fields(shown)}))
        return
    at = f" on {', '.join(shown.hosts)}" if shown.hosts else ""
    print(f"{shown.identity}{at}, valid until {shown.valid_until:%Y-%m-%d}, in {files.certificate.parent}:")
    print(f"  {files.certificate.name}  certificate")
    print(f"  {files.key.name}  its private key")
    print("  ca.pem  the authority")


def show_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A certificate in PEM.")],
    as_json: AsJson = False,
) -> None:
    """Show what a certificate says: identity, role, hosts, and until when it is valid.

    Anybody's certificate will do, an authority's too. Private keys are never shown.

    \b
      blindtail certs show ca/cell-1/cell-1.pem
      blindtail certs show ca/ca.pem --json
    """
    shown = _certs().show(file)
    fields = _fields(shown)
    if as_json:
        print(json.dumps({"file": str(file), **fields}))
        return
    if shown.authority:
        print("an authority: signs certificates, is nobody itself")
    else:
        print(f"identity     {shown.identity or 'none: no server would accept it'}")
        print(f"role         {shown.role or '-'}")
        print(f"hosts        {', '.join(shown.hosts) or '-'}")
    print(f"subject      {shown.subject}")
    print(f"issuer       {shown.issuer}")
    print(f"serial       {shown.serial}")
    print(f"valid from   {shown.valid_from:%Y-%m-%d %H:%M} UTC")
    state = "EXPIRED" if fields["expired"] else f"{fields['days_left']:.1f} days left"
    print(f"valid until  {shown.valid_until:%Y-%m-%d %H:%M} UTC ({state})")


def _fields(shown: Shown) -> dict[str, Any]:
    """`Shown` as plain JSON data, with what is left of its time."""
    left = shown.valid_until - datetime.datetime.now(datetime.UTC)
    return {
        **asdict(shown),
        "valid_from": shown.valid_from.isoformat(),
        "valid_until": shown.valid_until.isoformat(),
        "days_left": round(left.total_seconds() / 86400, 3),
        "expired": left.total_seconds() <= 0,
    }


def _certs() -> Any:
    """Late, since cryptography is an extra and slow to load. Raises `ConfigError` without it."""
    try:
        from blindtail import certs
    except ImportError as error:
        raise ConfigError(
            "this command needs the package cryptography: pip install 'blindtail[certs]'"
        ) from error
    return certs


__all__ = ["register"]
