"""The workers of a batcher: several at a time, which share cores, linger, prefetch, and probe."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, as_completed

import numpy as np
import pytest

from serving.config import Batching
from serving.errors import Cancelled, InternalError, Overloaded
from serving.runtimes.base import Images, Probabilities
from serving.runtimes.cost import CostCurve
from serving.scheduling import admission, batcher
from serving.scheduling.batcher import Batcher
from serving.scheduling.latency_target import LatencyTarget
from serving.scheduling.queue import BatchResult, Outcome
from tests.serving.scheduling.bench import (
    HOUR,
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


def test_a_full_batch_is_concatenated_while_another_is_computed(
    pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those in it wait as the others do, and are computed though the engine fails on the batch before."""
    monkeypatch.setattr(batcher, "MIN_PREFETCH_BYTES", 24)  # two images of this test
    thread = PrefetchThread()
    bench = Bench(pool, threads=thread, max_queue=20)
    futures = [bench.start(1), *(bench.wait(value, 100 + value) for value in range(2, 8))]
    bench.compute()
    assert bench.engine.entered.acquire(timeout=10)
    assert [thread.concatenated.get(timeout=10) for _ in range(2)] == [4, 4]
    assert bench.batcher.queued == 8
    with pytest.raises(Overloaded, match="8 images are waiting, 13 more would exceed the 20 allowed"):
        bench.enqueue(*range(13))
    futures.append(bench.wait(9))
    bench.engine.failure = RuntimeError("out of memory")
    bench.compute()
    for future in futures[1:3]:
        with pytest.raises(InternalError):
            future.result(10)
    assert bench.engine.entered.acquire(timeout=10)
    bench.engine.failure = None
    bench.compute(3)
    answers = [future.result(10) for future in (futures[0], *futures[3:])]
    assert [answer.batch_size for answer in answers] == [1, 4, 4, 4, 4, 1]
    assert [answer.probabilities[0, 0] for answer in answers] == [1, 4, 5, 6, 7, 9]
    assert bench.batcher.drain(10)
    assert bench.batcher.queued == 0


