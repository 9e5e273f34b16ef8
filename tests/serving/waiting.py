"""Asking a batcher, and waiting for what becomes of it."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from serving.runtimes.base import Images
from serving.scheduling.batcher import Batcher
from serving.scheduling.queue import BatchResult, Outcome


def submit(batcher: Batcher, images: Images, *rest: Any, **options: Any) -> BatchResult:
    """Have images computed as `enqueue` does; return the answer, or raise the error that took its place."""
    future: Future[Outcome] = Future()
    batcher.enqueue(images, future.set_result, *rest, **options)
    outcome = future.result(60)
    if isinstance(outcome, BatchResult):
        return outcome
    raise outcome
