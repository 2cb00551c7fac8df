"""Verdicts on operations of a network: what CKKS makes of each, and why not where it makes nothing of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from blindtail.models.rewrites import Rewrite


class Effect(Enum):
    """What an operation does to an activation, as CKKS sees it."""

    CONSTANT = "constant"  # no activation goes in
    SHAPE = "shape"  # asks for a shape
    LINEAR = "linear"
    SQUARE = "square"  # Square, Quadratic, Polynomial, x * x, x ** 3: an activation
    REFUSED = "refused"


@dataclass(frozen=True)
class Ruling:
    """The verdict on one operation. `reason` and `advice` where it is refused."""

    effect: Effect
    kind: str
    reason: str = ""
    advice: str = ""
    rewrite: Rewrite | None = None
    #: Lines of Python where no single layer takes its place.
    code: str = ""


@dataclass
class Live:
    """An operand that depends on the activation, with a shape (B, ...)."""

    shape: tuple[int, ...]


def lives(args: Any) -> list[Live]:
    """Every operand in (nested) arguments that depends on the activation."""
    if isinstance(args, Live):
        return [args]
    if isinstance(args, Mapping):
        args = list(args.values())
    if isinstance(args, slice):
        args = [args.start, args.stop, args.step]
    if isinstance(args, Sequence) and not isinstance(args, str):
        return [found for a in args for found in lives(a)]
    return []


__all__ = ["Effect", "Live", "Ruling", "lives"]
