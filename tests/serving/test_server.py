"""A real server on a free port, asked by real clients."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from numpy.typing import NDArray

from export import manifest
from protos import classifier_pb2 as pb
from protos.classifier_pb2_grpc import ClassifierStub
from resnet import BadInput
from serving import errors
from serving.client import AsyncClient, Client
from serving.config import Batching, Compute, Limits
from serving.models import loader, registry
from serving.models.model import Model
from serving.protocols.classifier import SERVICE
from serving.runtimes.base import Images, Probabilities
from serving.runtimes.cost import CostCurve
from serving.server import Server
from tests.conftest import edit_manifest
from tests.heldout import Heldout
from tests.serving.scheduling.bench import GatedEngine


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[Client]:
    """A connection to the server."""
    with Client(address) as connection:
        yield connection


def test_pixels_get_the_answers_of_the_original(
    client: Client, heldout: Heldout, probabilities: NDArray[np.float32]
) -> None:
    """All classes, in order of probability, equal to Keras within the budget."""
    answer = client.classify(heldout[0][:100], top_k=10)
    assert (answer.model, answer.version) == ("digits", 1)
    for classes, expected in zip(answer.images, probabilities, strict=False):
        assert sorted(item.index for item in classes) == list(range(10))
        assert all(item.label == str(item.index) for item in classes)
        found = [item.probability for item in classes]
        assert found == sorted(found, reverse=True)
        np.testing.assert_allclose(found, expected[[item.index for item in classes]], atol=1e-5)


def test_files_get_the_same_answers_as_their_pixels(
    client: Client, heldout: Heldout, png: Callable[[NDArray[np.uint8]], bytes]
) -> None:
    """PNG loses nothing on the way."""
    pixels = heldout[0][:20]
    files, tensor = client.classify([png(image) for image in pixels]), client.classify(pixels)
    for left, right in zip(files.images, tensor.images, strict=True):
        assert [item.index for item in left] == [item.index for item in right]
        np.testing.assert_allclose([item.probability for item in left], [item.probability for item in right], atol=1e-6)


def test_a_file_of_another_size_is_resized(client: Client, png: Callable[[NDArray[np.uint8]], bytes]) -> None:
    """As the manifest says; a tensor of another size is refused instead."""
    assert len(client.classify([png(np.zeros((50, 70, 3), np.uint8))]).images) == 1


def test_the_answer_says_where_the_time_went(client: Client, heldout: Heldout) -> None:
    """And how many images shared the batch."""
    answer = client.classify(heldout[0][:3])
    assert min(answer.decode_ns, answer.queue_ns, answer.compute_ns) > 0
    assert answer.batch_size == 3
    assert [len(classes) for classes in answer.images] == [5, 5, 5]


def test_the_asyncio_client_asks_many_at_once(
    address: str, heldout: Heldout, probabilities: NDArray[np.float32]
) -> None:
    """Answers belong to their questions."""

    async def ask() -> list[int]:
        async with AsyncClient(address) as client:
            answers = await asyncio.gather(*(client.classify(image[None], top_k=1) for image in heldout[0][:64]))
            with pytest.raises(errors.NotFound):
                await client.classify(heldout[0][:1], model="other")
        return [answer.images[0][0].index for answer in answers]

    assert asyncio.run(ask()) == probabilities[:64].argmax(axis=1).tolist()


def test_health_and_reflection_are_served(address: str) -> None:
    """For the server and for the service, as standard tools ask for them."""
    with grpc.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", SERVICE):
            status = health.Check(health_pb2.HealthCheckRequest(service=service)).status
            assert status == health_pb2.HealthCheckResponse.SERVING
        if hasattr(health, "List"):  # not in the version of constraints.txt, which goes with tritonclient
            statuses = health.List(health_pb2.HealthListRequest()).statuses
            assert statuses[SERVICE].status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        (reply,) = reflection.ServerReflectionInfo(iter([ask]))
        assert SERVICE in [service.name for service in reply.list_services_response.service]


def tensor(shape: tuple[int, ...] = (1, 32, 32, 3), size: int = 3072, data_type: int = pb.DATA_TYPE_UINT8) -> pb.Tensor:
    """Return a tensor whose parts need not fit each other."""
    return pb.Tensor(data_type=data_type, shape=shape, data=bytes(size))  # type: ignore[arg-type]


INVALID, UNKNOWN = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
GOOD = pb.ClassifyRequest(tensor=tensor())
REQUESTS: dict[str, tuple[pb.ClassifyRequest, grpc.StatusCode, str]] = {
    "nothing": (pb.ClassifyRequest(), INVALID, "the request holds no images: set `encoded` or `tensor`"),
    "no files": (pb.ClassifyRequest(encoded=pb.EncodedImages()), INVALID, "the request holds no images"),
    "empty file": (pb.ClassifyRequest(encoded=pb.EncodedImages(images=[b""])), INVALID, "image 0 is empty (0 bytes)"),
    "text": (pb.ClassifyRequest(encoded=pb.EncodedImages(images=[b"x"])), INVALID, "image 0 is not a JPEG or PNG"),
    "dtype": (pb.ClassifyRequest(tensor=tensor(data_type=0)), INVALID, "data_type is 0, it must be DATA_TYPE_UINT8"),
    "axes": (pb.ClassifyRequest(tensor=tensor((32, 32, 3))), INVALID, "takes [images, 32, 32, 3]"),
    "size": (pb.ClassifyRequest(tensor=tensor((1, 16, 16, 3), 768)), INVALID, "shape is [1, 16, 16, 3]"),
    "rows": (pb.ClassifyRequest(tensor=tensor((257, 32, 32, 3), 257 * 3072)), INVALID, "more than the 256 allowed"),
    "no rows": (pb.ClassifyRequest(tensor=tensor((0, 32, 32, 3), 0)), INVALID, "the request holds no images"),
    "negative": (pb.ClassifyRequest(tensor=tensor((-1, 32, 32, 3))), INVALID, "the request holds no images"),
    "bytes": (
        pb.ClassifyRequest(tensor=tensor(size=3071)),
        INVALID,
        "has 3071 bytes, its shape [1, 32, 32, 3] needs 3072",
    ),
    "top_k": (pb.ClassifyRequest(tensor=tensor(), top_k=-1), INVALID, "top_k is -1; it is a number of classes"),
    "model": (pb.ClassifyRequest(tensor=tensor(), model="cats"), UNKNOWN, "no model 'cats'; this server has digits"),
    "version": (pb.ClassifyRequest(tensor=tensor(), version=9), UNKNOWN, "version 9 of model 'digits' is not served"),
}


@pytest.mark.parametrize("kind", REQUESTS)
def test_a_bad_request_has_its_code_and_one_sentence(kind: str, address: str) -> None:
    """And the next good one is answered."""
    request, code, message = REQUESTS[kind]
    with grpc.insecure_channel(address) as channel:
        stub = ClassifierStub(channel)
        with pytest.raises(grpc.RpcError) as failure:
            stub.Classify(request)
        assert failure.value.code() is code
        assert message in failure.value.details()
        assert len(stub.Classify(GOOD).classifications) == 1


def test_the_image_at_fault_is_told_by_its_index(client: Client, png: Callable[[NDArray[np.uint8]], bytes]) -> None:
    """In the message for people, and as a number for programs."""
    good = png(np.zeros((32, 32, 3), np.uint8))
    with pytest.raises(errors.InvalidRequest, match="image 2 is a broken image") as failure:
        client.classify([good, good, good[:50]])
    assert failure.value.image == 2


def test_the_client_refuses_pixels_that_are_no_bytes(client: Client) -> None:
    """Floats would be cut to whole numbers otherwise."""
    with pytest.raises(TypeError, match="must be uint8"):
        client.classify(np.zeros((1, 32, 32, 3)))  # type: ignore[arg-type]


@pytest.fixture
def gated(repository: Path, transport: str) -> Iterator[tuple[GatedEngine, Model, Server]]:
    """A server whose engine waits for the test."""
    about = manifest.read(repository / "digits" / "1")
    engine = GatedEngine()

    class Wide:
        """The gated engine, with as many outputs as the manifest says."""

        provider = "test"

        def run(self, images: Images) -> Probabilities:
            return np.repeat(engine.run(images), 10, axis=1)

    engine.gate.release(2)
    model = loader.start(about, Wide(), Batching(max_batch=2, max_queue=2), curve=CostCurve())
    for _ in range(2):
        engine.entered.acquire()
    engine.batches.clear()
    server = Server(registry.ModelRegistry([model]), "127.0.0.1", 0, Limits(), transport=transport)
    yield engine, model, server
    engine.gate.release(100)
    server.stop(0)


def test_a_full_queue_is_told_to_the_client(gated: tuple[GatedEngine, Model, Server]) -> None:
    """RESOURCE_EXHAUSTED, with the time to try again."""
    engine, model, server = gated
    image = np.zeros((1, 32, 32, 3), np.uint8)
    with Client(server.address) as client, ThreadPoolExecutor() as pool:
        running = pool.submit(client.classify, image)
        engine.entered.acquire()
        waiting = pool.submit(client.classify, image.repeat(2, axis=0))
        while model.batcher.queued < 2:
            pass
        with pytest.raises(errors.Overloaded) as refusal:
            client.classify(image)
        assert refusal.value.retry_ms >= 1
        engine.gate.release(2)
        assert (len(running.result().images), len(waiting.result().images)) == (1, 2)


def test_a_request_that_was_given_up_is_never_computed(gated: tuple[GatedEngine, Model, Server]) -> None:
    """Neither one that was cancelled nor one whose deadline passed."""
    engine, model, server = gated
    with grpc.insecure_channel(server.address) as channel, ThreadPoolExecutor() as pool:
        stub = ClassifierStub(channel)
        running = pool.submit(stub.Classify, GOOD)
        engine.entered.acquire()
        late = stub.Classify.future(GOOD, timeout=2)  # time enough to be queued
        cancelled = stub.Classify.future(GOOD)
        while model.batcher.queued < 2:
            pass
        cancelled.cancel()
        assert late.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        while any(entry.drop_reason() is None for entry in model.batcher._queue):
            pass  # the server has not noticed yet
        engine.gate.release(1)
        running.result()
        again = pool.submit(stub.Classify, GOOD)
        engine.entered.acquire()
        engine.gate.release(1)
        again.result()
    assert [len(batch) for batch in engine.batches] == [1, 1]


def test_stopping_answers_what_is_under_way(gated: tuple[GatedEngine, Model, Server]) -> None:
    """Health says NOT_SERVING meanwhile, and new requests are refused as UNAVAILABLE."""
    engine, _, server = gated
    with Client(server.address) as client, ThreadPoolExecutor() as pool:
        running = pool.submit(client.classify, np.zeros((1, 32, 32, 3), np.uint8))
        engine.entered.acquire()
        stopping = pool.submit(server.stop, 30)
        with Client(server.address, retries=0) as other:
            refusal: errors.ServingError | None = None
            while not isinstance(refusal, errors.Unavailable):  # until the stop begins, requests wait in the queue
                with pytest.raises((errors.Unavailable, errors.DeadlineExceeded, errors.Overloaded)) as caught:
                    other.classify(np.zeros((1, 32, 32, 3), np.uint8), timeout=0.05)
                refusal = caught.value
            assert "the server is shutting down" in str(refusal)
        engine.gate.release(10)
        assert len(running.result().images) == 1
        stopping.result()


def test_an_engine_that_fails_is_an_internal_error_without_details(
    gated: tuple[GatedEngine, Model, Server],
) -> None:
    """The server lives on."""
    engine, _, server = gated
    engine.gate.release(2)
    engine.failure = RuntimeError("a secret of the engine")
    image = np.zeros((1, 32, 32, 3), np.uint8)
    with Client(server.address) as client:
        with pytest.raises(errors.InternalError, match="the server's log has the details"):
            client.classify(image)
        engine.failure = None
        assert len(client.classify(image).images) == 1


def test_two_models_are_told_apart_by_name(repository: Path, tmp_path: Path) -> None:
    """With several models a request must name one."""
    (tmp_path / "numbers").mkdir()
    shutil.copytree(repository / "digits" / "1", tmp_path / "numbers" / "1")
    edit_manifest(tmp_path / "numbers" / "1", lambda content: content.update(model="numbers"))
    loaded = [
        loader.load(folder / "1", Compute(device="cpu", tune=False))
        for folder in (repository / "digits", tmp_path / "numbers")
    ]
    image = np.zeros((1, 32, 32, 3), np.uint8)
    with Server(registry.ModelRegistry(loaded), "127.0.0.1", 0, Limits()) as server, Client(server.address) as client:
        assert client.classify(image, model="numbers").model == "numbers"
        assert client.classify(image, model="digits", version=1).model == "digits"
        with pytest.raises(errors.InvalidRequest, match="name one of the models digits, numbers"):
            client.classify(image)


def test_a_port_in_use_is_refused(address: str) -> None:
    """Two servers never share a port unseen."""
    with pytest.raises(BadInput, match="the port is in use; choose another with --port"):
        Server(registry.ModelRegistry([]), "127.0.0.1", int(address.rpartition(":")[2]), Limits())


def test_a_version_that_does_not_hold_is_not_loaded(own_repository: Path) -> None:
    """A changed file, and a certificate outside its budget."""
    version = own_repository / "digits" / "1"
    good = (version / "manifest.json").read_text()

    def worsen(content: dict[str, Any]) -> None:
        content["certificate"]["variants"][0]["rows"][0]["max_difference"] = 0.5

    edit_manifest(version, worsen, forge=False)
    with pytest.raises(BadInput, match="manifest.json was edited: its digest differs"):
        loader.load(version, Compute(device="cpu", tune=False))
    edit_manifest(version, worsen)
    with pytest.raises(BadInput, match="the certificate of .* does not hold, the largest difference"):
        loader.load(version, Compute(device="cpu", tune=False))
    (version / "manifest.json").write_text(good)
    (version / "variables" / "variables.index").write_bytes(b"")
    with pytest.raises(BadInput, match=r"variables.index is not the file that was exported"):
        loader.load(version, Compute(device="cpu", tune=False))


def test_cuda_that_is_not_there_is_refused(repository: Path) -> None:
    """Asking for the GPU never means getting the CPU."""
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(BadInput, match="--device cuda: this onnxruntime has no CUDA"):
        loader.load(repository / "digits" / "1", Compute(device="cuda"))
    assert (
        loader.load(repository / "digits" / "1", Compute(device="auto", tune=False)).engine.provider
        == "CPUExecutionProvider"
    )
    with pytest.raises(BadInput, match="has no int8 variant; export it again with --precision fp32,int8"):
        loader.load(repository / "digits" / "1", Compute(precision="int8"))
