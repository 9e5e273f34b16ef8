"""TensorFlow Serving's own client, as it is, asks a real server, in one process with our messages of the same names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import tensorflow as tf
from numpy.typing import NDArray
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

from tests.heldout import Heldout


@pytest.fixture(scope="module")
def channel(address: str) -> Iterator[grpc.Channel]:
    """A connection to the server."""
    with grpc.insecure_channel(address) as connection:
        yield connection


@pytest.fixture(scope="module")
def stub(channel: grpc.Channel) -> prediction_service_pb2_grpc.PredictionServiceStub:
    """The service that predicts."""
    return prediction_service_pb2_grpc.PredictionServiceStub(channel)


def request(values: Any = None, **spec: Any) -> predict_pb2.PredictRequest:
    """Return a request as TensorFlow writes it."""
    found = predict_pb2.PredictRequest(model_spec={"name": "digits", **spec})
    if values is not None:
        found.inputs["image"].CopyFrom(tf.make_tensor_proto(values))
    return found


def test_three_forms_of_an_image_get_one_answer(
    stub: prediction_service_pb2_grpc.PredictionServiceStub,
    heldout: Heldout,
    probabilities: NDArray[np.float32],
    png: Callable[[NDArray[np.uint8]], bytes],
) -> None:
    """Pixels as uint8 or float, and files."""
    pixels = heldout[0][:5]
    for values in (pixels, pixels.astype(np.float32), [png(image) for image in pixels]):
        response = stub.Predict(request(values))
        found = tf.make_ndarray(response.outputs["probabilities"])
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, probabilities[:5], atol=1e-5)
        spec = response.model_spec
        assert (spec.name, spec.version.value, spec.signature_name) == ("digits", 1, "serving_default")


def test_values_may_be_typed_and_one_may_stand_for_all(
    stub: prediction_service_pb2_grpc.PredictionServiceStub, heldout: Heldout, probabilities: NDArray[np.float32]
) -> None:
    """As the comments of tensor.proto have it."""
    typed = request()
    typed.inputs["image"].CopyFrom(tf.make_tensor_proto(heldout[0][:1]))
    typed.inputs["image"].tensor_content = b""
    typed.inputs["image"].int_val.extend(heldout[0][0].ravel().tolist())
    found = tf.make_ndarray(stub.Predict(typed).outputs["probabilities"])
    np.testing.assert_allclose(found, probabilities[:1], atol=1e-5)
    grey = np.full((2, 32, 32, 3), 7, np.uint8)
    one = request(grey)
    one.inputs["image"].tensor_content = b""
    one.inputs["image"].int_val.append(7)
    whole, short = (tf.make_ndarray(stub.Predict(asked).outputs["probabilities"]) for asked in (request(grey), one))
    np.testing.assert_array_equal(whole, short)


def test_versions_signatures_and_filters(
    stub: prediction_service_pb2_grpc.PredictionServiceStub, heldout: Heldout
) -> None:
    """By number, by the number as a label as perf_analyzer has it, and by name."""
    for spec in ({"version": {"value": 1}}, {"version_label": "1"}, {"signature_name": "serving_default"}):
        asked = request(heldout[0][:1], **spec)
        asked.output_filter.append("probabilities")
        assert list(stub.Predict(asked).outputs) == ["probabilities"]


def test_a_model_says_what_it_takes(stub: prediction_service_pb2_grpc.PredictionServiceStub) -> None:
    """As a map of signatures."""
    asked = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
    asked.model_spec.name = "digits"
    signatures = get_model_metadata_pb2.SignatureDefMap()
    assert stub.GetModelMetadata(asked).metadata["signature_def"].Unpack(signatures)
    signature = signatures.signature_def["serving_default"]
    image, given = signature.inputs["image"], signature.outputs["probabilities"]
    assert tf.as_dtype(image.dtype) == tf.uint8
    assert tf.TensorShape(image.tensor_shape).as_list() == [None, 32, 32, 3]
    assert (tf.as_dtype(given.dtype), tf.TensorShape(given.tensor_shape).as_list()) == (tf.float32, [None, 10])
    with pytest.raises(grpc.RpcError, match="metadata_field must be") as caught:
        stub.GetModelMetadata(get_model_metadata_pb2.GetModelMetadataRequest())
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]


def test_a_model_says_that_it_is_served(channel: grpc.Channel) -> None:
    """One that is not there is an error."""
    stub = model_service_pb2_grpc.ModelServiceStub(channel)
    asked = get_model_status_pb2.GetModelStatusRequest()
    asked.model_spec.name = "digits"
    (status,) = stub.GetModelStatus(asked).model_version_status
    assert (status.version, status.state) == (1, get_model_status_pb2.ModelVersionStatus.AVAILABLE)
    asked.model_spec.name = "cats"
    with pytest.raises(grpc.RpcError, match="no model 'cats'") as caught:
        stub.GetModelStatus(asked)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND  # type: ignore[attr-defined]


def test_examples_are_refused(stub: prediction_service_pb2_grpc.PredictionServiceStub) -> None:
    """And it is said what to call instead."""
    with pytest.raises(grpc.RpcError, match="holds? no images; call Predict") as caught:
        stub.Classify(classification_pb2.ClassificationRequest(model_spec={"name": "digits"}))
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED  # type: ignore[attr-defined]


PIXELS = np.zeros((1, 32, 32, 3), np.uint8)


def with_other_output() -> predict_pb2.PredictRequest:
    """Return a request for an output that is not there."""
    found = request(PIXELS)
    found.output_filter.append("logits")
    return found


def with_huge_shape() -> predict_pb2.PredictRequest:
    """Return a request of one value that is to be repeated 2^62 times."""
    found = request(PIXELS)
    found.inputs["image"].tensor_content = b""
    found.inputs["image"].int_val.append(1)
    found.inputs["image"].tensor_shape.dim[0].size = 2**50
    return found


BAD: dict[str, tuple[Callable[[], predict_pb2.PredictRequest], str, str]] = {
    "no input": (request, "INVALID_ARGUMENT", r"takes one input, 'image'; the request has \[\]"),
    "other model": (lambda: request(PIXELS, name="cats"), "NOT_FOUND", "no model 'cats'"),
    "other version": (lambda: request(PIXELS, version={"value": 9}), "NOT_FOUND", "version 9 of model 'digits'"),
    "version 0": (lambda: request(PIXELS, version={"value": 0}), "INVALID_ARGUMENT", "versions begin with 1"),
    "label": (lambda: request(PIXELS, version_label="stable"), "INVALID_ARGUMENT", "no version label 'stable'"),
    "signature": (lambda: request(PIXELS, signature_name="x"), "FAILED_PRECONDITION", "no signature 'x'"),
    "output": (with_other_output, "INVALID_ARGUMENT", "one output, 'probabilities'"),
    "shape": (lambda: request(PIXELS[0]), "INVALID_ARGUMENT", r"shape is \[32, 32, 3\], model 'digits' takes"),
    "huge shape": (with_huge_shape, "INVALID_ARGUMENT", "more than the 256 allowed"),
    "dtype": (lambda: request(PIXELS.astype(np.int64)), "INVALID_ARGUMENT", "is DT_UINT8, DT_FLOAT or DT_STRING"),
    "NaN": (lambda: request(np.full(PIXELS.shape, np.nan, np.float32)), "INVALID_ARGUMENT", "from 0 to 255"),
    "no picture": (lambda: request([b"abc"]), "INVALID_ARGUMENT", "image 0 "),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_request_has_its_code_and_one_sentence(
    kind: str, stub: prediction_service_pb2_grpc.PredictionServiceStub
) -> None:
    """And the next good one is answered."""
    build, code, message = BAD[kind]
    with pytest.raises(grpc.RpcError, match=message) as caught:
        stub.Predict(build())
    assert caught.value.code().name == code  # type: ignore[attr-defined]
    assert len(stub.Predict(request(PIXELS)).outputs) == 1
