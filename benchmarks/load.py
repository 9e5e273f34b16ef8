"""A closed loop of load: so many requests in flight, each followed by the next as soon as it is answered."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache

import grpc
import numpy as np
from numpy.typing import NDArray

from protos import classifier_pb2 as pb
from serving.channel import UNLIMITED
from serving.server import SERVICE

Call = Callable[[int], object]
"""Sends the request of the given number, and returns when it is answered."""


@dataclass(frozen=True)
class Sample:
    """What one stretch of load saw.

    Attributes:
        latencies_ms: Of every request that was answered within the stretch, in milliseconds.
        images_per_second: Images answered, over the length of the stretch.
        failures: Requests that had no answer, by the name of what came instead.
    """

    latencies_ms: NDArray[np.float64]
    images_per_second: float
    failures: Mapping[str, int] = field(default_factory=dict)


def run(call: Call, in_flight: int, images: int, seconds: float) -> Sample:
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
    """A server, put under load from another process: its client is not to compete for this one's interpreter lock."""

    def __init__(self, address: str, model: str, pixels: NDArray[np.uint8], pool: ProcessPoolExecutor) -> None:
        """Send requests for `model` to the server at `address` out of a process of `pool`."""
        self._address, self._model, self._pixels, self._pool = address, model, pixels, pool

    def measure(self, in_flight: int, images: int, seconds: float) -> Sample:
        """Put the server under load; see `run`."""
        work = self._pool.submit(_load, self._address, self._model, self._pixels, in_flight, images, seconds)
        return work.result()


def _load(address: str, model: str, pixels: NDArray[np.uint8], in_flight: int, images: int, seconds: float) -> Sample:
    requests = [_request(model, _batch(pixels, number, images)) for number in range(64)]
    method = _connect(address)
    return run(lambda number: method(requests[number % len(requests)]), in_flight, images, seconds)


@cache
def _connect(address: str) -> Callable[[bytes], bytes]:
    """Return the method as a function of bytes: packing and unpacking are not what is measured."""
    call: grpc.UnaryUnaryMultiCallable[bytes, bytes]
    call = grpc.insecure_channel(address, UNLIMITED).unary_unary(f"/{SERVICE}/Classify")
    return call


def _request(model: str, pixels: NDArray[np.uint8]) -> bytes:
    tensor = pb.Tensor(data_type=pb.DATA_TYPE_UINT8, shape=pixels.shape, data=pixels.tobytes())
    return pb.ClassifyRequest(model=model, tensor=tensor, top_k=1).SerializeToString()


def _batch(pixels: NDArray[np.uint8], number: int, images: int) -> NDArray[np.uint8]:
    return pixels[np.arange(number * images, (number + 1) * images) % len(pixels)]
