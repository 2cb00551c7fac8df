"""How this machine reaches its package mirrors, handed on to the root directories.

A container file names no mirror and no index: where an image is built, those of
that place are used. So here: apt's sources and proxies and pip's settings are
read at run time from this machine.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

#: Where a root directory finds what is handed on.
SHARED = "/run/blindtail-check"
RELEASE = "bookworm"
_PIP = (
    "index-url",
    "extra-index-url",
    "find-links",
    "trusted-host",
    "proxy",
    "timeout",
    "retries",
    "no-index",
)
_PROXIES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")


@dataclass
class Handed:
    """Files for the shared folder, mounts below it, and the environment of install steps."""

    files: dict[str, str] = field(default_factory=dict)
    mounts: list[tuple[str, str, bool]] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)


def sources() -> list[str]:
    """apt's sources of the release, one "deb" line each, the main archive first."""
    format_ = "$(REPO_URI) $(RELEASE) $(COMPONENT) $(CREATED_BY)"
    lines = _output(["apt-get", "indextargets", "--format", format_]).splitlines()
    found: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        uri, release, component, created_by = (*line.split(), "", "", "", "")[:4]
        if created_by == "Packages" and release.startswith(RELEASE) and component == "main":
            found.setdefault((release, uri), []).append(component)
    return [f"deb {uri} {release} main" for release, uri in sorted(found)]


def mirror() -> str:
    """The address of the release's main archive, "" when apt here knows none."""
    for line in sources():
        _, uri, release, _ = line.split()
        if release == RELEASE:
            return uri
    return ""


def handed() -> Handed:
    """What install steps need to reach apt's and pip's sources."""
    given = Handed()
    proxies = re.findall(
        r'^(Acquire::\w+::Proxy\S* "[^"]*";)$', _output(["apt-config", "dump"]), re.MULTILINE
    )
    given.files["apt.conf"] = "\n".join([*proxies, 'APT::Sandbox::User "root";', ""])
    given.environment["APT_CONFIG"] = f"{SHARED}/apt.conf"
    lines = ["[global]"]
    for key, values in _pip_settings().items():
        if key in _PIP:
            lines.append(f"{key} = " + "\n    ".join(_local(value, given) for value in values))
    certificates = os.environ.get("SSL_CERT_FILE") or os.environ.get("PIP_CERT") or ""
    if certificates and Path(certificates).is_file():
        given.mounts.append((str(Path(certificates).resolve()), f"{SHARED}/ca.pem", False))
        given.environment["SSL_CERT_FILE"] = f"{SHARED}/ca.pem"
        lines.append(f"cert = {SHARED}/ca.pem")
    given.files["pip.conf"] = "\n".join([*lines, ""])
    given.environment["PIP_CONFIG_FILE"] = f"{SHARED}/pip.conf"
    given.environment.update({name: os.environ[name] for name in _PROXIES if name in os.environ})
    return given


def _pip_settings() -> dict[str, list[str]]:
    """pip's settings here; those of the environment win over those of files, as in pip itself."""
    found: dict[str, list[str]] = {}
    from_environment: dict[str, list[str]] = {}
    for line in _output([sys.executable, "-m", "pip", "config", "list"]).splitlines():
        name, _, value = line.partition("=")
        where = from_environment if name.startswith(":env:") else found
        where[name.rpartition(".")[2].rpartition(":")[2]] = value.strip("'\"").replace("\\n", " ").split()
    return {**found, **from_environment}


def _local(value: str, given: Handed) -> str:
    """An index or folder on this disk, as it is seen from inside; anything else as it is."""
    path = Path(value.removeprefix("file://"))
    if not (value.startswith(("file://", "/")) and path.is_dir()):
        return value
    # Its pages point to files beside it.
    outer = path.parent if path.parent != Path("/") else path
    inner = f"{SHARED}/local-{len(given.mounts)}"
    given.mounts.append((str(outer), inner, False))
    return ("file://" if value.startswith("file://") else "") + (
        inner if outer == path else f"{inner}/{path.name}"
    )


def debootstrap(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Its command and environment: the installed one, or Debian's package unpacked below `folder`.

    Raises `RuntimeError` when it cannot be had.
    """
    if found := shutil.which("debootstrap", path=os.environ.get("PATH", "") + ":/usr/sbin"):
        return [found], {}
    unpacked = folder / "debootstrap"
    if not unpacked.exists():
        packages = folder / "packages"
        packages.mkdir(parents=True, exist_ok=True)
        command = ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", "debootstrap"]
        done = subprocess.run(command, cwd=packages, capture_output=True, text=True, timeout=120)
        files = sorted(packages.glob("debootstrap_*.deb"))
        if not files:
            last = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
            raise RuntimeError(f"apt-get did not deliver the package debootstrap: {last}")
        subprocess.run(["dpkg-deb", "-x", str(files[-1]), str(unpacked)], check=True, timeout=60)
    scripts = unpacked / "usr" / "share" / "debootstrap"
    return [str(unpacked / "usr" / "sbin" / "debootstrap")], {"DEBOOTSTRAP_DIR": str(scripts)}


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        return ""
    return done.stdout if done.returncode == 0 else ""


__all__ = ["RELEASE", "SHARED", "Handed", "debootstrap", "handed", "mirror", "sources"]
