"""How requests are put together into batches, as options: each declared once."""

from __future__ import annotations

from dataclasses import dataclass

from serving.limits import option


@dataclass(frozen=True, kw_only=True)
class Batching:
    """How a batcher works; `resnet serve --help` says what each is."""

    max_batch: int = option(32, "images in one batch", low=1)
    max_queue: int = option(1024, "images that may wait; a request that would go beyond is refused at once", low=1)
    # Beyond that most callers have given up, and what is computed for them keeps the others waiting.
    max_queue_ms: float = option(
        5000.0, "milliseconds of work that may wait; a request that comes when there is more is refused at once", low=0
    )
    linger_ms: float = option(
        0.0, "milliseconds that the first request of a batch waits for others while the engine is free", low=0, high=1e6
    )
    target_p99_ms: float = option(
        0.0, "milliseconds in which 99 of 100 requests are to be answered, by refusing others; 0 is no such goal", low=0
    )
