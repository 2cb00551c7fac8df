"""How far long work is: what a compile tells whoever started it.

    compile_tail(layers, calibration, progress=lambda done, total, what: print(what))

A caller gives one function; the work has a `Span` of it, and gives parts of that span to the parts of
the work. What is told rises and ends at its total. Where nobody asks nothing is told.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

T = TypeVar("T")

#: Units of the whole work.
TOTAL = 1000


class Progress(Protocol):
    """Called at stages that take time; `done` of `total` never falls. What it raises ends the work."""

    def __call__(self, done: int, total: int, what: str, /) -> None: ...


@dataclass
class _Told:
    """One function, and what it was told last."""

    progress: Progress | None
    done: int = 0
    raised: BaseException | None = None

    def tell(self, done: int, what: str) -> None:
        if self.progress is None:
            return
        if self.raised is not None:  # what it raised looked like trouble of the work, which went on
            raise self.raised
        self.done = max(self.done, done)
        try:
            self.progress(self.done, TOTAL, what)
        except BaseException as error:
            self.raised = error
            raise


@dataclass(frozen=True)
class Span:
    """A part of the work, from `low` to `high` of all of it (0 to 1); `name` is said before what it does."""

    told: _Told = field(default_factory=lambda: _Told(None))
    low: float = 0.0
    high: float = 1.0
    name: str = ""

    @classmethod
    def of(cls, progress: Progress | Span | None) -> Span:
        """All of a piece of work, or the span that a larger one gave to it."""
        return progress if isinstance(progress, Span) else cls(_Told(progress))

    def at(self, share: float, what: str) -> None:
        """So much of this part is done (0 to 1), and `what` comes next."""
        place = self.low + (self.high - self.low) * min(max(share, 0.0), 1.0)
        self.told.tell(int(TOTAL * place + 1e-6), f"{self.name}{what}")

    def ended(self, result: T) -> T:
        """What the work came to; of all of it, and not of a part, it is told that it is done."""
        if (self.low, self.high, self.name) == (0.0, 1.0, ""):
            self.at(1.0, "done")
        return result

    def parts(self, *weights: float, name: str = "") -> list[Span]:
        """Parts in their order, as large as their weights; `name` is said before what they do."""
        whole, at, found = sum(weights), 0.0, list[Span]()
        for weight in weights:
            low, high = (self.low + (self.high - self.low) * end / whole for end in (at, at + weight))
            found.append(Span(self.told, low, high, f"{self.name}{name}"))
            at += weight
        return found

    def named(self, name: str) -> Span:
        """This part, with `name` said before what it does."""
        return self.parts(1, name=name)[0]

    def over(self, things: Sequence[T], name: str = "") -> Iterator[tuple[T, Span]]:
        """Each of some things with a part of this span, all as large."""
        parts = self.parts(*[1.0] * len(things), name=name) if things else []
        return zip(things, parts, strict=True)


__all__ = ["TOTAL", "Progress", "Span"]