@pytest.mark.parametrize(("min_bytes", "requests", "is_prefetched"), [(24, 4, True), (25, 4, False), (24, 3, False)])
def test_only_full_batches_of_large_requests_are_prefetched(
    min_bytes: int, requests: int, is_prefetched: bool, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small ones take longer to hand over than to copy, and a part of a batch may still grow."""
    monkeypatch.setattr(batcher, "MIN_PREFETCH_BYTES", min_bytes)
    thread = PrefetchThread()
    bench = Bench(pool, threads=thread)
    bench.start(1)
    for value in range(requests):
        bench.enqueue(value, value)
    bench.compute(3)
    assert bench.batcher.drain(10)
    assert ("prefetch-0" in thread.names) == is_prefetched


def test_a_prefetched_batch_is_given_up_for_who_goes_first(
    pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And for those who left: their images are not computed, and neither waits longer than it would have."""
    monkeypatch.setattr(batcher, "MIN_PREFETCH_BYTES", 24)
    thread, here = PrefetchThread(), True
    bench = Bench(pool, threads=thread, max_queue=20)
    futures = [bench.start(1), bench.wait(2, 102), bench.wait(3, 103)]
    left = bench.wait(4, 104, is_active=lambda: here)
    futures.append(bench.wait(5, 105))
    bench.compute()
    assert [thread.concatenated.get(timeout=10) for _ in range(2)] == [4, 4]
    futures.append(bench.wait(6, 106, priority=1))
    here = False
    bench.compute(2)
    assert [future.result(10).probabilities[0, 0] for future in futures] == [1, 2, 3, 5, 6]
    assert bench.engine.batches == [[1], [2, 102, 3, 103], [6, 106, 5, 105]]
    with pytest.raises(Cancelled):
        left.result(10)


def test_a_probe_is_computed_alone_and_counts_for_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Callers go before it; a busy batcher needs none."""
    counted: list[int] = []
    engine = GatedEngine()
    curve = CostCurve({1: HOUR_NS})
    bench = Batcher(engine.run, curve=curve, count=lambda size, _: counted.append(size))
    bench.probe(images(7))
    assert engine.entered.acquire(timeout=10)
    assert bench.is_busy
    bench.probe(images(8))  # there is one
    future: Future[Outcome] = Future()
    bench.enqueue(images(1), future.set_result, time.monotonic() + 10)  # less than an hour: beside a probe it is idle
    with pytest.raises(Overloaded):
        bench.enqueue(images(2), future.set_result, time.monotonic() + 10)
    engine.gate.release(2)
    assert isinstance(future.result(10), BatchResult)
    assert bench.drain(10)
    assert (engine.batches, counted, bench.answered, bench.is_busy) == ([[7], [1]], [1], 2, False)
    assert not caplog.records
    bench.close()
    bench.probe(images(9))
    assert not bench.is_busy


def test_a_probe_shares_no_batch() -> None:
    """Whoever comes just after it is computed before it, and alone."""
    engine, threads = GatedEngine(), HeldThreads()
    engine.gate.release(2)
    bench = Batcher(engine.run, threads=threads)
    bench.probe(images(7))
    future: Future[Outcome] = Future()
    bench.enqueue(images(1), future.set_result)
    (work,) = threads.work
    work()
    assert isinstance(future.result(10), BatchResult)
    assert engine.batches == [[1], [7]]


def test_a_prediction_knows_that_full_batches_will_share_cores() -> None:
    """On two instances with two further ones, batches of three hours take six."""
    curve = KnownCurve({1: HOUR_NS, 2: 1.8 * HOUR_NS, 4: 3 * HOUR_NS})
    batching = Batching(max_batch=4, max_queue_ms=float("inf"))
    bench = Batcher(GatedEngine().run, batching, curve, instances=2, overflow=2, threads=HeldThreads())
    bench.enqueue(images(1, 2, 3, 4), ignore)
    with pytest.raises(Overloaded, match="may take"):
        bench.enqueue(images(5), ignore, time.monotonic() + 5.9 * admission.SAFETY_FACTOR * HOUR)
    bench.enqueue(images(5), ignore, time.monotonic() + 6.1 * admission.SAFETY_FACTOR * HOUR)


def test_a_latency_target_learns_what_callers_waited(clock: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """From arrival to the end of the computation; nothing of probes and failures."""
    recorded, threads = list[float](), HeldThreads()
    monkeypatch.setattr(LatencyTarget, "record", lambda _, ns: recorded.append(ns))

    def run(batch: Images) -> Probabilities:
        clock[0] += 100
        if batch[0, 0, 0, 0] == 2:
            raise RuntimeError("out of memory")
        return batch[:, 0, 0, :1].astype(np.float32)

    bench = Batcher(run, Batching(target_p99_ms=1000), threads=threads)
    bench.enqueue(images(1), ignore)
    clock[0] += 30
    threads.work.pop()()
    bench.enqueue(images(2), ignore)
    threads.work.pop(0)()
    threads.work.pop()()
    bench.probe(images(3))
    threads.work.pop()()
    assert bench.drain(10)
    assert recorded == [130]
    assert bench.answered == 3


@pytest.mark.parametrize("costs", [{1: 3, 2: 8, 4: 18}, {1: 3, 2: 6, 4: 11.5}])
def test_a_batch_is_no_larger_than_pays(pool: ThreadPoolExecutor, costs: dict[int, float]) -> None:
    """Where an image costs more in larger batches, or nearly as much, requests do not wait for each other."""
    bench = Bench(pool, CostCurve({size: cost * HOUR_NS for size, cost in costs.items()}))
    futures = [bench.start(1), bench.wait(2), bench.wait(3)]
    bench.compute(3)
    assert [future.result(10).batch_size for future in futures] == [1, 1, 1]


def test_who_lingers_waits_for_a_full_batch(pool: ThreadPoolExecutor) -> None:
    """For an hour, if need be; but not once the batcher is closed."""
    bench = Bench(pool, linger_ms=3.6e6)
    first = bench.enqueue(1)
    futures = [first, bench.enqueue(2), bench.enqueue(3, 4)]
    bench.compute()
    assert [outcome.batch_size for future in futures if isinstance(outcome := future.result(10), BatchResult)] == [
        4
    ] * 3
    last = bench.enqueue(5)
    bench.batcher.close()
    bench.compute()
    assert isinstance(last.result(10), BatchResult)


def test_several_instances_run_at_a_time() -> None:
    """Two batches that wait for each other are both computed."""
    meeting = threading.Barrier(2)

    def run(batch: Images) -> Probabilities:
        meeting.wait(10)
        return np.zeros((len(batch), 2), np.float32)

    batcher = Batcher(run, Batching(max_batch=1), instances=2)
    futures: list[Future[Outcome]] = [Future() for _ in range(6)]
    for future in futures:
        batcher.enqueue(images(1), future.set_result)
    assert all(isinstance(future.result(10), BatchResult) for future in futures)
    assert batcher.drain(10)


def test_who_lingers_waits_no_longer_than_the_oldest_request_may(clock: list[int]) -> None:
    """Even if others go before it."""
    engine, threads = GatedEngine(), HeldThreads()
    engine.gate.release()
    bench = Batcher(engine.run, Batching(linger_ms=5), threads=threads)
    bench.enqueue(images(1), ignore)
    clock[0] += 4_000_000
    bench.enqueue(images(2), ignore, priority=1)
    clock[0] += 1_000_000
    threads.work[0]()
    assert engine.batches == [[2, 1]]


def test_a_lone_request_lingers_for_the_rest_of_its_time(clock: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it is computed without company."""
    engine, threads, waits = GatedEngine(), HeldThreads(), list[float]()

    def wait(_: threading.Condition, seconds: float) -> None:
        waits.append(seconds)
        clock[0] += round(seconds * 1e9)

    engine.gate.release()
    bench = Batcher(engine.run, Batching(linger_ms=5), threads=threads)
    bench.enqueue(images(1), ignore)
    clock[0] += 2_000_000
    with monkeypatch.context() as patch:
        patch.setattr(threading.Condition, "wait", wait)
        threads.work[0]()
    assert waits == [0.003]
    assert engine.batches == [[1]]


def test_no_more_workers_begin_than_batches_may_run() -> None:
    """The further ones only for full batches."""
    threads = HeldThreads()
    bench = Batcher(GatedEngine().run, Batching(max_batch=4), overflow=1, threads=threads)
    workers = []
    for request in (images(1), images(2), images(3, 4), images(*range(4)), images(*range(4))):
        bench.enqueue(request, ignore)
        workers.append(len(threads.work))
    assert workers == [1, 1, 2, 2, 2]


def test_batches_of_instances_share_no_cores() -> None:
    """Two of them take as long as one: a deadline leaves time for both requests in a batch."""
    engine, threads = GatedEngine(), HeldThreads()
    engine.gate.release()
    curve = KnownCurve({1: HOUR_NS, 2: 1.8 * HOUR_NS, 4: 3 * HOUR_NS})
    batching = Batching(max_batch=4, max_queue_ms=float("inf"))
    bench = Batcher(engine.run, batching, curve, instances=2, threads=threads)
    for value in (1, 2):
        bench.enqueue(images(value), ignore, time.monotonic() + 2.7 * HOUR)
    threads.work[0]()
    assert engine.batches == [[1, 2]]


def test_batches_that_share_cores_are_measured_as_if_they_did_not(clock: list[int]) -> None:
    """The second begins and ends while the first one runs; what is counted is the time that passed."""
    curve, threads = KnownCurve({1: 1.0, 4: 4.0}), HeldThreads()
    counted: list[tuple[int, int]] = []

    def run(batch: Images) -> Probabilities:
        if len(threads.work) > 1:
            threads.work.pop()()
        clock[0] += 100
        return batch[:, 0, 0, :1].astype(np.float32)

    bench = Batcher(
        run, Batching(max_batch=4), curve, overflow=1, threads=threads, count=lambda *batch: counted.append(batch)
    )
    bench.enqueue(images(1, 2, 3, 4), ignore)
    bench.enqueue(images(5, 6, 7, 8), ignore)
    threads.work[0]()
    assert curve.updates == [(4, 50), (4, 200)]
    assert counted == [(4, 100), (4, 200)]
    assert bench.drain(10)
    assert bench.answered == 2


def test_a_batch_that_shares_cores_is_done_by_its_deadlines(pool: ThreadPoolExecutor) -> None:
    """It takes twice as long beside another one."""
    bench = Bench(pool, KnownCurve({1: HOUR_NS, 2: 1.8 * HOUR_NS, 4: 3 * HOUR_NS}), overflow=1)
    futures = [bench.start(1), bench.wait(2, deadline=time.monotonic() + 3 * HOUR), bench.wait(3), bench.wait(4)]
    futures.append(bench.start(5))
    assert bench.engine.batches == [[1], [2]]
    bench.compute(4)
    assert [future.result(10).batch_size for future in futures[:2]] == [1, 1]
    assert bench.batcher.drain(10)


def test_the_longest_time_until_an_answer_is_that_of_the_largest_batch() -> None:
    """Of those that may come and those that run, after the wait for more."""
    curve, threads, expected = KnownCurve({1: 10e6, 4: 40e6}), HeldThreads(), list[float]()

    def run(batch: Images) -> Probabilities:
        expected.append(bench.expected_ns)
        return batch[:, 0, 0, :1].astype(np.float32)

    bench = Batcher(run, Batching(max_batch=4, linger_ms=5), curve, threads=threads)
    assert bench.expected_ns == 45e6
    for request in (images(1, 2, 3, 4), images(*range(8))):
        bench.enqueue(request, ignore)
    threads.work[0]()
    assert expected == [45e6, 85e6]
    assert bench.expected_ns == 45e6


def test_an_overflow_batch_begins_when_it_is_full(pool: ThreadPoolExecutor) -> None:
    """And leaves less than that to the batch that is next anyway."""
    bench = Bench(pool, overflow=1)
    futures = [bench.start(1), bench.wait(2), bench.wait(3, 4)]
    futures.append(pool.submit(submit, bench.batcher, images(5)))  # makes the batch full
    assert bench.engine.entered.acquire(timeout=10)
    futures += [bench.wait(6), bench.wait(7)]
    assert bench.engine.batches == [[1], [2, 3, 4, 5]]
    bench.compute(3)
    assert [future.result(10).batch_size for future in futures] == [1, 4, 4, 4, 2, 2]
    assert bench.batcher.drain(10)
    again = bench.start(8)
    bench.compute()
    assert again.result(10).batch_size == 1


def test_batches_of_any_size_run_beside_an_overflow_batch(pool: ThreadPoolExecutor) -> None:
    """However few images wait: the cores of the first batch are idle."""
    bench = Bench(pool, overflow=1)
    first, *full = bench.start(1), *(bench.enqueue(value) for value in (2, 3, 4, 5))
    assert bench.engine.entered.acquire(timeout=10)
    bench.compute()  # for whichever of the two comes first
    next(as_completed((first, full[0]), 10))
    last = bench.enqueue(6)
    assert bench.engine.entered.acquire(timeout=10)
    bench.compute(2)
    assert isinstance(outcome := last.result(10), BatchResult)
    assert outcome.batch_size == 1


def test_overflow_survives_work_that_nobody_waits_for(pool: ThreadPoolExecutor) -> None:
    """Batches that turn out empty do not count as running."""
    bench = Bench(pool, overflow=1)
    first = bench.start(1)
    gone = [bench.enqueue(value, is_active=lambda: False) for value in range(2, 6)]
    assert all(isinstance(future.result(10), Cancelled) for future in gone)
    bench.compute()
    assert first.result(10).batch_size == 1
    futures = [bench.start(6), bench.wait(7)]
    bench.compute(2)
    assert [future.result(10).batch_size for future in futures] == [1, 1]


def test_a_latency_target_refuses_what_would_miss_it(pool: ThreadPoolExecutor) -> None:
    """And keeps batches to half of it, so that one that is under way does not spoil it."""
    curve = CostCurve({1: 3.6e12, 2: 4.3e12, 4: 7.2e12})
    bench = Bench(pool, curve, target_p99_ms=3.3 * HOUR_MS)
    futures = [bench.start(1), bench.wait(2), bench.wait(3)]  # an hour for the first, 1.2 for the others
    with pytest.raises(Overloaded, match="the answer would take .* ms, too long for the server's latency target"):
        submit(bench.batcher, images(4, 5))
    bench.compute(2)
    assert [future.result(10).batch_size for future in futures] == [1, 2, 2]
