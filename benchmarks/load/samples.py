"""The sample of one stretch of load: latencies, rates and failures, computed from the trace of its requests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from benchmarks.load.generator import ClosedLoop, Load, Trace
from benchmarks.load.senders import CODE_NAMES, OK


@dataclass(frozen=True)
class Sample:
    """Measurements of one stretch of load.

    Attributes:
        latencies_ms: Latencies of the answered requests in milliseconds, from the time each was due.
        images_per_second: Throughput: images answered within the stretch, over its length.
        failures: Number of requests without an answer, by status; NOT_SENT are those that the load generator left out.
        good_per_second: Goodput: images of requests answered within their deadline, over the length of the stretch.
        late_ms: Delay between the time a request was due and the time it was sent, in milliseconds: how far the load
            generator itself fell behind.
    """

    latencies_ms: NDArray[np.float64]
    images_per_second: float
    failures: Mapping[str, int] = field(default_factory=dict)
    good_per_second: float = 0.0
    late_ms: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))


def summarize(trace: Trace, load: Load, images: int, begin: float, end: float, deadline: float | None = None) -> Sample:
    """Return the sample of the stretch between two times.

    A request of a closed loop belongs to the stretch in which it ended. A request of an open loop belongs to the
    stretch in which it was due, since requests that are answered late, or never, are what an open loop is for. A rate
    counts the answers that arrived within the stretch.

    Args:
        trace: Record of all requests.
        load: The load that sent them.
        images: Images per request.
        begin: Start of the stretch, in seconds from the start of the load; before it is the warm-up.
        end: End of the stretch.
        deadline: Seconds from the time a request was due within which its answer is useful; None counts those that
            arrived within the stretch.
    """
    answered = trace.codes == OK
    arrived = answered & (begin <= trace.done) & (trace.done <= end)
    when = trace.done if isinstance(load, ClosedLoop) else trace.due
    inside = (begin <= when) & (when <= end)
    latencies = trace.done - trace.due
    good = answered & inside & (trace.done <= end if deadline is None else latencies <= deadline)
    failures = Counter(CODE_NAMES[code] for code in trace.codes[inside & ~answered].tolist())
    seconds = end - begin
    return Sample(
        1e3 * latencies[answered & inside],
        int(arrived.sum()) * images / seconds,
        dict(failures),
        int(good.sum()) * images / seconds,
        1e3 * (trace.sent - trace.due)[inside],
    )


def summarize_closed(trace: Trace, load: ClosedLoop, images: int, seconds: float) -> Sample:
    """Return the sample of a closed loop without warm-up.

    Answers after the end do not count, since they came under less load. A stretch too short for a single answer lasts
    until the first one.
    """
    return summarize(trace, load, images, 0, max(seconds, float(trace.done.min())))
