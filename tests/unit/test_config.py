"""Settings: TOML and flags to a checked dataclass, and what every mistake says."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest

from blindtail.config import load_config
from blindtail.errors import ConfigError


class Mode(Enum):
    FAST = "fast"
    SAFE = "safe"


@dataclass(frozen=True)
class Queue:
    limit: int = 64
    weights: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise ConfigError("queue.limit must be at least 1")


@dataclass(frozen=True)
class Config:
    models: tuple[Path, ...]
    host: str = "127.0.0.1"
    port: int = 0
    rate: float = 1.0
    verbose: bool = False
    mode: Mode = Mode.FAST
    backend: Literal["seal", "clear"] = "seal"
    state_dir: Path | None = None
    queue: Queue = field(default_factory=Queue)
    pair: tuple[int, str] = (1, "a")


def _write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "site.toml"
    path.write_text(text)
    return path


def test_defaults_file_and_flags(tmp_path: Path) -> None:
    path = _write(
        tmp_path,
        'models = ["m/cloud.bt"]\nport = 7\nrate = 2\nmode = "safe"\nstate_dir = "state"\n'
        "[queue]\nlimit = 9\n[queue.weights]\na = 1\n",
    )
    config = load_config(Config, path, {"port": 8, "host": None, "queue.limit": 10})
    assert config.port == 8  # the flag wins
    assert config.host == "127.0.0.1"  # a flag not given changes nothing
    assert config.rate == 2.0
    assert isinstance(config.rate, float)
    assert config.mode is Mode.SAFE
    assert config.queue == Queue(10, {"a": 1.0})
    # A file's paths are relative to the file, a flag's to the working directory.
    assert config.models == (tmp_path / "m/cloud.bt",)
    assert config.state_dir == tmp_path / "state"
    assert load_config(Config, path, {"state_dir": Path("here")}).state_dir == Path("here")


def test_flags_alone() -> None:
    config = load_config(Config, None, {"models": [Path("a.bt"), "b.bt"]})
    assert config.models == (Path("a.bt"), Path("b.bt"))


MISTAKES: list[tuple[str, str, str]] = [
    ("unknown, with a close one", "prot = 1", "unknown setting 'prot'; did you mean 'port'?"),
    ("unknown, nothing close", "zzzzzz = 1", "known settings:"),
    (
        "unknown inside a table",
        "[queue]\nlimt = 1",
        "unknown setting 'queue.limt'; did you mean 'queue.limit'?",
    ),
    ("text for a number", 'port = "8"', "'port' must be a whole number, not a text ('8')"),
    ("bool for a number", "port = true", "'port' must be a whole number, not true or false"),
    ("fraction for a whole number", "port = 1.5", "'port' must be a whole number, not a number"),
    ("number for a text", "host = 1", "'host' must be a text"),
    ("nan", "rate = nan", "'rate' must be a finite number"),
    ("wrong choice", 'backend = "gpu"', "'backend' must be one of 'seal', 'clear'"),
    ("wrong enum", 'mode = "x"', "'mode' must be one of 'fast', 'safe'"),
    ("text for a list", 'models = "a.bt"', "'models' must be a list of a path"),
    ("wrong item", "models = [1]", "'models[0]' must be a path"),
    ("value for a table", "queue = 3", "'queue' must be a table"),
    ("wrong value in a dict", '[queue.weights]\na = "x"', "'queue.weights.a' must be a finite number"),
    ("wrong length", "pair = [1]", "'pair' must be"),
    ("range, checked by the class", "[queue]\nlimit = 0", "queue.limit must be at least 1"),
    ("missing", "port = 1", "'models' is missing"),
    ("not TOML", "port = = 1", "is not valid TOML"),
]


@pytest.mark.parametrize(("toml", "says"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_mistakes_name_field_and_file(tmp_path: Path, toml: str, says: str) -> None:
    path = _write(tmp_path, toml)
    overrides: dict[str, Any] = {} if "models" in toml or says.endswith("missing") else {"models": ["a.bt"]}
    with pytest.raises(ConfigError) as caught:
        load_config(Config, path, overrides)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no settings file"):
        load_config(Config, tmp_path / "none.toml", {})
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(Config, tmp_path, {})
    binary = tmp_path / "b.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_config(Config, binary, {})
    binary.write_bytes(b"#" * 1_000_001)
    with pytest.raises(ConfigError, match="not a settings file"):
        load_config(Config, binary, {})
