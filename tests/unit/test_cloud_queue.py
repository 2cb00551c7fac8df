"""The queue: fairness, deadlines, bounds, crashes. A hand-driven pool, no Ray, no clock of the wall."""

from __future__ import annotations

import asyncio

import pytest

from blindtail.errors import AccessDenied, ContainerError, DeadlineExceeded, EvaluationFailed, Overloaded
from cloud.config import QueueLimits
from cloud.evaluators import EvaluatorCrashed, EvaluatorGone
from cloud.queue import Predictor, Queue
from tests.clock import FakeClock
from tests.queue_cases import Hand, HandPool, run, settle, work

pytestmark = pytest.mark.timeout(20)


def test_one_request_comes_back_with_its_times() -> None:
    async def body(queue: Queue, pool: HandPool, clock: FakeClock) -> None:
        future = queue.submit("a", work("1"), 5)
        await settle()
        clock.now += 0.5
        await pool.hands[0].answer(eval_s=0.2)
        result = future.result()
        assert (result.container, result.evaluator, result.eval_s) == (b"1!", "e0", 0.2)
        assert result.queue_s == pytest.approx(0.3)

    run(body)


def test_at_most_two_outstanding_per_evaluator() -> None:
    async def body(queue: Queue, pool: HandPool, clock: FakeClock) -> None:
        for i in range(7):
            queue.submit("a", work(str(i)), 5)
        await settle()
        assert [len(h.waiting) for h in pool.hands] == [2, 2]
        assert len(queue) == 3

    run(body, evaluators=2)


def test_a_quiet_identity_is_not_starved_by_a_busy_one() -> None:
    async def body(queue: Queue, pool: HandPool, clock: FakeClock) -> None:
        for i in range(20):
            queue.submit("busy", work(f"b{i}"), 60)
        await settle()
        queue.submit("quiet", work("q"), 60)
        order = []
        while pool.hands[0].waiting:
            order.append(await pool.hands[0].answer())
        assert len(order) == 21
        assert order.index(b"q") <= 4  # two were with the evaluator already

    run(body)


def test_turns_are_shared_in_seconds_not_in_requests() -> None:
    async def body(queue: Queue, pool: HandPool, clock: FakeClock) -> None:
        for i in range(40):
            queue.submit("slow", work(f"s{i}", "slow"), 60)
            queue.submit("fast", work(f"f{i}", "fast"), 60)
        await settle()
        order = []
        for _ in range(22):
            slow = pool.hands[0].waiting[0][0].program_id == "slow"
            order.append(await pool.hands[0].answer(eval_s=1.0 if slow else 0.1))
        fast = sum(tag.startswith(b"f") for tag in order)
        assert 16 <= fast <= 21  # ten to one, less what was sent before the other came

    run(body, cost_s=lambda program: 1.0 if program == "slow" else 0.1)


def test_expired_work_is_dropped_when_its_turn_comes() -> None:
    async def body(queue: Queue, pool: HandPool, clock: FakeClock) -> None:
        queue.submit("a", work("0"), 60)
        queue.submit("a", work("1"), 60)
        late = queue.submit("a", work("late"), 1.0)
        kept = queue.submit("a", work("kept"), 60)
        await settle()
        clock.now += 2
        await pool.hands[0].answer()
        assert isinstance(late.exception(), DeadlineExceeded)
        assert [w.container for w, _ in pool.hands[0].waiting] == [b"1", b"kept"]
        assert not kept.done()

    run(body)


def test_no_time_left_is_refused_at_once() -> None:
    async def body(queue: Queue, pool: HandPool, clock: FakeClock) -> None:
        with pytest.raises(DeadlineExceeded):
            queue.submit("a", work("x"), 0.0)

    run(body)


@pytest.mark.parametrize("limits", [QueueLimits(jobs=3), QueueLimits(jobs_per_identity=3)])
def test_a_full_queue_says_when_to_come_back(limits: QueueLimits) -> None:
    async def body(queue: Queue, pool: HandPool, clock: FakeClock) -> None:
        for i in range(5):  # two with the evaluator, three wait
            queue.submit("a", work(str(i)), 60)
        with pytest.raises(Overloaded) as caught:
            queue.submit("a", work("x"), 60)
        assert 0.1 <= caught.value.retry_after_s <= 1.0
        if limits.jobs_per_identity == 3:
            queue.submit("b", work("other"), 60)

    run(body, limits=limits)


