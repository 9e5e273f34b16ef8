"""The watchdog, whose looks the test counts, and servers that hang."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos import inference_pb2, inference_pb2_grpc
from serving.config import Batching, Limits, Transport
from serving.models import loader
from serving.models.model import Model
from serving.models.registry import ModelRegistry
from serving.models.version_policy import VersionPolicy
from serving.protocols.inputs import Check, InputDecoder
from serving.runtimes.base import Images, Probabilities
from serving.runtimes.cost import CostCurve
from serving.scheduling.queue import BatchResult, Outcome
from serving.server import Server
from serving.threads import EXIT_CODE, WorkerPool
from serving.watchdog import LOOK_SECONDS, LOOKS_PER_PROBE, STUCK_SECONDS, Watchdog
from tests.serving.runtimes.test_cuda import CLASSES, make_manifest, pixels
from tests.serving.scheduling.bench import GatedEngine

STUCK_LOOKS = int(STUCK_SECONDS / LOOK_SECONDS) + LOOKS_PER_PROBE + 1  # until a probe, and then until it is late


class GatedZeroEngine:
    """Computes nothing, once the gate is open."""

    provider = "test"

    def __init__(self) -> None:
        self.gated = GatedEngine()

    def run(self, images: Images) -> Probabilities:
        """Return zeros."""
        self.gated.run(images)
        return np.zeros((len(images), CLASSES), np.float32)


class GatedDecoder(InputDecoder):
    """Decodes while the gate is open."""

    def __init__(self) -> None:
        super().__init__(Limits())
        self.gate = threading.Event()
        self.gate.set()

    def decode(self, files: Sequence[bytes], model: Model, check: Check = lambda: None) -> Images:
        """Wait for the gate."""
        assert self.gate.wait(timeout=30)
        return super().decode(files, model, check)


class WatchedModel:
    """A model, its watchdog, and what the watchdog says."""

    def __init__(self, curve: CostCurve | None = None) -> None:
        self.engine = GatedZeroEngine()
        self.engine.gated.gate.release(2)
        self.model = loader.start(
            make_manifest(), self.engine, Batching(max_batch=2, max_queue_ms=1e9), curve=curve or CostCurve()
        )
        for _ in range(2):
            self.engine.gated.entered.acquire()
        self.models = ModelRegistry([self.model])
        self.decoder, self.workers = GatedDecoder(), WorkerPool(1, "decode")
        self.said: list[tuple[bool, str]] = []
        self.watchdog = Watchdog(
            self.models, self.decoder, self.workers, lambda live, report: self.said.append((live, report))
        )

    def look(self, looks: int, before: Callable[[], None] = lambda: None) -> None:
        """Look so often, each time after something else and after the decoding of a probe, unless that waits."""
        for _ in range(looks):
            before()
            self.watchdog.look()
            await_true(lambda: not (self.watchdog._is_probing and self.decoder.gate.is_set()))

    def ask(self) -> Future[Outcome]:
        """Send a request."""
        future: Future[Outcome] = Future()
        self.model.batcher.enqueue(pixels(1), future.set_result)
        return future


@pytest.fixture
def watched() -> Iterator[WatchedModel]:
    """Let everything go at the end."""
    parts = WatchedModel()
    yield parts
    parts.engine.gated.gate.release(10_000)
    parts.decoder.gate.set()


def await_true(condition: Callable[[], bool]) -> None:
    """Return once something is true that another thread does."""
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0)  # gives way to the other thread


def test_a_probe_goes_all_the_way_and_nothing_counts_it(watched: WatchedModel) -> None:
    """Nor the cost curve; a server with requests of callers needs none."""
    points = watched.model.batcher.curve.points()
    watched.engine.gated.gate.release(10_000)
    for probes in range(1, 4):
        watched.look(2 * LOOKS_PER_PROBE)
        await_true(lambda number=probes: watched.model.batcher.answered >= number)  # type: ignore[misc]
        await_true(lambda: not watched.model.batcher.is_busy)
    counts = watched.model.statistics.counts()
    assert (counts.images, counts.batches, counts.codes, counts.last_ms) == (0, {}, {}, 0)
    assert watched.model.batcher.curve.points() == points
    assert watched.said == []


def test_an_engine_that_does_not_return_is_found_and_told_where_it_stands(watched: WatchedModel) -> None:
    """Once; and again when it has returned."""
    watched.look(LOOKS_PER_PROBE)
    watched.look(LOOKS_PER_PROBE)
    assert watched.engine.gated.entered.acquire(timeout=10)
    watched.look(2 * STUCK_LOOKS)
    ((live, report),) = watched.said
    assert not live
    assert report.startswith("no request gets through, stuck: shapes/1; the threads stand here:\n")
    assert "thread batch-0:\n" in report
    assert "self.gate.acquire" in report
    watched.engine.gated.gate.release(10_000)
    await_true(lambda: not watched.model.batcher.is_busy)
    watched.look(1)
    assert watched.said[1:] == [(True, "requests get through again")]
    assert watched.watchdog.live


def test_requests_of_callers_show_it_too(watched: WatchedModel) -> None:
    """No probe is needed where there is work."""
    watched.ask()
    assert watched.engine.gated.entered.acquire(timeout=10)
    watched.look(STUCK_LOOKS)
    assert [live for live, _ in watched.said] == [False]


def test_decoding_that_does_not_return_is_found(watched: WatchedModel) -> None:
    """Even while tensors are computed, which need no decoding."""
    watched.engine.gated.gate.release(10_000)
    watched.look(LOOKS_PER_PROBE)  # the first probe is for no model: each may have answered just before
    await_true(lambda: watched.workers.done == 1)
    watched.decoder.gate.clear()
    answers: list[Future[Outcome]] = []
    watched.look(2 * LOOKS_PER_PROBE)
    watched.look(STUCK_LOOKS, lambda: answers.append(watched.ask()))
    assert all(isinstance(answer.result(10), BatchResult) for answer in answers)
    ((live, report),) = watched.said
    assert not live
    assert "stuck: the decoding of images;" in report


def test_a_server_with_more_work_than_it_can_do_is_not_stuck(watched: WatchedModel) -> None:
    """Its queue is never empty; each batch that is answered is a sign of life, if there is one in a while."""
    answers = [watched.ask() for _ in range(100)]

    def compute() -> None:
        before = watched.model.batcher.answered
        watched.engine.gated.gate.release()
        await_true(lambda: watched.model.batcher.answered > before)

    for _ in range(5):
        watched.look(1, compute)
        watched.look(int(STUCK_SECONDS / LOOK_SECONDS) - 1)
    assert watched.said == []
    assert not answers[-1].done()


def test_a_batch_may_take_as_long_as_it_costs() -> None:
    """A large model on a small machine: ten times the predicted cost of a full batch."""
    watched = WatchedModel(CostCurve({1: 20e9, 2: 40e9}))
    watched.ask()
    assert watched.engine.gated.entered.acquire(timeout=10)
    watched.look(401)
    assert watched.said == []
    watched.look(1)
    assert [live for live, _ in watched.said] == [False]
    watched.engine.gated.gate.release(10_000)


def test_a_model_that_is_unloaded_is_not_watched(watched: WatchedModel) -> None:
    """Its last requests are no longer the server's; nor is one that comes blamed for it."""
    watched.ask()
    assert watched.engine.gated.entered.acquire(timeout=10)
    watched.look(int(STUCK_SECONDS / LOOK_SECONDS))
    watched.models.retain("shapes", (), {})
    watched.look(STUCK_LOOKS)
    assert watched.said == []


