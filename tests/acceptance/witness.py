"""A client that watches a server while something is done to it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import grpc
import numpy as np
from grpc_health.v1 import health_pb2
from numpy.typing import NDArray

from benchmarks.harness.background import Background
from protos import classifier_pb2 as pb
from resnet import CheckFailed
from serving.errors import RETRY
from tests.acceptance.messages import ValidRequest

HEALTH = "/grpc.health.v1.Health/Check"
PATIENCE_SECONDS = 10.0
TOLERANCE = 1e-5  # of a probability: a batch of another size is summed in another order


class Witness(Background):
    """Checks the health of a server and sends one valid request, again and again during a `with` block.

    The block fails if the server is not healthy in time, or if the request is answered otherwise than before, or by a
    version that does not compute it so.

    Attributes:
        answered: Answers to the request.
        refused: Refusals of the request.
        health_ms: Latencies of the health checks in milliseconds.
    """

    def __init__(
        self,
        address: str,
        request: ValidRequest,
        expected: Mapping[int, NDArray[np.float32]] | None = None,
        *,
        deadline: float | None = None,
        overload: bool = False,
        pause: float = 0.02,
    ) -> None:
        """Watch a server.

        Args:
            address: HOST:PORT of the server.
            request: A request to our own protocol, for the probabilities of all classes.
            expected: By version, the probabilities that it computes, [images, classes]; None takes those of the first
                answer of each version.
            deadline: Deadline of the request in seconds; None is none, and the server has `PATIENCE_SECONDS`.
            overload: Whether the server may refuse the request, with a time to retry, or miss its deadline.
            pause: Seconds between two requests.
        """
        super().__init__()
        self.answered, self.refused = 0, 0
        self.health_ms: list[float] = []
        self._address, self._request, self._deadline, self._pause = address, request, deadline, pause
        self._expected = dict(expected or {})
        self._learns = expected is None
        self._may_refuse = overload
        self._problem: BaseException | None = None

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        if self._problem:
            raise self._problem

    def run(self) -> None:
        """Ask, at least once."""
        try:
            # A connection of its own, which others cannot fill.
            with grpc.insecure_channel(self._address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
                health: Any = channel.unary_unary(HEALTH)
                method: Any = channel.unary_unary(self._request.path)
                while True:
                    self._check_health(health)
                    self._check_answer(method)
                    if self.stopped.wait(self._pause):  # asked at least once
                        return
        except Exception as error:
            self._problem = error

    def _check_health(self, health: Any) -> None:
        started = time.perf_counter()
        try:
            status = health_pb2.HealthCheckResponse.FromString(health(b"", timeout=PATIENCE_SECONDS)).status
        except grpc.RpcError as error:
            raise CheckFailed(f"a health check failed: {describe(error)}") from None
        if status != health_pb2.HealthCheckResponse.SERVING:
            raise CheckFailed(f"the health is {health_pb2.HealthCheckResponse.ServingStatus.Name(status)}")
        self.health_ms.append(1e3 * (time.perf_counter() - started))

    def _check_answer(self, method: Any) -> None:
        try:
            answer = method(self._request.message, timeout=self._deadline or PATIENCE_SECONDS)
        except grpc.RpcError as error:
            if not self._may_refuse or not is_refusal(error, late=self._deadline is not None):
                raise CheckFailed(f"a valid request failed: {describe(error)}") from None
            self.refused += 1
            return
        response = pb.ClassifyResponse.FromString(answer)
        probabilities = read_probabilities(response)
        if self._learns:
            self._expected.setdefault(response.version, probabilities)
        if response.version not in self._expected:
            raise CheckFailed(f"version {response.version} answered, which is not served")
        difference = np.abs(probabilities - self._expected[response.version]).max()
        if not difference <= TOLERANCE:
            raise CheckFailed(f"version {response.version} did not compute its answer: they differ by {difference:.2g}")
        self.answered += 1


def is_serving(address: str) -> bool:
    """Return whether a server says that it serves; one that refuses the connection does not.

    Raises:
        CheckFailed: It says nothing.
    """
    with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        health: Any = channel.unary_unary(HEALTH)
        try:
            answer = health_pb2.HealthCheckResponse.FromString(health(b"", timeout=PATIENCE_SECONDS))
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise CheckFailed(f"a health check was not answered within {PATIENCE_SECONDS:.0f} s") from None
            return False
    return answer.status == health_pb2.HealthCheckResponse.SERVING


def read_probabilities(response: pb.ClassifyResponse) -> NDArray[np.float32]:
    """Return the probabilities of a response with all classes, [images, classes], in the order of the classes."""
    rows = [sorted((item.index, item.probability) for item in image.classes) for image in response.classifications]
    return np.array([[probability for _, probability in row] for row in rows], np.float32)


def is_refusal(error: grpc.RpcError, late: bool) -> bool:
    """Return whether a server may refuse a call so: with a time to retry or, if it is `late`, after its deadline."""
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return late
    trailers: Any = error.trailing_metadata() or ()
    return error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and int(dict(trailers).get(RETRY, 0)) > 0


def describe(error: grpc.RpcError) -> str:
    """Return the status and the message of a failed call."""
    return f"{error.code().name}: {error.details()}"
