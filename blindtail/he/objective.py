"""What a plan for an encrypted tail costs, and what its owner wants least of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from blindtail.errors import ConfigError, ModelError

#: What can be weighed or bounded; bounds and weights are in these units.
METRICS = ("total_s", "online_s", "uplink_bytes", "key_bytes", "memory_bytes")
#: What can be bounded besides: known when there is calibration data (`blindtail.he.precision`).
ERROR, DISAGREEMENT = "error", "disagreement"
#: Seconds that a byte of uplink is worth where nobody says: of 100 Mbit/s.
UPLINK_S = 8e-8


class NoPlan(ModelError):
    """No plan keeps the objective's bounds."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Predicted costs of one plan on the reference core with `native`, known before any key exists.

    total_s       server seconds of one evaluation, container in to container out
    online_s      the same with a ticket; what is done ahead is not in it
    uplink_bytes  of one request
    key_bytes     evaluation keys that a device uploads once
    memory_bytes  of the server: encoded plaintexts, and one device's expanded keys
    """

    total_s: float
    online_s: float
    uplink_bytes: int
    key_bytes: int
    memory_bytes: int

    def of(self, metric: str) -> float:
        return float(getattr(self, metric))

    def beats(self, other: Costs) -> bool:
        """Nowhere worse, somewhere better."""
        # Written out: fronts of large layers ask a million times.
        return (
            self.total_s <= other.total_s
            and self.online_s <= other.online_s
            and self.uplink_bytes <= other.uplink_bytes
            and self.key_bytes <= other.key_bytes
            and self.memory_bytes <= other.memory_bytes
            and self != other
        )


@dataclass(frozen=True)
class Objective:
    """The least weighted sum of costs among plans within bounds.

    weights  metric -> weight, per second or byte; most often one metric with weight 1
    at_most  metric -> bound, in seconds or bytes; "error" bounds the predicted error of a logit, over
             max(1, largest |logit|), that one in some ten thousand exceeds; "disagreement" the share of
             images whose largest logit noise may change, predicted from the margins of calibration data
    usual_primes  look at primes of the usual size alone. Without it, smaller ones are looked at where uplink
             is weighed or bounded, or where disagreement is

    Raises `ConfigError` for an unknown metric, a negative or infinite weight, weights
    that are all zero, and a bound that is not positive.
    """

    weights: Mapping[str, float] = field(default_factory=lambda: {"total_s": 1.0})
    at_most: Mapping[str, float] = field(default_factory=dict)
    usual_primes: bool = False

    def __post_init__(self) -> None:
        for name in (*self.weights, *self.at_most):
            if name not in METRICS and not (name in (ERROR, DISAGREEMENT) and name not in self.weights):
                raise ConfigError(
                    f"an objective knows no {name!r}: use {', '.join(METRICS)}; "
                    f"{ERROR} and {DISAGREEMENT} can be bounded only"
                )
        if any(not 0 <= w < math.inf for w in self.weights.values()) or not any(self.weights.values()):
            raise ConfigError("an objective's weights are finite, none is negative, and one is above zero")
        if any(not bound > 0 for bound in self.at_most.values()):
            raise ConfigError("an objective's bounds are above zero, in seconds or bytes")
        if not self.at_most.get(DISAGREEMENT, 0.5) < 1:
            raise ConfigError(f"{DISAGREEMENT} is a share of images, below 1: 0.001 is one in a thousand")
        object.__setattr__(self, "weights", MappingProxyType(dict(self.weights)))
        object.__setattr__(self, "at_most", MappingProxyType(dict(self.at_most)))

    @classmethod
    def parse(cls, weights: Iterable[str] = (), at_most: Iterable[str] = ()) -> Objective:
        """From "metric" or "metric=weight", and "metric=bound", as they stand on a command line."""
        parsed = dict(_pair(text, 1.0) for text in weights)
        bounds = dict(_pair(text, None) for text in at_most)
        return cls(parsed, bounds) if parsed else cls(at_most=bounds)

    def value(self, costs: Costs) -> float:
        """The weighted sum; in seconds or bytes where a single metric has weight 1."""
        return sum(weight * costs.of(name) for name, weight in self.weights.items())

    def admits(self, costs: Costs) -> bool:
        """Whether bounds are kept; those on errors stand aside, since no cost tells them."""
        return all(costs.of(name) <= bound for name, bound in self.at_most.items() if name in METRICS)

    def to_json(self) -> dict[str, Any]:
        return {"weights": dict(self.weights), "at_most": dict(self.at_most)}


def _pair(text: str, otherwise: float | None) -> tuple[str, float]:
    name, equals, number = text.partition("=")
    try:
        value = float(number) if equals else otherwise
    except ValueError:
        value = None
    if value is None:
        raise ConfigError(f"{text!r}: write METRIC=NUMBER, in seconds or bytes")
    return name.strip(), value


__all__ = ["DISAGREEMENT", "ERROR", "METRICS", "UPLINK_S", "Costs", "NoPlan", "Objective"]
