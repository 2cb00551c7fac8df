"""What a measurement was made on: machine and versions, for reports and results."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

#: Packages whose version can change a number we print.
_PACKAGES = ("blindtail", "numpy", "onnxruntime", "tenseal", "grpcio", "protobuf", "ray", "torch")


def machine() -> dict[str, Any]:
    """Processor, cores this process may use, memory in bytes, system."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "avx512": "avx512f" in _cpu_field("flags").split(),
    }


def versions() -> dict[str, str]:
    """Python's and every relevant installed package's version."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def release() -> str:
    """blindtail's own version."""
    try:
        return metadata.version("blindtail")
    except metadata.PackageNotFoundError:  # run from a copy of the sources
        return "unknown"


def _processor() -> str:
    return _cpu_field("model name") or platform.processor() or "unknown"


def _cpu_field(name: str) -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == name:
                return value.strip()
    except OSError:
        pass
    return ""


__all__ = ["machine", "release", "versions"]
