"""`resnet serve --frontends`, as the processes that it is."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.request import urlopen

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from grpc_health.v1 import health_pb2, health_pb2_grpc
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from protos import classifier_pb2 as pb
from protos.classifier_pb2_grpc import ClassifierStub
from serving.client import Client
from serving.config import Config
from serving.errors import Unavailable
from serving.server import SERVICE
from serving.supervisor import choose
from tests.serving import gated
from tests.serving.gated import pixels
from tests.serving.test_command import SERVE
from tests.serving.test_watcher import add

Heldout = tuple[NDArray[np.uint8], NDArray[np.int32]]


class Service:
    """A supervisor and the processes below it."""

    def __init__(self, repository: Path, *options: str) -> None:
        command = [*SERVE, str(repository), "--port=0", "--metrics-port=0", "--watch=0", "--frontends=2", *options]
        # In a session of its own, as in a terminal: a signal for all must not reach the tests.
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert self.process.stdout is not None
        said = {}
        for line in self.process.stdout:
            about, _, where = line.strip().rpartition(" ")
            said[about] = where
            if about == "serving on":
                break
        self.address, self.metrics = said["serving on"], said["metrics on"]

    def children(self, module: str = "") -> list[int]:
        """Return the processes that run a module, or all."""
        numbers = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [
            int(number) for number in numbers if Path(f"/proc/{number}/cmdline").read_text().endswith(f"{module}\0")
        ]

    def replace(self, module: str) -> None:
        """Kill a process as the kernel does, and return once it is gone and there is another."""
        (killed, *others) = before = self.children(module)
        os.kill(killed, signal.SIGKILL)
        while killed in (after := self.children(module)) or len(after) < len(before):
            time.sleep(0.01)
        assert set(others) < set(after)

    def await_ready(self) -> None:
        """Return once every front end takes requests."""
        with self.each() as channels:
            for channel in channels:
                stub = health_pb2_grpc.HealthStub(channel)
                for response in stub.Watch(
                    health_pb2.HealthCheckRequest(service="digits"), wait_for_ready=True, timeout=60
                ):
                    if response.status == health_pb2.HealthCheckResponse.SERVING:
                        break

    @contextmanager
    def each(self) -> Iterator[list[grpc.Channel]]:
        """Return connections that reach every front end, but for one time in thirty thousand."""
        with ExitStack() as stack:
            own = [("grpc.use_local_subchannel_pool", 1)]
            yield [stack.enter_context(grpc.insecure_channel(self.address, own)) for _ in range(16)]

    def read(self) -> dict[tuple[str, str], float]:
        """Return every sample of the metrics by its name and its last label."""
        with urlopen(self.metrics) as page:
            families = list(text_string_to_metric_families(page.read().decode()))
        return {
            (sample.name, sample.labels.get("le", sample.labels.get("code", ""))): sample.value
            for family in families
            for sample in family.samples
        }

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End all by a signal to the supervisor, and see that all have ended, well."""
        below = self.children()
        assert len(below) == 3
        self.process.send_signal(number)
        assert self.process.communicate(timeout=60)[0].endswith("finishing the requests under way\n")
        assert self.process.returncode == 0
        assert not any(Path(f"/proc/{child}").exists() for child in below)


@pytest.fixture
def serve() -> Iterator[Callable[..., Service]]:
    """Starts services, and ends those that the test has not ended."""
    services: list[Service] = []

    def start(repository: Path, *options: str) -> Service:
        services.append(Service(repository, *options))
        return services[-1]

    yield start
    for service in services:
        service.process.kill()
        service.process.communicate()


@pytest.fixture(scope="module")
def service(repository: Path) -> Iterator[Service]:
    """One that tests only ask."""
    service = Service(repository)
    yield service
    service.end()