def test_abandoned_work_never_reaches_an_evaluator() -> None:
    async def body(queue: Queue, pool: HandPool, clock: FakeClock) -> None:
        futures = [queue.submit("a", work(str(i)), 60) for i in range(4)]
        await settle()
        queue.abandon(futures[2])
        queue.abandon(futures[2])  # twice is once
        queue.abandon(futures[0])  # runs already: it is finished
        assert futures[2].cancelled()
        assert not futures[0].cancelled()
        seen = []
        while pool.hands[0].waiting:
            seen.append(await pool.hands[0].answer())
        assert seen == [b"0", b"1", b"3"]
        assert len(queue) == 0

    run(body)


def test_an_error_of_the_evaluator_reaches_its_caller_alone() -> None:
    async def body(queue: Queue, pool: HandPool, clock: FakeClock) -> None:
        bad, odd, good = (queue.submit("a", work(t), 60) for t in ("bad", "odd", "good"))
        await settle()
        await pool.hands[0].fail(ContainerError("cut"))
        await pool.hands[0].fail(ValueError("internals"))
        await pool.hands[0].answer()
        assert isinstance(bad.exception(), ContainerError)
        assert isinstance(odd.exception(), EvaluationFailed)
        assert "internals" not in str(odd.exception())
        assert good.result().container == b"good!"

    run(body)


def test_a_crash_is_tried_once_more_on_an_idle_evaluator() -> None:
    async def body(queue: Queue, pool: HandPool, clock: FakeClock) -> None:
        first, second = pool.hands
        futures = [queue.submit("a", work(str(i)), 60) for i in range(6)]
        await settle()
        pool.hands = [second]
        await first.fail(EvaluatorCrashed(), count=2)
        assert len(second.waiting) == 2  # busy: the retry waits until it is idle
        await second.answer()
        assert len(second.waiting) == 1  # nothing new is put before the retry
        await second.answer()
        assert [w.container for w, _ in second.waiting] == [b"0"]
        while second.waiting:
            await second.answer()
        assert all(f.result().evaluator == "e1" for f in futures)

    run(body, evaluators=2)


def test_the_second_crash_of_a_request_is_the_last_and_quarantines_its_client() -> None:
    async def body(queue: Queue, pool: HandPool, clock: FakeClock) -> None:
        poison, bystander = queue.submit("evil", work("poison"), 60), queue.submit("good", work("g"), 60)
        await settle()
        await pool.hands[0].fail(EvaluatorCrashed(), count=2)
        assert [w.container for w, _ in pool.hands[0].waiting] == [b"poison"]
        await pool.hands[0].fail(EvaluatorCrashed())
        assert isinstance(poison.exception(), EvaluationFailed)
        await pool.hands[0].answer()
        assert bystander.result().container == b"g!"
        with pytest.raises(AccessDenied, match="refused for another"):
            queue.submit("evil", work("again"), 60)
        queue.submit("good", work("fine"), 60)
        clock.now += QueueLimits().quarantine_s + 1
        queue.submit("evil", work("forgiven"), 60)

    run(body)


def test_two_crashes_far_apart_are_forgiven() -> None:
    async def body(queue: Queue, pool: HandPool, clock: FakeClock) -> None:
        for _ in range(2):
            queue.submit("a", work("x"), 60)
            await settle()
            await pool.hands[0].fail(EvaluatorCrashed())
            await pool.hands[0].answer()
            clock.now += QueueLimits().crash_window_s + 1
        queue.submit("a", work("x"), 60)

    run(body)


def test_work_that_never_arrived_blames_nobody() -> None:
    async def body(queue: Queue, pool: HandPool, clock: FakeClock) -> None:
        future = queue.submit("a", work("x"), 60)
        await settle()
        for _ in range(2):
            await pool.hands[0].fail(EvaluatorGone())
        await pool.hands[0].answer()
        assert future.result().container == b"x!"
        queue.submit("a", work("y"), 60)

    run(body)


def test_without_evaluators_work_waits_for_one() -> None:
    async def body(queue: Queue, pool: HandPool, clock: FakeClock) -> None:
        hands, pool.hands = pool.hands, []
        future = queue.submit("a", work("x"), 60)
        await settle()
        assert not future.done()
        pool.hands = hands
        pool.on_change()
        await settle()
        await hands[0].answer()
        assert future.result().container == b"x!"

    run(body)


