"""Submit images to a batcher, and wait for the outcome."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from serving.runtimes.base import Images
from serving.scheduling.batcher import Batcher
from serving.scheduling.queue import BatchResult, Outcome


def submit(batcher: Batcher, images: Images, *args: Any, **options: Any) -> BatchResult:
    """Enqueue images, with the other arguments of `enqueue`; return the result, or raise the error."""
    future: Future[Outcome] = Future()
    batcher.enqueue(images, future.set_result, *args, **options)
    outcome = future.result(60)
    if isinstance(outcome, BatchResult):
        return outcome
    raise outcome
