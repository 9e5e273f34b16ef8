"""The interface of engines: anything with `run` can stand behind a batcher, and an engine may bring its own threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from export.parity import Probabilities
from serving.threads import WorkerPool

__all__ = ["Concatenator", "Engine", "EngineThreads", "Images", "Probabilities", "ThreadPool"]

Images = NDArray[np.uint8]
"""Pixels of 0 to 255, [n, height, width, channels]."""

Concatenator = Callable[[Sequence[Images]], Images]
"""Concatenates the images of several requests."""


class Engine(Protocol):
    """Computes one batch at a time."""

    provider: str
    """What computes: an execution provider of onnxruntime, or the name of another library."""

    def run(self, images: Images) -> Probabilities:
        """Map uint8 [n, height, width, channels] to float32 [n, classes]."""
        ...


class EngineThreads(Protocol):
    """The threads on which an engine computes."""

    prefetch: bool
    """Whether the next full batch is concatenated while one is computed; only possible with one instance."""

    def submit(self, work: Callable[[], object], /) -> object:
        """Run `work` on one of the threads, as soon as one is free; this never fails."""
        ...

    def concatenator(self) -> Concatenator:
        """Return what concatenates batches for the calling thread; the call after the next one reuses the memory."""
        ...


class ThreadPool(WorkerPool):
    """Threads for an engine that any thread may call."""

    prefetch = False

    def concatenator(self) -> Concatenator:
        """Return a function that allocates new memory for each batch."""
        return np.concatenate
