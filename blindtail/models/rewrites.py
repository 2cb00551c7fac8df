"""Layers that take the place of those that cannot run encrypted, as modules and as Python to paste."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from blindtail.models.layers import Quadratic, Square
from blindtail.models.operation_names import NORMS_WITH_STATISTICS


@dataclass(frozen=True)
class Rewrite:
    """A layer to put in the place of another; `text` is Python that makes it."""

    kind: type[nn.Module]
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()

    @property
    def text(self) -> str:
        prefix = "nn." if self.kind.__module__.startswith("torch.nn") else ""
        args = [a.text if isinstance(a, Rewrite) else repr(a) for a in self.args]
        args += [f"{name}={value!r}" for name, value in self.kwargs]
        return f"{prefix}{self.kind.__name__}({', '.join(args)})"

    def build(self) -> nn.Module:
        args = [a.build() if isinstance(a, Rewrite) else a for a in self.args]
        return self.kind(*args, **dict(self.kwargs))

    @property
    def levels(self) -> int:
        """Levels that its squares add: each ends a map and costs one itself."""
        if self.kind is nn.Sequential:
            return sum(a.levels for a in self.args if isinstance(a, Rewrite))
        return 2 if self.kind in (Square, Quadratic) else 0


def average_pool(
    name: str, module: nn.Module | None, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Rewrite | None:
    """The average over the same windows."""
    digit = next((c for c in name if c in "123"), "")
    if not digit:
        return None
    if "adaptive" in name:
        size = (
            module.output_size
            if module is not None
            else (args[1] if len(args) > 1 else kwargs.get("output_size"))
        )
        return Rewrite(getattr(nn, f"AdaptiveAvgPool{digit}d"), (_plain(size),))
    if "maxpool" not in name.replace("_", "") or "unpool" in name or "fractional" in name:
        return None
    fields = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    given: dict[str, Any] = {}
    if module is not None:
        given = {n: getattr(module, n) for n in fields}
    else:
        given = dict(zip(fields, args[1:], strict=False)) | {k: v for k, v in kwargs.items() if k in fields}
    if given.get("dilation", 1) not in (1, (1, 1), (1,), [1, 1]):
        return None
    extra = (
        [("padding", _plain(given["padding"]))] if given.get("padding", 0) not in (0, (0, 0), (0,)) else []
    )
    extra += [("ceil_mode", True)] if given.get("ceil_mode") else []
    kernel = _plain(given["kernel_size"])
    stride = _plain(given.get("stride") if given.get("stride") not in (None, ()) else kernel)
    return Rewrite(getattr(nn, f"AvgPool{digit}d"), (kernel, stride), tuple(extra))


def batch_norm(module: nn.Module | None, shape: tuple[int, ...]) -> Rewrite | None:
    """The batch norm for activations (B, C, ...) of this shape."""
    if isinstance(module, NORMS_WITH_STATISTICS):
        extra = (("track_running_stats", True),) if "Instance" in type(module).__name__ else ()
        return Rewrite(type(module), (module.num_features,), extra)
    dims = len(shape)
    if not 2 <= dims <= 5:
        return None
    return Rewrite(
        (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 2], (int(shape[1]),)
    )


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return value[0] if len(value) == 1 or len(set(value)) == 1 else tuple(value)
    return value