def test_a_server_without_models_lives(watched: WatchedModel) -> None:
    """It may load them later."""
    watched.models.retain("shapes", (), {})
    watched.look(3 * STUCK_LOOKS)
    assert watched.said == []


@pytest.mark.parametrize("transport", ["grpcio", "native"])
def test_liveness_is_told_by_every_protocol(watched: WatchedModel, transport: Transport) -> None:
    """As not serving while the server hangs, and not before or after; readiness follows it."""
    reports: list[str] = []
    server = Server(watched.models, "127.0.0.1", 0, Limits(), transport=transport)
    server.watch(reports.append)
    assert server._watchdog
    with grpc.insecure_channel(server.address) as channel:
        health, kserve = health_pb2_grpc.HealthStub(channel), inference_pb2_grpc.GRPCInferenceServiceStub(channel)

        def read() -> tuple[bool, bool, bool, bool]:
            statuses = [health.Check(health_pb2.HealthCheckRequest(service=name)).status for name in ("liveness", "")]
            live = kserve.ServerLive(inference_pb2.ServerLiveRequest()).live
            ready = kserve.ServerReady(inference_pb2.ServerReadyRequest()).ready
            return (statuses[0] == 1, live, statuses[1] == 1, ready)

        assert read() == (True, True, True, True)
        answer = watched.ask()
        assert watched.engine.gated.entered.acquire(timeout=10)
        while server.live:
            server._watchdog.look()
        assert read() == (False, False, False, False)
        assert len(reports) == 1
        watched.engine.gated.gate.release(10_000)
        answer.result(10)
        await_true(lambda: not watched.model.batcher.is_busy)
        server._watchdog.look()
        assert read() == (True, True, True, True)
        server._health.close()
        assert health.Check(health_pb2.HealthCheckRequest(service="liveness")).status == 1
    server.stop(0)


