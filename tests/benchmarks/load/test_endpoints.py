"""Requests are made of what the server says of its model."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
from PIL import Image

from benchmarks.load import endpoints
from benchmarks.load.endpoints import PROTOCOLS
from protos import classifier_pb2, tensorflow_pb2, tensorflow_serving_pb2
from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import GRPCInferenceServiceServicer, add_GRPCInferenceServiceServicer_to_server
from resnet import BadInput


class Stranger(GRPCInferenceServiceServicer):
    """Another server's model, as its metadata tells of it."""

    def __init__(self, datatype: str, *shapes: list[int]) -> None:
        """Take inputs of these shapes."""
        self._datatype, self._shapes = datatype, shapes

    def ModelMetadata(self, request: pb.ModelMetadataRequest, context: object) -> pb.ModelMetadataResponse:  # noqa: ARG002
        """Tell."""
        tensor = pb.ModelMetadataResponse.TensorMetadata
        inputs = [tensor(name="pixels", datatype=self._datatype, shape=shape) for shape in self._shapes]
        return pb.ModelMetadataResponse(name=request.name, inputs=inputs)

    def RepositoryIndex(self, request: pb.RepositoryIndexRequest, context: object) -> pb.RepositoryIndexResponse:  # noqa: ARG002
        """List two models."""
        index = pb.RepositoryIndexResponse.ModelIndex
        return pb.RepositoryIndexResponse(models=[index(name="cats"), index(name="dogs")])


@contextmanager
def serve(stranger: Stranger) -> Iterator[str]:
    """Yield the stranger's address."""
    server = grpc.server(ThreadPoolExecutor(1))
    add_GRPCInferenceServiceServicer_to_server(stranger, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(0).wait()


@pytest.mark.parametrize(
    ("protocol", "model", "datatype"),
    [
        ("native", "", ""),
        ("kserve", "", ""),
        ("kserve", "digits", "FP32"),
        ("tfs", "digits", ""),
        ("tfs", "digits", "FP32"),
    ],
)
def test_our_server_answers_every_request(address: str, protocol: str, model: str, datatype: str) -> None:
    """In each protocol and datatype, two images a request, without being told a shape."""
    endpoint = endpoints.connect(address, protocol, model, images=2, datatype=datatype)
    assert endpoint.input.datatype == (datatype or "UINT8")
    assert len(endpoint.requests[0]) > 2 * 32 * 32 * 3 * (4 if datatype else 1)
    assert endpoint.input.model == "digits"
    assert endpoint.input.shape == (2, 32, 32, 3)
    assert len(set(endpoint.requests)) > 1
    answers = {
        "native": lambda data: len(classifier_pb2.ClassifyResponse.FromString(data).classifications),
        "kserve": lambda data: pb.ModelInferResponse.FromString(data).outputs[0].shape[0],
        "tfs": lambda data: (
            tensorflow_serving_pb2.PredictResponse.FromString(data).outputs["probabilities"].tensor_shape.dim[0].size
        ),
    }
    with grpc.insecure_channel(address) as channel:
        method: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(endpoint.path)
        assert [answers[protocol](method(request)) for request in endpoint.requests] == [2] * len(endpoint.requests)


def test_another_server_gets_what_it_asks_for() -> None:
    """Channels first, and floats; a model in a fixed size of batch gets that."""
    with serve(Stranger("FP32", [4, 3, 8, 6])) as address:
        endpoint = endpoints.connect(address, "kserve", "cats", images=4)
    request = pb.ModelInferRequest.FromString(endpoint.requests[0])
    assert (request.model_name, request.inputs[0].name, request.inputs[0].datatype) == ("cats", "pixels", "FP32")
    assert list(request.inputs[0].shape) == [4, 3, 8, 6]
    pixels = np.frombuffer(request.raw_input_contents[0], "<f4")
    assert len(pixels) == 4 * 3 * 8 * 6
    assert pixels.min() >= 0
    assert 200 < pixels.max() <= 255


@pytest.mark.parametrize("channels", [1, 3])
def test_files_are_sent_in_the_form_of_the_model(channels: int, tmp_path: Path) -> None:
    """In turn, in its size and colours, as floats where it wants them."""
    for shade in (10, 20):
        Image.new("RGB", (30, 20), (shade, shade, shade)).save(tmp_path / f"{shade}.png")
    with serve(Stranger("FP32", [-1, 4, 5, channels])) as address:
        endpoint = endpoints.connect(address, "kserve", "cats", data=sorted(tmp_path.glob("*.png")))
    sent = [pb.ModelInferRequest.FromString(request).raw_input_contents[0] for request in endpoint.requests[:3]]
    assert sent == [np.full(4 * 5 * channels, shade, "<f4").tobytes() for shade in (10, 20, 10)]


@pytest.mark.parametrize(
    ("stranger", "options", "message"),
    [
        (Stranger("BYTES", [-1]), {}, "takes BYTES; only UINT8 and FP32"),
        (Stranger("FP32", [-1, 4], [-1, 4]), {}, "takes 2 inputs"),
        (Stranger("FP32", [1, 3, 8, 8]), {"images": 2}, "give --images 1"),
        (Stranger("FP32", [-1, -1, -1, 3]), {}, "give --shape"),
        (Stranger("FP32", [-1, 3, 8, 8]), {"data": [Path("cat.png")]}, r"--data needs a model of \[height"),
        (Stranger("FP32", [-1, 8, 8, 3]), {"data": [Path(__file__)]}, "test_endpoints.py is no"),
        (Stranger("FP32", [-1, 8, 8, 3]), {"model": ""}, "has the models cats, dogs; choose one with --model"),
        (Stranger("FP32", [-1, 8, 8, 3]), {"protocol": "tfs"}, "does not report the input of its model.*UNIMPLEMENTED"),
        (Stranger("FP32", [-1, 8, 8, 3]), {"protocol": "native"}, "the native protocol takes UINT8 pixels, not FP32"),
        (Stranger("FP32", [-1, 8, 8, 3]), {"protocol": "tfs", "model": ""}, "name one with --model"),
    ],
)
def test_what_cannot_be_sent_is_a_sentence(stranger: Stranger, options: dict[str, object], message: str) -> None:
    """It says what to do."""
    asked: dict[str, object] = {"protocol": "kserve", "model": "cats", **options}
    with serve(stranger) as address, pytest.raises(BadInput, match=message):
        endpoints.connect(address, **asked)  # type: ignore[arg-type]


def test_floats_go_to_tensorflow_serving_too() -> None:
    """With the dtype of the protocol."""
    wanted = endpoints.Input("cats", "pixels", (1, 2, 2, 3), "FP32")
    request = tensorflow_serving_pb2.PredictRequest.FromString(
        PROTOCOLS["tfs"].pack(wanted, np.ones(wanted.shape, "<f4"))
    )
    tensor = request.inputs["pixels"]
    assert (request.model_spec.name, tensor.dtype) == ("cats", tensorflow_pb2.DT_FLOAT)
    assert tensor.tensor_content == np.ones(12, "<f4").tobytes()
