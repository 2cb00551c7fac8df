"""The one path: exits, offloads, and the best exit whenever the tail does not deliver."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from blindtail.errors import (
    AccessDenied,
    BlindtailError,
    ConfigError,
    ContainerError,
    DeadlineExceeded,
    EvaluationFailed,
    InputError,
    KeysMissing,
    Overloaded,
    ProgramMismatch,
    SessionLost,
    StateError,
    TailUnavailable,
)
from blindtail.records import Action, Decision, DecisionContext, TailReply, TailTimings
from edge.runtime import EdgeRuntime
from orchestrator.policy import CloudOnly, EdgeOnly, Policy
from tests.clock import FakeClock
from tests.edge_fakes import CLASSES, FakeTail, PlainCipher, bundle_of, image, reply
from tests.runtime_cases import SURE, THRESHOLDS, UNSURE, runtime


def test_a_sure_exit_answers_without_the_tail() -> None:
    tail = FakeTail()
    with runtime(tail) as edge:
        answer = edge.infer(image(2, SURE))
    assert (answer.label, answer.class_name, answer.route, answer.fallback) == (2, "two", "exit1", None)
    assert answer.confidence == pytest.approx(max(answer.probabilities))
    assert sum(answer.probabilities) == pytest.approx(1.0)
    assert tail.calls == []


def test_an_unsure_image_is_answered_by_the_tail() -> None:
    tail = FakeTail()
    with runtime(tail) as edge:
        answer = edge.infer(image(1, UNSURE))
        status = edge.status()
    assert (answer.label, answer.route, answer.fallback) == (3, "tail", None)
    assert answer.offloaded
    assert [e.index for e in answer.exits] == [0, 1]
    assert answer.uplink_bytes == 64
    assert answer.reply_bytes == 8 * CLASSES
    assert answer.timings.eval_s == pytest.approx(0.001)
    assert answer.timings.total_s > 0
    assert status.routes == {"tail": 1}
    assert status.latencies["offload2"].samples == 1


def test_the_timings_add_up() -> None:
    with runtime(FakeTail()) as edge:
        t = edge.infer(image(1, UNSURE)).timings
    steps = t.head_s + t.exits_s + t.decide_s + t.encrypt_s + t.network_s + t.decrypt_s
    assert 0 < steps <= t.total_s


FAULTS: list[tuple[BaseException, str]] = [
    (DeadlineExceeded("x"), "deadline"),
    (TailUnavailable("x"), "unavailable"),
    (Overloaded("x", 0.5), "overloaded"),
    (SessionLost("x"), "session"),
    (KeysMissing("x"), "keys"),
    (EvaluationFailed("x"), "evaluation"),
    (ContainerError("x"), "refused"),
    (ProgramMismatch("x"), "refused"),
    (AccessDenied("x"), "refused"),
    (ValueError("a bug of a library"), "unavailable"),
]


@pytest.mark.parametrize(("fault", "reason"), FAULTS, ids=lambda p: type(p).__name__ if p else p)
def test_any_fault_of_the_tail_is_answered_by_the_best_exit(fault: Exception, reason: str) -> None:
    def fail(_: bytes, __: float | None) -> TailReply:
        raise fault

    with runtime(FakeTail(fail)) as edge:
        answer = edge.infer(image(1, UNSURE), deadline_s=5.0)
        assert edge.status().fallbacks == {reason: 1}
    assert (answer.label, answer.route, answer.fallback) == (1, "exit2", reason)


BAD_REPLIES: list[bytes] = [
    b"",
    b"garbage",
    np.zeros(CLASSES).tobytes()[:-1],
    np.full(CLASSES, np.nan).tobytes(),
]


@pytest.mark.parametrize("container", BAD_REPLIES, ids=["empty", "garbage", "truncated", "nan"])
def test_a_bad_reply_is_refused_and_nothing_is_told_to_the_cloud(container: bytes) -> None:
    tail = FakeTail(lambda _c, _r: TailReply(container, TailTimings(0, 0), 0.0))
    with runtime(tail) as edge:
        answer = edge.infer(image(1, UNSURE))
    assert (answer.label, answer.fallback) == (1, "refused")
    assert len(tail.calls) == 1  # no retry that depends on a decryption


def test_the_reply_is_waited_for_no_longer_than_the_deadline_allows() -> None:
    tail = FakeTail()
    clock = FakeClock()
    with runtime(tail, clock=clock) as edge:
        edge.infer(image(1, UNSURE), deadline_s=2.0)
    (remaining_s,) = tail.calls
    assert remaining_s is not None
    assert 1.0 < remaining_s < 2.0  # a margin for decrypting is kept


def test_a_late_reply_is_dropped_but_teaches_that_offloads_are_slow() -> None:
    clock = FakeClock()

    def slow(_: bytes, remaining_s: float | None) -> TailReply:
        clock.advance((remaining_s or 0) + 0.5)
        return reply()

    with runtime(FakeTail(slow), clock=clock) as edge:
        answer = edge.infer(image(1, UNSURE), deadline_s=2.0)
        learned = edge.status().latencies["offload2"]
    assert (answer.label, answer.fallback) == (1, "deadline")
    assert learned.p95_s >= 2.5


def test_without_time_to_encrypt_nothing_is_sent() -> None:
    tail = FakeTail()
    clock = FakeClock()
    with runtime(tail, clock=clock) as edge:
        answer = edge.infer(image(1, UNSURE), deadline_s=0.001)
        assert edge.status().latencies["offload2"].samples == 0
    assert (answer.route, answer.fallback) == ("exit2", "deadline")
    assert tail.calls == []


def test_a_decryption_that_ends_after_the_deadline_does_not_answer() -> None:
    clock = FakeClock()

    class SlowCipher(PlainCipher):
        def decrypt(self, container: bytes, wait_s: float | None = None, segment: int = 0) -> Any:
            clock.advance(3.0)
            return super().decrypt(container)

    with runtime(FakeTail(cipher=SlowCipher()), clock=clock) as edge:
        assert edge.infer(image(1, UNSURE), deadline_s=2.0).fallback == "deadline"


def test_a_head_that_is_late_answers_from_the_best_exit_so_far() -> None:
    clock = FakeClock()

    class Slow(Policy):
        name = "slow"

        def decide(self, context: DecisionContext) -> Decision:
            if context.exits:
                clock.advance(1.0)
            return Decision(Action.CONTINUE)

    with runtime(FakeTail(), Slow(), clock=clock) as edge:
        answer = edge.infer(image(1, UNSURE), deadline_s=0.5)
    assert (answer.route, answer.fallback) == ("exit1", "deadline")


@pytest.mark.timeout(20)
def test_infer_does_not_outlive_its_deadline() -> None:
    def stuck(_: bytes, remaining_s: float | None) -> TailReply:
        assert remaining_s is not None
        time.sleep(remaining_s)
        raise DeadlineExceeded("late")

    with runtime(FakeTail(stuck)) as edge:
        start_s = time.monotonic()
        answer = edge.infer(image(1, UNSURE), deadline_s=0.3)
        took_s = time.monotonic() - start_s
    assert answer.fallback == "deadline"
    assert 0.2 < took_s < 1.0  # generous: this machine may be busy


def test_a_tail_that_is_not_ready_is_named_as_the_reason() -> None:
    with runtime(FakeTail(ready=False)) as edge:
        answer = edge.infer(image(1, UNSURE))
    assert (answer.route, answer.fallback) == ("exit2", "unavailable")


def test_a_device_without_a_cloud_has_no_fallbacks() -> None:
    with runtime(None) as edge:
        answer = edge.infer(image(1, UNSURE))
        assert edge.wait_ready(1.0)
    assert (answer.route, answer.fallback) == ("exit2", None)


def test_an_offload_before_any_exit_buys_a_fallback_first() -> None:
    def fail(_: bytes, __: float | None) -> TailReply:
        raise TailUnavailable("gone")

    bundle = bundle_of(exits=(2,), cuts=(0,))
    with EdgeRuntime(bundle, {0: FakeTail(fail)}, CloudOnly()) as edge:
        answer = edge.infer(image(1, UNSURE))
    assert (answer.label, answer.route, answer.fallback) == (1, "exit1", "unavailable")


def test_a_policy_that_names_an_unseen_exit_gets_the_next_one() -> None:
    class Hasty(Policy):
        name = "hasty"

        def decide(self, context: DecisionContext) -> Decision:
            return Decision(Action.EXIT, 1)

    with runtime(None, Hasty(), bundle=bundle_of(exits=(1, 2))) as edge:
        assert edge.infer(image(1, UNSURE)).route == "exit1"


@pytest.mark.parametrize("cut", [0, 1])
def test_a_policy_that_offloads_where_no_tail_is_gets_an_exit(cut: int) -> None:
    class Wrong(Policy):
        name = "wrong"

        def decide(self, context: DecisionContext) -> Decision:
            return Decision(Action.OFFLOAD if context.stage == cut else Action.CONTINUE)

    with runtime(FakeTail(), Wrong()) as edge:
        assert edge.infer(image(1, UNSURE)).fallback == "unavailable"


BAD_IMAGES: list[tuple[str, Callable[[], Any], str]] = [
    ("shape", lambda: np.zeros((1, 4, 2), np.uint8), r"\(1, 2, 4\)"),
    ("batch", lambda: np.zeros((1, 1, 2, 4), np.uint8), "one image"),
    ("dtype", lambda: np.zeros((1, 2, 4), np.float64), "float64"),
    ("list", lambda: [[0]], "list"),
    ("none", lambda: None, "NoneType"),
    ("scalar", lambda: np.uint8(3), "uint8"),
]


@pytest.mark.parametrize(("_name", "make", "words"), BAD_IMAGES, ids=[b[0] for b in BAD_IMAGES])
def test_a_bad_image_raises_what_was_expected_and_given(
    _name: str, make: Callable[[], Any], words: str
) -> None:
    with runtime(FakeTail()) as edge, pytest.raises(InputError, match=words):
        edge.infer(make())


@pytest.mark.parametrize(
    ("value", "words"), [(np.nan, "NaN"), (np.inf, "infinit"), (1.5, r"\[0, 1\]"), (-1.0, r"\[0, 1\]")]
)
def test_float_images_hold_finite_values_from_0_to_1(value: float, words: str) -> None:
    pixels = np.zeros((1, 2, 4), np.float32)
    with runtime(None, bundle=bundle_of(dtype="float32")) as edge:
        assert edge.infer(pixels).route == "exit2"
        pixels[0, 0, 0] = value
        with pytest.raises(InputError, match=words):
            edge.infer(pixels)


def test_one_channel_may_be_left_out() -> None:
    with runtime(None) as edge:
        assert edge.infer(image(2, SURE)[0]).label == 2


@pytest.mark.parametrize("deadline_s", [0.0, -1.0, float("nan")])
def test_a_deadline_must_be_positive(deadline_s: float) -> None:
    with runtime(None) as edge, pytest.raises(InputError, match="deadline"):
        edge.infer(image(), deadline_s)


@pytest.mark.timeout(60)
def test_many_threads_get_their_own_answers() -> None:
    def echo(container: bytes, _: float | None) -> TailReply:
        time.sleep(0.001)
        pixels = np.frombuffer(container)[:CLASSES]
        return TailReply((pixels * 30).tobytes(), TailTimings(0, 0.001), 0.001)

    wrong: list[tuple[int, int]] = []
    with runtime(FakeTail(echo)) as edge:

        def work(seed: int) -> None:
            rng = np.random.default_rng(seed)
            for _ in range(50):
                label = int(rng.integers(CLASSES))
                answer = edge.infer(image(label, int(rng.choice([UNSURE, SURE]))))
                if answer.label != label:
                    wrong.append((label, answer.label))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert edge.status().answered == 300
        assert set(edge.status().routes) == {"exit1", "tail"}
    assert wrong == []


@pytest.mark.timeout(30)
def test_async_answers_come_from_one_event_loop() -> None:
    async def ask(edge: EdgeRuntime) -> list[int]:
        answers = await asyncio.gather(*(edge.infer_async(image(i % 4, SURE)) for i in range(12)))
        return [a.label for a in answers]

    with runtime(FakeTail()) as edge:
        assert asyncio.run(ask(edge)) == [i % 4 for i in range(12)]


def test_a_closed_runtime_says_so_and_closes_its_tails() -> None:
    tail = FakeTail()
    edge = runtime(tail)
    edge.close()
    edge.close()
    assert tail.closed
    with pytest.raises(StateError):
        edge.infer(image())
    with pytest.raises(StateError):
        asyncio.run(edge.infer_async(image()))


def test_edge_only_never_touches_a_ready_tail() -> None:
    tail = FakeTail()
    with runtime(tail, EdgeOnly((2.0, 2.0))) as edge:
        assert edge.infer(image(1, SURE)).route == "exit2"
    assert tail.calls == []


def test_a_tail_at_a_cut_that_the_model_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match="no cut"):
        EdgeRuntime(bundle_of(), {1: FakeTail()}, EdgeOnly(THRESHOLDS))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"policy": "thrshold"}, "threshold"),
        ({"policy": "threshold", "policy_parameters": {"tresholds": 0.5}}, "thresholds"),
    ],
)
def test_open_names_what_is_wrong_with_a_policy(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        EdgeRuntime.open(bundle_of(), **settings)


def test_every_error_of_the_tail_has_a_word() -> None:
    from edge.tail import fallback_reason

    allowed = {"deadline", "unavailable", "overloaded", "session", "keys", "evaluation", "refused"}

    def walk(kind: type[BlindtailError]) -> None:
        assert fallback_reason(kind.__new__(kind, "x")) in allowed  # some want more than a message
        for child in kind.__subclasses__():
            walk(child)

    walk(BlindtailError)


def test_nothing_private_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    def fail(container: bytes, _: float | None) -> TailReply:
        raise RuntimeError(f"secret activation {container!r}")

    with caplog.at_level("DEBUG"), runtime(FakeTail(fail)) as edge:
        edge.infer(image(1, UNSURE))
    assert "RuntimeError" in caplog.text  # positive control: something was logged
    assert "secret" not in caplog.text
