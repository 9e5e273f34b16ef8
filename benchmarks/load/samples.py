"""Stretches of load, and what they saw: of functions in this process, and of servers from other processes."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

import grpc
import numpy as np
from numpy.typing import NDArray

from benchmarks.load.callers import Caller, Closed, Load, Trace, call
from benchmarks.load.endpoints import PROTOCOLS, Endpoint, Input
from resnet import CheckFailed

NAMES = {status.value[0]: status.name for status in grpc.StatusCode}
DISTINCT = 16

CallFunction = Callable[[int], object]
"""Sends the request of the given number, and returns when it is answered."""


@dataclass(frozen=True)
class Sample:
    """What one stretch of load saw.

    Attributes:
        latencies_ms: Of the requests that were answered, in milliseconds, from when each was due.
        images_per_second: Images answered, over the length of the stretch.
        failures: Requests that had no answer, by the name of what came instead.
        good_per_second: Images of requests that were answered within their deadline, over the length of the stretch.
        late_ms: How much later than due each request was sent, in milliseconds: what the load itself could not do.
    """

    latencies_ms: NDArray[np.float64]
    images_per_second: float
    failures: Mapping[str, int] = field(default_factory=dict)
    good_per_second: float = 0.0
    late_ms: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))


def sample(trace: Trace, load: Load, images: int, begin: float, end: float, deadline: float | None = None) -> Sample:
    """Return what a load saw between two moments.

    A request of a closed loop belongs to the stretch in which it ended; one of an open loop to that in which it was
    due, for those that are answered late or never are the point there. A rate counts the answers that came within.

    Args:
        trace: Of all requests.
        load: That they were sent by.
        images: In each.
        begin: Of the stretch, in seconds from the start of the load; what was before is warm-up.
        end: Of the stretch.
        deadline: Seconds from when a request was due, after which its answer is of no use.
    """
    answered = trace.codes == grpc.StatusCode.OK.value[0]
    came = answered & (begin <= trace.done) & (trace.done < end)
    when = trace.done if isinstance(load, Closed) else trace.due
    inside = (begin <= when) & (when < end)
    took = trace.done - trace.due
    good = answered & inside & (took <= (deadline or np.inf))
    refused = Counter(NAMES[code] for code in trace.codes[inside & ~answered].tolist())
    seconds = end - begin
    return Sample(
        1e3 * took[answered & inside],
        int(came.sum()) * images / seconds,
        dict(refused),
        int(good.sum()) * images / seconds,
        1e3 * (trace.sent - trace.due)[inside],
    )


def run(call: CallFunction, in_flight: int, images: int, seconds: float) -> Sample:
    """Keep `in_flight` threads calling for `seconds`; each call answers `images` images.

    Raises:
        Exception: Whatever a call raised; a load with failures measures nothing.
    """
    answers: list[tuple[float, float]] = []  # when each came, and the seconds it took
    failures: list[BaseException] = []
    start = time.perf_counter()
    end = start + seconds

    def loop(number: int) -> None:
        before = start
        try:
            while before < end and not failures:
                call(number)
                number, after = number + in_flight, time.perf_counter()
                answers.append((after, after - before))
                before = after
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=loop, args=(worker,)) for worker in range(in_flight)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    # What comes after the end came under less load. A stretch too short for a single answer lasts until the first.
    end = max(end, min(answers)[0])
    found = np.array([took * 1e3 for when, took in answers if when <= end])
    return Sample(found, len(found) * images / (end - start))


class Target:
    """Something to put under load with requests of one or many images."""

    def __init__(self, predict: Callable[[NDArray[np.uint8]], object], pixels: NDArray[np.uint8]) -> None:
        """Call `predict` in this process, on images out of `pixels`, uint8 [n, height, width, 3]."""
        self._predict, self._pixels = predict, pixels

    def measure(self, in_flight: int, images: int, seconds: float) -> Sample:
        """Put the target under load; see `run`."""
        return run(lambda number: self._predict(_batch(self._pixels, number, images)), in_flight, images, seconds)


class RemoteTarget(Target):
    """Our server, put under load from another process: its client is not to compete for this one's interpreter lock."""

    def __init__(self, address: str, model: str, pixels: NDArray[np.uint8], pool: ProcessPoolExecutor) -> None:
        """Send requests for `model` to the server at `address` out of a process of `pool`."""
        self._address, self._model, self._pixels, self._pool = address, model, pixels, pool

    def measure(self, in_flight: int, images: int, seconds: float) -> Sample:
        """Put the server under load.

        Raises:
            CheckFailed: It refused a request; a load with failures measures nothing.
        """
        protocol = PROTOCOLS["native"]
        wanted = Input(self._model, "", (images, *self._pixels.shape[1:]), "UINT8")
        requests = tuple(protocol.pack(wanted, _batch(self._pixels, number, images)) for number in range(DISTINCT))
        endpoint = Endpoint(self._address, protocol.path, requests, images, wanted, "native")
        return self._pool.submit(_keep, endpoint, in_flight, seconds).result()


def _keep(endpoint: Endpoint, in_flight: int, seconds: float) -> Sample:
    load = Closed(in_flight)
    with Caller(endpoint) as caller:
        trace = call(caller, load, seconds)
    # A stretch too short for a single answer lasts until the first.
    found = sample(trace, load, endpoint.images, 0, max(seconds, np.nextafter(trace.done.min(), np.inf)))
    if found.failures:
        raise CheckFailed(f"{endpoint.address} refused requests under load: {found.failures}")
    return found


def _batch(pixels: NDArray[np.uint8], number: int, images: int) -> NDArray[np.uint8]:
    return pixels[np.arange(number * images, (number + 1) * images) % len(pixels)]
