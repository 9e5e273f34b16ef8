"""Call every RPC of a server with widely used, unmodified clients, and check the responses.

The clients are tritonclient (calls, callbacks, asyncio, streams), tensorflow-serving-api, and those of gRPC's
reflection and health services, from the dependency group `dev`. The server is `resnet serve` on a model repository. The
last line of the output is one JSON object; the exit code is 1 if a response is not as expected.

Examples:
  python -m tests.acceptance.conformance demo/models --transport grpcio
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import queue
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import tensorflow as tf
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from PIL import Image
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from benchmarks.harness.process import serve
from export import manifest, repository
from resnet import CheckFailed, cli
from resnet.table import render

HEADER = ("client", "RPC", "result")

RpcCheck = tuple[str, str, Callable[[], str]]
"""Client, RPC, and the check, which returns its result in words or raises an exception."""


def main() -> None:
    """Run all checks, and print the table, a row for each call."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.acceptance.conformance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("repository", type=Path, help="a model repository")
    parser.add_argument(
        "--transport",
        default="auto",
        choices=("auto", "native", "grpcio"),
        help="transport of the server (default: auto)",
    )
    args = parser.parse_args()
    folder = args.repository
    failed, rows = 0, []
    with serve(folder, f"--transport={args.transport}") as server, ExitStack() as stack:
        subject = _Subject(server.address, repository.models(folder)[0], stack)
        for client, rpc, check in _list_checks(subject):
            try:
                result = check()
            except Exception as error:
                failed += 1
                result = f"**FAILED**: {type(error).__name__}: {error}"
            print(f"{client}, {rpc}: {result}", flush=True)
            rows.append([client, rpc, " ".join(result.split())])
    print(f"\n{render(HEADER, rows, left=3)}\n")
    if failed:
        raise CheckFailed(f"{failed} of {len(rows)} calls had an unexpected response; they are marked FAILED above")
    print(json.dumps({"calls": len(rows)}))


class _Subject:
    """The model under test, images for it, and the connections to its server."""

    def __init__(self, address: str, model: Path, stack: ExitStack) -> None:
        self.address, self.manifest = address, manifest.read(repository.latest(model))
        self.name, self.input, self.output = (
            self.manifest.model,
            self.manifest.input.name,
            self.manifest.output.name,
        )
        self.classes = len(self.manifest.labels)
        self.pixels = np.random.default_rng(0).integers(0, 256, (3, *self.manifest.input.shape[1:]), np.uint8)
        file = io.BytesIO()
        Image.fromarray(self.pixels[0]).save(file, "PNG")
        self.file = file.getvalue()
        self.triton = stack.enter_context(triton.InferenceServerClient(address))
        self.channel = stack.enter_context(grpc.insecure_channel(address))

    def tensor(self, values: np.ndarray[Any, Any], datatype: str) -> list[triton.InferInput]:
        return [triton.InferInput(self.input, list(values.shape), datatype).set_data_from_numpy(values)]

    def infer(self, values: np.ndarray[Any, Any], datatype: str, **more: Any) -> Any:
        return self.triton.infer(self.name, self.tensor(values, datatype), **more)

    def probabilities(self, count: int = 3) -> np.ndarray[Any, Any]:
        probabilities: np.ndarray[Any, Any] = self.infer(self.pixels[:count], "UINT8").as_numpy(self.output)
        return probabilities


def _expect(holds: bool, result: str) -> str:
    """Return the result of a check, or raise `CheckFailed` with it."""
    if not holds:
        raise CheckFailed(result)
    return result


def _expect_error(call: Callable[[], object], code: str) -> str:
    """Return the error of a call that must fail with this code."""
    try:
        call()
    except InferenceServerException as error:
        return _expect(error.status() == f"StatusCode.{code}", f"{error.status()}: {error.message()}")
    except grpc.RpcError as error:
        return _expect(error.code().name == code, f"StatusCode.{error.code().name}: {error.details()}")
    raise CheckFailed(f"the call succeeded, and should have failed with {code}")


def _list_checks(subject: _Subject) -> Iterator[RpcCheck]:
    for rpc, call in (*_list_triton_calls(subject), *_list_triton_inferences(subject)):
        yield "tritonclient", rpc, call
    yield from _list_tensorflow_calls(subject)
    yield from _list_grpc_calls(subject)


