"""Records of the wire: round trips, and every malformed message refused before use."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blindtail import wire
from blindtail.errors import ContainerError
from blindtail.pb import tail_pb2 as pb
from blindtail.wire import (
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

PROGRAM = "0f" * 32
HASH = bytes(range(32))
SESSION = bytes(16)

RECORDS = [
    RegisterCall("toy", "1", PROGRAM, HASH),
    RegisterResult(SESSION, KeyState.CHECKING, "cell:50051", 900.0),
    KeyStatusCall(PROGRAM, HASH),
    KeyStatus(KeyState.REFUSED, 5, "why"),
    KeyChunk(b"data"),
    KeyChunk(b"data", KeyHeader(PROGRAM, HASH, 10, 6)),
    EvaluateResult(b"reply", 0.5, 0.25, "evaluator-0"),
    EvaluateResult(b"reply", 0.5, 0.25, "evaluator-0", ticket=True),
    TicketOffer(SESSION, ()),
    TicketOffer(SESSION, tuple(bytes([i]) * wire.SEED_BYTES for i in range(wire.MOST_SEEDS))),
    TicketsTaken(0, 0),
    TicketsTaken(wire.MOST_SEEDS, 16),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: type(r).__name__)
def test_a_record_survives_its_own_encoding(record: RegisterCall) -> None:
    assert type(record).decode(record.encode()) == record


def test_evaluate_call_survives_and_holds_its_cap() -> None:
    call = EvaluateCall(SESSION, SESSION, b"x" * 100, 1, 0.5)
    assert EvaluateCall.decode(call.encode(), 100) == call
    large = EvaluateCall(SESSION, SESSION, b"x" * (101 + wire.OVERHEAD_BYTES)).encode()
    with pytest.raises(ContainerError, match="more than"):
        EvaluateCall.decode(large, 100)


BROKEN = {
    "register: short hash": (RegisterCall, pb.RegisterRequest(program_id=PROGRAM, key_sha256=b"x")),
    "register: program id": (RegisterCall, pb.RegisterRequest(program_id="F" * 64, key_sha256=HASH)),
    "register: long name": (
        RegisterCall,
        pb.RegisterRequest(model="m" * 201, program_id=PROGRAM, key_sha256=HASH),
    ),
    "register: too large": (RegisterCall, pb.RegisterRequest(model="m" * 5000)),
    "reply: no session": (RegisterResult, pb.RegisterReply(keys=pb.KEY_STATE_READY)),
    "reply: no state": (RegisterResult, pb.RegisterReply(session=SESSION)),
    "reply: negative time": (
        RegisterResult,
        pb.RegisterReply(session=SESSION, keys=pb.KEY_STATE_READY, idle_timeout_s=-1),
    ),
    "status: unknown state": (KeyStatus, pb.KeyStatusReply(keys=99)),
    "chunk: too large": (KeyChunk, pb.KeyChunk(data=bytes(wire.CHUNK_BYTES + 1))),
    "chunk: offset behind the end": (
        KeyChunk,
        pb.KeyChunk(header=pb.KeyHeader(program_id=PROGRAM, key_sha256=HASH, total_bytes=1, offset=2)),
    ),
    "chunk: header without a hash": (KeyChunk, pb.KeyChunk(header=pb.KeyHeader(program_id=PROGRAM))),
    "tickets: no session": (TicketOffer, pb.TicketsRequest(seeds=[bytes(64)])),
    "tickets: short seed": (TicketOffer, pb.TicketsRequest(session=SESSION, seeds=[bytes(64), bytes(63)])),
    "tickets: long seed": (TicketOffer, pb.TicketsRequest(session=SESSION, seeds=[bytes(65)])),
    "tickets: too many": (TicketOffer, pb.TicketsRequest(session=SESSION, seeds=[bytes(64)] * 65)),
    "tickets: too large": (TicketOffer, pb.TicketsRequest(session=SESSION, seeds=[bytes(64)] * 1000)),
    "tickets: more than were offered": (TicketsTaken, pb.TicketsReply(accepted=65, capacity=1)),
    "result: time is not a number": (EvaluateResult, pb.EvaluateReply(eval_s=float("nan"))),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_message_is_refused(name: str) -> None:
    kind, message = BROKEN[name]
    with pytest.raises(ContainerError):
        kind.decode(message.SerializeToString())  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "message",
    [
        pb.EvaluateRequest(session=b"short", request_id=SESSION),
        pb.EvaluateRequest(session=SESSION, request_id=bytes(17)),
        pb.EvaluateRequest(session=SESSION, request_id=SESSION, remaining_s=float("inf")),
        pb.EvaluateRequest(session=SESSION, request_id=SESSION, remaining_s=-0.1),
    ],
)
def test_a_broken_evaluation_is_refused(message: pb.EvaluateRequest) -> None:
    with pytest.raises(ContainerError):
        EvaluateCall.decode(message.SerializeToString(), 1000)


@given(st.binary(max_size=300))
def test_arbitrary_bytes_decode_or_are_refused(data: bytes) -> None:
    kinds = (RegisterCall, RegisterResult, KeyStatusCall, KeyStatus, KeyChunk, EvaluateResult)
    for kind in (*kinds, TicketOffer, TicketsTaken):
        try:
            kind.decode(data)  # type: ignore[attr-defined]
        except ContainerError:
            continue


def test_a_field_that_cannot_be_encoded_is_refused() -> None:
    with pytest.raises(ContainerError):
        EvaluateCall(SESSION, SESSION, b"", attempt=-1).encode()
    with pytest.raises(ContainerError):
        KeyChunk(b"", KeyHeader(PROGRAM, HASH, 1 << 70, 0)).encode()


def test_a_seed_has_the_length_that_containers_give_it() -> None:
    from blindtail.he import container

    assert wire.SEED_BYTES == container.SEED_BYTES
