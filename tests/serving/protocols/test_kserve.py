"""Triton's own client, as it is, asks a real server, in one process with our messages of the same names."""

from __future__ import annotations

import asyncio
import queue
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from protos import inference_pb2 as pb
from serving.config import Compute, Limits
from serving.models import loader, registry
from serving.protocols import kserve_request
from serving.protocols.kserve_request import InferRequest, RequestParser
from serving.server import Server
from tests.heldout import Heldout


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[triton.InferenceServerClient]:
    """A connection to the server."""
    with triton.InferenceServerClient(address) as connection:
        yield connection


@pytest.fixture(scope="module")
def stub(address: str) -> Iterator[service_pb2_grpc.GRPCInferenceServiceStub]:
    """What tritonclient itself calls, for requests that it would not send."""
    with grpc.insecure_channel(address) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def tensor(values: NDArray[Any], datatype: str) -> list[triton.InferInput]:
    """Return the one input of a request."""
    found = triton.InferInput("image", list(values.shape), datatype)
    found.set_data_from_numpy(values)
    return [found]


def test_the_server_says_what_it_is(client: triton.InferenceServerClient) -> None:
    """Live, ready, and with the extensions that it has; a model that is not there is an error."""
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("digits")
    assert client.is_model_ready("digits", "1")
    assert {"classification", "statistics"} <= set(client.get_server_metadata().extensions)
    with pytest.raises(InferenceServerException, match=r"StatusCode.NOT_FOUND.*no model 'cats'"):
        client.is_model_ready("cats")
    (model,) = client.get_model_repository_index().models
    assert (model.name, model.version, model.state) == ("digits", "1", "READY")


def test_a_model_says_what_it_takes_and_what_was_proved(client: triton.InferenceServerClient) -> None:
    """The batch is free, and the certificate is a property."""
    found = client.get_model_metadata("digits")
    assert [(item.name, item.datatype, list(item.shape)) for item in (*found.inputs, *found.outputs)] == [
        ("image", "UINT8", [-1, 32, 32, 3]),
        ("probabilities", "FP32", [-1, 10]),
    ]
    assert (found.platform, list(found.versions)) == ("onnxruntime_onnx", ["1"])
    config = client.get_model_config("digits").config
    assert (config.name, config.backend, config.max_batch_size) == ("digits", "onnxruntime", 256)
    assert (list(config.input[0].dims), list(config.output[0].dims)) == ([32, 32, 3], [10])
    assert (config.dynamic_batching.priority_levels, config.dynamic_batching.default_priority_level) == (3, 2)


def test_properties_say_what_was_proved_where_it_serves(address: str) -> None:
    """Beside the figures of the certificate; tritonclient does not read them."""
    with grpc.insecure_channel(address) as channel:
        describe: grpc.UnaryUnaryMultiCallable[Any, Any] = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelMetadata",
            pb.ModelMetadataRequest.SerializeToString,
            pb.ModelMetadataResponse.FromString,
        )
        found = describe(pb.ModelMetadataRequest(name="digits")).properties
    assert found["proof.device"]
    assert (found["proof.runtime"], found["proof.images"]) == ("CPUExecutionProvider", "256")
    assert 0 < float(found["proof.accuracy"]) <= 1
    assert float(found["proof.max_difference"]) < 1e-5
    assert float(found["proof.seconds"]) > 0


def test_three_forms_of_an_image_get_one_answer(
    client: triton.InferenceServerClient,
    heldout: Heldout,
    probabilities: NDArray[np.float32],
    png: Callable[[NDArray[np.uint8]], bytes],
) -> None:
    """Pixels as UINT8 or FP32, and files."""
    pixels = heldout[0][:5]
    files = np.array([png(image) for image in pixels], dtype=np.object_)
    for values, datatype in ((pixels, "UINT8"), (pixels.astype(np.float32), "FP32"), (files, "BYTES")):
        result = client.infer("digits", tensor(values, datatype), request_id="seven", priority=1, timeout=10**7)
        np.testing.assert_allclose(result.as_numpy("probabilities"), probabilities[:5], atol=1e-5)
        response = result.get_response()
        assert (response.id, response.model_name, response.model_version) == ("seven", "digits", "1")


def test_classification_gives_labels(
    client: triton.InferenceServerClient, heldout: Heldout, probabilities: NDArray[np.float32]
) -> None:
    """As `value:index:label`, best first."""
    wanted = [triton.InferRequestedOutput("probabilities", class_count=3)]
    found = client.infer("digits", tensor(heldout[0][:2], "UINT8"), outputs=wanted).as_numpy("probabilities")
    assert found.shape == (2, 3)
    for row, expected in zip(found, probabilities, strict=False):
        values, indices, labels = zip(*(text.decode().split(":") for text in row), strict=True)
        assert [int(index) for index in indices] == np.argsort(-expected)[:3].tolist()
        assert labels == indices
        np.testing.assert_allclose([float(value) for value in values], np.sort(expected)[::-1][:3], atol=2e-5)