def _list_triton_inferences(subject: _Subject) -> Iterator[tuple[str, Callable[[], str]]]:
    client, name, pixels = subject.triton, subject.name, subject.pixels

    def three_forms() -> str:
        expected = subject.probabilities(1)
        as_float = subject.infer(pixels[:1].astype(np.float32), "FP32").as_numpy(subject.output)
        as_file = subject.infer(np.array([subject.file], np.object_), "BYTES").as_numpy(subject.output)
        equal = np.allclose(expected, as_float, atol=1e-6) and np.allclose(expected, as_file, atol=1e-6)
        return _expect(equal, "UINT8, FP32 and BYTES of one image give the same answer")

    def classification() -> str:
        top = [triton.InferRequestedOutput(subject.output, class_count=2)]
        classes = subject.infer(pixels[:1], "UINT8", outputs=top).as_numpy(subject.output)
        best = int(subject.probabilities(1).argmax())
        return _expect(
            int(classes[0, 0].split(b":")[1]) == best, f"top 2 as {[text.decode() for text in classes[0].tolist()]}"
        )

    def callback() -> str:
        answers: queue.Queue[Any] = queue.Queue()
        client.async_infer(
            name, subject.tensor(pixels[:1], "UINT8"), lambda result, error: answers.put((result, error))
        )
        result, error = answers.get(timeout=30)
        return _expect(
            error is None and result.as_numpy(subject.output).shape == (1, subject.classes), "the callback was called"
        )

    def asynchronous() -> str:
        async def infer() -> Any:
            async with triton_aio.InferenceServerClient(subject.address) as connection:
                return (await connection.infer(name, subject.tensor(pixels, "UINT8"))).as_numpy(subject.output)

        return _expect(np.allclose(asyncio.run(infer()), subject.probabilities(), atol=1e-6), "the same from asyncio")

    def stream() -> str:
        answers: queue.Queue[Any] = queue.Queue()
        client.start_stream(lambda result, error: answers.put((result, error)))
        for model, identity in ((name, "a"), ("no-such-model", "b"), (name, "c")):
            client.async_stream_infer(model, subject.tensor(pixels[:1], "UINT8"), request_id=identity)
        first, failure, last = (answers.get(timeout=30) for _ in range(3))
        client.stop_stream()
        ids = [answer[0].get_response().id for answer in (first, last)]
        return _expect(ids == ["a", "c"] and failure[1] is not None, "a failure in the middle does not end the stream")

    def exact() -> str:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(subject.channel)
        tensor = service_pb2.ModelInferRequest.InferInputTensor(name=subject.input, datatype="BYTES", shape=[1])
        raw = struct.pack("<I", len(subject.file)) + subject.file
        request = service_pb2.ModelInferRequest(model_name=name, id="7", inputs=[tensor], raw_input_contents=[raw])
        response = stub.ModelInfer(request)
        expected = subject.probabilities(1).astype("<f4").tobytes()
        fields = [response.id, len(response.raw_output_contents), response.outputs[0].HasField("contents")]
        same = fields == ["7", 1, False] and len(response.raw_output_contents[0]) == len(expected)
        return _expect(same, f"BYTES: 4-byte length, file; answer: {len(expected)} raw bytes, no typed contents")

    def timeout() -> str:
        return _expect_error(lambda: subject.infer(np.repeat(pixels, 64, 0), "UINT8", timeout=1), "DEADLINE_EXCEEDED")

    yield "ModelInfer", three_forms
    yield "ModelInfer, classification", classification
    yield "ModelInfer, bytes on the wire", exact
    yield "ModelInfer, timeout of 1 us", timeout
    yield (
        "ModelInfer, wrong shape",
        lambda: _expect_error(lambda: subject.infer(pixels[:, :1], "UINT8"), "INVALID_ARGUMENT"),
    )
    yield "ModelInfer, callback", callback
    yield "ModelInfer, asyncio", asynchronous
    yield "ModelStreamInfer", stream


def _list_triton_calls(subject: _Subject) -> Iterator[tuple[str, Callable[[], str]]]:
    client, name = subject.triton, subject.name
    version = str(subject.manifest.version)

    def count() -> int:
        return int(client.get_inference_statistics(name).model_stats[0].inference_count)

    def statistics() -> str:
        before = count()
        subject.probabilities(3)
        return _expect(count() - before == 3, "three further images are counted as three")

    def reload() -> str:
        client.unload_model(name)
        gone = _expect_error(lambda: client.is_model_ready(name), "NOT_FOUND")
        client.load_model(name)
        return _expect(client.is_model_ready(name), f"unloaded ({gone}), loaded, ready")

    def describe() -> str:
        shapes = [list(item.shape) for item in client.get_model_metadata(name).inputs]
        return _expect(shapes == [[-1, *subject.manifest.input.shape[1:]]], "name, datatype and shape as exported")

    def configure() -> str:
        return _expect(client.get_model_config(name).config.max_batch_size > 0, "with batching, for perf_analyzer")

    def list_models() -> str:
        index = {(model.name, model.state) for model in client.get_model_repository_index().models}
        return _expect((name, "READY") in index, "READY")

    yield "ServerLive", lambda: _expect(client.is_server_live(), "true")
    yield "ServerReady", lambda: _expect(client.is_server_ready(), "true")
    yield "ModelReady", lambda: _expect(client.is_model_ready(name, version), "true")
    yield "ModelReady, unknown model", lambda: _expect_error(lambda: client.is_model_ready("no-such"), "NOT_FOUND")
    yield "ServerMetadata", lambda: ", ".join(client.get_server_metadata().extensions)
    yield "ModelMetadata", describe
    yield "ModelConfig", configure
    yield "ModelStatistics", statistics
    yield "RepositoryIndex", list_models
    yield "RepositoryModelUnload, -Load", reload
    yield "SystemSharedMemoryStatus", lambda: _expect_error(client.get_system_shared_memory_status, "UNIMPLEMENTED")