class SlowRepository:
    """Loads a model for as long as the test lasts."""

    def __init__(self) -> None:
        self.loading, self.loaded = threading.Semaphore(0), threading.Event()

    def load(self, _: str, __: VersionPolicy | None = None) -> None:
        """Wait."""
        self.loading.release()
        assert self.loaded.wait(30)

    def unload(self, _: str) -> None:
        """Do nothing."""


def test_models_may_load_for_minutes(watched: WatchedModel) -> None:
    """Several at a time, on request: images are decoded all the while, and the server lives."""
    repository = SlowRepository()
    watched.engine.gated.gate.release(10_000)
    server = Server(watched.models, "127.0.0.1", 0, Limits(), repository=repository)
    reports: list[str] = []
    server.watch(reports.append)
    watchdog = server._watchdog
    assert watchdog
    with grpc.insecure_channel(server.address) as channel:
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        request = inference_pb2.RepositoryModelLoadRequest(model_name="shapes")
        answers = [stub.RepositoryModelLoad.future(request) for _ in range(3)]
        for _ in answers:
            assert repository.loading.acquire(timeout=10)
        for _ in range(STUCK_LOOKS):
            watchdog.look()
            await_true(lambda: not watchdog._is_probing)
        assert reports == []
        repository.loaded.set()
        for answer in answers:
            answer.result(10)
    server.stop(0)


@pytest.mark.parametrize("transport", ["grpcio", "native"])
def test_a_server_that_hangs_can_be_stopped(watched: WatchedModel, transport: Transport) -> None:
    """In the time that it is given, and its callers get an answer."""
    server = Server(watched.models, "127.0.0.1", 0, Limits(), transport=transport)
    with grpc.insecure_channel(server.address) as channel:
        image = pixels(1)
        tensor = inference_pb2.ModelInferRequest.InferInputTensor(name="image", datatype="UINT8", shape=image.shape)
        request = inference_pb2.ModelInferRequest(
            model_name="shapes", inputs=[tensor], raw_input_contents=[image.tobytes()]
        )
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        answer, stream = stub.ModelInfer.future(request), stub.ModelStreamInfer(iter([request]))
        images = watched.engine.gated.batches
        await_true(lambda: watched.model.batcher.queued + sum(map(len, images)) == 5)  # the warm-up had 3
        server.stop(0.1)
        assert answer.exception(timeout=10).code() == grpc.StatusCode.UNAVAILABLE
        assert answer.exception().details() == "the server is shutting down, and had no time for this request"
        with pytest.raises(grpc.RpcError) as refusal:
            list(stream)
        assert refusal.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    await_true(lambda: not server._streams._open)  # the thread of the stream ends, too
    assert watched.model.batcher.is_busy  # the engine has not returned


STUCK = """
import sys, threading
from resnet import cli
from serving import server, watchdog
from serving.runtimes import onnx
run, start, serving = onnx.OnnxEngine.run, server.Server.__init__, threading.Event()
def stuck_in_the_engine(self, images):
    if serving.is_set():
        threading.Event().wait()
    return run(self, images)
def start_serving(*args, **options):
    start(*args, **options)
    serving.set()
onnx.OnnxEngine.run, server.Server.__init__ = stuck_in_the_engine, start_serving
watchdog.LOOK_SECONDS, watchdog.STUCK_SECONDS = 0.01, 0.1
sys.exit(cli.main(["serve", sys.argv[1], "--port=0", "--no-tune"]))
"""


def test_a_server_that_hangs_ends_with_a_code_and_says_where(repository: Path) -> None:
    """Nobody has to ask it anything; whoever runs it can start it again."""
    ended = subprocess.run(
        [sys.executable, "-c", STUCK, str(repository)], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == EXIT_CODE
    line = f"the process ends with code {EXIT_CODE}: no request gets through, stuck: digits/1; the threads stand here:"
    assert line in ended.stderr
    assert "in stuck_in_the_engine" in ended.stderr
