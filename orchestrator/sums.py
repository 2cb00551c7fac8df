"""What edges report, added up per minute until it is written. Bounded, whatever peers claim."""

from __future__ import annotations

from collections.abc import Mapping

from blindtail.wire.control import Report
from orchestrator.store import SumKey

OTHER = "other"
#: Distinct models, and names of one model and kind, between two calls of `forget_names`.
MOST_MODELS, MOST_NAMES = 64, 32
#: What one report may add to one sum.
_MOST_COUNT = 10**12


class Sums:
    """`add` as reports come, `take` to write them, `put_back` when that failed."""

    def __init__(self) -> None:
        self._counts: dict[SumKey, int] = {}
        self._names: dict[str, dict[str, set[str]]] = {}

    def __len__(self) -> int:
        return len(self._counts)

    def add(self, unix_s: float, model: str, report: Report) -> None:
        minute = int(unix_s // 60)
        moved = {"uplink": report.uplink_bytes, "reply": report.reply_bytes}
        for kind, counts in (("route", report.routes), ("fallback", report.fallbacks), ("bytes", moved)):
            self._add(minute, model, kind, counts)

    def take(self) -> dict[SumKey, int]:
        taken, self._counts = self._counts, {}
        return taken

    def put_back(self, taken: Mapping[SumKey, int], most: int = 100_000) -> None:
        """For the next try; the oldest go when there are more than `most`."""
        for key, count in taken.items():
            self._counts[key] = self._counts.get(key, 0) + count
        if len(self._counts) > most:
            self._counts = dict(sorted(self._counts.items())[-most:])

    def forget_names(self) -> None:
        """Lets new names in: what filled the caps may have been rubbish."""
        self._names.clear()

    def _add(self, minute: int, model: str, kind: str, counts: Mapping[str, int]) -> None:
        if model not in self._names and len(self._names) >= MOST_MODELS:
            model = OTHER
        names = self._names.setdefault(model, {}).setdefault(kind, set())
        for name, count in counts.items():
            if count <= 0:
                continue
            if name not in names and len(names) >= MOST_NAMES:
                name = OTHER
            names.add(name)
            key = (minute, model, kind, name)
            self._counts[key] = self._counts.get(key, 0) + min(count, _MOST_COUNT)


__all__ = ["MOST_MODELS", "MOST_NAMES", "OTHER", "Sums"]
