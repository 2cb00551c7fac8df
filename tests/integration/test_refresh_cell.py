"""A refreshed tail through a real cell over gRPC: right, whole or an exit; nothing depends on what opened."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from blindtail.errors import ContainerError, ProgramMismatch
from blindtail.records import TailReply
from blindtail.wire import EvaluateCall, KeyStatusCall, RegisterCall
from cloud.local import LocalCell
from edge.accounting import seen_from_outside
from edge.cipher import LockedCipher
from edge.executor import softmax
from edge.local_client import LocalTail
from edge.runtime import EdgeRuntime
from edge.session import RemoteTail
from orchestrator.policy import CloudOnly
from tests.cell_pair import uploads
from tests.refresh_cases import TRIPS, expected, images, packed, saved


@pytest.fixture(scope="module", params=["clear", "native"])
def cell(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCell]:
    folder = tmp_path_factory.mktemp("refreshed")
    with LocalCell([saved(folder)[1]], backend=request.param, state_dir=folder / "cloud") as made:
        yield made


def runtime(cell: LocalCell, folder: Path, **settings: Any) -> EdgeRuntime:
    backend = "clear" if cell.config.backend == "clear" else "seal"
    return EdgeRuntime.open(
        packed()[0],
        cell.address,
        credentials="insecure-loopback",
        policy="cloud-only",
        state_dir=folder,
        backend=backend,
        **settings,
    )


def test_answers_are_pytorchs_after_as_many_round_trips_as_segments(cell: LocalCell, tmp_path: Path) -> None:
    pixels = images(4, seed=5)
    specs = packed()[0].segments(0)
    before = uploads(cell)
    with runtime(cell, tmp_path) as edge:
        assert edge.wait_ready(60), edge.status()
        answers = [edge.infer(image, deadline_s=20) for image in pixels]
        status = edge.status().tails[0]
    assert [(a.route, a.fallback) for a in answers] == [("tail", None)] * 4
    want = softmax(expected(pixels)[0])
    np.testing.assert_allclose(answers[0].probabilities, want, atol=0.01)
    for answer, logits in zip(answers, expected(pixels), strict=True):
        assert answer.label == int(logits.argmax())
        assert answer.extra["round_trips"] == TRIPS
        t = answer.timings
        assert min(t.encrypt_s, t.network_s, t.eval_s, t.decrypt_s, t.interlude_s) > 0
        named = t.head_s + t.exits_s + t.decide_s + t.encrypt_s + t.network_s + t.queue_s + t.eval_s
        assert named + t.decrypt_s + t.interlude_s <= t.total_s
        if cell.config.backend == "native":
            assert answer.uplink_bytes == sum(s.uplink_bytes for s in specs)
            assert answer.reply_bytes == sum(s.reply_bytes for s in specs)
    # One set of keys for all segments, uploaded once, and one session.
    assert uploads(cell) - before == 1
    assert (status.registrations, status.key_bytes) == (1, specs[0].key_bytes)


def _session(cell: LocalCell, folder: Path) -> tuple[Any, bytes, LockedCipher]:
    """A registered client with its cipher."""
    edge = runtime(cell, folder)
    assert edge.wait_ready(60)
    (tail,) = edge._tails.values()
    assert isinstance(tail, RemoteTail)
    place, cipher = tail._place, tail.cipher
    assert place is not None
    assert place.session is not None
    assert isinstance(cipher, LockedCipher)
    return edge, place.session, cipher


def test_a_segments_container_is_refused_for_another(cell: LocalCell, tmp_path: Path) -> None:
    specs = packed()[0].segments(0)
    edge, session, cipher = _session(cell, tmp_path)
    gateway = cell.gateway
    assert gateway is not None
    containers = [cipher.encrypt(np.zeros(s.features), segment=i) for i, s in enumerate(specs)]

    identity = gateway.sessions._all[session].identity

    def evaluate(container: bytes, program_id: str) -> Any:
        call = EvaluateCall(session, os.urandom(16), container, 0, 10.0, program_id)
        assert gateway is not None
        return cell.call(lambda: gateway.evaluate(identity, call, 10.0))

    with edge:
        for i, container in enumerate(containers):
            assert evaluate(container, specs[i].program_id if i else "").container
        for i, j in ((0, 1), (1, 2), (2, 1), (2, 0)):
            with pytest.raises(ContainerError, match=r"another segment|this program's have"):
                evaluate(containers[i], specs[j].program_id)
        with pytest.raises(ProgramMismatch, match="no segment of this session's tail"):
            evaluate(containers[1], "0" * 64)


def test_keys_and_sessions_are_the_first_segments_alone(cell: LocalCell) -> None:
    specs, gateway = packed()[0].segments(0), cell.gateway
    assert gateway is not None
    assert gateway.register("someone", RegisterCall("small", "1", specs[0].program_id, bytes(32))).session
    for spec in specs[1:]:
        with pytest.raises(ProgramMismatch, match=specs[0].program_id[:12]):
            gateway.register("someone", RegisterCall("small", "1", spec.program_id, bytes(32)))
        with pytest.raises(ProgramMismatch, match="holds no program"):
            gateway.key_status("someone", KeyStatusCall(spec.program_id, bytes(32)))


def _interrupted(edge: EdgeRuntime, after: int, then: Callable[[], None]) -> list[int]:
    """`then` is called when `after` round trips of an offload are done; the segments that were sent."""
    (tail,) = edge._tails.values()
    assert isinstance(tail, RemoteTail)
    honest, sent = tail.evaluate, list[int]()

    def evaluate(container: bytes, remaining_s: float | None, segment: int = 0) -> TailReply:
        if segment == after:
            then()
        sent.append(segment)
        return honest(container, remaining_s, segment)

    tail.evaluate = evaluate  # type: ignore[method-assign]
    return sent


def test_a_cloud_that_dies_between_segments_leaves_the_answer_to_an_exit(tmp_path: Path) -> None:
    cell = LocalCell([saved(tmp_path)[1]], backend="clear", state_dir=tmp_path / "cloud").start()
    try:
        with runtime(cell, tmp_path / "edge") as edge:
            assert edge.wait_ready(60)
            sent = _interrupted(edge, 1, cell.stop)
            answer = edge.infer(images(1)[0], deadline_s=20)
            report = edge._accounting.take()
        assert (answer.route, answer.fallback) == ("exit1", "unavailable")
        assert answer.extra["round_trips"] == 1
        assert set(sent) == {0, 1}
        assert answer.timings.total_s < 20.05
        assert answer.reply_bytes > 0
        # A reply was still owed: the cloud knows, and so may the orchestrator.
        assert report.fallbacks == {"unavailable": 1}
    finally:
        cell.stop()


def test_the_cell_may_come_back_between_segments(tmp_path: Path) -> None:
    """A session that is lost between two segments costs this answer, not the next one."""
    with LocalCell([saved(tmp_path)[1]], backend="clear", state_dir=tmp_path / "cloud") as cell:
        with runtime(cell, tmp_path / "edge") as edge:
            assert edge.wait_ready(60)
            _interrupted(edge, 2, cell.forget_sessions)
            assert edge.infer(images(1)[0], deadline_s=20).fallback == "session"
            (tail,) = edge._tails.values()
            del tail.evaluate  # type: ignore[attr-defined]
            assert edge.wait_ready(30)
            assert edge.infer(images(1)[0], deadline_s=20).route == "tail"
        assert uploads(cell) == 1


# -- without a cell ----------------------------------------------------------------------


class StrangeCipher:
    """Opens one segment's reply to something that no honest reply holds."""

    def __init__(self, inner: Any, segment: int, value: float) -> None:
        self._inner, self._segment, self._value = inner, segment, value
        self.sent: list[tuple[int, int]] = []

    def encrypt(
        self, x: NDArray[np.float64], wait_s: Any = None, ticket: Any = None, segment: int = 0
    ) -> bytes:
        assert np.isfinite(x).all()
        container: bytes = self._inner.encrypt(x, wait_s, ticket, segment)
        self.sent.append((segment, len(container)))
        return container

    def decrypt(self, container: bytes, wait_s: Any = None, segment: int = 0) -> NDArray[np.float64]:
        opened: NDArray[np.float64] = self._inner.decrypt(container, wait_s, segment)
        return opened if segment != self._segment else np.full_like(opened, self._value)

    def ticket(self, wait_s: Any = None) -> None:
        return None


