"""Announce files: what a service tells others on its machine about itself once it is ready."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blindtail.errors import ConfigError


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Whole or not at all, for readers that poll. Raises `ConfigError`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigError(f"cannot write the announce file {path}: {error.strerror}") from error


__all__ = ["write_json"]