def test_callbacks_streams_and_asyncio(
    client: triton.InferenceServerClient, address: str, heldout: Heldout, probabilities: NDArray[np.float32]
) -> None:
    """The other ways in which the client asks."""
    answers: queue.Queue[Any] = queue.Queue()
    client.async_infer("digits", tensor(heldout[0][:1], "UINT8"), lambda result, error: answers.put((result, error)))
    result, error = answers.get(timeout=30)
    assert error is None
    np.testing.assert_allclose(result.as_numpy("probabilities"), probabilities[:1], atol=1e-5)

    client.start_stream(lambda result, error: answers.put((result, error)))
    for index in range(3):
        client.async_stream_infer("digits", tensor(heldout[0][index : index + 1], "UINT8"), request_id=str(index))
    client.async_stream_infer("cats", tensor(heldout[0][:1], "UINT8"))
    client.async_stream_infer("digits", tensor(heldout[0][:1], "UINT8"), request_id="last")
    for expected in ("0", "1", "2", None, "last"):
        result, error = answers.get(timeout=30)
        if expected is None:
            assert "no model 'cats'" in str(error)  # and the stream goes on
            continue
        assert error is None
        assert result.get_response().id == expected
        assert result.get_response().parameters["triton_final_response"].bool_param
    client.stop_stream()

    async def ask() -> NDArray[np.float32]:
        async with triton_aio.InferenceServerClient(address) as connection:
            result = await connection.infer("digits", tensor(heldout[0][:4], "UINT8"))
            return np.asarray(result.as_numpy("probabilities"))

    np.testing.assert_allclose(asyncio.run(ask()), probabilities[:4], atol=1e-5)


def test_a_stream_may_ask_for_statuses(stub: service_pb2_grpc.GRPCInferenceServiceStub) -> None:
    """With Triton's header, the first error ends it."""
    calls = stub.ModelStreamInfer(
        iter([service_pb2.ModelInferRequest(model_name="cats")]), metadata=[("triton_grpc_error", "true")]
    )
    with pytest.raises(grpc.RpcError) as caught:
        next(calls)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND  # type: ignore[attr-defined]


def test_statistics_count_what_was_asked(client: triton.InferenceServerClient, heldout: Heldout) -> None:
    """Requests, images, batches and failures, exactly."""

    def count() -> Any:
        (found,) = client.get_inference_statistics("digits").model_stats
        return found

    before = count()
    for images in (1, 3):
        client.infer("digits", tensor(heldout[0][:images], "UINT8"))
    with pytest.raises(InferenceServerException):
        client.infer("digits", tensor(heldout[0][:1, :4], "UINT8"))
    after = count()
    assert after.inference_count - before.inference_count == 4
    assert after.execution_count - before.execution_count == 2
    assert after.inference_stats.success.count - before.inference_stats.success.count == 2
    assert after.inference_stats.fail.count - before.inference_stats.fail.count == 1
    assert after.inference_stats.compute_infer.ns > before.inference_stats.compute_infer.ns
    assert after.last_inference >= max(1, before.last_inference)


def test_answers_are_raw_to_the_byte(
    stub: service_pb2_grpc.GRPCInferenceServiceStub, heldout: Heldout, png: Callable[[NDArray[np.uint8]], bytes]
) -> None:
    """BYTES by hand: a length of four bytes, little-endian, before each element; typed contents serve as well."""
    file = png(heldout[0][0])
    given = service_pb2.ModelInferRequest.InferInputTensor(name="image", datatype="BYTES", shape=[2])
    raw = (struct.pack("<I", len(file)) + file) * 2
    response = stub.ModelInfer(
        service_pb2.ModelInferRequest(model_name="digits", inputs=[given], raw_input_contents=[raw])
    )
    assert [len(content) for content in response.raw_output_contents] == [2 * 10 * 4]
    assert not response.outputs[0].HasField("contents")
    given = service_pb2.ModelInferRequest.InferInputTensor(name="image", datatype="UINT8", shape=[1, 32, 32, 3])
    given.contents.uint_contents.extend(heldout[0][0].ravel().tolist())
    typed = stub.ModelInfer(service_pb2.ModelInferRequest(model_name="digits", inputs=[given]))
    np.testing.assert_allclose(
        np.frombuffer(typed.raw_output_contents[0], "<f4"),
        np.frombuffer(response.raw_output_contents[0], "<f4")[:10],
        atol=1e-6,
    )


def image(datatype: str = "UINT8", shape: tuple[int, ...] = (1, 32, 32, 3), **more: Any) -> dict[str, Any]:
    """Return the one input of a request, as a dictionary."""
    return {"name": "image", "datatype": datatype, "shape": shape, **more}


