"""The edge: `EdgeRuntime` answers images, through early exits or an encrypted tail.

from edge import EdgeRuntime

with EdgeRuntime.open("edge.bt", "cloud.example:50051", credentials=tls) as runtime:
    answer = runtime.infer(image, deadline_s=0.5)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import blindtail  # noqa: F401  (first: it switches off ONNX Runtime's reports to its maker)

if TYPE_CHECKING:
    from edge.runtime import EdgeRuntime
    from edge.status import RuntimeStatus

__all__ = ["EdgeRuntime", "RuntimeStatus"]


def __getattr__(name: str) -> Any:
    # When first used: the key process and the command line need no ONNX Runtime.
    if name == "EdgeRuntime":
        from edge.runtime import EdgeRuntime

        return EdgeRuntime
    if name == "RuntimeStatus":
        from edge.status import RuntimeStatus

        return RuntimeStatus
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
