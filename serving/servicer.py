"""`resnet.v1.Classifier`: check, submit to the batcher, answer."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import numpy as np

from protos import classifier_pb2 as pb
from protos.classifier_pb2_grpc import ClassifierServicer
from serving.batcher import Answer
from serving.calls import Job, Work, find_deadline
from serving.engine import Images
from serving.errors import InvalidRequest
from serving.events import computed
from serving.intake import Intake, to_priority
from serving.models import Model, Models
from serving.stream import Stream

DEFAULT_TOP_K = 5


class Servicer(ClassifierServicer):
    """Answers `resnet.v1.Classifier`."""

    def __init__(self, models: Models, intake: Intake) -> None:
        """Serve `models`, to requests that `intake` takes."""
        self._models, self._intake = models, intake
        self._streams: set[Stream] = set()
        self._closed = False

    @computed(unpacks=lambda request: request.WhichOneof("input") == "encoded")
    def Classify(self, request: pb.ClassifyRequest, context: grpc.ServicerContext) -> Work[pb.ClassifyResponse]:
        """Classify the images of one request."""
        return self._work(request, find_deadline(context))

    def ClassifyStream(
        self, request_iterator: Iterator[pb.ClassifyStreamRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.ClassifyStreamResponse]:
        """Classify the images of many requests, and answer each as soon as it is ready."""
        stream = Stream(self._work, context)
        self._streams.add(stream)
        try:
            if self._closed:
                stream.close()
            yield from stream.answer(request_iterator)
        finally:
            self._streams.discard(stream)

    def close(self) -> None:
        """End the streams, once what they have read is answered; calls end by themselves."""
        self._closed = True
        for stream in self._streams.copy():
            stream.close()

    def _work(self, request: pb.ClassifyRequest, deadline: float) -> Work[pb.ClassifyResponse]:
        """Answer one request."""
        model = self._models.find(request.model, request.version, request.version_label)
        with model.statistics.request() as record:
            top_k, priority = _top_k(request, model), to_priority(request.priority)
            images = self._images(request, model)
            record.decoded()
            record.answer = yield Job(model.batcher, images, deadline, priority)
            return _respond(model, record.answer, top_k, record.decode_ns)

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


def _top_k(request: pb.ClassifyRequest, model: Model) -> int:
    classes = len(model.manifest.labels)
    if not 0 <= request.top_k <= classes:
        raise InvalidRequest(f"top_k is {request.top_k}, model {model.name!r} has 1 to {classes} classes to return")
    return request.top_k or min(DEFAULT_TOP_K, classes)


def _respond(model: Model, answer: Answer, top_k: int, decode_ns: int) -> pb.ClassifyResponse:
    # A stable sort of the negated values: equal probabilities come in the order of the classes.
    best = np.argsort(-answer.probabilities, axis=1, kind="stable")[:, :top_k]
    values = np.take_along_axis(answer.probabilities, best, axis=1)
    labels = model.manifest.labels
    return pb.ClassifyResponse(
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
