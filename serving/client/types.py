"""Inputs, options and answers of a client as plain values, with their conversion to and from messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from protos import classifier_pb2 as pb
from serving.errors import InternalError

ImageInput = bytes | NDArray[np.uint8]
"""A JPEG or PNG file; or pixels, uint8 [height, width, channels], of the model's input size."""

ImageInputs = Sequence[bytes] | NDArray[np.uint8]
"""JPEG or PNG files; or pixels, uint8 [n, height, width, channels], of the model's input size."""


MAX_INT32, MAX_INT64 = 2**31 - 1, 2**63 - 1

# Of one request; a server's defaults are 256 images and 64 MiB. What a server refuses is sent in parts.
REQUEST_IMAGES = 256
REQUEST_BYTES = 48 * 2**20


@dataclass(frozen=True)
class Class:
    """One class of an image: its name, its index in the model's output, its probability."""

    label: str
    index: int
    probability: float


@dataclass(frozen=True)
class Answer:
    """A server's answer for some images.

    The times are those of the request that carried the images. If there were several requests, each figure is the
    maximum over them: they ran in parallel, so that sums would exceed the wait.

    Attributes:
        model: Name of the model that answered.
        version: Version of that model.
        images: Classes of each image, the most probable first.
        decode_ns: Time to parse and decode the request, in nanoseconds.
        queue_ns: Time in the queue, in nanoseconds.
        compute_ns: Time to compute the batch, in nanoseconds.
        batch_size: Images in that batch, including those of other requests.
    """

    model: str
    version: int
    images: tuple[tuple[Class, ...], ...]
    decode_ns: int
    queue_ns: int
    compute_ns: int
    batch_size: int

    def split(self) -> list[Answer]:
        """Return one answer per image."""
        return [replace(self, images=(classes,)) for classes in self.images]

    @classmethod
    def join(cls, answers: Sequence[Answer]) -> Answer:
        """Merge answers by the same version of a model into one."""
        return cls(
            model=answers[0].model,
            version=answers[0].version,
            images=tuple(classes for answer in answers for classes in answer.images),
            decode_ns=max(answer.decode_ns for answer in answers),
            queue_ns=max(answer.queue_ns for answer in answers),
            compute_ns=max(answer.compute_ns for answer in answers),
            batch_size=max(answer.batch_size for answer in answers),
        )


@dataclass(frozen=True)
class ClassifyOptions:
    """Options that apply to every image.

    Attributes:
        top_k: Classes to return for each image; 0 returns 5. All if the model has fewer.
        model: Name of the model; may be empty if the server has only one.
        version: Version number, or a label; 0 is the server's default.

    Raises:
        ValueError: `top_k` or `version` are out of range.
    """

    top_k: int = 0
    model: str = ""
    version: int | str = 0

    def __post_init__(self) -> None:
        if not 0 <= self.top_k <= MAX_INT32:
            raise ValueError(f"top_k must be a number of classes, or 0, not {self.top_k}")
        if not isinstance(self.version, str) and not 0 <= self.version <= MAX_INT64:
            raise ValueError(f"version must be a version number from 1, a label, or 0, not {self.version}")

    def to_request(self, images: ImageInputs) -> pb.ClassifyRequest:
        """Return the request for some images.

        Raises:
            TypeError: Pixels are not uint8.
        """
        request = pb.ClassifyRequest(model=self.model, top_k=self.top_k)
        if isinstance(self.version, str):
            request.version_label = self.version
        else:
            request.version = self.version
        if not isinstance(images, np.ndarray):
            request.encoded.images.extend(images)
            return request
        if images.dtype != np.uint8:
            raise TypeError(f"pixels must be uint8 (0 to 255), not {images.dtype}")
        request.tensor.data_type = pb.DATA_TYPE_UINT8
        request.tensor.shape.extend(images.shape)
        request.tensor.data = images.tobytes()
        return request


def fits_one_request(images: ImageInputs) -> bool:
    """Return whether images are sent in one request at first.

    Raises:
        TypeError: They are not files or pixels.
    """
    if not isinstance(images, Sequence | np.ndarray) or isinstance(images, bytes | str):
        raise TypeError(f"images must be a list of files, or an array of pixels, not {type(images).__name__}")
    size = images.nbytes if isinstance(images, np.ndarray) else sum(map(count_bytes, images))
    return len(images) <= 1 or (len(images) <= REQUEST_IMAGES and size <= REQUEST_BYTES)


def count_bytes(image: ImageInput) -> int:
    """Return the size of an image as it is sent.

    Raises:
        TypeError: It is neither a file nor pixels.
    """
    if isinstance(image, bytes):
        return len(image)
    if isinstance(image, np.ndarray):
        return image.nbytes
    raise TypeError(f"an image is the bytes of a file, or an array of pixels, not {type(image).__name__}")


def to_answer(response: pb.ClassifyResponse, images: int) -> Answer:
    """Return a response as an answer.

    Args:
        response: The response.
        images: Images of the request.

    Raises:
        InternalError: It answers for another number of images, so that nobody knows whose an answer is.
    """
    if len(response.classifications) != images:
        raise InternalError(f"the server answered for {len(response.classifications)} images; the request has {images}")
    return Answer(
        model=response.model,
        version=response.version,
        images=tuple(
            tuple(Class(item.label, item.index, item.probability) for item in image.classes)
            for image in response.classifications
        ),
        decode_ns=response.timing.decode_ns,
        queue_ns=response.timing.queue_ns,
        compute_ns=response.timing.compute_ns,
        batch_size=response.timing.batch_size,
    )