def test_closing_refuses_what_waits() -> None:
    async def body(queue: Queue, pool: HandPool, clock: FakeClock) -> None:
        futures = [queue.submit("a", work(str(i)), 60) for i in range(4)]
        await settle()
        await queue.close()
        assert all(f.done() for f in futures)
        assert isinstance(futures[3].exception(), Overloaded)
        with pytest.raises(Overloaded):
            queue.submit("a", work("x"), 60)

    run(body)


def test_predictions_follow_measurements_and_ignore_outliers() -> None:
    predict = Predictor(lambda program: 0.1)
    assert predict("p") == 0.1
    for _ in range(100):
        predict.learn("p", 0.2)
    assert predict("p") == pytest.approx(0.2, rel=0.01)
    predict.learn("p", 1000.0)
    assert predict("p") < 0.3


# -- evaluators that do something ahead ----------------------------------------------------


def test_work_goes_to_the_evaluator_that_did_a_part_of_it_if_that_is_not_full() -> None:
    async def body(queue: Queue, pool: HandPool, clock: FakeClock) -> None:
        queue.submit("a", work("0", holder="e1"), 5)
        queue.submit("a", work("1", holder="e1"), 5)  # e0 is idle
        await settle()
        assert [len(h.waiting) for h in pool.hands] == [0, 2]
        queue.submit("a", work("2", holder="e1"), 5)
        queue.submit("a", work("3", holder="gone"), 5)
        await settle()
        assert [[w.container for w, _ in h.waiting] for h in pool.hands] == [[b"2", b"3"], [b"0", b"1"]]

    run(body, evaluators=2)


def test_an_evaluator_is_idle_when_it_has_nothing_and_nothing_waits() -> None:
    async def body(queue: Queue, pool: HandPool, clock: FakeClock) -> None:
        told = []
        queue.on_idle = lambda: told.append(len(queue.idle()))
        queue.submit("a", work("0"), 5)
        await settle()
        assert [m.name for m in queue.idle()] == ["e1"]
        queue.take_aside(queue.idle()[0], "a")
        assert queue.idle() == []
        for i in range(1, 5):
            queue.submit("a", work(str(i)), 5)
        await settle()
        # What is done ahead takes one of the two places.
        assert [len(h.waiting) for h in pool.hands] == [2, 1]
        assert len(queue) == 2
        told.clear()
        queue.bring_back(pool.hands[1])
        await settle()
        assert [len(h.waiting) for h in pool.hands] == [2, 2]
        assert told == []  # one request waits still
        for _ in range(3):
            await pool.hands[0].answer()
            await pool.hands[1].answer() if pool.hands[1].waiting else None
        assert [m.name for m in queue.idle()] == ["e0", "e1"]
        assert told[-1] == 2

    run(body, evaluators=2)


@pytest.mark.parametrize("job_first", [True, False])
def test_a_crash_while_aside_blames_whom_it_was_for(job_first: bool) -> None:
    async def body(queue: Queue, pool: HandPool, clock: FakeClock) -> None:
        innocent = []
        for round_ in range(2):
            old = pool.hands[0]
            queue.take_aside(old, "guilty")
            innocent.append(queue.submit("innocent", work(str(round_)), 30))
            await settle()
            pool.hands[0] = Hand(f"next-{round_}")
            crashed = old.waiting.pop()[1]
            if job_first:
                crashed.set_exception(EvaluatorCrashed())
                await settle()
                queue.bring_back(old, crashed=True)
            else:
                queue.bring_back(old, crashed=True)
                crashed.set_exception(EvaluatorCrashed())
            await settle()
            await pool.hands[0].answer()
            assert innocent[-1].result().container == str(round_).encode() + b"!"
        queue.refuse_quarantined("innocent")
        with pytest.raises(AccessDenied):
            queue.refuse_quarantined("guilty")

    run(body)


def test_what_takes_less_with_a_ticket_is_not_learned() -> None:
    async def main() -> None:
        pool, clock, predict = HandPool(1), FakeClock(), Predictor(lambda program: 0.1)
        queue = Queue(pool, QueueLimits(), predict, clock)
        future = queue.submit("a", work("1"), 5)
        await settle()
        await pool.hands[0].answer(eval_s=0.01, ticket=True)
        assert future.result().ticket
        assert predict("p") == 0.1
        await queue.close()

    asyncio.run(main())