PIXELS = bytes(32 * 32 * 3)
BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "no input": ({}, "INVALID_ARGUMENT", r"takes one input, 'image'; the request has \[\]"),
    "two inputs": ({"inputs": [image(), image()]}, "INVALID_ARGUMENT", "takes one input"),
    "other output": (
        {"inputs": [image()], "outputs": [{"name": "logits"}], "raw_input_contents": [PIXELS]},
        "INVALID_ARGUMENT",
        r"one output, 'probabilities'; the request asks for \['logits'\]",
    ),
    "unknown datatype": (
        {"inputs": [image("FP64")], "raw_input_contents": [PIXELS]},
        "INVALID_ARGUMENT",
        "is UINT8, FP32 or BYTES, not 'FP64'",
    ),
    "too few bytes": (
        {"inputs": [image()], "raw_input_contents": [PIXELS[1:]]},
        "INVALID_ARGUMENT",
        "has 3071 bytes, its shape .* needs 3072",
    ),
    "negative shape": (
        {"inputs": [image(shape=(-1, 32, 32, 3))], "raw_input_contents": [PIXELS]},
        "INVALID_ARGUMENT",
        "holds no images",
    ),
    "zero rows": ({"inputs": [image(shape=(0, 32, 32, 3))]}, "INVALID_ARGUMENT", "holds no images"),
    "overflowing shape": (
        {"inputs": [image(shape=(2**62, 32, 32, 3))], "raw_input_contents": [PIXELS]},
        "INVALID_ARGUMENT",
        "more than the 256 allowed",
    ),
    "raw and typed": (
        {"inputs": [image(contents={"uint_contents": [1]})], "raw_input_contents": [PIXELS]},
        "INVALID_ARGUMENT",
        "contents must not be set beside raw_input_contents",
    ),
    "two raw entries": (
        {"inputs": [image()], "raw_input_contents": [PIXELS, PIXELS]},
        "INVALID_ARGUMENT",
        "raw_input_contents has 2 entries for one input",
    ),
    "NaN": (
        {"inputs": [image("FP32")], "raw_input_contents": [np.full(3072, np.nan, "<f4").tobytes()]},
        "INVALID_ARGUMENT",
        "must be from 0 to 255",
    ),
    "a byte of 256": (
        {"inputs": [image(contents={"uint_contents": [256] * 3072})]},
        "INVALID_ARGUMENT",
        "has a value that is no uint8",
    ),
    "cut BYTES": (
        {"inputs": [image("BYTES", (1,))], "raw_input_contents": [b"\xff\0\0\0abc"]},
        "INVALID_ARGUMENT",
        "an element begins at byte 0 of 7",
    ),
    "no picture": (
        {"inputs": [image("BYTES", (1,), contents={"bytes_contents": [b"abc"]})]},
        "INVALID_ARGUMENT",
        "image 0 ",
    ),
    "unknown label": ({"model_version": "x"}, "INVALID_ARGUMENT", "no version label 'x' of model 'digits'"),
    "version 0": ({"model_version": "0"}, "NOT_FOUND", "versions begin with 1"),
    "unknown version": ({"model_version": "9"}, "NOT_FOUND", "version 9 of model 'digits' is not served"),
    "shared memory": (
        {"inputs": [image(parameters={"shared_memory_region": {"string_param": "x"}})]},
        "UNIMPLEMENTED",
        "reads no shared memory",
    ),
    "negative timeout": ({"parameters": {"timeout": {"int64_param": -1}}}, "INVALID_ARGUMENT", "timeout is a number"),
    "priority 4": (
        {"inputs": [image()], "raw_input_contents": [PIXELS], "parameters": {"priority": {"uint64_param": 4}}},
        "INVALID_ARGUMENT",
        "the priority is 4; it must be 1 to 3, or 0 for none",
    ),
    "priority of letters": (
        {"parameters": {"priority": {"string_param": "x"}}},
        "INVALID_ARGUMENT",
        "priority is a number",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_request_has_its_code_and_one_sentence(
    kind: str, stub: service_pb2_grpc.GRPCInferenceServiceStub
) -> None:
    """And the next good one is answered."""
    fields, code, message = BAD[kind]
    with pytest.raises(grpc.RpcError, match=message) as caught:
        stub.ModelInfer(service_pb2.ModelInferRequest(**{"model_name": "digits", **fields}))
    assert caught.value.code().name == code  # type: ignore[attr-defined]
    good = service_pb2.ModelInferRequest(model_name="digits", inputs=[image()], raw_input_contents=[PIXELS])
    assert len(stub.ModelInfer(good).raw_output_contents) == 1


def test_a_request_is_parsed_as_protobuf_would() -> None:
    """Whole, cut off, with bytes that were changed, and with fields that nobody knows: the same, or no message."""
    parse = RequestParser().parse
    rng = np.random.default_rng(0)
    tensor = pb.ModelInferRequest.InferInputTensor(name="image", datatype="UINT8", shape=[2, 4, 4, 3])
    request = pb.ModelInferRequest(
        model_name="digits", id="7", inputs=[tensor, tensor], raw_input_contents=[rng.bytes(300)]
    )
    request.parameters["priority"].int64_param = 1
    whole = request.SerializeToString()
    unknown = [b"\x98\x06\x05", b"\xa2\x06\x02ab", b"\x9d\x06abcd", b"\x99\x06abcdefgh"]  # varint, bytes, 32, 64 bits
    payloads = [whole[:size] for size in range(len(whole) + 1)]
    payloads += [extra + whole for extra in unknown] + [whole + extra for extra in unknown]
    payloads += [whole + whole, whole + b"\x80" * 12, b"\x3a" + b"\xff" * 9 + b"\x01", b"\x3b", b"\x00"]
    # Contents with tags and sizes that are longer than need be; many of them, or none.
    payloads += [
        head + tail + whole for head in (b"\xba\x80\x00", b"\xba\x80\x80\x80\x80\x80\x00") for tail in (b"\0", b"\1a")
    ]
    payloads += [b"\x3a\x81" + b"\x80" * count + b"\x00a" for count in range(10)]
    payloads += [b"\x3a\x00" * 100, whole + b"\x3a\x00", b"\x3a\x00" + whole, b"\x3a\x00", b"\x0a\x00" * 100 + whole]
    for _ in range(2000):
        changed = bytearray(whole)
        changed[rng.integers(len(changed) if rng.random() < 0.5 else 60)] = rng.integers(256)
        payloads.append(bytes(changed))
    found = [parse_as_protobuf(parse, payload) for payload in payloads]
    assert sum(request is not None and not request.head.message.raw_input_contents for request in found) > 1000


def parse_as_protobuf(parse: Callable[[bytes], InferRequest], payload: bytes) -> InferRequest | None:
    """Check that a request says what protobuf reads in it, and return it; None if both say that it is none."""
    try:
        expected = pb.ModelInferRequest.FromString(payload)
    except DecodeError:
        with pytest.raises(DecodeError):
            parse(payload)
        return None
    request = parse(payload)
    message = pb.ModelInferRequest()
    message.CopyFrom(request.head.message)
    if not message.raw_input_contents:
        message.raw_input_contents.extend(map(bytes, request.raw))
    assert message == expected
    return request


def test_a_head_that_is_known_is_that_of_the_same_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever came before: other pixels, other ids, more pixels behind the same head, fields behind the pixels."""
    monkeypatch.setattr(kserve_request, "CACHE_SIZE", 50)
    parse = RequestParser().parse
    rng = np.random.default_rng(0)
    tensor = pb.ModelInferRequest.InferInputTensor(name="image", datatype="UINT8", shape=[1, 4, 4, 3])
    for _ in range(3000):
        size = rng.integers(200)
        request = pb.ModelInferRequest(
            model_name=rng.choice(["digits", "letter", "cat"]), id=rng.choice(["", "1", "23"]), inputs=[tensor]
        )
        request.raw_input_contents.append(rng.bytes(size))
        payload = request.SerializeToString()
        payload += rng.choice([b"", b"", b"", b"\x1a\x01x", b"\x3a\x02ab", b"\x3a"])
        parse_as_protobuf(parse, payload)
    payload = pb.ModelInferRequest(inputs=[tensor], raw_input_contents=[bytes(7)]).SerializeToString()
    assert parse(payload).head is parse(payload[:-1] + b"x").head


def test_large_requests_are_answered_as_others(
    repository: Path, heldout: tuple[NDArray[np.uint8], NDArray[np.int32]], probabilities: NDArray[np.float32]
) -> None:
    """Of pixels in both types, over the transport that leaves them where they came."""
    model = loader.load(repository / "digits" / "1", Compute(device="cpu", tune=False))
    pixels = heldout[0][:100]
    with Server(registry.ModelRegistry([model]), "127.0.0.1", 0, Limits(), transport="native") as server:
        client = triton.InferenceServerClient(server.address)
        for dtype, kind in ((np.uint8, "UINT8"), (np.float32, "FP32")):
            tensor = triton.InferInput("image", list(pixels.shape), kind)
            tensor.set_data_from_numpy(pixels.astype(dtype))
            found = client.infer("digits", [tensor]).as_numpy("probabilities")
            np.testing.assert_allclose(found, probabilities[:100], atol=1e-5)
        short = triton.InferInput("image", [101, 32, 32, 3], "UINT8")
        short._raw_content = pixels.tobytes()
        with pytest.raises(InferenceServerException, match="the tensor's data has 307200 bytes"):
            client.infer("digits", [short])
        client.close()
