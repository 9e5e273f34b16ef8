"""Batches, without a batcher: what each request of one gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from serving.errors import Cancelled, InternalError
from serving.runtimes.base import Images
from serving.scheduling.batch import Batch
from serving.scheduling.queue import BatchResult, Entry, Outcome
from serving.threads import WorkerPool


class WaitingCaller:
    """Its request of some images, each of one value, and what it is answered."""

    def __init__(self, *values: int, place: int = 0, is_active: Callable[[], bool] = lambda: True) -> None:
        self.outcomes: list[Outcome] = []
        images = np.array(values, np.uint8).reshape(-1, 1, 1, 1) * np.ones((1, 2, 2, 3), np.uint8)
        self.entry = Entry(images, float("inf"), is_active, self.outcomes.append)
        self.entry.arrival_ns = 100
        self.entry.order = 2, place, place


def concatenate(parts: Sequence[Images]) -> Images:
    """Concatenate two or more parts: one alone needs no copy."""
    assert len(parts) > 1
    return np.concatenate(parts)


def test_each_request_gets_its_own_rows_and_times() -> None:
    """The rows in its order; the wait from its arrival; the size of the whole batch."""
    first, second, third = WaitingCaller(1), WaitingCaller(2, 3), WaitingCaller(4)
    batch = Batch([first.entry, second.entry, third.entry], size=4, start_ns=150)
    batch.respond(np.arange(4, dtype=np.float32).reshape(4, 1), 30)
    rows = []
    for caller in (first, second, third):
        (outcome,) = caller.outcomes
        assert isinstance(outcome, BatchResult)
        rows.append(outcome.probabilities[:, 0].tolist())
        assert outcome[1:] == (50, 30, 4)
    assert rows == [[0], [1, 2], [3]]


def test_without_probabilities_each_request_gets_an_error_of_its_own() -> None:
    """A dropped one gets its reason in either case."""
    first, second, dropped = WaitingCaller(1), WaitingCaller(2), WaitingCaller(3)
    reason = Cancelled("the caller went away")
    batch = Batch([first.entry, second.entry], [(dropped.entry, reason)], size=2)
    assert batch.removed == [first.entry, second.entry, dropped.entry]
    batch.respond(None, 0)
    assert [type(outcome) for caller in (first, second) for outcome in caller.outcomes] == [InternalError] * 2
    assert first.outcomes[0] is not second.outcomes[0]
    assert "the engine failed" in str(first.outcomes[0])
    assert dropped.outcomes == [reason]


@pytest.mark.parametrize("is_prefetched", [False, True])
def test_images_are_concatenated_in_the_order_of_requests(is_prefetched: bool) -> None:
    """On a thread beforehand, or when they are needed."""
    batch, pool = Batch([WaitingCaller(1).entry, WaitingCaller(2, 3).entry]), WorkerPool(1, "prefetch")
    if is_prefetched:
        batch.prefetch(concatenate, pool)
    images = batch.concatenate(concatenate)
    assert images is not None
    assert images[:, 0, 0, 0].tolist() == [1, 2, 3]


def test_one_request_is_computed_without_a_copy(caplog: pytest.LogCaptureFixture) -> None:
    """And none gives no images, which is no error."""
    caller = WaitingCaller(1, 2)
    assert Batch([caller.entry]).concatenate(concatenate) is caller.entry.images
    assert Batch().concatenate(concatenate) is None
    assert not caplog.records


@pytest.mark.parametrize("is_prefetched", [False, True])
def test_images_that_cannot_be_concatenated_are_none(is_prefetched: bool, caplog: pytest.LogCaptureFixture) -> None:
    """The error is logged, on whichever thread it was."""

    class Panic(RuntimeError):
        """Such as too little memory."""

    def fail(parts: Sequence[Images]) -> Images:
        raise Panic(len(parts))

    batch, pool = Batch([WaitingCaller(1).entry, WaitingCaller(2).entry]), WorkerPool(1, "prefetch")
    if is_prefetched:
        batch.prefetch(fail, pool)
    assert batch.concatenate(fail) is None
    assert "a batch of 2 requests cannot be concatenated" in caplog.text
    assert "Panic" in caplog.text


def test_a_prefetched_batch_is_stale_if_a_caller_left_or_another_goes_first() -> None:
    """Before any request of it; one that waits behind it changes nothing."""
    here = True
    batch = Batch([WaitingCaller(1, place=1).entry, WaitingCaller(2, place=3, is_active=lambda: here).entry])
    assert not batch.is_stale(None)
    assert not batch.is_stale(WaitingCaller(4, place=4).entry)
    assert batch.is_stale(WaitingCaller(3, place=2).entry)
    here = False
    assert batch.is_stale(None)
