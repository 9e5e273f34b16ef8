"""The batcher, with an engine that computes when the test says so."""

from __future__ import annotations

import gc
import queue
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest

from serving.config import Batching
from serving.errors import Cancelled, DeadlineExceeded, InternalError, Overloaded, TooLarge, Unavailable
from serving.runtimes.base import Concatenator, Images, Probabilities
from serving.runtimes.cost import CostCurve
from serving.scheduling import admission, batcher
from serving.scheduling.batch import Batch
from serving.scheduling.batcher import Batcher
from serving.scheduling.queue import BatchResult, Outcome
from tests.serving.scheduling.bench import (
    HOUR,
    HOUR_EACH,
    HOUR_MS,
    HOUR_NS,
    Bench,
    GatedEngine,
    HeldThreads,
    KnownCurve,
    PrefetchThread,
    ignore,
    images,
)
from tests.serving.waiting import submit


def test_a_lone_request_is_answered_by_the_thread_that_computed_it() -> None:
    """One change of threads, and the answer says what it cost."""
    threads: list[int] = []
    outcomes: list[Outcome] = []

    def run(batch: Images) -> Probabilities:
        threads.append(threading.get_ident())
        return np.zeros((len(batch), 2), np.float32)

    def done(outcome: Outcome) -> None:
        threads.append(threading.get_ident())
        outcomes.append(outcome)

    batcher = Batcher(run)
    batcher.enqueue(images(1, 2), done)
    assert batcher.drain(10)
    assert threads[0] == threads[1] != threading.get_ident()
    (answer,) = outcomes
    assert isinstance(answer, BatchResult)
    assert answer.probabilities.shape == (2, 2)
    assert answer.batch_size == 2
    assert answer.compute_ns > 0


def test_what_waits_becomes_the_next_batch_in_order_of_arrival(pool: ThreadPoolExecutor) -> None:
    """Whole requests up to max_batch; each gets its own rows back."""
    bench = Bench(pool)
    futures = [bench.start(1), bench.wait(2), bench.wait(3, 4), bench.wait(5, 6), bench.wait(7)]
    bench.compute(3)
    answers = [future.result(10) for future in futures]
    assert bench.engine.batches == [[1], [2, 3, 4], [5, 6, 7]]
    assert [answer.probabilities[:, 0].tolist() for answer in answers] == [[1], [2], [3, 4], [5, 6], [7]]
    assert [answer.batch_size for answer in answers] == [1, 3, 3, 3, 3]
    assert answers[1].queue_ns > 0
    assert all(answer.compute_ns > 0 for answer in answers)


def test_the_queue_is_also_known_in_milliseconds(pool: ThreadPoolExecutor, clock: list[int]) -> None:
    """What runs takes its time, too; an idle batcher has none."""
    bench = Bench(pool, KnownCurve(HOUR_EACH))
    assert bench.batcher.queue_ms == 0
    futures = [bench.start(1), bench.wait(2, 3)]
    assert bench.batcher.queue_ms == 3 * HOUR_MS
    clock[0] += int(HOUR_NS / 2)
    assert bench.batcher.queue_ms == 2.5 * HOUR_MS
    bench.compute(2)
    for future in futures:
        future.result(10)


