"""`resnet.v1.Classifier`: requests to images, and probabilities to responses."""

from __future__ import annotations

from functools import partial

import numpy as np

from protos import classifier_pb2 as pb
from serving.errors import InvalidRequest, ServingError, to_failure
from serving.models.model import Model
from serving.models.registry import ModelRegistry
from serving.protocols.calls import InferenceHandler, Query, parse_message
from serving.protocols.inputs import InputDecoder, to_priority
from serving.protocols.stream import StreamItem
from serving.runtimes.base import Images
from serving.scheduling.queue import BatchResult

DEFAULT_TOP_K = 5


class Classifier:
    """Reads requests of `resnet.v1.Classifier`."""

    def __init__(self, models: ModelRegistry, intake: InputDecoder) -> None:
        """Ask `models`, with images that `intake` takes."""
        self._models, self._intake = models, intake

    def parse(self, payload: bytes) -> pb.ClassifyRequest:
        """Return the request that these bytes are."""
        return pb.ClassifyRequest.FromString(payload)

    def unpacks(self, request: pb.ClassifyRequest) -> bool:
        """Say whether it holds encoded images."""
        return request.WhichOneof("input") == "encoded"

    def find(self, request: pb.ClassifyRequest) -> Model:
        """Return the model that it names."""
        return self._models.find(request.model, request.version, request.version_label)

    def read(self, request: pb.ClassifyRequest, model: Model) -> Query:
        """Return what it asks the model."""
        top_k, priority = _top_k(request, model), to_priority(request.priority)
        return Query(self._images(request, model), partial(_respond, model, top_k), priority=priority)

    def _images(self, request: pb.ClassifyRequest, model: Model) -> Images:
        """Return the pixels that a request carries, uint8 [n, height, width, 3]."""
        match request.WhichOneof("input"):
            case "encoded":
                return self._intake.decode(request.encoded.images, model)
            case "tensor":
                tensor = request.tensor
                if tensor.data_type != pb.DATA_TYPE_UINT8:
                    raise InvalidRequest(
                        f"the tensor's data_type is {tensor.data_type}, it must be DATA_TYPE_UINT8 (1)"
                    )
                return self._intake.read(tensor.data, self._intake.expect(tensor.shape, "uint8", model))
            case _:
                raise InvalidRequest("the request holds no images: set `encoded` or `tensor`")


class ClassifyStream:
    """What the messages of ClassifyStream are like."""

    ordered = False

    def __init__(self, inference: InferenceHandler[pb.ClassifyRequest]) -> None:
        """Have requests answered by `inference`."""
        self._inference = inference
        self._items: dict[int, StreamItem] = {}  # without an answer

    def begin(self, item: StreamItem) -> None:
        """Have a message answered, as a call."""
        message = parse_message(pb.ClassifyStreamRequest.FromString, item.payload)
        item.id = message.id
        if self._items.setdefault(item.id, item) is not item:
            raise InvalidRequest(f"id {item.id} is that of a request without an answer; choose another")
        self._inference.begin(item, message.request)

    def respond(self, item: StreamItem, response: bytes) -> bytes:
        """Return the message that answers another."""
        del self._items[item.id]
        message = pb.ClassifyStreamResponse(id=item.id)
        message.response.MergeFromString(response)
        return message.SerializeToString()

    def refuse(self, item: StreamItem, error: ServingError) -> bytes:
        """Return the message that says why there is no answer."""
        if self._items.get(item.id) is item:
            del self._items[item.id]
        return pb.ClassifyStreamResponse(id=item.id, failure=to_failure(error)).SerializeToString()


def _top_k(request: pb.ClassifyRequest, model: Model) -> int:
    classes = len(model.manifest.labels)
    if not 0 <= request.top_k <= classes:
        raise InvalidRequest(f"top_k is {request.top_k}, model {model.name!r} has 1 to {classes} classes to return")
    return request.top_k or min(DEFAULT_TOP_K, classes)


def _respond(model: Model, top_k: int, answer: BatchResult, decode_ns: int) -> bytes:
    # A stable sort of the negated values: equal probabilities come in the order of the classes.
    best = np.argsort(-answer.probabilities, axis=1, kind="stable")[:, :top_k]
    values = np.take_along_axis(answer.probabilities, best, axis=1)
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
            queue_ns=answer.queue_ns,
            compute_ns=answer.compute_ns,
            batch_size=answer.batch_size,
        ),
    )
    return response.SerializeToString()
