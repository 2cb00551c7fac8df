"""The wire contract as plain records: nobody else touches generated code.

Every record encodes itself to the bytes of its protobuf message and decodes
such bytes with everything checked: the message's size against its method's cap
(before parsing), lengths of ids and hashes, finite non-negative times. Decoding
raises `ContainerError`, whoever the peer is; building a wrong record by hand
raises the same. Sizes are bytes, times are seconds.

    blindtail.wire           the data plane: an edge and a cell (this module's names)
    blindtail.wire.control   the control plane: edges, cells and the orchestrator
    blindtail.wire.policies  its operators: policies, the fleet, what was used
    blindtail.wire.cell      a cell's models, its drain, and keys between cells
"""

from __future__ import annotations

from blindtail.wire.checks import (
    CHUNK_BYTES,
    CONTROL_BYTES,
    OVERHEAD_BYTES,
    REPLY_BYTES,
    REQUEST_ID_BYTES,
    SEED_BYTES,
    SESSION_BYTES,
    SHA256_BYTES,
)
from blindtail.wire.tail import (
    MOST_SEEDS,
    SERVICE,
    EvaluateCall,
    EvaluateResult,
    KeyChunk,
    KeyHeader,
    KeyState,
    KeyStatus,
    KeyStatusCall,
    RegisterCall,
    RegisterResult,
    TicketOffer,
    TicketsTaken,
)

__all__ = [
    "CHUNK_BYTES",
    "CONTROL_BYTES",
    "MOST_SEEDS",
    "OVERHEAD_BYTES",
    "REPLY_BYTES",
    "REQUEST_ID_BYTES",
    "SEED_BYTES",
    "SERVICE",
    "SESSION_BYTES",
    "SHA256_BYTES",
    "EvaluateCall",
    "EvaluateResult",
    "KeyChunk",
    "KeyHeader",
    "KeyState",
    "KeyStatus",
    "KeyStatusCall",
    "RegisterCall",
    "RegisterResult",
    "TicketOffer",
    "TicketsTaken",
]
