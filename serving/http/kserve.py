"""The Open Inference Protocol (KServe v2) over HTTP, with Triton's binary tensors, as tritonclient.http speaks it.

JSON becomes the messages of `inference.GRPCInferenceService`. Of a request to infer, the head is JSON, and the pixels
follow it as they are: a client sends the same head again and again, so what was made of it is cached.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from http import HTTPStatus
from itertools import accumulate, pairwise
from typing import Annotated, Any, NamedTuple, cast

import msgspec
import numpy as np
from google.protobuf.message import Message
from msgspec import Meta, field

from protos import inference_pb2 as pb
from protos.record import to_record
from serving.errors import InvalidRequest, Unsupported
from serving.http.connection import HEAD_SIZE
from serving.http.content import parse_json, to_array, to_file
from serving.http.endpoint import (
    BINARY,
    FILE,
    JSON,
    RequestEncoder,
    ResponseDecoder,
    RestMethod,
    RestRequest,
    RestResponse,
    to_json,
)
from serving.http.schema import describe
from serving.protocols.kserve import pack_elements, unpack_elements

SERVICE = "/inference.GRPCInferenceService"
CACHED_BYTES = 1024  # of a head; no client sends a longer one for a model of one input
TYPES = {"UINT8": "u1", "FP32": "<f4"}
MAX_BINARY = 2**31

Parameters = dict[str, bool | int | float | str]


class TensorHead(msgspec.Struct):
    """An input of a request, without its binary data."""

    name: str
    datatype: Annotated[str, Meta(description="UINT8 or FP32, pixels of 0 to 255, or BYTES, image files")]
    shape: Annotated[list[int], Meta(description="[images, height, width, channels], or [images] of BYTES")]
    parameters: Annotated[Parameters, Meta(description="binary_data_size, in place of data")] = {}
    data: Annotated[msgspec.Raw, Meta(description="nested or in one row; files in base64")] = field(
        default_factory=msgspec.Raw
    )


class OutputHead(msgspec.Struct):
    """An output that a request asks for."""

    name: str
    parameters: Annotated[Parameters, Meta(description="classification: how many classes; binary_data")] = {}


class InferHead(msgspec.Struct):
    """A request to infer, without its binary data."""

    inputs: Annotated[list[TensorHead], Meta(description="the one input")]
    id: str = ""
    parameters: Annotated[
        Parameters, Meta(description="priority, 1 to 3; timeout in microseconds; binary_data_output")
    ] = {}
    outputs: list[OutputHead] = []


class OutputTensor(msgspec.Struct, omit_defaults=True):
    """An output of a response; binary data follow the JSON."""

    name: str
    datatype: str
    shape: list[int]
    data: list[Any] | None = None
    parameters: Parameters = {}


class InferAnswer(msgspec.Struct, omit_defaults=True):
    """A response, without its binary data."""

    model_name: str
    model_version: str
    outputs: list[OutputTensor]
    id: str = ""


class LoadRequest(msgspec.Struct):
    """A request to load or unload a model."""

    parameters: Parameters = {}


class IndexRequest(msgspec.Struct):
    """A request for the index of the repository."""

    ready: bool = False


class EncodedHead(NamedTuple):
    """What was made of the head of a request.

    Attributes:
        message: The message without raw contents, serialized.
        sizes: Bytes of each binary tensor.
        values: What stands in the head for the other tensors, as raw contents; None for a binary one.
        binary: Whether the output is wanted as a binary tensor.
    """

    message: bytes
    sizes: tuple[int, ...]
    values: tuple[bytes | None, ...]
    binary: bool


def encode_infer(request: RestRequest) -> bytes:
    """Return the ModelInferRequest of a request."""
    at = _find_head_size(request)
    text, names = request.body[:at], (request.parameters["name"], request.parameters.get("version", ""))
    head = _encode_cached(text, *names) if at <= CACHED_BYTES else _encode_head(text, *names)
    request.parsed = head
    if len(request.body) - at != sum(head.sizes):
        given = len(request.body) - at
        raise InvalidRequest(f"{given} bytes follow the JSON, its tensors have a binary_data_size of {sum(head.sizes)}")
    ends = accumulate(head.sizes, initial=at)
    binary = (request.body[start:end] for start, end in pairwise(ends))
    raws = [next(binary) if value is None else value for value in head.values]
    # Two messages that follow each other are one.
    return head.message + pb.ModelInferRequest(raw_input_contents=raws).SerializeToString()


def decode_infer(request: RestRequest, answer: bytes) -> RestResponse:
    """Return the response that a ModelInferResponse stands for."""
    response, head = pb.ModelInferResponse.FromString(answer), cast(EncodedHead, request.parsed)
    outputs = [
        OutputTensor(tensor.name, tensor.datatype, list(tensor.shape), parameters={"binary_data_size": len(raw)})
        if head.binary
        else OutputTensor(tensor.name, tensor.datatype, list(tensor.shape), _to_values(tensor.datatype, raw))
        for tensor, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    ]
    text = msgspec.json.encode(InferAnswer(response.model_name, response.model_version, outputs, response.id))
    if not head.binary:
        return RestResponse(text)
    body = b"".join((text, *response.raw_output_contents))
    return RestResponse(body, BINARY, headers=((HEAD_SIZE, str(len(text))),))


def _find_head_size(request: RestRequest) -> int:
    size = request.headers.get(HEAD_SIZE)
    if size is None:
        return len(request.body)
    if not (size.isascii() and size.isdecimal() and len(size) < 20 and int(size) <= len(request.body)):
        raise InvalidRequest(
            f"the header {HEAD_SIZE} is the number of bytes of the JSON, at most the {len(request.body)} of the body"
        )
    return int(size)


def _encode_head(text: bytes, name: str, version: str) -> EncodedHead:
    head = parse_json(text, InferHead)
    message = pb.ModelInferRequest(model_name=name, model_version=version, id=head.id)
    _set_parameters(message.parameters, head.parameters, skip=("binary_data_output",))
    sizes: list[int] = []
    values: list[bytes | None] = []
    for tensor in head.inputs:
        size = tensor.parameters.get("binary_data_size")
        if size is None:
            values.append(_to_raw(tensor))
        elif isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= MAX_BINARY or _has_data(tensor):
            raise InvalidRequest(f"input {tensor.name!r} has either data or a binary_data_size, a number of bytes")
        else:
            values.append(None)
            sizes.append(size)
        spec = message.inputs.add(name=tensor.name, datatype=tensor.datatype)
        try:
            spec.shape.extend(tensor.shape)
        except ValueError:
            raise InvalidRequest(f"the shape of input {tensor.name!r} is out of range") from None
        _set_parameters(spec.parameters, tensor.parameters, skip=("binary_data_size", "content_type"))
    binary = head.parameters.get("binary_data_output") is True
    for output in head.outputs:
        binary = output.parameters.get("binary_data", binary) is True
        asked = message.outputs.add(name=output.name)
        _set_parameters(asked.parameters, output.parameters, skip=("binary_data",))
    return EncodedHead(message.SerializeToString(), tuple(sizes), tuple(values), binary)


_encode_cached = functools.lru_cache(1024)(_encode_head)


def _set_parameters(target: Any, given: Parameters, skip: Sequence[str]) -> None:
    for name, value in given.items():
        if name in skip:
            continue
        match value:
            case bool():
                target[name].bool_param = value
            case int():
                if not -(2**63) <= value < 2**63:
                    raise InvalidRequest(f"the parameter {name} is out of range")
                target[name].int64_param = value
            case float():
                target[name].double_param = value
            case str():
                target[name].string_param = value


def _to_raw(tensor: TensorHead) -> bytes:
    """Return the data of a tensor in JSON, nested or in one row, as raw contents."""
    if "shared_memory_region" in tensor.parameters:
        raise Unsupported("this server reads no shared memory; send the tensor in the request")
    if not _has_data(tensor):
        raise InvalidRequest(f"input {tensor.name!r} has no data; write it in JSON, or give its binary_data_size")
    if tensor.datatype == "BYTES":
        return pack_elements(map(to_file, _flatten(parse_json(bytes(tensor.data), list))))
    if tensor.datatype not in TYPES:
        return b""  # the datatype is refused where the model is known
    return to_array(bytes(tensor.data), f"input {tensor.name!r}", TYPES[tensor.datatype]).tobytes()


def _has_data(tensor: TensorHead) -> bool:
    return bytes(tensor.data) not in (b"", b"null")


def _flatten(data: list[Any]) -> Iterable[Any]:
    for item in data:
        if isinstance(item, list):
            yield from item
        else:
            yield item


def _to_values(datatype: str, raw: bytes) -> list[Any]:
    """Return the values of an output as JSON has them, in one row."""
    if datatype != "BYTES":
        return list(np.frombuffer(raw, TYPES[datatype]).tolist())
    return [text.decode() for text in unpack_elements(raw)]


def _name_model(request_type: type[Message]) -> RequestEncoder:
    """Return what makes a request that names a model and a version, if the path does."""

    def encode(request: RestRequest) -> bytes:
        return request_type(**request.parameters).SerializeToString()

    return encode


def _to_plain(response_type: type[Message], key: str = "") -> ResponseDecoder:
    """Return what makes JSON of a response, or of one field of it."""

    def decode(_: RestRequest, answer: bytes) -> RestResponse:
        record = to_record(response_type.FromString(answer), absent=False)
        return to_json(record[key] if key else record)

    return decode


def _to_probe(response_type: type[Message]) -> ResponseDecoder:
    """Return what makes a response whose status is what a probe looks at."""

    def decode(_: RestRequest, answer: bytes) -> RestResponse:
        record = to_record(response_type.FromString(answer))
        return to_json(record, HTTPStatus.OK if all(record.values()) else HTTPStatus.SERVICE_UNAVAILABLE)

    return decode


def _encode_index(request: RestRequest) -> bytes:
    asked = parse_json(request.body, IndexRequest) if request.body else IndexRequest()
    return pb.RepositoryIndexRequest(ready=asked.ready).SerializeToString()


def _encode_load(request: RestRequest) -> bytes:
    message = pb.RepositoryModelLoadRequest(model_name=request.parameters["name"])
    given = parse_json(request.body, LoadRequest).parameters if request.body else {}
    for name, value in given.items():
        message.parameters[name].string_param = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return message.SerializeToString()


def _encode_unload(request: RestRequest) -> bytes:
    return pb.RepositoryModelUnloadRequest(model_name=request.parameters["name"]).SerializeToString()


def _empty(*_: object) -> RestResponse:
    return to_json({})


MODEL = ("/v2/models/{name}", "/v2/models/{name}/versions/{version}")


def _ask(
    method: str,
    paths: Sequence[str],
    summary: str,
    encode: RequestEncoder,
    decode: ResponseDecoder,
    answer: Any,
    **rest: Any,
) -> RestMethod:
    return RestMethod(
        verb=rest.pop("verb", "GET"),
        paths=tuple(paths),
        method=f"{SERVICE}/{method}",
        encode=encode,
        decode=decode,
        tag="KServe v2",
        summary=summary,
        response=answer,
        **rest,
    )


def _below(last: str) -> list[str]:
    return [f"{path}/{last}" for path in MODEL]


METHODS = (
    _ask(
        "ModelInfer",
        _below("infer"),
        "Classify the images of a tensor",
        encode_infer,
        decode_infer,
        InferAnswer,
        verb="POST",
        request={JSON: InferHead, BINARY: FILE},
    ),
    _ask(
        "ServerLive",
        ["/v2/health/live"],
        "Whether requests get through the server",
        _name_model(pb.ServerLiveRequest),
        _to_probe(pb.ServerLiveResponse),
        describe(pb.ServerLiveResponse),
    ),
    _ask(
        "ServerReady",
        ["/v2/health/ready"],
        "Whether the server takes requests, and has a model for them",
        _name_model(pb.ServerReadyRequest),
        _to_probe(pb.ServerReadyResponse),
        describe(pb.ServerReadyResponse),
    ),
    _ask(
        "ServerMetadata",
        ["/v2"],
        "Name, version and extensions of the server",
        _name_model(pb.ServerMetadataRequest),
        _to_plain(pb.ServerMetadataResponse),
        describe(pb.ServerMetadataResponse),
    ),
    _ask(
        "ModelStatistics",
        ["/v2/models/stats", *_below("stats")],
        "Statistics of a model, or of all",
        _name_model(pb.ModelStatisticsRequest),
        _to_plain(pb.ModelStatisticsResponse),
        describe(pb.ModelStatisticsResponse),
    ),
    _ask(
        "ModelMetadata",
        MODEL,
        "Input and output of a model, and its certificate",
        _name_model(pb.ModelMetadataRequest),
        _to_plain(pb.ModelMetadataResponse),
        describe(pb.ModelMetadataResponse),
    ),
    _ask(
        "ModelReady",
        _below("ready"),
        "Whether a model takes requests",
        _name_model(pb.ModelReadyRequest),
        _to_probe(pb.ModelReadyResponse),
        describe(pb.ModelReadyResponse),
    ),
    _ask(
        "ModelConfig",
        _below("config"),
        "The model's configuration for Triton, with the limits of this server",
        _name_model(pb.ModelConfigRequest),
        _to_plain(pb.ModelConfigResponse, "config"),
        {"type": "object"},
    ),
    _ask(
        "RepositoryIndex",
        ["/v2/repository/index"],
        "The served and the refused versions, with the reason",
        _encode_index,
        _to_plain(pb.RepositoryIndexResponse, "models"),
        {"type": "array", "items": describe(pb.RepositoryIndexResponse.ModelIndex)},
        verb="POST",
        request={JSON: IndexRequest},
    ),
    _ask(
        "RepositoryModelLoad",
        ["/v2/repository/models/{name}/load"],
        "Load a model; its parameter `config` may choose the versions",
        _encode_load,
        _empty,
        {"type": "object"},
        verb="POST",
        request={JSON: LoadRequest},
    ),
    _ask(
        "RepositoryModelUnload",
        ["/v2/repository/models/{name}/unload"],
        "Stop serving a model until it is loaded again",
        _encode_unload,
        _empty,
        {"type": "object"},
        verb="POST",
        request={JSON: {"type": "object"}},
    ),
)
