"""Records of the control plane: round trips, and nothing but `ContainerError` for rubbish."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blindtail.errors import ContainerError
from blindtail.pb import control_pb2 as pb
from blindtail.wire.control import (
    DOWN_BYTES,
    MOST_ITEMS,
    UP_BYTES,
    CellLoad,
    Hello,
    PeerKind,
    PolicyAck,
    PolicyUpdate,
    Report,
    StepTiming,
    Welcome,
    decode_down,
    decode_up,
    encode_down,
    encode_up,
)
from blindtail.wire.policies import (
    CHANGE_BYTES,
    FleetPeer,
    PolicyChange,
    PolicyEntry,
    PolicyQuery,
    PolicyState,
    decode_entries,
    decode_fleet,
    encode_entries,
    encode_fleet,
)

INSTANCE = bytes(range(16))
names = st.text(st.characters(codec="utf-8"), max_size=20)
seconds = st.floats(0, 1e9)
whole = st.integers(0, 2**64 - 1)
models = st.lists(st.tuples(names, names), max_size=3).map(tuple)
counts = st.dictionaries(names, whole, max_size=3)
loads = st.builds(
    CellLoad,
    evaluators=st.integers(0, 2**32 - 1),
    queue_depth=st.integers(0, 2**32 - 1),
    backlog_s=seconds,
    sessions=st.integers(0, 2**32 - 1),
    restarts=whole,
    key_store_bytes=whole,
    draining=st.booleans(),
)
hellos = st.builds(
    Hello, st.sampled_from(PeerKind), st.binary(min_size=16, max_size=16), names, models, whole, names
)
steps = st.lists(st.builds(StepTiming, names, whole, seconds, seconds), max_size=3).map(tuple)
reports = st.builds(Report, seconds, counts, counts, steps, whole, whole, names, st.none() | loads, models)
acks = st.builds(PolicyAck, whole, st.booleans(), names)
updates = st.builds(PolicyUpdate, whole, names, st.binary(max_size=50))
entries = st.builds(
    PolicyEntry,
    updates,
    st.sampled_from(PolicyState),
    seconds,
    names,
    names,
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
)
peers = st.builds(FleetPeer, hellos, names, seconds, st.floats(-1, 1e9), reports)


@given(hellos | reports | acks)
def test_what_goes_up_survives(up: Any) -> None:
    assert decode_up(encode_up(up)) == up


@given(updates | st.builds(Welcome, seconds))
def test_what_comes_down_survives(down: Any) -> None:
    assert decode_down(encode_down(down)) == down


@given(st.lists(entries, max_size=3), st.lists(peers, max_size=3))
def test_lists_for_operators_survive(history: list[PolicyEntry], fleet: list[FleetPeer]) -> None:
    assert decode_entries(encode_entries(history)) == history
    assert decode_fleet(encode_fleet(fleet)) == fleet


@given(names, st.binary(max_size=50), names, st.integers(0, 2**32 - 1), entries)
def test_calls_of_operators_survive(
    model: str, document: bytes, note: str, limit: int, entry: PolicyEntry
) -> None:
    change, query = PolicyChange(model, document, note), PolicyQuery(model, limit)
    assert PolicyChange.decode(change.encode()) == change
    assert PolicyQuery.decode(query.encode()) == query
    assert PolicyEntry.decode(entry.encode()) == entry


DECODERS: list[Callable[[bytes], object]] = [
    decode_up,
    decode_down,
    decode_entries,
    decode_fleet,
    PolicyChange.decode,
    PolicyQuery.decode,
    PolicyEntry.decode,
]


@given(
    st.sampled_from(DECODERS),
    st.binary(max_size=100) | (hellos | reports | acks).map(encode_up) | entries.map(PolicyEntry.encode),
    st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=4),
    st.integers(0, 200),
)
def test_rubbish_gives_one_kind_of_error(
    decode: Callable[[bytes], object], data: bytes, changes: list[tuple[int, int]], cut: int
) -> None:
    broken = bytearray(data)
    for at, value in changes:
        if at < len(broken):
            broken[at] = value
    for given_bytes in (bytes(broken), bytes(broken[:cut])):
        with suppress(ContainerError):
            decode(given_bytes)


def _up(**fields: Any) -> bytes:
    return bytes(pb.AttachUp(**fields).SerializeToString())


BROKEN = {
    "nothing in it": (b"", "newer protocol"),
    "no kind": (_up(hello=pb.Hello(instance=INSTANCE)), "an edge or a cell"),
    "short instance": (_up(hello=pb.Hello(kind=pb.PEER_KIND_EDGE, instance=b"x")), "instance"),
    "too many models": (
        _up(
            hello=pb.Hello(
                kind=pb.PEER_KIND_EDGE, instance=INSTANCE, models=[pb.ModelVersion()] * (MOST_ITEMS + 1)
            )
        ),
        "models",
    ),
    "too many routes": (_up(report=pb.Report(routes={str(i): 1 for i in range(MOST_ITEMS + 1)})), "routes"),
    "negative time": (_up(report=pb.Report(interval_s=-1.0)), "interval_s"),
    "no number": (_up(report=pb.Report(load=pb.CellLoad(backlog_s=float("nan")))), "backlog_s"),
    "endless reason": (_up(ack=pb.PolicyAck(reason="x" * 1000)), "reason"),
    "too large": (bytes(UP_BYTES + 1), "accepted"),
}


@pytest.mark.parametrize(("data", "says"), BROKEN.values(), ids=BROKEN.keys())
def test_what_a_peer_may_not_send(data: bytes, says: str) -> None:
    with pytest.raises(ContainerError, match=says):
        decode_up(data)


def test_an_unknown_message_from_above_is_passed_over() -> None:
    assert decode_down(b"") is None
    with pytest.raises(ContainerError, match="accepted"):
        decode_down(bytes(DOWN_BYTES + 1))
    with pytest.raises(ContainerError, match="accepted"):
        PolicyChange.decode(bytes(CHANGE_BYTES + 1))


@pytest.mark.parametrize(
    "wrong",
    [
        Hello(PeerKind.EDGE, INSTANCE, "0", (), -1),
        Report(1.0, routes={"tail": -1}),
        Report(1.0, load=CellLoad(evaluators=2**33)),
        PolicyAck(2**64, True),
        Report(1.0, tail="\ud800"),
    ],
    ids=["negative version", "negative count", "no uint32", "no uint64", "half a character"],
)
def test_a_record_that_no_message_can_hold(wrong: Any) -> None:
    with pytest.raises(ContainerError, match="does not fit"):
        encode_up(wrong)
