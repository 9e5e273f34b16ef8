"""Targets of a benchmark: a function in this process, or a model of our server; each takes the same workloads."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from benchmarks.load.endpoints import DISTINCT, PROTOCOLS, Endpoint, Input
from benchmarks.load.generator import ClosedLoop, generate
from benchmarks.load.processes import LoadProcesses
from benchmarks.load.samples import Sample, summarize_closed
from benchmarks.load.senders import FunctionSender
from resnet import CheckFailed


class Workload(NamedTuple):
    """A closed loop: the images per request, and the requests in flight."""

    images: int
    in_flight: int

    def __str__(self) -> str:
        return f"{self.images} x {self.in_flight}"

    @property
    def title(self) -> str:
        """The workload in words."""
        in_flight = f"{self.in_flight} in flight"
        return in_flight if self.images == 1 else f"{self.images}-image requests, {in_flight}"


class Target(Protocol):
    """Something that can be put under load."""

    def measure(self, workload: Workload, seconds: float) -> Sample:
        """Put the target under a workload, and return what was measured.

        Raises:
            Exception: A request failed; a load with failures measures nothing.
        """
        ...


class FunctionTarget:
    """A function of a batch of images, called in this process by a thread for each request in flight."""

    def __init__(self, predict: Callable[[NDArray[np.uint8]], object], pixels: NDArray[np.uint8]) -> None:
        """Prepare to call `predict` with batches of `pixels`, uint8 [n, height, width, channels]."""
        self._predict, self._pixels = predict, pixels

    def measure(self, workload: Workload, seconds: float) -> Sample:
        """Put the function under a workload; see `Target.measure`."""
        return measure_function(
            lambda number: self._predict(_take(self._pixels, number, workload.images)), workload, seconds
        )


class ServerTarget:
    """A model of our server, put under load from another process, which shares no interpreter lock with this one."""

    def __init__(self, address: str, model: str, pixels: NDArray[np.uint8], processes: LoadProcesses) -> None:
        """Prepare to send requests for `model` to the server at `address`."""
        self._address, self._model, self._pixels, self._processes = address, model, pixels, processes

    def measure(self, workload: Workload, seconds: float) -> Sample:
        """Put the server under a workload; see `Target.measure`.

        Raises:
            CheckFailed: The server refused a request.
        """
        images, load, protocol = workload.images, ClosedLoop(workload.in_flight), PROTOCOLS["native"]
        shape = Input(self._model, "", (images, *self._pixels.shape[1:]), "UINT8")
        requests = tuple(protocol.pack(shape, _take(self._pixels, number, images)) for number in range(DISTINCT))
        self._processes.connect(Endpoint(self._address, protocol.path, requests, images, shape, "native"))
        sample = summarize_closed(self._processes.run(load, seconds), load, images, seconds)
        if sample.failures:
            raise CheckFailed(f"{self._address} refused requests under load: {sample.failures}")
        return sample


def measure_function(function: Callable[[int], object], workload: Workload, seconds: float) -> Sample:
    """Put a function in this process under a workload.

    Args:
        function: Answers the request with this number, of as many images as the workload says.
        workload: The images per request, and the threads that call the function.
        seconds: Duration.

    Raises:
        Exception: What a call raised; a load with failures measures nothing.
    """
    load = ClosedLoop(workload.in_flight)
    with FunctionSender(function, workload.in_flight) as sender:
        trace = generate(sender, load, seconds)
    return summarize_closed(trace, load, workload.images, seconds)


def _take(pixels: NDArray[np.uint8], number: int, images: int) -> NDArray[np.uint8]:
    """Return the images of the request with this number."""
    return pixels[np.arange(number * images, (number + 1) * images) % len(pixels)]
