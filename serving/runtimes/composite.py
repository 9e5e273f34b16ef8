"""Engines made of other engines: one for each batch size, or one for a lone batch and one for concurrent batches."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Mapping

from serving.runtimes.base import Engine, Images, Probabilities


class ConcurrentEngine:
    """Computes a batch on all cores while it is the only one, and concurrent batches on one core each.

    Attributes:
        provider: What computes.
        parts: Both engines, the one for a lone batch first.
    """

    def __init__(self, alone: Engine, concurrent: Engine) -> None:
        """Compute with two engines.

        Args:
            alone: Computes while no other batch runs; called by one thread at a time.
            concurrent: Computes beside other batches; called by several threads.
        """
        self._alone, self._concurrent, self._running = alone, concurrent, 0
        self._lock = threading.Lock()
        self.provider, self.parts = alone.provider, (alone, concurrent)

    def run(self, images: Images) -> Probabilities:
        """Map uint8 [n, height, width, channels] to float32 [n, classes]."""
        with self._lock:
            engine = self._concurrent if self._running else self._alone
            self._running += 1
        try:
            return engine.run(images)
        finally:
            with self._lock:
                self._running -= 1


class SizedEngine:
    """Computes each batch with the engine for its size."""

    def __init__(self, engines: Mapping[int, Engine]) -> None:
        """Compute with `engines`, by the largest batch of each, ascending; the last also computes larger ones."""
        self._sizes, self._engines = list(engines), list(engines.values())
        self.provider = " and ".join(dict.fromkeys(engine.provider for engine in self._engines))

    @property
    def sizes(self) -> list[int]:
        """The largest batch of each engine but that for single images, ascending."""
        largest = {id(engine): size for size, engine in zip(self._sizes, self._engines, strict=True)}
        largest.pop(id(self._engines[0]))
        return list(largest.values())

    def run(self, images: Images) -> Probabilities:
        """Map uint8 [n, height, width, channels] to float32 [n, classes]."""
        return self._engines[bisect_left(self._sizes, min(len(images), self._sizes[-1]))].run(images)
