"""The one exception tree of blindtail, and its one map to gRPC status codes.

    BlindtailError
    ├── ConfigError            a setting, flag or TOML field is wrong
    ├── BundleError            a .bt file is damaged or of the wrong kind
    ├── ModelError             a network cannot be split, trained or compiled as asked
    ├── DataError              a data set or an image folder is missing or damaged
    ├── InputError             an image given to `infer` has the wrong shape, dtype or values
    ├── StateError             an object was used in the wrong state (closed, not opened)
    └── TailError              everything that can go wrong between edge and cloud
        ├── ContainerError     bytes of a ciphertext or key container are malformed
        ├── ProgramMismatch    edge and cloud hold different versions of a model
        │   └── ModelWithdrawn the cloud served this version and does so no more
        ├── SessionLost        the cloud no longer knows this session
        ├── KeysMissing        the cloud does not hold (or has evicted) the evaluation keys
        ├── Overloaded         the queue is full; carries `retry_after_s`
        ├── DeadlineExceeded   the answer could not be had in time
        ├── EvaluationFailed   the evaluator failed on this request
        ├── AccessDenied       the peer's identity may not do this
        └── TailUnavailable    nobody answers, or the connection broke

Public messages say what is wrong and what to do; they never carry key
material, activations, weights, logits or internal paths of a peer.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType


class BlindtailError(Exception):
    """Base of every error that blindtail raises on purpose."""


class ConfigError(BlindtailError):
    """A setting, flag or TOML field is wrong."""


class BundleError(BlindtailError):
    """A `.bt` file is damaged, incomplete or of the wrong kind."""


class ModelError(BlindtailError):
    """A network cannot be split, trained or compiled as asked."""


class DataError(BlindtailError):
    """A data set or a folder of images is missing or damaged."""


class InputError(BlindtailError):
    """An input image has a wrong shape, dtype or value."""


class StateError(BlindtailError):
    """An object was used in a state that does not allow it."""


class TailError(BlindtailError):
    """Base of everything that can go wrong between edge and cloud."""


class ContainerError(TailError):
    """Bytes of a ciphertext or key container are malformed or do not fit the program."""


class ProgramMismatch(TailError):
    """Edge and cloud hold different models or different versions of one."""


class ModelWithdrawn(ProgramMismatch):
    """The cloud's operator has taken this version of the model back."""


class SessionLost(TailError):
    """The cloud no longer knows this session; register again."""


class KeysMissing(TailError):
    """The cloud does not hold, or has evicted, this client's evaluation keys; upload again."""


class Overloaded(TailError):
    """The queue is full. `retry_after_s` says when to try again."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(TailError):
    """The answer could not be had within the remaining time."""


class EvaluationFailed(TailError):
    """The evaluator failed on this request (it crashed, or refused the program)."""


class AccessDenied(TailError):
    """The peer's identity does not allow this call."""


class TailUnavailable(TailError):
    """Nobody answers at the address, or the connection broke."""


#: Error class -> name of the gRPC status code it travels as. `blindtail.rpc`
#: turns names into `grpc.StatusCode` and back; the class name itself travels in
#: the trailing metadata key `blindtail-error`, so that classes that share a
#: status are told apart.
STATUS_OF: Mapping[type[BlindtailError], str] = MappingProxyType(
    {
        ConfigError: "FAILED_PRECONDITION",
        BundleError: "FAILED_PRECONDITION",
        ModelError: "FAILED_PRECONDITION",
        InputError: "INVALID_ARGUMENT",
        StateError: "FAILED_PRECONDITION",
        ContainerError: "INVALID_ARGUMENT",
        ProgramMismatch: "FAILED_PRECONDITION",
        ModelWithdrawn: "FAILED_PRECONDITION",
        SessionLost: "NOT_FOUND",
        KeysMissing: "NOT_FOUND",
        Overloaded: "RESOURCE_EXHAUSTED",
        DeadlineExceeded: "DEADLINE_EXCEEDED",
        EvaluationFailed: "INTERNAL",
        AccessDenied: "PERMISSION_DENIED",
        TailUnavailable: "UNAVAILABLE",
    }
)

__all__ = [
    "STATUS_OF",
    "AccessDenied",
    "BlindtailError",
    "BundleError",
    "ConfigError",
    "ContainerError",
    "DataError",
    "DeadlineExceeded",
    "EvaluationFailed",
    "InputError",
    "KeysMissing",
    "ModelError",
    "ModelWithdrawn",
    "Overloaded",
    "ProgramMismatch",
    "SessionLost",
    "StateError",
    "TailError",
    "TailUnavailable",
]
