"""The server's own methods over HTTP: images as the body of a request, and the status.

curl --data-binary @cat.jpg 'localhost:8080/classify/digits?top_k=3'
"""

from __future__ import annotations

import msgspec

from protos import admin_pb2, classifier_pb2
from protos.record import to_record
from serving.errors import InvalidRequest
from serving.http.content import MULTIPART, split_parts
from serving.http.endpoint import FILE, RestMethod, RestRequest, RestResponse, to_json
from serving.http.schema import describe
from serving.protocols.inputs import to_number, to_version

MAX_PARTS = 65_536  # the limit of --max-images comes later


class ClassProbability(msgspec.Struct):
    """A class of an image."""

    label: str
    index: int
    probability: float


class ImageClasses(msgspec.Struct):
    """The most probable classes of an image, the most probable first."""

    classes: list[ClassProbability]


class RequestTimes(msgspec.Struct):
    """Where the time of a request went, in nanoseconds, and how many images were computed with it."""

    decode_ns: int
    queue_ns: int
    compute_ns: int
    batch_size: int


class ClassifyAnswer(msgspec.Struct):
    """What a version answers, an item for each image."""

    model: str
    version: int
    classifications: list[ImageClasses]
    timing: RequestTimes


def encode_classify(request: RestRequest) -> bytes:
    """Return the ClassifyRequest of a body that is an image file, or several as multipart."""
    query = request.read_query("version", "top_k", "priority")
    message = classifier_pb2.ClassifyRequest(
        model=request.parameters.get("name", ""),
        top_k=_to_number("top_k", query.get("top_k", "0")),
        priority=_to_number("priority", query.get("priority", "0")),
    )
    if version := query.get("version", ""):
        if number := to_version(version):
            message.version = min(number, 2**63 - 1)
        else:
            message.version_label = version
    kind = request.headers.get("content-type", "")
    if kind.lower().startswith(MULTIPART):
        images = split_parts(request.body, kind, MAX_PARTS)
    else:
        images = [request.body] if request.body else []
    message.encoded.images.extend(images)
    return message.SerializeToString()


def decode_classify(_: RestRequest, answer: bytes) -> RestResponse:
    """Return the JSON of a ClassifyResponse."""
    response = classifier_pb2.ClassifyResponse.FromString(answer)
    images = [
        ImageClasses([ClassProbability(one.label, one.index, one.probability) for one in image.classes])
        for image in response.classifications
    ]
    timing = response.timing
    times = RequestTimes(timing.decode_ns, timing.queue_ns, timing.compute_ns, timing.batch_size)
    return to_json(ClassifyAnswer(response.model, response.version, images, times))


def _to_number(name: str, text: str) -> int:
    if (number := to_number(text)) is None:
        raise InvalidRequest(f"{name} is a number, not {text!r}")
    return min(number, 2**31 - 1)  # the largest that the message holds


def _encode_status(request: RestRequest) -> bytes:
    return admin_pb2.GetStatusRequest(model=request.parameters.get("name", "")).SerializeToString()


def _decode_status(_: RestRequest, answer: bytes) -> RestResponse:
    return to_json(to_record(admin_pb2.GetStatusResponse.FromString(answer)))


TAG = "This server"
METHODS = (
    RestMethod(
        verb="POST",
        paths=("/classify/{name}", "/classify"),
        method="/resnet.v1.Classifier/Classify",
        encode=encode_classify,
        decode=decode_classify,
        tag=TAG,
        summary="Classify an image file, or several",
        request={"image/jpeg": FILE, "image/png": FILE, MULTIPART: {"type": "object", "additionalProperties": FILE}},
        response=ClassifyAnswer,
        query={
            "top_k": {"type": "integer", "description": "how many classes, the most probable first; 5 without it"},
            "version": {"type": "string", "description": "number or label of the version"},
            "priority": {"type": "integer", "description": "1 to 3, the first is served first; 2 without it"},
        },
        example="curl --data-binary @cat.jpg 'localhost:8080/classify/digits?top_k=3'",
    ),
    RestMethod(
        verb="GET",
        paths=("/status", "/status/{name}"),
        method="/resnet.v1.Admin/GetStatus",
        encode=_encode_status,
        decode=_decode_status,
        tag=TAG,
        summary="Models, versions, traffic, shadows and rollouts",
        response=describe(admin_pb2.GetStatusResponse),
    ),
)
