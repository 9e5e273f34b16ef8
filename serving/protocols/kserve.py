"""`inference.GRPCInferenceService`, the Open Inference Protocol (KServe v2) with Triton's extensions.

A model has one input, in one of three forms by its datatype: UINT8 or FP32 pixels of 0 to 255,
[n, height, width, channels], or BYTES, [n] encoded images. Responses use `raw_output_contents` only: tritonclient reads
nothing else.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import numpy as np
from google.protobuf.message import DecodeError

from protos import inference_pb2 as pb
from serving.errors import InvalidRequest, ServingError, Unsupported
from serving.models.model import Model
from serving.protocols.base import ServerContext, reply_methods, services_of
from serving.protocols.handler import InferenceHandler, ParsedRequest
from serving.protocols.inputs import Check, TensorLayout, to_bytes, to_priority
from serving.protocols.kserve_control import DATATYPES, KServeControl, find_model
from serving.protocols.kserve_request import ENCODED, InferRequest, RequestParser
from serving.protocols.outputs import find_top
from serving.protocols.stream import StreamItem
from serving.runtimes.base import Images
from serving.scheduling.queue import BatchResult
from serving.transports.call import Call, Methods, Streaming, Unary

SERVICES = services_of(pb.DESCRIPTOR)
INFER, STREAM_INFER = (f"/{SERVICES[0]}/{method}" for method in ("ModelInfer", "ModelStreamInfer"))
PROBES = ("ServerLive", "ServerReady", "ModelReady")


class RequestTerms(NamedTuple):
    """What a request asks of a model, and how its images are encoded.

    Attributes:
        top_k: Classes to return; 0 returns the probabilities.
        timeout: Seconds that the caller waits, apart from the deadline of the call; 0 is no limit.
        priority: Of the request.
        layout: Layout of its pixels; None for encoded images.
        inline: Whether the images are in the tensor, not in the raw contents.
        id: The field of the response that returns the request's id, serialized.
    """

    top_k: int
    timeout: float
    priority: int
    layout: TensorLayout | None
    inline: bool
    id: bytes


class KServe:
    """Reads requests of ModelInfer."""

    def __init__(self, context: ServerContext) -> None:
        """Find models and decode images for the server of `context`."""
        self._models, self._decoder, self._server = context.models, context.decoder, context.server
        self._parser = RequestParser()

    def parse(self, payload: bytes) -> InferRequest:
        """Return the request in two parts."""
        return self._parser.parse(payload)

    def is_slow(self, request: InferRequest) -> bool:
        """Return whether its images are encoded."""
        return request.head.encoded

    def find(self, request: InferRequest, call: Call) -> Model:
        """Return the model that the request names."""
        call.message_id = request.head.id
        return find_model(self._models, self._server, request.head.name, request.head.version, call.find_key)

    def read(self, request: InferRequest, model: Model, check: Check) -> ParsedRequest:
        """Return what the request asks of the model."""
        terms = request.head.resolve(model, self._derive_terms)
        images = self._read_images(request, terms, model, check)
        return ParsedRequest(images, partial(_respond, terms, model), terms.timeout, terms.priority)

    def _derive_terms(self, request: pb.ModelInferRequest, model: Model) -> RequestTerms:
        """Return what a request asks, without its raw contents."""
        timeout, top_k = _find_number(request, "timeout") / 1e6, _find_top_k(request, model)
        priority, name = to_priority(_find_number(request, "priority")), model.manifest.input.name
        if len(request.inputs) != 1 or request.inputs[0].name != name:
            names = [tensor.name for tensor in request.inputs]
            raise InvalidRequest(f"model {model.name!r} takes one input, {name!r}; the request has {names}")
        tensor = request.inputs[0]
        if "shared_memory_region" in tensor.parameters:
            raise Unsupported("this server reads no shared memory; send the tensor in the request")
        dtype = next((dtype for dtype, datatype in DATATYPES.items() if datatype == tensor.datatype), None)
        if dtype is None and tensor.datatype != ENCODED:
            raise InvalidRequest(f"input {name!r} is UINT8, FP32 or BYTES, not {tensor.datatype!r}")
        return RequestTerms(
            top_k,
            timeout,
            priority,
            self._decoder.expect(tuple(tensor.shape), dtype, model) if dtype else None,
            tensor.HasField("contents"),
            pb.ModelInferResponse(id=request.id).SerializeToString(),
        )

    def _read_images(self, request: InferRequest, terms: RequestTerms, model: Model, check: Check) -> Images:
        """Return the pixels of the one input, in whichever form they came."""
        raw, name = request.raw, model.manifest.input.name
        if raw and terms.inline:
            raise InvalidRequest(f"contents must not be set beside raw_input_contents, for input {name!r}")
        if len(raw) > 1:
            raise InvalidRequest(f"raw_input_contents has {len(raw)} entries for one input")
        if raw and terms.layout:
            return self._decoder.read(raw[0], terms.layout)
        tensor = request.head.message.inputs[0]
        if terms.layout is None:
            files, shape = (
                unpack_elements(bytes(raw[0])) if raw else list(tensor.contents.bytes_contents),
                list(tensor.shape),
            )
            if shape not in ([len(files)], [len(files), 1]):
                raise InvalidRequest(f"input {name!r} has the shape {shape}, but {len(files)} encoded images")
            return self._decoder.decode(files, model, check)
        values = tensor.contents
        is_uint8 = terms.layout.dtype == np.uint8
        data = to_bytes(values.uint_contents) if is_uint8 else np.array(values.fp32_contents, "<f4").tobytes()
        return self._decoder.read(data, terms.layout)


class ModelStreamInfer:
    """The messages of ModelStreamInfer, answered in the order of the requests.

    A request that fails does not end the stream. Its error is a message, unless the client asked with the header
    `triton_grpc_error: true` for it to become the status of the call.
    """

    ordered = True

    def __init__(self, handler: InferenceHandler[InferRequest], call: Call) -> None:
        """Have requests answered by `handler`."""
        self._handler = handler
        self._ends = ("triton_grpc_error", "true") in call.metadata

    def begin(self, item: StreamItem) -> None:
        """Have a request answered, like a call."""
        self._handler.begin(item)

    def respond(self, _: StreamItem, response: bytes) -> bytes:
        """Return the message that carries a response."""
        message = pb.ModelStreamInferResponse()
        message.infer_response.MergeFromString(response)
        message.infer_response.parameters["triton_final_response"].bool_param = True
        return message.SerializeToString()

    def refuse(self, item: StreamItem, error: ServingError) -> bytes | ServingError:
        """Return the message that carries an error, or the error that ends the stream."""
        if self._ends:
            return error
        message = pb.ModelStreamInferResponse(error_message=str(error))
        with suppress(DecodeError):
            request = pb.ModelInferRequest.FromString(item.payload)
            message.infer_response.model_name, message.infer_response.id = request.model_name, request.id
        message.infer_response.parameters["triton_final_response"].bool_param = True
        return message.SerializeToString()


def find_methods(context: ServerContext) -> Methods:
    """Return the methods of the service, by path."""
    handler = InferenceHandler(KServe(context), context.models, context.workers)
    stream = partial(context.streams.answer, partial(ModelStreamInfer, handler))
    skip = [path.rpartition("/")[2] for path in (INFER, STREAM_INFER)]
    methods = reply_methods(pb.DESCRIPTOR, KServeControl(context), context.control, skip, PROBES)
    return methods | {INFER: Unary(handler.answer), STREAM_INFER: Streaming(stream)}


def _find_number(request: pb.ModelInferRequest, name: str) -> int:
    """Return a parameter that is a number; 0 without it."""
    if name not in request.parameters:
        return 0
    parameter = request.parameters[name]
    kind = parameter.WhichOneof("parameter_choice")
    # tritonclient sends the one as int64, the other as uint64.
    if kind not in ("int64_param", "uint64_param") or getattr(parameter, kind) < 0:
        raise InvalidRequest(f"the parameter {name} is a number, int64 and not negative")
    number: int = getattr(parameter, kind)
    return number


def _find_top_k(request: pb.ModelInferRequest, model: Model) -> int:
    """Return how many classes the extension `classification` asks for; 0 asks for the probabilities."""
    name, classes = model.manifest.output.name, len(model.manifest.labels)
    if not request.outputs:
        return 0
    names = [output.name for output in request.outputs]
    if names != [name]:
        raise InvalidRequest(f"model {model.name!r} has one output, {name!r}; the request asks for {names}")
    parameters = request.outputs[0].parameters
    if "shared_memory_region" in parameters:
        raise Unsupported("this server writes no shared memory; take the tensor from the response")
    if "classification" not in parameters:
        return 0
    count = parameters["classification"].int64_param
    if not count >= 1:
        raise InvalidRequest(f"the parameter classification is a number of classes, at least 1, not {count}")
    return min(count, classes)


def _respond(terms: RequestTerms, model: Model, result: BatchResult, _: int) -> bytes:
    """Return a serialized ModelInferResponse, by concatenation: protobuf merges messages that follow each other."""
    probabilities = result.probabilities
    if terms.top_k:
        best = find_top(probabilities, terms.top_k)
        labels = model.manifest.labels
        texts = [
            f"{row[index]:f}:{index}:{labels[index]}".encode()
            for row, indices in zip(probabilities, best, strict=True)
            for index in indices
        ]
        datatype, shape, raw = ENCODED, best.shape, pack_elements(texts)
    else:
        datatype, shape, raw = "FP32", probabilities.shape, probabilities.astype("<f4", copy=False).tobytes()
    frame = _frame(model.name, model.version, model.manifest.output.name, datatype, shape, len(raw))
    return b"".join((frame, raw, terms.id))


@functools.lru_cache(1024)
def _frame(model: str, version: int, output: str, datatype: str, shape: tuple[int, ...], size: int) -> bytes:
    """Return the bytes of a response before its raw contents, which have `size` bytes."""
    tensor = pb.ModelInferResponse.InferOutputTensor(name=output, datatype=datatype, shape=shape)
    response = pb.ModelInferResponse(
        model_name=model, model_version=str(version), outputs=[tensor], raw_output_contents=[bytes(size)]
    )
    return response.SerializeToString().removesuffix(bytes(size))


def pack_elements(elements: Iterable[bytes]) -> bytes:
    """Return a BYTES tensor; each element is its length, 4 bytes little-endian, and its bytes."""
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


def unpack_elements(raw: bytes) -> list[bytes]:
    """Return the elements of a BYTES tensor, as `pack_elements` writes them.

    Raises:
        InvalidRequest: It is cut off.
    """
    elements, at = [], 0
    while at < len(raw):
        if at + 4 > len(raw) or (end := at + 4 + struct.unpack_from("<I", raw, at)[0]) > len(raw):
            raise InvalidRequest(f"the BYTES tensor is cut off: an element begins at byte {at} of {len(raw)}")
        elements.append(raw[at + 4 : end])
        at = end
    return elements
