"""A batcher whose engine computes when a test says so."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from serving.config import Batching
from serving.runtimes.base import Concatenator, Images, Probabilities
from serving.runtimes.cost import CostCurve
from serving.scheduling.batcher import Batcher
from serving.scheduling.queue import DEFAULT_PRIORITY, BatchResult, Outcome
from tests.serving.waiting import submit

HOUR, HOUR_MS, HOUR_NS = 3600, 3.6e6, 3.6e12  # so long that the time the test takes does not count
HOUR_EACH = {1: HOUR_NS, 2: 2 * HOUR_NS, 4: 4 * HOUR_NS}


class GatedEngine:
    """Answers each image with its first value; waits before each batch until the gate is opened for it."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.entered = threading.Semaphore(0)
        self.gate = threading.Semaphore(0)
        self.failure: Exception | None = None
        self.dropped_rows = 0

    def run(self, images: Images) -> Probabilities:
        """Record the batch, and compute it once the gate is open."""
        self.batches.append(images[:, 0, 0, 0].tolist())
        self.entered.release()
        assert self.gate.acquire(timeout=20)  # longer than a test waits for anything: it must not go on by itself
        if self.failure is not None:
            raise self.failure
        return images[: len(images) - self.dropped_rows, 0, 0, :1].astype(np.float32)


def images(*values: int) -> Images:
    """Return an image for each value."""
    return np.array(values, np.uint8).reshape(-1, 1, 1, 1) * np.ones((1, 2, 2, 3), np.uint8)


def ignore(_: Outcome) -> None:
    """Take an outcome that the test does not look at."""


class PrefetchThread(ThreadPoolExecutor):
    """An engine thread for which batches are prefetched."""

    prefetch = True

    def __init__(self) -> None:
        super().__init__(1)
        self.concatenated: queue.Queue[int] = queue.Queue()
        self.names: set[str] = set()

    def concatenator(self) -> Concatenator:
        """Return what notes the size of each batch."""

        def concatenate(parts: Sequence[Images]) -> Images:
            batch = np.concatenate(parts)
            self.names.add(threading.current_thread().name)
            self.concatenated.put(len(batch))
            return batch

        return concatenate


class KnownCurve(CostCurve):
    """The costs that a test says, whatever its batches take, which are noted."""

    def __init__(self, measured: Mapping[int, float]) -> None:
        super().__init__(measured)
        self.updates: list[tuple[int, float]] = []

    def update(self, images: int, ns: float) -> None:
        """Learn nothing."""
        self.updates.append((images, ns))


class Bench:
    """A batcher over a gated engine, and threads that submit to it in a known order."""

    def __init__(
        self,
        pool: ThreadPoolExecutor,
        curve: CostCurve | None = None,
        overflow: int = 0,
        threads: PrefetchThread | None = None,
        **batching: float,
    ) -> None:
        self.engine = GatedEngine()
        options: dict[str, Any] = {"max_batch": 4, "max_queue": 8, "max_queue_ms": float("inf"), **batching}
        self.batcher = Batcher(self.engine.run, Batching(**options), curve, overflow=overflow, threads=threads)
        self._pool = pool

    def start(self, *values: int) -> Future[BatchResult]:
        """Submit a request that finds the engine free, and return once it is being computed."""
        future = self._pool.submit(submit, self.batcher, images(*values))
        assert self.engine.entered.acquire(timeout=10)
        return future

    def wait(
        self,
        *values: int,
        deadline: float = float("inf"),
        is_active: Callable[[], bool] = lambda: True,
        priority: int = DEFAULT_PRIORITY,
    ) -> Future[BatchResult]:
        """Submit a request while the engine is busy, and return once it is in the queue."""
        before = self.batcher.queued
        future = self._pool.submit(submit, self.batcher, images(*values), deadline, is_active, priority)
        while self.batcher.queued == before:
            time.sleep(0)  # gives way to the submitting thread
        return future

    def enqueue(self, *values: int, is_active: Callable[[], bool] = lambda: True) -> Future[Outcome]:
        """Post a request."""
        future: Future[Outcome] = Future()
        self.batcher.enqueue(images(*values), future.set_result, is_active=is_active)
        return future

    def compute(self, batches: int = 1) -> None:
        """Open the gate for so many batches."""
        self.engine.gate.release(batches)


class HeldThreads:
    """Threads that begin when the test says so."""

    prefetch = False

    def __init__(self) -> None:
        self.work: list[Callable[[], object]] = []

    def submit(self, work: Callable[[], object]) -> None:
        """Hold the work."""
        self.work.append(work)

    def concatenator(self) -> Concatenator:
        """Return NumPy's."""
        return np.concatenate
