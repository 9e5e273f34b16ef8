"""Shadows: some of the answered requests are computed by another version, too, and the answers are compared.

That happens after the answer was sent, on idle capacity only. What waits too long for that is dropped.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import NamedTuple

from resnet import BadInput
from serving.models.statistics import TrackedRequest
from serving.rollouts.agreement import Agreement
from serving.rollouts.idle import RESERVE, IdleCapacity
from serving.rollouts.others import Other, Others, ShadowFailed, ShadowHangs
from serving.runtimes.base import Images, Probabilities

MAX_IMAGES = 64  # that wait; the images of one request beyond these are not compared
MAX_WAIT_SECONDS = 1.0

log = logging.getLogger(__name__)


class ShadowedRequest(NamedTuple):
    """A request that was answered, to be compared."""

    request_id: str
    version: int
    images: Images
    given: Probabilities
    arrived: float


class ShadowCounts(NamedTuple):
    """What became of the images to compare: those that were dropped, and those that failed."""

    dropped: int
    failed: int
    problem: str


class Shadow:
    """Observes the requests for a model, and compares a share of the answers with those of another version.

    It has a thread of its own until `close`.
    """

    def __init__(
        self,
        agreement: Agreement,
        others: Others,
        is_idle: Callable[[], bool],
        percent: float = 100.0,
        reserve: float = RESERVE,
        on_hang: Callable[[], object] = lambda: None,
    ) -> None:
        """Start.

        Args:
            agreement: Counts how the answers compare.
            others: What to compare with.
            is_idle: Returns whether the server has nothing else to do.
            percent: Share of the requests, 0 to 100.
            reserve: As in `IdleCapacity`.
            on_hang: Called when the other version gives no answer any more, after which nothing is compared.

        Raises:
            BadInput: The process may have no further thread.
        """
        self.agreement, self._others, self._is_idle = agreement, others, is_idle
        self._share, self._on_hang = percent / 100, on_hang
        self._queue: SimpleQueue[ShadowedRequest | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._waiting = self._dropped = self._failed = 0  # images
        self._skipped = 0  # before their share was taken; nearly, as threads that count at the same time may count one
        self._is_full = False  # until all that waits is done
        self._problem = ""
        self._capacity = IdleCapacity(reserve)
        self._is_computing, self._computed_ns = False, 0
        self._closed = threading.Event()
        try:
            threading.Thread(target=self._run, name="shadow", daemon=True).start()
        except RuntimeError:
            raise BadInput("the server cannot start a further thread, which a shadow needs") from None

    def end(self, request: TrackedRequest) -> None:
        """Take a request that was answered."""
        if request.answer is None or request.images is None:
            return
        if self._is_full:  # the callers of a busy server wait for no more than this
            self._skipped += len(request.images)
            return
        if random.random() >= self._share or not self._others.covers(request.version):
            return
        images, given = request.images[:MAX_IMAGES], request.answer.probabilities[:MAX_IMAGES]
        with self._lock:
            if self._waiting and self._waiting + len(images) > MAX_IMAGES:
                self._is_full = True
                self._dropped += len(images)
                return
            self._waiting += len(images)
        self._queue.put(ShadowedRequest(request.find_id(), request.version, images, given.copy(), time.monotonic()))

    def counts(self) -> ShadowCounts:
        """Return what became of the images that were not compared."""
        with self._lock:
            return ShadowCounts(self._dropped + round(self._share * self._skipped), self._failed, self._problem)

    def overlaps(self, request: TrackedRequest) -> bool:
        """Return whether something was computed for the shadow while a request lasted, which ends now."""
        return self._is_computing or self._computed_ns >= request.arrived_ns

    def close(self) -> None:
        """Compare nothing more."""
        self._closed.set()
        self._queue.put(None)
        self._others.close()

    def _run(self) -> None:
        while (request := self._queue.get()) is not None and not self._closed.is_set():
            done = failed = 0
            problem = ""
            try:
                done = self._compare(request)
            except ShadowHangs as error:
                log.error("answers are compared no longer: %s", error)
                self._on_hang()
                return
            except ShadowFailed as error:
                failed, problem = len(request.images), str(error)
            except Exception as error:  # the next request may be compared
                failed, problem = len(request.images), f"{type(error).__name__}: {error}"
            if problem and problem != self._problem:
                log.warning("answers cannot be compared: %s", problem)
            with self._lock:
                self._problem = problem
                self._waiting -= len(request.images)
                self._is_full = self._is_full and self._waiting > 0
                self._failed += failed
                self._dropped += len(request.images) - done - failed
            del request  # it holds the memory of its images

    def _compare(self, request: ShadowedRequest) -> int:
        """Compare the answers for as many images as idle capacity allows, and return for how many."""
        done = 0
        while done < len(request.images):
            other = self._others.find(request.version)
            if other is None or not self._wait_until_idle(request.arrived + MAX_WAIT_SECONDS):
                break
            part = slice(done, done + other.chunk)
            answers = self._compute(other, request.images[part])
            if answers is None:
                continue
            if answers.shape != request.given[part].shape:
                raise ShadowFailed(f"version {request.version} has other classes than the one that it is compared with")
            self.agreement.add(
                request.request_id, request.version, request.images[part], request.given[part], answers, done
            )
            done += len(answers)
        return done

    def _compute(self, other: Other, images: Images) -> Probabilities | None:
        start, self._is_computing = time.monotonic(), True
        try:
            answers = other.compute(images)
        finally:
            self._computed_ns, self._is_computing = time.perf_counter_ns(), False
        if answers is not None:
            self._capacity.record(start, time.monotonic())
        return answers

    def _wait_until_idle(self, end: float) -> bool:
        """Wait for the next moment in which a batch may be computed; return False if there is none until `end`."""
        while (now := time.monotonic()) < end and not self._closed.is_set():
            if self._capacity.may_compute(self._is_idle(), now):
                return True
            self._closed.wait(self._capacity.pause)
        return False
