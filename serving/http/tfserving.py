"""TensorFlow Serving's REST API: predictions in row and in column form, status and metadata.

JSON becomes the messages of `tensorflow.serving.PredictionService`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import msgspec
import numpy as np
from google.protobuf import json_format
from google.protobuf.message import Message
from msgspec import Meta, field

from protos import POOL
from protos import tensorflow_pb2 as tf
from protos import tensorflow_serving_pb2 as pb
from serving.errors import STATUSES, InvalidRequest
from serving.http.content import parse_json, to_array, to_file
from serving.http.endpoint import JSON, RestMethod, RestRequest, RestResponse, to_json
from serving.protocols.inputs import to_version

PREDICTION, MODEL = "/tensorflow.serving.PredictionService", "/tensorflow.serving.ModelService"
INPUT = "image"  # every exported model's
FILE_KEY = "b64"
CODES = {0: "OK"} | {status.code: status.name for status in STATUSES.values()}


class PredictBody(msgspec.Struct):
    """A request to predict: one of `instances`, in rows, and `inputs`, in columns."""

    signature_name: str = ""
    instances: Annotated[
        list[msgspec.Raw] | None,
        Meta(description='each pixels [height, width, channels], or {"b64": FILE}; or such in {"image": ...}'),
    ] = None
    inputs: Annotated[
        msgspec.Raw,
        Meta(description='pixels [images, height, width, channels], or [{"b64": FILE}]; or such in {"image": ...}'),
    ] = field(default_factory=msgspec.Raw)


class ImageFile(msgspec.Struct, forbid_unknown_fields=True):
    """An image file, in base64."""

    b64: str


class Predictions(msgspec.Struct):
    """The answer to `instances`."""

    predictions: list[list[float]]


def encode_predict(request: RestRequest) -> bytes:
    """Return the PredictRequest of a request."""
    body = parse_json(request.body, PredictBody)
    if (body.instances is None) == (not bytes(body.inputs)):
        raise InvalidRequest("the request has exactly one of instances and inputs")
    request.parsed = body.instances is not None
    name, items = _read_columns(bytes(body.inputs)) if body.instances is None else _read_rows(body.instances)
    message = pb.PredictRequest(model_spec=_specify(request))
    message.model_spec.signature_name = body.signature_name
    message.inputs[name].CopyFrom(_to_tensor(items))
    return message.SerializeToString()


def _read_rows(instances: Sequence[msgspec.Raw]) -> tuple[str, list[bytes]]:
    """Return the name of the input, and what each instance has for it, in JSON."""
    items = [bytes(item) for item in instances]
    named = [parse_json(item, dict[str, msgspec.Raw]) for item in items if item.startswith(b"{")]
    named = [item for item in named if FILE_KEY not in item]
    keys = {key for item in named for key in item}
    if not named:
        return INPUT, items
    if len(named) < len(items) or len(keys) != 1:
        raise InvalidRequest(f"each instance has the same one input; the instances have {sorted(keys)}")
    (name,) = keys
    return name, [bytes(item[name]) for item in named]


def _read_columns(inputs: bytes) -> tuple[str, list[bytes]]:
    """Return the name of the input, and its images, in JSON."""
    name = INPUT
    if inputs.startswith(b"{"):
        named = parse_json(inputs, dict[str, msgspec.Raw])
        if FILE_KEY in named:
            return name, [inputs]
        if len(named) != 1:
            raise InvalidRequest(f"the model has one input; the request has {sorted(named)}")
        ((name, column),) = named.items()
        inputs = bytes(column)
    if not inputs.startswith(b"["):
        raise InvalidRequest("the images are a list")
    return name, [bytes(item) for item in parse_json(inputs, list[msgspec.Raw])]


def decode_predict(request: RestRequest, answer: bytes) -> RestResponse:
    """Return the predictions in the form of the request."""
    ((_, tensor),) = pb.PredictResponse.FromString(answer).outputs.items()
    shape = [axis.size for axis in tensor.tensor_shape.dim]
    rows = np.array(tensor.float_val, np.float32).reshape(shape).tolist()
    return to_json({"predictions" if request.parsed else "outputs": rows})


def _to_tensor(items: list[bytes]) -> tf.TensorProto:
    """Return the tensor of image files, or of pixels: whole numbers as DT_UINT8, others as DT_FLOAT."""
    if any(item.startswith(b"{") for item in items):
        files = [to_file(parse_json(item, ImageFile).b64) for item in items]
        return tf.TensorProto(dtype=tf.DT_STRING, tensor_shape=_to_shape([len(files)]), string_val=files)
    values = to_array(b"[" + b",".join(items) + b"]", "the tensor of images")
    kind = tf.DT_UINT8 if values.dtype == np.uint8 else tf.DT_FLOAT
    return tf.TensorProto(dtype=kind, tensor_shape=_to_shape(values.shape), tensor_content=values.tobytes())


def _to_shape(sizes: Any) -> tf.TensorShapeProto:
    return tf.TensorShapeProto(dim=[tf.TensorShapeProto.Dim(size=size) for size in sizes])


def _specify(request: RestRequest) -> pb.ModelSpec:
    parameters = request.parameters
    spec = pb.ModelSpec(name=parameters["name"])
    if "label" in parameters:
        spec.version_label = parameters["label"]
    elif "version" in parameters:
        version = to_version(parameters["version"])
        if version is None or version >= 2**63:
            raise InvalidRequest(f"the version is {parameters['version']!r}; versions are numbers")
        spec.version.value = version
    return spec


def _encode_status(request: RestRequest) -> bytes:
    return pb.GetModelStatusRequest(model_spec=_specify(request)).SerializeToString()


def _encode_metadata(request: RestRequest) -> bytes:
    message = pb.GetModelMetadataRequest(model_spec=_specify(request), metadata_field=["signature_def"])
    return message.SerializeToString()


def _encode_empty(request_type: type[Message]) -> Callable[[RestRequest], bytes]:
    return lambda _: request_type().SerializeToString()


def _decode_status(_: RestRequest, answer: bytes) -> RestResponse:
    record = _to_record(pb.GetModelStatusResponse.FromString(answer))
    for version in record["model_version_status"]:
        version["status"]["error_code"] = CODES[version["status"]["error_code"]]
    return to_json(record)


def _decode_metadata(_: RestRequest, answer: bytes) -> RestResponse:
    record = _to_record(pb.GetModelMetadataResponse.FromString(answer))
    for value in record["metadata"].values():
        del value["@type"]
    return to_json(record)


def _to_record(message: Message) -> Any:
    """Return a message as TensorFlow Serving writes it: with numbers of 64 bits as text."""
    return json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True, descriptor_pool=POOL
    )


BASE = "/v1/models/{name}"
VERSIONS = (BASE, f"{BASE}/versions/{{version}}", f"{BASE}/labels/{{label}}")
TAG = "TensorFlow Serving"


def _below(last: str) -> tuple[str, ...]:
    return tuple(f"{path}{last}" for path in VERSIONS)


METHODS = (
    RestMethod(
        verb="POST",
        paths=_below(":predict"),
        method=f"{PREDICTION}/Predict",
        encode=encode_predict,
        decode=decode_predict,
        tag=TAG,
        summary="Classify images",
        request={JSON: PredictBody},
        response=Predictions,
    ),
    RestMethod(
        verb="GET",
        paths=_below("/metadata"),
        method=f"{PREDICTION}/GetModelMetadata",
        encode=_encode_metadata,
        decode=_decode_metadata,
        tag=TAG,
        summary="Signature of a model",
        response={"type": "object"},
    ),
    RestMethod(
        verb="GET",
        paths=VERSIONS,
        method=f"{MODEL}/GetModelStatus",
        encode=_encode_status,
        decode=_decode_status,
        tag=TAG,
        summary="Status of the versions of a model",
        response={"type": "object"},
    ),
    *(
        RestMethod(
            verb="POST",
            paths=_below(f":{verb}"),
            method=f"{PREDICTION}/{method}",
            encode=_encode_empty(request_type),
            decode=_decode_status,  # it is never answered
            tag=TAG,
            summary="Not supported: it takes tf.Example records, which hold no images",
            response={"type": "object"},
        )
        for verb, method, request_type in (
            ("classify", "Classify", pb.ClassificationRequest),
            ("regress", "Regress", pb.RegressionRequest),
        )
    ),
)