def test_no_thread_is_needed_that_was_not_there_at_the_start(
    pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other processes may have taken all that the machine has."""
    monkeypatch.setattr(batcher, "MIN_PREFETCH_BYTES", 24)
    threads = PrefetchThread()
    threads.submit(lambda: None).result(10)  # an executor starts its thread with its first work
    bench = Bench(pool, threads=threads, max_queue=20)
    futures = [bench.enqueue(1)]
    assert bench.engine.entered.acquire(timeout=10)

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    futures += [bench.enqueue(value, 100 + value) for value in range(2, 8)]
    bench.compute(4)
    outcomes = [future.result(10) for future in futures]
    assert [outcome.batch_size for outcome in outcomes if isinstance(outcome, BatchResult)] == [1, 4, 4, 4, 4, 4, 4]
    assert threads.concatenated.qsize() == 3  # each batch once


def test_whatever_fails_each_request_gets_an_answer(
    pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also outside of the engine, and also if it is no Exception; the next request is computed as ever."""

    class Panic(BaseException):
        """As libraries in Rust raise it."""

    bench = Bench(pool)
    first = bench.start(1)
    second = bench.wait(2)
    with monkeypatch.context() as patch:
        patch.setattr(bench.batcher.curve, "update", lambda *_: (_ for _ in ()).throw(Panic))
        bench.engine.failure = None
        bench.compute(2)
        for future in (first, second):
            with pytest.raises(InternalError):
                future.result(10)
    assert "a batch failed outside of the engine" in caplog.text
    third = bench.start(3)
    bench.compute()
    assert third.result(10).probabilities[0, 0] == 3
    assert bench.batcher.drain(10)


def test_a_request_of_which_nobody_knows_whether_its_caller_waits_is_dropped(pool: ThreadPoolExecutor) -> None:
    """With an error; the others are computed."""

    def is_active() -> bool:
        raise ValueError

    bench = Bench(pool)
    futures = [bench.enqueue(1), bench.enqueue(2, is_active=is_active), bench.enqueue(3)]
    bench.compute(3)
    outcomes = [future.result(10) for future in futures]
    assert [type(outcome) for outcome in outcomes] == [BatchResult, InternalError, BatchResult]


def test_answers_come_in_the_order_of_batches() -> None:
    """The engine goes on while one is given, and nothing overtakes it."""
    engine, threads, answered, may_end = GatedEngine(), HeldThreads(), list[int](), threading.Event()

    def answer(_: Outcome) -> None:
        assert may_end.wait(10)
        answered.append(1)

    engine.gate.release(2)
    bench = Batcher(engine.run, Batching(max_batch=1), threads=threads)
    bench.enqueue(images(1), answer)
    bench.enqueue(images(2), lambda _: answered.append(2))
    threads.work[0]()
    assert engine.batches == [[1], [2]]
    assert answered == []
    may_end.set()
    assert bench.drain(10)
    assert answered == [1, 2]


def test_a_worker_that_cannot_form_a_batch_is_busy_for_good() -> None:
    """A watchdog then finds that nothing is answered."""

    class Threads(HeldThreads):
        """Without memory."""

        def concatenator(self) -> Concatenator:
            raise MemoryError

    threads = Threads()
    bench = Batcher(GatedEngine().run, threads=threads)
    bench.enqueue(images(1), ignore)
    threads.work.pop()()
    assert threads.work == []
    assert bench.is_busy
    assert not bench.drain(0)


def test_a_batch_that_was_answered_is_not_answered_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the one after it cannot be formed."""
    batches, outcomes, threads = [Batch()], list[Outcome](), HeldThreads()
    monkeypatch.setattr(batcher, "Batch", batches.pop)
    engine = GatedEngine()
    engine.gate.release()
    bench = Batcher(engine.run, threads=threads)
    bench.enqueue(images(1), outcomes.append)
    threads.work.pop()()
    assert [type(outcome) for outcome in outcomes] == [BatchResult]
    assert threads.work == []
    assert bench.is_busy


def test_callers_without_a_deadline_let_those_with_one_go_first(pool: ThreadPoolExecutor) -> None:
    """In order of arrival among themselves; the batch is filled with those that wait."""
    bench = Bench(pool, max_queue=100)
    far = time.monotonic() + 1000
    futures = [bench.start(1), bench.wait(2), bench.wait(3), bench.wait(4), bench.wait(5)]
    futures += [bench.wait(11, deadline=far), bench.wait(12, deadline=far - 500)]
    bench.compute(3)
    for future in futures:
        future.result(10)
    assert bench.engine.batches == [[1], [11, 12, 2, 3], [4, 5]]


def test_callers_without_a_deadline_wait_only_so_long(pool: ThreadPoolExecutor) -> None:
    """As long as they may wait anyway: after that, those with a deadline go behind them."""
    bench = Bench(pool, max_queue_ms=0.001, max_batch=2)
    futures = [bench.enqueue(1), bench.enqueue(2), bench.enqueue(3)]
    future: Future[Outcome] = Future()
    futures.append(future)
    bench.batcher.enqueue(images(11), future.set_result, time.monotonic() + 1000)
    bench.compute(4)
    for each in futures:
        each.result(10)
    assert [value for batch in bench.engine.batches for value in batch] == [1, 2, 3, 11]


def test_a_queue_full_of_patient_callers_keeps_no_other_out(pool: ThreadPoolExecutor) -> None:
    """Nor does what they are told; they themselves are kept out."""
    bench = Bench(pool, CostCurve({1: 1e9, 4: 1e9}), max_queue=4, max_queue_ms=10_000)
    futures = [bench.start(1), bench.wait(2, 3, 4, 5)]
    with pytest.raises(Overloaded):
        submit(bench.batcher, images(6))
    soon = time.monotonic() + 100
    assert bench.batcher.refusal(float("inf"))
    assert bench.batcher.refusal(soon) is None
    futures.append(bench.wait(11, deadline=soon))
    with pytest.raises(Overloaded, match="may take"):
        submit(bench.batcher, images(12), time.monotonic() + 2)
    bench.compute(4)
    for future in futures:
        future.result(10)


def test_a_size_that_costs_too_much_is_tried_now_and_then(
    pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a cost that is wrong would keep it out for ever, while smaller requests are computed."""
    bench = Bench(pool, CostCurve({1: 1.0, 4: 3600e9}), max_queue=100)
    monkeypatch.setattr(admission, "TRIAL_INTERVAL", 0)
    first = bench.start(1)
    with pytest.raises(DeadlineExceeded):
        submit(bench.batcher, images(2, 3, 4, 5), time.monotonic() + 100)
    with monkeypatch.context() as patch:
        patch.setattr(admission, "TRIAL_INTERVAL", 1e9)
        tried = bench.wait(2, 3, 4, 5, deadline=time.monotonic() + 100)
    with pytest.raises(DeadlineExceeded):
        submit(bench.batcher, images(2, 3, 4, 5), time.monotonic() + 100)
    with pytest.raises(DeadlineExceeded):
        submit(bench.batcher, images(2, 3, 4, 5), time.monotonic() - 1)
    bench.compute(2)
    assert [first.result(10).batch_size, tried.result(10).batch_size] == [1, 4]
    assert bench.batcher.drain(10)
    again = bench.start(1)
    right = bench.wait(2, 3, 4, 5, deadline=time.monotonic() + 100)
    bench.compute(2)
    assert [again.result(10).batch_size, right.result(10).batch_size] == [1, 4]


def test_a_refusal_does_not_outlive_the_load(pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    """An idle server refuses nothing for what it costs."""
    monkeypatch.setattr(admission, "REFUSAL_TTL_NS", 10**15)
    bench = Bench(pool, CostCurve({1: HOUR_NS}), max_queue_ms=1.5 * HOUR_MS)
    futures = [bench.start(1), bench.wait(2)]
    with pytest.raises(Overloaded):
        submit(bench.batcher, images(3))
    assert bench.batcher.refusal(float("inf"))
    bench.compute(2)
    for future in futures:
        future.result(10)
    assert bench.batcher.drain(10)
    assert bench.batcher.refusal(float("inf")) is None


def test_a_request_that_arrives_during_a_batch_is_in_the_next(pool: ThreadPoolExecutor) -> None:
    """The batch is fixed when the engine is free, not before."""
    bench = Bench(pool)
    first, second = bench.start(1), bench.wait(2)
    bench.compute()
    assert bench.engine.entered.acquire(timeout=10)  # the batch of 2 has begun
    third = bench.wait(3)
    bench.compute(2)
    assert [future.result(10).batch_size for future in (first, second, third)] == [1, 1, 1]


def test_a_large_request_is_computed_alone(pool: ThreadPoolExecutor) -> None:
    """It shares its batch neither with the request before it nor with the one after."""
    bench = Bench(pool, max_queue=16)
    futures = [bench.start(1), bench.wait(2), bench.wait(*range(10, 20)), bench.wait(3)]
    bench.compute(4)
    assert futures[2].result(10).probabilities[:, 0].tolist() == list(range(10, 20))
    assert futures[3].result(10).batch_size == 1
    assert bench.engine.batches == [[1], [2], list(range(10, 20)), [3]]


def test_work_that_nobody_waits_for_is_dropped(pool: ThreadPoolExecutor) -> None:
    """Cancelled and expired requests cost no computation, whatever their place in the queue."""
    bench = Bench(pool)
    first = bench.start(1)
    cancelled = bench.wait(2, is_active=lambda: False)
    deadline = time.monotonic() + 0.5
    expired = bench.wait(3, deadline=deadline)
    last = bench.wait(4)
    while time.monotonic() <= deadline:
        time.sleep(0)
    bench.compute(2)
    assert last.result(10).batch_size == first.result(10).batch_size == 1
    assert bench.engine.batches == [[1], [4]]
    with pytest.raises(Cancelled):
        cancelled.result(10)
    with pytest.raises(DeadlineExceeded):
        expired.result(10)


def test_a_queue_of_dropped_requests_leaves_the_batcher_free(pool: ThreadPoolExecutor) -> None:
    """A batch that turns out empty is none."""
    bench = Bench(pool)
    first, cancelled = bench.start(1), bench.wait(2, is_active=lambda: False)
    bench.compute()
    first.result(10)
    assert isinstance(cancelled.exception(10), Cancelled)
    again = bench.start(3)
    bench.compute()
    assert again.result(10).probabilities[0, 0] == 3


def test_a_full_queue_refuses_at_once(pool: ThreadPoolExecutor) -> None:
    """The bound is in images; who is refused learns when to try again, and who waits is answered."""
    bench = Bench(pool, max_queue=3)
    futures = [bench.start(1), bench.wait(2, 3)]
    with pytest.raises(Overloaded, match="2 images are waiting, 2 more would exceed the 3 allowed") as refusal:
        submit(bench.batcher, images(4, 5))
    assert refusal.value.retry_ms >= 1
    futures.append(bench.wait(6))
    bench.compute(2)
    assert [len(future.result(10).probabilities) for future in futures] == [1, 2, 1]


@pytest.mark.parametrize("fault", ["exception", "short"])
def test_a_failed_batch_fails_its_own_requests_only(pool: ThreadPoolExecutor, fault: str) -> None:
    """Each caller has an error of its own, without details of the engine; the next batch is computed."""
    bench = Bench(pool)
    first, second, third = bench.start(1), bench.wait(2), bench.wait(3)
    bench.compute()
    first.result(10)
    assert bench.engine.entered.acquire(timeout=10)
    if fault == "exception":
        bench.engine.failure = ValueError("secret")
    else:
        bench.engine.dropped_rows = 1
    fourth = bench.wait(4)
    bench.compute()
    errors = [future.exception(10) for future in (second, third)]
    assert all(isinstance(error, InternalError) and "secret" not in str(error) for error in errors)
    assert errors[0] is not errors[1]
    assert bench.engine.entered.acquire(timeout=10)
    bench.engine.failure, bench.engine.dropped_rows = None, 0
    bench.compute()
    assert fourth.result(10).probabilities[0, 0] == 4


def test_closing_refuses_new_requests_and_answers_old_ones(pool: ThreadPoolExecutor) -> None:
    """Nothing that was accepted is lost."""
    bench = Bench(pool)
    futures = [bench.start(1), bench.wait(2)]
    bench.batcher.close()
    with pytest.raises(Unavailable, match="shutting down"):
        submit(bench.batcher, images(3))
    assert not bench.batcher.drain(0)
    bench.compute(2)
    assert bench.batcher.drain(10)
    assert [future.result(10).probabilities[0, 0] for future in futures] == [1, 2]


def test_a_posted_request_holds_nobody_up(pool: ThreadPoolExecutor) -> None:
    """One that finds the engine free is computed on another thread; those that come meanwhile are the next batch."""
    bench = Bench(pool)
    first = bench.enqueue(1)
    assert bench.engine.entered.acquire(timeout=10)
    rest = [bench.enqueue(2), bench.enqueue(3, 4)]
    assert not first.done()
    bench.compute(2)
    outcomes = [future.result(10) for future in (first, *rest)]
    assert bench.engine.batches == [[1], [2, 3, 4]]
    answers = [outcome for outcome in outcomes if isinstance(outcome, BatchResult)]
    assert [answer.probabilities[:, 0].tolist() for answer in answers] == [[1], [2], [3, 4]]


def test_posted_and_submitted_requests_share_batches(pool: ThreadPoolExecutor) -> None:
    """In order of arrival, of whichever kind they are."""
    bench = Bench(pool, max_batch=2)
    posted = [bench.enqueue(1)]
    assert bench.engine.entered.acquire(timeout=10)
    submitted = [bench.wait(2)]
    posted.append(bench.enqueue(3))
    posted.append(bench.enqueue(4))
    submitted.append(bench.wait(5))
    bench.compute(3)
    assert [future.result(10).probabilities[0, 0] for future in submitted] == [2, 5]
    assert all(isinstance(future.result(10), BatchResult) for future in posted)
    assert bench.engine.batches == [[1], [2, 3], [4, 5]]


def test_a_posted_request_is_refused_or_fails_like_others(pool: ThreadPoolExecutor) -> None:
    """At once if it cannot wait; through its callback if that shows later."""
    bench = Bench(pool, max_queue=3)
    first = bench.enqueue(1)
    assert bench.engine.entered.acquire(timeout=10)
    cancelled, last = bench.enqueue(2, is_active=lambda: False), bench.enqueue(3)
    with pytest.raises(Overloaded):
        bench.enqueue(4, 5, 6)
    bench.compute()
    assert isinstance(first.result(10), BatchResult)
    bench.engine.failure = ValueError("secret")
    bench.batcher.close()
    with pytest.raises(Unavailable):
        bench.enqueue(6)
    assert not bench.batcher.drain(0)
    bench.compute()
    assert isinstance(cancelled.result(10), Cancelled)
    assert isinstance(last.result(10), InternalError)
    assert bench.batcher.drain(10)


def test_a_request_that_was_not_read_is_checked_as_one_of_one_image(pool: ThreadPoolExecutor) -> None:
    """It changes nothing; where there are priorities, its own is not known, and it is not refused."""
    bench = Bench(pool, CostCurve({1: HOUR_NS}), max_queue=1)
    bench.batcher.check(time.monotonic() + 1)  # nothing is refused by an idle engine
    futures = [bench.start(1)]
    bench.batcher.check(float("inf"))
    with pytest.raises(DeadlineExceeded, match="computing takes"):
        bench.batcher.check(time.monotonic() + 1)
    futures.append(bench.wait(2))
    assert bench.batcher.queued == 1
    with pytest.raises(Overloaded, match="1 images are waiting"):
        bench.batcher.check(float("inf"))
    bench.batcher.enqueue(images(3), ignore, priority=1)
    bench.batcher.check(float("inf"))
    bench.compute(3)
    assert [future.result(10).probabilities.tolist() for future in futures] == [[[1]], [[2]]]


def test_whoever_is_gone_makes_room_in_a_full_queue(pool: ThreadPoolExecutor) -> None:
    """At once, not only when the engine comes to it."""
    bench, here = Bench(pool, max_queue=3), True
    first = bench.enqueue(1)
    assert bench.engine.entered.acquire(timeout=10)
    gone = [bench.enqueue(value, is_active=lambda: here) for value in (2, 3, 4)]
    here = False
    others = [bench.enqueue(value) for value in (5, 6, 7)]
    assert all(isinstance(call.result(10), Cancelled) for call in gone)
    bench.compute(2)
    assert all(isinstance(call.result(10), BatchResult) for call in (first, *others))
    assert bench.engine.batches == [[1], [5, 6, 7]]


def test_a_full_queue_is_searched_only_now_and_then(clock: list[int]) -> None:
    """A flood of requests that are refused costs no more than one."""
    bench, here = Batcher(GatedEngine().run, Batching(max_queue=2), threads=HeldThreads()), True
    gone: list[Future[Outcome]] = [Future(), Future()]
    for future in gone:
        bench.enqueue(images(1), future.set_result, is_active=lambda: here)
    with pytest.raises(Overloaded):
        bench.enqueue(images(2), ignore)
    here = False
    clock[0] += batcher.SWEEP_INTERVAL_NS - 1
    with pytest.raises(Overloaded):
        bench.enqueue(images(2), ignore)
    clock[0] += 1
    bench.enqueue(images(2), ignore)
    assert all(isinstance(future.result(10), Cancelled) for future in gone)
    assert bench.queued == 1


def test_all_answers_to_those_who_are_gone_are_waited_for(pool: ThreadPoolExecutor, clock: list[int]) -> None:
    """Also if a full queue is searched again before the first of them are out."""
    bench, may_answer = Bench(pool, max_queue=1), threading.Event()

    def hold(_: Outcome) -> None:
        may_answer.wait(10)

    bench.enqueue(1)
    assert bench.engine.entered.acquire(timeout=10)
    for _ in range(2):
        bench.batcher.enqueue(images(2), hold, is_active=lambda: False)
        clock[0] += batcher.SWEEP_INTERVAL_NS
        with pytest.raises(TooLarge):
            bench.enqueue(3, 4)  # room is searched for, though even an empty queue has none
    bench.compute()
    assert not bench.batcher.drain(0)
    may_answer.set()
    assert bench.batcher.drain(10)


def test_a_refusal_holds_for_a_moment_for_those_who_can_wait_no_longer(
    pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They need not be read; it is nobody's own."""
    now = time.perf_counter_ns()
    monkeypatch.setattr(time, "perf_counter_ns", lambda: now)
    bench = Bench(pool, max_queue=1)
    assert bench.batcher.refusal(float("inf")) is None
    bench.enqueue(1)
    assert bench.engine.entered.acquire(timeout=10)
    bench.enqueue(2)
    assert bench.batcher.refusal(float("inf")) is None
    with pytest.raises(Overloaded) as caught:
        bench.enqueue(3)
    caught.value.request_id = "of the one that was refused"
    found = bench.batcher.refusal(float("inf"))
    assert isinstance(found, Overloaded)
    assert (str(found), found.retry_ms, found.request_id) == (str(caught.value), caught.value.retry_ms, "")
    now += admission.REFUSAL_TTL_NS
    assert bench.batcher.refusal(float("inf")) is None
    bench.compute(2)


def test_the_threads_of_a_batcher_end_with_it() -> None:
    """A version that is served no longer leaves nothing behind."""
    workers: list[threading.Thread] = []

    def run(batch: Images) -> Probabilities:
        workers.append(threading.current_thread())
        return np.zeros((len(batch), 2), np.float32)

    batcher = Batcher(run)
    for _ in range(2):
        future: Future[Outcome] = Future()
        batcher.enqueue(images(1), future.set_result)
        future.result(10)
    assert workers[0] is workers[1] is not threading.current_thread()
    assert batcher.drain(10)
    del batcher
    gc.collect()
    workers[0].join(10)
    assert not workers[0].is_alive()


def test_many_threads_get_their_own_answers(pool: ThreadPoolExecutor) -> None:
    """2,000 requests from 16 threads, submitted and posted, each of which checks what it gets."""

    def run(batch: Images) -> Probabilities:
        return batch[:, 0, 0, :1].astype(np.float32)

    batcher = Batcher(run, Batching(max_batch=8, max_queue=100))

    def ask(number: int) -> bool:
        values = [number % 251] * (1 + number % 3)
        if number % 2:
            answer: Outcome = submit(batcher, images(*values))
        else:
            future: Future[Outcome] = Future()
            batcher.enqueue(images(*values), future.set_result)
            answer = future.result(10)
        return isinstance(answer, BatchResult) and bool(answer.probabilities[:, 0].tolist() == values)

    assert all(pool.map(ask, range(2000)))
    assert batcher.queued == 0


def test_priorities_go_first_and_equals_in_order(pool: ThreadPoolExecutor) -> None:
    """Those that come late go before the ones that wait, if they are of a higher priority."""
    bench = Bench(pool, max_batch=2)
    first = bench.start(0)
    waiting = [bench.wait(value, priority=priority) for value, priority in ((1, 3), (2, 2), (3, 2), (4, 1))]
    bench.compute()
    first.result(timeout=10)
    assert bench.engine.entered.acquire(timeout=10)
    late = [bench.wait(value, priority=1) for value in (5, 6)]
    bench.compute(3)
    assert [future.result(timeout=10).probabilities[0, 0] for future in (*waiting, *late)] == [1, 2, 3, 4, 5, 6]
    assert bench.engine.batches == [[0], [4, 2], [5, 6], [3, 1]]


def test_the_queue_is_bounded_in_milliseconds_of_work(pool: ThreadPoolExecutor) -> None:
    """What is under way counts too; the caller learns when to come again."""
    bench = Bench(pool, CostCurve(HOUR_EACH), max_queue_ms=1.5 * HOUR_MS)
    futures = [bench.start(1), bench.wait(2)]
    with pytest.raises(Overloaded, match="ms of work are waiting, more than the 5.4e[+]06 ms allowed") as refusal:
        submit(bench.batcher, images(3))
    assert 1.9 * HOUR_MS < refusal.value.retry_ms <= 2 * HOUR_MS
    bench.compute(2)
    for future in futures:
        future.result(10)


def test_a_deadline_that_cannot_be_met_is_refused_at_once(pool: ThreadPoolExecutor) -> None:
    """As DeadlineExceeded where the computation alone would take too long; as Overloaded where the others are to blame,
    which another server may not have.
    """
    bench = Bench(pool, KnownCurve({1: HOUR_NS, 2: 1.8 * HOUR_NS, 4: 3 * HOUR_NS}))
    futures = [bench.start(1), bench.wait(2, 3)]
    with pytest.raises(DeadlineExceeded, match="computing takes 10800000 ms, [89]...... ms are left"):
        submit(bench.batcher, images(4, 5, 6, 7), deadline=time.monotonic() + 2.5 * HOUR)
    # An hour until the engine is free, and 2.4 for the batch that all of them are in.
    with pytest.raises(Overloaded, match="the answer may take .* ms, 14...... ms are left"):
        submit(bench.batcher, images(4), deadline=time.monotonic() + 4 * HOUR)
    futures.append(bench.wait(8, deadline=time.monotonic() + 5 * HOUR))
    bench.compute(2)
    assert [future.result(10).batch_size for future in futures] == [1, 3, 3]


def test_a_batch_is_done_by_the_deadline_of_each_in_it(pool: ThreadPoolExecutor) -> None:
    """Whoever would make it too late for another waits for the next one."""
    bench = Bench(pool, KnownCurve({1: HOUR_NS, 2: 1.8 * HOUR_NS, 4: 3.4 * HOUR_NS}))
    futures = [bench.start(1), bench.wait(2, deadline=time.monotonic() + 2.8 * HOUR), *map(bench.wait, (3, 4, 5))]
    bench.compute(3)
    assert [future.result(10).batch_size for future in futures] == [1, 3, 3, 3, 1]


def test_an_idle_engine_turns_nothing_down(pool: ThreadPoolExecutor) -> None:
    """Whatever its last batch took: else one that stalled would keep all later requests out."""
    bench = Bench(pool, CostCurve({1: 3600e9}), max_queue_ms=1)
    first = bench.start(1)
    bench.compute()
    assert first.result(10).batch_size == 1
    again = bench.start(2)
    bench.compute()
    assert again.result(10).batch_size == 1


def test_who_fails_to_take_an_answer_harms_no_other() -> None:
    """Neither those in the same batch nor those after it."""
    engine = GatedEngine()
    engine.gate.release(10)
    batcher, answers = Batcher(engine.run), queue.SimpleQueue[Outcome]()

    def fail(_: Outcome) -> None:
        raise ValueError("the client is gone")

    for _ in range(3):
        batcher.enqueue(images(1), fail)
        batcher.enqueue(images(1), answers.put)
    assert all(isinstance(answers.get(timeout=10), BatchResult) for _ in range(3))
    assert batcher.drain(10)
