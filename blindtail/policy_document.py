"""What the orchestrator hands down: a policy by name, its parameters, and objectives.

    {"policy": "deadline", "parameters": {"safety": 1.2}, "objectives": {"deadline_s": 0.5}}

As TOML, for `blindtail policy set`:

    policy = "deadline"
    parameters = { safety = 1.2 }
    objectives = { deadline_s = 0.5 }

The shape is checked here. Whether a policy of that name exists and takes those
parameters is checked by `orchestrator.policy.make_policy`, which the orchestrator
and every edge call for themselves: an edge knows its model's exits, and may run
another release.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from blindtail.errors import ConfigError

#: Largest document on the wire.
DOCUMENT_BYTES = 16 * 1024
_FIELDS = ("policy", "parameters", "objectives")


@dataclass(frozen=True)
class Objectives:
    """What an operator wants. `deadline_s`: of requests that bring none of their own; None = none."""

    deadline_s: float | None = None

    def __post_init__(self) -> None:
        value = self.deadline_s
        if value is None:
            return
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and math.isfinite(value) and value > 0):
            raise ConfigError(f"objectives.deadline_s must be a number of seconds above 0, not {value!r}")


@dataclass(frozen=True)
class PolicyDocument:
    """Raises `ConfigError` that names the field."""

    policy: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    objectives: Objectives = Objectives()

    def __post_init__(self) -> None:
        if not isinstance(self.policy, str) or not self.policy or len(self.policy) > 100:
            raise ConfigError(f"policy must be the name of a policy, not {str(self.policy)[:100]!r}")
        if not isinstance(self.parameters, Mapping):
            raise ConfigError("parameters must be a table of the policy's settings")
        if len(self.encode()) > DOCUMENT_BYTES:
            raise ConfigError(f"a policy document has at most {DOCUMENT_BYTES} bytes")

    def to_json(self) -> dict[str, Any]:
        objectives = {} if self.objectives.deadline_s is None else {"deadline_s": self.objectives.deadline_s}
        return {"policy": self.policy, "parameters": dict(self.parameters), "objectives": objectives}

    def encode(self) -> bytes:
        """Canonical JSON. Raises `ConfigError` for a parameter that JSON cannot hold."""
        try:
            text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"parameters must be numbers, texts, lists and tables ({error})") from error
        return text.encode()

    @classmethod
    def decode(cls, data: bytes) -> PolicyDocument:
        """From JSON bytes of a peer or a file. Raises `ConfigError`."""
        if len(data) > DOCUMENT_BYTES:
            raise ConfigError(f"a policy document has at most {DOCUMENT_BYTES} bytes, not {len(data)}")
        try:
            found = json.loads(data, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise ConfigError("the policy document is not JSON") from error
        return cls.from_mapping(found)

    @classmethod
    def from_mapping(cls, data: object) -> PolicyDocument:
        """From parsed JSON or TOML. Raises `ConfigError`."""
        if not isinstance(data, Mapping):
            raise ConfigError("a policy document is a table with policy, parameters and objectives")
        for name in data:
            if name not in _FIELDS:
                raise ConfigError(
                    f"a policy document has no field {str(name)[:100]!r}; it has {_listed(_FIELDS)}"
                )
        if "policy" not in data:
            raise ConfigError("a policy document needs the field policy, the name of a policy")
        objectives = data.get("objectives", {})
        if not isinstance(objectives, Mapping):
            raise ConfigError("objectives must be a table")
        for name in objectives:
            if name != "deadline_s":
                raise ConfigError(f"there is no objective {str(name)[:100]!r}; known: deadline_s")
        return cls(data["policy"], data.get("parameters", {}), Objectives(objectives.get("deadline_s")))


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names)


__all__ = ["DOCUMENT_BYTES", "Objectives", "PolicyDocument"]
