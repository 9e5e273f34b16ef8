"""What every engine is: anything with `run` can stand behind a batcher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from export.parity import Probabilities

__all__ = ["Engine", "EngineThreads", "Gather", "Images", "Probabilities"]

Images = NDArray[np.uint8]
"""Pixels of 0 to 255, [n, height, width, 3]."""

Gather = Callable[[Sequence[Images]], Images]
"""Concatenates the images of several requests."""


class Engine(Protocol):
    """Computes one batch at a time."""

    provider: str
    """What computes: an execution provider of onnxruntime, or the name of another library."""

    def run(self, images: Images) -> Probabilities:
        """Map uint8 [n, height, width, 3] to float32 [n, classes]."""
        ...


class EngineThreads(Protocol):
    """The threads from which an engine computes."""

    ahead: bool
    """Whether the next full batch is concatenated while one is computed; for one instance only."""

    def submit(self, work: Callable[[], object], /) -> object:
        """Run `work` on one of them, as soon as one is free."""
        ...

    def gatherer(self) -> Gather:
        """Return what concatenates batches for the calling thread; each call overwrites the result of the last but one."""
        ...