@pytest.mark.parametrize("backend", ["clear", "seal"])
def test_what_opens_strangely_changes_nothing_that_others_see(backend: str) -> None:
    edge_bundle, cloud = packed()
    usual: list[tuple[int, int]] | None = None
    strange = [(-1, 0.0), (0, np.nan), (0, 1e300), (1, -np.inf), (TRIPS - 1, np.nan)]
    for segment, value in strange if backend == "clear" else strange[:2]:
        tail = LocalTail(cloud.programs[0], backend, cloud.following[0])
        cipher = StrangeCipher(tail._cipher, segment, value)
        tail._cipher = cipher  # type: ignore[assignment]
        with EdgeRuntime(edge_bundle, {0: tail}, CloudOnly()) as edge:
            answer = edge.infer(images(1)[0])
            report = edge._accounting.take()
        usual = usual or cipher.sent
        # Every round trip is made, with bytes of the usual size, and reports tell of an answer by the tail.
        assert cipher.sent == usual == [(i, size) for i, (_, size) in enumerate(usual)]
        assert len(usual) == TRIPS
        assert dict(report.routes) == {"tail": 1}
        assert not report.fallbacks
        outward = seen_from_outside(answer)
        assert (outward.route, outward.fallback) == ("tail", None)
        # The device's own people are told the truth.
        assert (answer.route, answer.fallback) == (("tail", None) if segment < 0 else ("exit1", "refused"))
        assert answer.extra["round_trips"] == TRIPS


def test_a_deadline_holds_over_all_round_trips() -> None:
    edge_bundle, cloud = packed()
    now = [0.0]
    tail = LocalTail(cloud.programs[0], "clear", cloud.following[0])
    honest = tail.evaluate

    def slow(container: bytes, remaining_s: float | None, segment: int = 0) -> TailReply:
        reply = honest(container, None, segment)
        now[0] += 0.4
        return reply

    tail.evaluate = slow  # type: ignore[method-assign]
    with EdgeRuntime(edge_bundle, {0: tail}, CloudOnly(), clock=lambda: now[0]) as edge:
        assert edge.infer(images(1)[0], deadline_s=0.4 * TRIPS + 0.2).route == "tail"
        late = edge.infer(images(1)[0], deadline_s=1.0)
        assert (late.route, late.fallback) == ("exit1", "deadline")
        assert late.extra["round_trips"] < TRIPS
        # What was learned counts every round trip, and the prior did before.
        learned = edge._latencies.estimate("offload0", now[0])
    assert learned.p95_s >= 0.4 * TRIPS


def test_the_prior_of_an_offload_counts_every_round_trip() -> None:
    from edge.priors import DEFAULT_ROUND_TRIP_S, priors_of

    edge, _ = packed()
    specs = edge.segments(0)
    wire_s = sum(s.uplink_bytes + s.reply_bytes for s in specs) * 8 / 1e6
    prior = priors_of(edge, 1e6)["offload0"].p50_s
    assert prior > wire_s + TRIPS * DEFAULT_ROUND_TRIP_S
