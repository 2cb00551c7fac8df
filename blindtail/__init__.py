"""blindtail: split computing with early exits and an encrypted tail.

The core that all roles share. It knows no role; importing it loads the standard
library only. What users import:

    blindtail.Answer, ...            what an edge answers (`blindtail.records`)
    blindtail.BlindtailError, ...    every error raised on purpose (`blindtail.errors`)
    blindtail.bundle                 `EdgeBundle`, `CloudBundle`: .bt files
    blindtail.models, .train         splitting and training a network (need torch)
    edge.EdgeRuntime                 the device's side
"""

import os

# ONNX Runtime reports its use to its maker unless told otherwise before it is loaded. A device
# that sees private data talks to its own cloud and to nobody else.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from blindtail.errors import (
    AccessDenied,
    BlindtailError,
    BundleError,
    ConfigError,
    ContainerError,
    DataError,
    DeadlineExceeded,
    EvaluationFailed,
    InputError,
    KeysMissing,
    ModelError,
    Overloaded,
    ProgramMismatch,
    SessionLost,
    StateError,
    TailError,
    TailUnavailable,
)
from blindtail.records import (
    Action,
    Answer,
    Decision,
    DecisionContext,
    ExitSeen,
    LatencyEstimate,
    Timings,
)

__all__ = [
    "AccessDenied",
    "Action",
    "Answer",
    "BlindtailError",
    "BundleError",
    "ConfigError",
    "ContainerError",
    "DataError",
    "DeadlineExceeded",
    "Decision",
    "DecisionContext",
    "EvaluationFailed",
    "ExitSeen",
    "InputError",
    "KeysMissing",
    "LatencyEstimate",
    "ModelError",
    "Overloaded",
    "ProgramMismatch",
    "SessionLost",
    "StateError",
    "TailError",
    "TailUnavailable",
    "Timings",
]