def ask_everything(address: str, images: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
    """Return the probabilities of some images, by each protocol."""
    with Client(address) as client:
        classes = client.classify(images, top_k=10).images
    native = np.array([[item.probability for item in sorted(found, key=lambda item: item.index)] for found in classes])
    with triton.InferenceServerClient(address) as inference:
        tensor = triton.InferInput("image", images.shape, "UINT8")
        tensor.set_data_from_numpy(images)
        kserve = inference.infer("digits", [tensor]).as_numpy("probabilities")
    request = predict_pb2.PredictRequest()
    request.model_spec.name = "digits"
    request.inputs["image"].dtype = 4
    for size in images.shape:
        request.inputs["image"].tensor_shape.dim.add(size=size)
    request.inputs["image"].tensor_content = images.tobytes()
    with grpc.insecure_channel(address) as channel:
        response = prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict(request)
    values = np.array(response.outputs["probabilities"].float_val, np.float32).reshape(-1, 10)
    return [native, kserve, values]


@pytest.mark.slow
def test_answers_are_those_of_the_original(
    service: Service, heldout: Heldout, probabilities: NDArray[np.float32]
) -> None:
    """In every protocol, for requests of 1 to 40 images, many at a time; and the sums are exact, wherever one asks."""
    before = service.read()
    failures: list[BaseException] = []

    def ask(sizes: range) -> None:
        try:
            for size in sizes:
                for found in ask_everything(service.address, heldout[0][size : 2 * size]):
                    np.testing.assert_allclose(found, probabilities[size : 2 * size], atol=1e-5)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ask, args=(range(first, 41, 8),)) for first in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    after = service.read()
    images = 3 * sum(range(1, 41))
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    assert grown["resnet_requests_total", "OK"] == grown["resnet_request_seconds_count", ""] == 3 * 40
    assert grown["resnet_images_total", ""] == grown["resnet_batch_images_sum", ""] == images
    assert after["resnet_queued_images", ""] == 0
    with service.each() as channels:
        for channel in channels:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            (found,) = stub.ModelStatistics(service_pb2.ModelStatisticsRequest(name="digits")).model_stats
            assert found.inference_count == after["resnet_images_total", ""]
            assert found.execution_count == after["resnet_batch_images_count", ""]


@pytest.mark.slow
def test_what_dies_is_replaced(
    serve: Callable[..., Service], repository: Path, heldout: Heldout, probabilities: NDArray[np.float32]
) -> None:
    """Callers are told UNAVAILABLE at worst, which clients try again; counts do not go back for a front end."""
    service = serve(repository)
    stop = threading.Event()
    answers: list[bool] = []
    problems: list[object] = []

    def ask() -> None:
        while not stop.is_set():
            with Client(service.address) as client:
                for _ in range(20):
                    try:
                        answer = client.classify(heldout[0][:3], top_k=1, timeout=30)
                    except Unavailable:
                        continue
                    except Exception as error:
                        problems.append(error)
                        return
                    else:
                        answers.append([classes[0].index for classes in answer.images] == best)

    best = probabilities[:3].argmax(axis=1).tolist()
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()

    def await_answers() -> None:
        count = len(answers)
        while len(answers) < count + 50 and not problems:
            time.sleep(0.01)

    try:
        await_answers()
        counted = service.read()["resnet_requests_total", "OK"]
        service.replace("serving.frontend")
        service.await_ready()
        await_answers()
        # What the killed one had answered still counts.
        assert service.read()["resnet_requests_total", "OK"] >= counted + 50
        service.replace("serving.backend")
        service.await_ready()
        await_answers()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not problems
    assert all(answers)
    service.end(signal.SIGINT)


