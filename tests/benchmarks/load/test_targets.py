"""Targets of load: functions in this process, and models of a server."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.load.processes import LoadProcesses
from benchmarks.load.targets import FunctionTarget, ServerTarget, Workload, measure_function
from resnet import BadInput


def test_a_load_counts_answers_and_their_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that each call moves on by 10 ms, 100 calls of 4 images fit into a second."""
    now = 0.0

    def call(_: int) -> None:
        nonlocal now
        now += 0.01

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    sample = measure_function(call, Workload(images=4, in_flight=1), seconds=1)
    assert len(sample.latencies_ms) == pytest.approx(100, abs=1)
    np.testing.assert_allclose(sample.latencies_ms, 10)
    assert sample.images_per_second == pytest.approx(400, abs=4)


def test_a_stretch_too_short_for_an_answer_lasts_until_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """One image after two seconds is half an image per second."""
    now = 0.0

    def call(_: int) -> None:
        nonlocal now
        now += 2

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    sample = measure_function(call, Workload(images=1, in_flight=1), seconds=1)
    assert sample.latencies_ms.tolist() == [2000]
    assert sample.images_per_second == 0.5


def test_as_many_calls_as_asked_for_are_in_flight() -> None:
    """A barrier of 8 opens only if 8 threads are calling at the same time."""
    barrier = threading.Barrier(8)
    measure_function(lambda number: number < 8 and barrier.wait(10), Workload(images=1, in_flight=8), seconds=0.01)
    assert not barrier.broken


def test_a_failing_call_ends_the_load() -> None:
    """A load with failures measures nothing."""

    def call(number: int) -> None:
        raise ConnectionError(f"call {number}")

    with pytest.raises(ConnectionError, match="call"):
        measure_function(call, Workload(images=1, in_flight=2), seconds=10)


def test_a_function_gets_the_images_in_turn() -> None:
    """Every request has other ones, from the start again when all were sent."""
    seen = []
    pixels = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1)

    def predict(images: NDArray[np.uint8]) -> None:
        seen.append(images.ravel().tolist())
        time.sleep(0.001)

    FunctionTarget(predict, pixels).measure(Workload(images=2, in_flight=1), seconds=0.05)
    assert seen[:4] == [[0, 1], [2, 3], [4, 0], [1, 2]]


def test_a_workload_has_a_title() -> None:
    """As the tables have it."""
    assert Workload(images=1, in_flight=8).title == "8 in flight"
    assert Workload(images=32, in_flight=8).title == "32-image requests, 8 in flight"
    assert str(Workload(images=32, in_flight=8)) == "32 x 8"


@pytest.fixture(scope="module")
def processes() -> Iterator[LoadProcesses]:
    """One process of the load generator."""
    with LoadProcesses() as processes:
        yield processes


@pytest.mark.slow
def test_a_server_is_measured_from_another_process(
    address: str, heldout: tuple[NDArray[np.uint8], NDArray[np.int32]], processes: LoadProcesses
) -> None:
    """One process serves for all workloads, each with requests of its own."""
    target = ServerTarget(address, "digits", heldout[0], processes)
    for workload in (Workload(1, 1), Workload(4, 2)):
        sample = target.measure(workload, seconds=0.2)
        assert len(sample.latencies_ms) > 0
        assert sample.images_per_second == pytest.approx(len(sample.latencies_ms) * workload.images / 0.2, rel=0.5)
        assert not sample.failures


@pytest.mark.slow
def test_a_model_that_is_not_served_is_a_sentence(
    address: str, heldout: tuple[NDArray[np.uint8], NDArray[np.int32]], processes: LoadProcesses
) -> None:
    """The process takes another target afterwards."""
    with pytest.raises(BadInput, match="refused a request"):
        ServerTarget(address, "nobody", heldout[0], processes).measure(Workload(1, 1), seconds=0.05)
    assert ServerTarget(address, "digits", heldout[0], processes).measure(Workload(1, 1), 0.05).images_per_second > 0
