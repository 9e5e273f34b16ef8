"""`resnet.v1.Classifier`, the server's own protocol."""

from __future__ import annotations

from functools import partial

import numpy as np

from protos import classifier_pb2 as pb
from serving.errors import InvalidRequest, ServingError, to_failure
from serving.models.model import Model
from serving.models.registry import ModelRegistry
from serving.protocols.base import ServerContext, services_of
from serving.protocols.handler import InferenceHandler, ParsedRequest, parse_message
from serving.protocols.inputs import Check, InputDecoder, to_priority
from serving.protocols.outputs import find_top
from serving.protocols.stream import StreamItem
from serving.runtimes.base import Images
from serving.scheduling.queue import BatchResult
from serving.transports.call import Call, Methods, Streaming, Unary

SERVICES = services_of(pb.DESCRIPTOR)
SERVICE = SERVICES[0]
CLASSIFY, CLASSIFY_STREAM = (f"/{SERVICE}/{method}" for method in ("Classify", "ClassifyStream"))
DEFAULT_TOP_K = 5


class Classifier:
    """Reads requests of Classify."""

    def __init__(self, models: ModelRegistry, decoder: InputDecoder) -> None:
        """Find models in `models`, and decode images with `decoder`."""
        self._models, self._decoder = models, decoder

    def parse(self, payload: bytes) -> pb.ClassifyRequest:
        """Return the request."""
        return pb.ClassifyRequest.FromString(payload)

    def is_slow(self, request: pb.ClassifyRequest) -> bool:
        """Return whether its images are encoded, and not small."""
        return request.WhichOneof("input") == "encoded" and not self._decoder.is_quick(request.encoded.images)

    def find(self, request: pb.ClassifyRequest, call: Call) -> Model:
        """Return the model that the request names."""
        return self._models.find(request.model, request.version, request.version_label, call.find_key)

    def read(self, request: pb.ClassifyRequest, model: Model, check: Check) -> ParsedRequest:
        """Return what the request asks of the model."""
        top_k, priority = _find_top_k(request, model), to_priority(request.priority)
        images = self._read_images(request, model, check)
        return ParsedRequest(images, partial(_respond, model, top_k), priority=priority)

    def _read_images(self, request: pb.ClassifyRequest, model: Model, check: Check) -> Images:
        match request.WhichOneof("input"):
            case "encoded":
                return self._decoder.decode(request.encoded.images, model, check)
            case "tensor":
                tensor = request.tensor
                if tensor.data_type != pb.DATA_TYPE_UINT8:
                    raise InvalidRequest(
                        f"the tensor's data_type is {tensor.data_type}, it must be DATA_TYPE_UINT8 (1)"
                    )
                return self._decoder.read(tensor.data, self._decoder.expect(tensor.shape, "uint8", model))
            case _:
                raise InvalidRequest("the request holds no images: set `encoded` or `tensor`")


class ClassifyStream:
    """The messages of ClassifyStream: requests with ids, answered as they are ready."""

    ordered = False

    def __init__(self, handler: InferenceHandler[pb.ClassifyRequest]) -> None:
        """Pass requests to `handler`."""
        self._handler = handler
        self._items: dict[int, StreamItem] = {}  # those without an answer, by id

    def begin(self, item: StreamItem) -> None:
        """Pass a request to the handler, like a call."""
        message = parse_message(pb.ClassifyStreamRequest.FromString, item.payload)
        item.id = message.id
        if self._items.setdefault(item.id, item) is not item:
            raise InvalidRequest(f"id {item.id} belongs to a request that is not answered yet; choose another")
        self._handler.begin(item, message.request)

    def respond(self, item: StreamItem, response: bytes) -> bytes:
        """Return the message that carries a response."""
        del self._items[item.id]
        message = pb.ClassifyStreamResponse(id=item.id)
        message.response.MergeFromString(response)
        return message.SerializeToString()

    def refuse(self, item: StreamItem, error: ServingError) -> bytes:
        """Return the message that carries an error."""
        if self._items.get(item.id) is item:
            del self._items[item.id]
        return pb.ClassifyStreamResponse(id=item.id, failure=to_failure(error)).SerializeToString()


def find_methods(context: ServerContext) -> Methods:
    """Return the methods of the service, by path."""
    handler = InferenceHandler(Classifier(context.models, context.decoder), context.models, context.workers)
    stream = partial(context.streams.answer, lambda _: ClassifyStream(handler))
    return {CLASSIFY: Unary(handler.answer), CLASSIFY_STREAM: Streaming(stream)}


def _find_top_k(request: pb.ClassifyRequest, model: Model) -> int:
    if request.top_k < 0:
        raise InvalidRequest(f"top_k is {request.top_k}; it is a number of classes, or 0 for {DEFAULT_TOP_K}")
    return min(request.top_k or DEFAULT_TOP_K, len(model.manifest.labels))


def _respond(model: Model, top_k: int, result: BatchResult, decode_ns: int) -> bytes:
    best = find_top(result.probabilities, top_k)
    values = np.take_along_axis(result.probabilities, best, axis=1)
    labels = model.manifest.labels
    response = pb.ClassifyResponse(
        model=model.name,
        version=model.version,
        classifications=[
            pb.Classification(
                classes=[
                    pb.Class(label=labels[index], index=index, probability=value)
                    for index, value in zip(indices, row, strict=True)
                ]
            )
            for indices, row in zip(best.tolist(), values.tolist(), strict=True)
        ],
        timing=pb.Timing(
            decode_ns=decode_ns,
            queue_ns=result.queue_ns,
            compute_ns=result.compute_ns,
            batch_size=result.batch_size,
        ),
    )
    return response.SerializeToString()
