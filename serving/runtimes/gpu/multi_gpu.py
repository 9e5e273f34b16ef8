"""One engine for several GPUs: each batch goes to a GPU that is free."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Protocol

import numpy as np

from serving.runtimes.base import Concatenator, Engine, EngineThreads, Images, Probabilities
from serving.runtimes.cost import CostCurve

# After a failure a GPU gets no work for so long. A failing GPU is free again quickly, and some errors are permanent: it
# would take the batches that other GPUs could compute.
COOLDOWN_SECONDS = 1.0


class SingleThreadEngine(Engine, EngineThreads, Protocol):
    """An engine that computes on one thread of its own.

    Attributes:
        thread: Identifier of that thread.
        curve: Cost of a batch by its size.
    """

    thread: int
    curve: CostCurve


class MultiGpuEngine:
    """Several engines of the same model, one for each GPU, as one engine.

    Attributes:
        provider: What computes.
        instances: Concurrent calls of `run`, one for each GPU; further calls wait.
        curve: Cost of a batch by its size, on any of the GPUs.
        parts: The engines, one for each GPU.
    """

    prefetch = False  # a batch that one GPU has taken could not be computed by another that is free earlier

    def __init__(self, engines: Sequence[SingleThreadEngine]) -> None:
        """Compute with `engines`, at least one."""
        self.provider, self.instances, self.curve = engines[0].provider, len(engines), engines[0].curve
        self.parts = tuple(engines)
        self._by_thread = {engine.thread: engine for engine in engines}
        self._lock = threading.Lock()
        self._free, self._waiting = deque(engines), deque[Callable[[], object]]()
        self._failed: set[SingleThreadEngine] = set()

    def run(self, images: Images) -> Probabilities:
        """Map uint8 [n, height, width, channels] to float32 [n, classes], on an engine's thread with that engine."""
        engine = self._by_thread.get(threading.get_ident())
        if engine is None:
            future: Future[Probabilities] = Future()
            self.submit(partial(self._run_into, future, images))
            return future.result()
        try:
            return engine.run(images)
        except Exception:
            self._failed.add(engine)
            raise

    def concatenator(self) -> Concatenator:
        """Return what concatenates batches for the engine of the calling thread."""
        engine = self._by_thread.get(threading.get_ident())
        return engine.concatenator() if engine else np.concatenate

    def submit(self, work: Callable[[], object]) -> None:
        """Run `work` on the thread of the next free engine, which is busy until it ends."""
        with self._lock:
            self._waiting.append(work)
            self._assign()

    def _run_into(self, future: Future[Probabilities], images: Images) -> None:
        """Run, and set the result of a future."""
        try:
            future.set_result(self.run(images))
        except Exception as error:
            future.set_exception(error)

    def _assign(self) -> None:
        """Start waiting work on free engines. The lock is held."""
        while self._waiting and self._free:
            engine = self._free.popleft()
            engine.submit(partial(self._work, engine, self._waiting.popleft()))

    def _work(self, engine: SingleThreadEngine, work: Callable[[], object]) -> None:
        """Run `work` on the thread of an engine, and release the engine, after a failure with a delay."""
        try:
            work()
        finally:
            if engine in self._failed:
                self._failed.discard(engine)
                cooldown = threading.Timer(COOLDOWN_SECONDS, self._release, [engine])
                cooldown.daemon = True
                try:
                    cooldown.start()
                except RuntimeError:  # no thread can be started: better no pause than one GPU less
                    self._release(engine)
            else:
                self._release(engine)

    def _release(self, engine: SingleThreadEngine) -> None:
        """Give an engine its next work."""
        with self._lock:
            self._free.append(engine)
            self._assign()
