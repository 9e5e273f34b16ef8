"""The request path: unpack and check, submit to the batcher, answer."""

from __future__ import annotations

import logging
import time

import grpc
import numpy as np

from protos import classifier_pb2 as pb
from protos.classifier_pb2_grpc import ClassifierServicer
from serving.batcher import Answer
from serving.engine import Images
from serving.errors import InternalError, InvalidRequest, ServingError, to_trailers
from serving.models import Model, Models
from training.images import InvalidImage, decode

DEFAULT_TOP_K = 5

log = logging.getLogger(__name__)


class Servicer(ClassifierServicer):
    """Answers `resnet.v1.Classifier`."""

    def __init__(self, models: Models, max_images: int) -> None:
        """Serve `models`, to requests of at most `max_images` images."""
        self._models, self._max_images = models, max_images

    def Classify(self, request: pb.ClassifyRequest, context: grpc.ServicerContext) -> pb.ClassifyResponse:
        """Classify the images of one request."""
        try:
            return self._classify(request, context)
        except ServingError as error:
            refusal = error
        except Exception:
            log.exception("a request failed")
            refusal = InternalError("the server failed on this request; its log has the details")
        context.set_trailing_metadata(to_trailers(refusal))
        return context.abort(refusal.code, str(refusal))

    def _classify(self, request: pb.ClassifyRequest, context: grpc.ServicerContext) -> pb.ClassifyResponse:
        arrived = time.perf_counter_ns()
        remaining = context.time_remaining()
        deadline = float("inf") if remaining is None else time.monotonic() + remaining
        model = self._models.find(request.model, request.version)
        top_k = _top_k(request, model)
        images = self._images(request, model)
        decode_ns = time.perf_counter_ns() - arrived
        answer = model.batcher.submit(images, deadline, context.is_active)
        return _respond(model, answer, top_k, decode_ns)

    def _images(self, request: pb.ClassifyRequest, model: Model) -> Images:
        """Return the pixels that a request carries, uint8 [n, height, width, 3]."""
        match request.WhichOneof("input"):
            case "encoded":
                self._check_count(len(request.encoded.images))
                height, width, _ = model.image_shape
                return np.stack(
                    [_decode(data, index, (height, width)) for index, data in enumerate(request.encoded.images)]
                )
            case "tensor":
                return self._tensor(request.tensor, model)
            case _:
                raise InvalidRequest("the request holds no images: set `encoded` or `tensor`")

    def _tensor(self, tensor: pb.Tensor, model: Model) -> Images:
        if tensor.data_type != pb.DATA_TYPE_UINT8:
            raise InvalidRequest(f"the tensor's data_type is {tensor.data_type}, it must be DATA_TYPE_UINT8 (1)")
        shape = tuple(tensor.shape)
        if len(shape) != 4 or shape[1:] != model.image_shape:
            wanted = ", ".join(map(str, model.image_shape))
            raise InvalidRequest(f"the tensor's shape is {list(shape)}, model {model.name!r} takes [images, {wanted}]")
        self._check_count(shape[0])
        size = shape[0] * shape[1] * shape[2] * shape[3]
        if len(tensor.data) != size:
            raise InvalidRequest(
                f"the tensor's data has {len(tensor.data)} bytes, its shape {list(shape)} needs {size}"
            )
        return np.frombuffer(tensor.data, np.uint8).reshape(shape)

    def _check_count(self, count: int) -> None:
        if count < 1:
            raise InvalidRequest("the request holds no images")
        if count > self._max_images:
            raise InvalidRequest(
                f"the request holds {count} images, more than the {self._max_images} allowed; split it"
            )


def _decode(data: bytes, index: int, size: tuple[int, int]) -> Images:
    try:
        return decode(data, size)
    except InvalidImage as error:
        raise InvalidRequest(f"image {index} {error}", image=index) from None


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
