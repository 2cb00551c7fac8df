"""blindtail: split computing with early exits and an encrypted tail.

The core that all roles share. It knows no role; importing it loads the standard
library only. What users import:

    blindtail.Answer, ...            what an edge answers (`blindtail.records`)
    blindtail.BlindtailError, ...    every error raised on purpose (`blindtail.errors`)
    blindtail.bundle                 `EdgeBundle`, `CloudBundle`: .bt files
    blindtail.models, .train         splitting and training a network (need torch)
    edge.EdgeRuntime                 the device's side
"""

from blindtail import _process as _process
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
    ModelWithdrawn,
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
    "ModelWithdrawn",
    "Overloaded",
    "ProgramMismatch",
    "SessionLost",
    "StateError",
    "TailError",
    "TailUnavailable",
    "Timings",
]