def _list_tensorflow_calls(subject: _Subject) -> Iterator[RpcCheck]:
    client = "tensorflow-serving-api"
    prediction = prediction_service_pb2_grpc.PredictionServiceStub(subject.channel)
    models = model_service_pb2_grpc.ModelServiceStub(subject.channel)

    def predict(**spec: Any) -> Any:
        request = predict_pb2.PredictRequest()
        request.model_spec.name = subject.name
        for field, value in spec.items():
            setattr(request.model_spec, field, value)
        request.inputs[subject.input].CopyFrom(tf.make_tensor_proto(subject.pixels))
        return prediction.Predict(request)

    def same() -> str:
        response = predict()
        probabilities = tf.make_ndarray(response.outputs[subject.output])
        spec = response.model_spec
        equal = np.allclose(probabilities, subject.probabilities(), atol=1e-6)
        return _expect(equal, f"the same as by tritonclient; {spec.signature_name}, version {spec.version.value}")

    def metadata() -> str:
        request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
        request.model_spec.name = subject.name
        signatures = get_model_metadata_pb2.SignatureDefMap()
        prediction.GetModelMetadata(request).metadata["signature_def"].Unpack(signatures)
        return _expect(list(signatures.signature_def) == ["serving_default"], "the signature serving_default")

    def status() -> str:
        request = get_model_status_pb2.GetModelStatusRequest()
        request.model_spec.name = subject.name
        versions = models.GetModelStatus(request).model_version_status
        return _expect([version.state for version in versions] == [30], "AVAILABLE")

    def classify() -> str:
        request = classification_pb2.ClassificationRequest()
        request.model_spec.name = subject.name
        return _expect_error(lambda: prediction.Classify(request), "UNIMPLEMENTED")

    yield client, "Predict", same
    yield (
        client,
        "Predict, unknown signature",
        lambda: _expect_error(lambda: predict(signature_name="x"), "FAILED_PRECONDITION"),
    )
    yield (
        client,
        "Predict, unknown label",
        lambda: _expect_error(lambda: predict(version_label="x"), "INVALID_ARGUMENT"),
    )
    yield client, "GetModelMetadata", metadata
    yield client, "GetModelStatus", status
    yield client, "Classify", classify


def _list_grpc_calls(subject: _Subject) -> Iterator[RpcCheck]:
    health: Any = health_pb2_grpc.HealthStub(subject.channel)  # its types lack its methods
    serving = health_pb2.HealthCheckResponse.SERVING

    def services() -> str:
        names = ProtoReflectionDescriptorDatabase(subject.channel).get_services()
        expected = {"resnet.v1.Classifier", "inference.GRPCInferenceService", "tensorflow.serving.PredictionService"}
        return _expect(expected <= set(names), ", ".join(sorted(names)))

    def descriptor() -> str:
        file = ProtoReflectionDescriptorDatabase(subject.channel).FindFileContainingSymbol("resnet.v1.Classifier")
        return _expect(file.service[0].name == "Classifier", file.name)

    def check(service: str) -> str:
        state = health.Check(health_pb2.HealthCheckRequest(service=service)).status
        return _expect(state == serving, "SERVING")

    def watch() -> str:
        call = health.Watch(health_pb2.HealthCheckRequest(service=subject.name), timeout=30)
        state = next(call).status
        call.cancel()
        return _expect(state == serving, "SERVING, at once")

    yield "grpcio-reflection", "ServerReflectionInfo, services", services
    yield "grpcio-reflection", "ServerReflectionInfo, file by symbol", descriptor
    for service in ("", "inference.GRPCInferenceService", subject.name):
        yield "grpcio-health-checking", f"Check {service!r}", partial(check, service)
    yield "grpcio-health-checking", f"Watch {subject.name!r}", watch
    unknown = health_pb2.HealthCheckRequest(service="no-such")
    yield "grpcio-health-checking", "Check 'no-such'", lambda: _expect_error(lambda: health.Check(unknown), "NOT_FOUND")


if __name__ == "__main__":
    sys.exit(cli.call(main, "error"))