@pytest.mark.slow
def test_versions_come_and_go_at_every_front_end(serve: Callable[..., Service], own_repository: Path) -> None:
    """On SIGHUP, and on request at any one of them."""
    service = serve(own_repository)
    assert service.process.stdout is not None
    add(own_repository, 2)
    service.process.send_signal(signal.SIGHUP)
    assert service.process.stdout.readline().startswith("loaded digits/2")
    tensor = pb.Tensor(data_type=pb.DATA_TYPE_UINT8, shape=(1, 32, 32, 3), data=bytes(3072))

    def answering() -> set[int | grpc.StatusCode]:
        """Return the versions that front ends answer with, or why they do not."""
        found: set[int | grpc.StatusCode] = set()
        with service.each() as channels:
            for channel in channels:
                try:
                    found.add(ClassifierStub(channel).Classify(pb.ClassifyRequest(tensor=tensor)).version)
                except grpc.RpcError as error:
                    found.add(error.code())
        return found

    while answering() != {2}:
        time.sleep(0.01)
    with triton.InferenceServerClient(service.address) as client:
        client.load_model("digits", config='{"version_policy": {"specific": {"versions": [1]}}}')
        assert answering() == {1}
        client.unload_model("digits")
        assert answering() == {grpc.StatusCode.NOT_FOUND}
        with pytest.raises(InferenceServerException, match="the repository has no model 'cats'; it has digits"):
            client.load_model("cats")
    service.end()


@pytest.mark.slow
def test_no_process_outlives_the_supervisor(serve: Callable[..., Service], repository: Path) -> None:
    """However it ends."""
    service = serve(repository)
    below = service.children()
    assert len(below) == 3
    service.process.kill()
    while any(Path(f"/proc/{child}").exists() for child in below):
        time.sleep(0.01)


@pytest.mark.slow
def test_ctrl_c_and_a_signal_for_all_are_heeded_once(
    serve: Callable[..., Service], repository: Path, heldout: Heldout
) -> None:
    """A terminal signals the whole group, systemd every process: the front ends finish what is under way."""
    service = serve(repository)
    for child in service.children():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(child, number)
    with Client(service.address) as client:
        client.classify(heldout[0][:1])
    os.killpg(service.process.pid, signal.SIGINT)
    assert service.process.communicate(timeout=60)[0] == "finishing the requests under way\n"
    assert service.process.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere holds no models"),
        (["{models}", "--port", "{used}"], "is the port in use"),
        (["{models}", "--tls-cert", "no.pem", "--tls-key", "no.pem"], "no.pem cannot be read (No such file"),
    ],
)
def test_what_does_not_start_says_why(arguments: list[str], message: str, repository: Path, address: str) -> None:
    """In one sentence, whichever process found it; exit code 2."""
    words = [word.format(models=repository, used=address.rpartition(":")[2]) for word in arguments]
    ended = subprocess.run([*SERVE, "--port=0", "--frontends=2", *words], check=False, capture_output=True, text=True)
    assert ended.returncode == 2
    said = ended.stderr.splitlines()
    assert [line for line in said if message in line] == said[-1:]


def test_a_front_end_says_when_nobody_computes(repository: Path) -> None:
    """Clients, probes and load balancers learn that it takes no requests, and that it does again."""
    tensor = triton.InferInput("image", (1, 32, 32, 3), "UINT8")
    tensor.set_data_from_numpy(pixels(1))
    status = health_pb2.HealthCheckResponse
    with gated.start(repository) as found, grpc.insecure_channel(found.address) as channel:
        health, client = health_pb2_grpc.HealthStub(channel), triton.InferenceServerClient(found.address)
        for ready, code in ((False, status.NOT_SERVING), (True, status.SERVING)):
            found.server.announce(ready)
            for service in ("", SERVICE, "digits"):
                assert health.Check(health_pb2.HealthCheckRequest(service=service)).status == code
            assert client.is_server_ready() == ready
        found.server.announce(False)
        with pytest.raises(InferenceServerException, match=r"UNAVAILABLE.*takes no requests now"):
            client.infer("digits", [tensor])
        client.close()


@pytest.mark.parametrize(
    ("given", "cores", "gpu", "count"), [(None, 2, True, 0), (None, 16, True, 12), (None, 8, True, 6), (5, 2, False, 5)]
)
def test_the_number_of_front_ends_follows_cores_and_device(
    given: int | None, cores: int, gpu: bool, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is asked for goes before that."""
    monkeypatch.setattr("serving.supervisor.count_cores", lambda: cores)
    monkeypatch.setattr("serving.supervisor._has_gpu", lambda _: gpu)
    assert choose(Config(repository=Path(), frontends=given)) == count
