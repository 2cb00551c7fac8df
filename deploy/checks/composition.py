"""The compose file: held to the compose specification and to our rules."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import compose_spec
import yaml

from deploy.checks import dockerfile

FOLDER = Path(__file__).resolve().parents[1] / "compose"
FILE = FOLDER / "compose.yaml"
REPOSITORY = FOLDER.parents[1]
#: Run Ray, whose object store lies in /dev/shm.
_RAY = re.compile(r"blindtail-(cloud|edge-site)")
_MIN_SHM_BYTES = 256_000_000
_UNITS = {"b": 1, "k": 1 << 10, "kb": 1 << 10, "m": 1 << 20, "mb": 1 << 20, "g": 1 << 30, "gb": 1 << 30}


def load(path: Path = FILE) -> dict[str, Any]:
    """The file as Compose reads it where no variable is set."""
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", path.read_text(encoding="utf-8"))
    loaded: dict[str, Any] = yaml.safe_load(text.replace("$$", "$"))
    return loaded


def problems(composition: Mapping[str, Any]) -> list[str]:
    """Everything that is wrong, each with its service."""
    found = _specification(composition)
    services = composition.get("services") or {}
    for name, service in services.items():
        found += [f"{name}: {p}" for p in _service_problems(service)]
        found += [f"{name}: {p}" for p in _mount_problems(service, composition.get("volumes") or {})]
        found += [
            f"{name}: depends on {other!r}, which is not a service or has no healthcheck to wait for"
            for other, how in (service.get("depends_on") or {}).items()
            if other not in services
            or (how["condition"] == "service_healthy" and not services[other].get("healthcheck"))
        ]
    return found


def _specification(composition: Mapping[str, Any]) -> list[str]:
    try:
        parsed = compose_spec.PyCompose.from_yaml(yaml.safe_dump(dict(composition)))
        parsed.validate()
    except (TypeError, ValueError) as error:
        return [f"not after the compose specification: {error}"]
    return []


def _service_problems(service: Mapping[str, Any]) -> list[str]:
    found = []
    once = service.get("restart") == "no"
    if service.get("read_only") is not True:
        found.append("read_only must be true")
    if service.get("cap_drop") != ["ALL"] or service.get("cap_add") or service.get("privileged"):
        found.append("cap_drop ALL, and none added")
    if "no-new-privileges:true" not in (service.get("security_opt") or []):
        found.append("security_opt lacks no-new-privileges:true")
    if (service.get("ulimits") or {}).get("core") != 0:
        found.append("ulimits.core must be 0: a core dump would hold keys")
    user = str(service.get("user", "0")).partition(":")[0]
    if not user.isdecimal() or int(user) == 0:
        found.append("user must be a number above 0")
    found += [f"no {key}" for key in ("mem_limit", "tmpfs") if not service.get(key)]
    if not once:
        found += [f"no {key}" for key in ("healthcheck", "stop_grace_period") if not service.get(key)]
    tag = str(service.get("image", "")).rpartition("/")[2].partition(":")[2]
    if not re.match(r"v?\d", tag):
        found.append(f"image {service.get('image')!r} is not pinned to a version")
    shm = bytes_of(service.get("shm_size", "64m"))
    if _RAY.search(str(service.get("image"))) and shm < _MIN_SHM_BYTES:
        found.append("Ray needs a larger /dev/shm: set shm_size")
    for port in service.get("ports") or []:
        if not str(port).startswith("127.0.0.1:"):
            found.append(f"port {port} is open on every address of the host")
    if service.get("network_mode") == "host" or service.get("pid") == "host":
        found.append("shares the host's namespaces")
    found += [
        f"environment {key} looks like a secret in the clear"
        for key, value in (service.get("environment") or {}).items()
        if re.search(r"(?i)password|token|secret|api_key", key) and value
    ]
    if build := service.get("build"):
        path = REPOSITORY / build["dockerfile"]
        arguments = set() if not path.exists() else _arguments(path)
        if not path.exists() or set(build.get("args") or {}) - arguments:
            found.append(f"build: {build['dockerfile']} is not there, or takes other arguments")
    return found


def _arguments(path: Path) -> set[str]:
    return {name for stage in dockerfile.read(path) for i in stage.all("ARG") for name in i.pairs()}


def _mount_problems(service: Mapping[str, Any], volumes: Mapping[str, Any]) -> list[str]:
    found = []
    for mount in service.get("volumes") or []:
        if isinstance(mount, dict):
            source, read_only = mount["source"], mount.get("read_only") is True
        else:
            source, *rest = mount.split(":")
            read_only = rest[-1] == "ro"
        if source.startswith("."):
            if not (FOLDER / source).exists():
                found.append(f"mounts {source}, which is not there")
            if not read_only:
                found.append(f"may write into {source} of the repository")
        elif source not in volumes:
            found.append(f"there is no volume {source!r}")
    return found


def bytes_of(size: str | int) -> int:
    """ "512mb" -> 536,870,912. Raises `ValueError`."""
    match = re.fullmatch(r"(\d+)\s*([a-z]*)", str(size).lower())
    if not match:
        raise ValueError(f"{size!r} is not a size")
    return int(match[1]) * _UNITS[match[2] or "b"]


def seconds_of(duration: str) -> float:
    """ "1m30s" -> 90. Raises `ValueError`."""
    parts = re.findall(r"(\d+)(ms|s|m|h)", duration)
    if "".join(f"{n}{unit}" for n, unit in parts) != duration or not parts:
        raise ValueError(f"{duration!r} is not a duration")
    return sum(int(n) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600}[unit] for n, unit in parts)


__all__ = ["FILE", "FOLDER", "bytes_of", "load", "problems", "seconds_of"]
