"""What a declared metric is: a name, a kind, labels, and how many series they allow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

OTHER = "other"
#: Most combinations of several labels, whatever their caps could give together.
MOST_COMBINATIONS = 512

Kind = Literal["counter", "gauge", "histogram"]
Role = Literal["edge", "cell", "orchestrator"]


@dataclass(frozen=True, slots=True)
class Label:
    """A label's name and what bounds it: fixed `values`, or the first `cap` that come."""

    name: str
    values: tuple[str, ...] = ()
    cap: int = 0

    @property
    def most(self) -> int:
        """Most values it can take, "other" included."""
        return (self.cap or len(self.values)) + 1


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. `name` without the suffix _total that counters are exported with.

    live     its values are read when it is scraped
    merge    what becomes of several values that are folded into "other"
    """

    roles: tuple[Role, ...]
    name: str
    kind: Kind
    help: str
    unit: str
    labels: tuple[Label, ...] = ()
    buckets: tuple[float, ...] = ()
    live: bool = False
    merge: Literal["sum", "max"] = "sum"

    @property
    def exported(self) -> str:
        """The name in queries (of a histogram: less _bucket, _sum and _count)."""
        return f"{self.name}_total" if self.kind == "counter" else self.name

    @property
    def limit(self) -> int:
        """Label combinations from which on the open labels of a new one become "other"."""
        product = math.prod(label.most for label in self.labels)
        return product if len(self.labels) < 2 else min(product, MOST_COMBINATIONS)

    @property
    def most_series(self) -> int:
        """Bound on its label combinations (a histogram has a few series for each)."""
        product = math.prod(label.most for label in self.labels)
        beyond = math.prod(label.most for label in self.labels if not label.cap)
        return min(product, self.limit + beyond)


__all__ = ["MOST_COMBINATIONS", "OTHER", "Kind", "Label", "Metric", "Role"]
