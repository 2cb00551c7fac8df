"""Two cells in this process that know each other, without Ray."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from blindtail.bundle import CloudBundle
from blindtail.ports import free_port
from cloud.config import CloudConfig
from cloud.local import LocalCell


@contextmanager
def cell_pair(
    folder: Path,
    models: CloudBundle | Mapping[str, CloudBundle],
    *,
    start_b: bool = True,
    b: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Iterator[tuple[LocalCell, LocalCell]]:
    """Cells "a" and "b", peers of each other. `settings` are those of both, `b` those of b alone."""
    ports = {name: free_port() for name in "ab"}
    made = []
    with ExitStack() as stack:
        for name, other in ("ab", "ba"):
            own = {"peers": (f"127.0.0.1:{ports[other]}",), **settings, **((b or {}) if name == "b" else {})}
            model = models if isinstance(models, CloudBundle) else models[name]
            cell = LocalCell(
                [model],
                backend="clear",
                state_dir=folder / name,
                port=ports[name],
                config=CloudConfig(**own),
            )
            if name == "a" or start_b:
                stack.enter_context(cell)
            made.append(cell)
        yield made[0], made[1]


def uploads(cell: LocalCell) -> float:
    """Uploads of keys by edges."""
    value = cell.metrics.registry.get_sample_value("blindtail_cloud_key_uploads_total", {"outcome": "ok"})
    return value or 0.0


def transfers(cell: LocalCell, direction: str, outcome: str = "ok") -> float:
    labels = {"direction": direction, "outcome": outcome}
    value = cell.metrics.registry.get_sample_value("blindtail_cloud_key_transfers_total", labels)
    return value or 0.0
